"""Measurements, one module a subject."""
