"""Compute log-likelihoods of counts with their gradients, and products of sparse counts with a weight."""
