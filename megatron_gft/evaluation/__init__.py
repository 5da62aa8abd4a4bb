"""Accuracy and log-probs of a model on problems with known answers."""
