"""Whether a model, or the cells it draws, can be believed."""
