"""Rounds of sampling and training: one YAML, the tools' own commands as stages, and a report."""
