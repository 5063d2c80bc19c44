"""The engine as callers see it, and what decides what runs next. Imports no torch."""
