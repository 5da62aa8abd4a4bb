"""Group records, their checks, and the making of shards."""
