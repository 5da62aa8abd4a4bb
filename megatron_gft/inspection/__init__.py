"""What is in group files and group shards, and how well it will pack."""
