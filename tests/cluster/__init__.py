"""A package, as `runtime` below it is one."""
