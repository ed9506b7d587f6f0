"""Where samples come from: indexed shards and streams of tars, how they are listed, indexed and read."""
