"""Which sample stands at each global position, and which data-parallel rank serves it."""
