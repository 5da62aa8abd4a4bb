"""Hugging Face folders: shapes, names and bytes."""
