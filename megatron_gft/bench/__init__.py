"""Measurements behind tools/bench.py, one module a subject."""
