"""The engine core: it schedules steps and owns the state of every request. Imports no Ray."""
