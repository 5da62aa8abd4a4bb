"""Group files to group shards: tokenize, check, write."""
