"""Verifiers, the worker pool that runs them, scoring of group files."""
