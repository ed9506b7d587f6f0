"""Which samples are worth keeping: filters by size, length and language, duplicates, and leaks between splits."""
