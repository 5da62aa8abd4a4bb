"""Hugging Face checkpoints: configuration, weight mapping, conversion both ways, verification."""
