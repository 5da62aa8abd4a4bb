"""Hugging Face folders to Megatron checkpoints and back, offline, and the proof that both are equal."""
