"""The command lines: one module a tool, each with a ``main``."""
