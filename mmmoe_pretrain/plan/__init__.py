"""What a layout will need, worked out without running it."""
