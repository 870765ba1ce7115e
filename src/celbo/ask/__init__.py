"""One module for each question put to a fitted model; `celbo.ExpressionVAE` has a method for each."""
