"""The mathematics: the model, its likelihoods and priors, the bound, and inference with it."""
