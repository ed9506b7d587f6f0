"""Changes the experts of a trained model: from one checkpoint to another one of the same step."""
