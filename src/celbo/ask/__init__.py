"""One module for each question put to a fitted model."""
