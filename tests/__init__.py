"""A package, as `deploy/openai` below it is one."""
