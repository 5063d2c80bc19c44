"""A package, so that pytest ends its fixtures of that scope, an engine among them, after its last test."""
