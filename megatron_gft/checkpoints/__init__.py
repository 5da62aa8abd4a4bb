"""Megatron distributed checkpoints: written, found, loaded, read without Megatron."""
