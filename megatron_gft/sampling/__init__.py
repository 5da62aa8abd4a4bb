"""Responses for groups: prompts, back ends, decoding."""
