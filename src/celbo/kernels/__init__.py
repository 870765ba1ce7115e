"""Log-likelihoods of counts, element by element, with their analytic gradients.

``reference.py`` is the definition, in plain torch, on any device that has float64. Faster tiers carry the same names
and signatures, and are tested against it.
"""

from celbo.kernels.reference import nb_log_prob, poisson_log_prob, zinb_log_prob

__all__ = ["nb_log_prob", "poisson_log_prob", "zinb_log_prob"]
