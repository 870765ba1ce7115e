"""Log-likelihoods of counts with their gradients, and the product of sparse counts with a weight."""
