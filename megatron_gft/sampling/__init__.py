"""Responses for groups: prompts, back ends, decoding, and the journal that survives a kill."""
