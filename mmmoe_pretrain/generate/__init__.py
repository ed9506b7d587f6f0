"""Generation of a value token by token, after the items of a sample that a task predicts it from."""
