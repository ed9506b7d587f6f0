"""Rows become shards: media are decoded, checked and written, one shard at a time."""
