"""Memory and time of a run, predicted without a GPU."""
