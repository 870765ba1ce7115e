"""A classifier of labels on z. It is trained together with the bound, on known labels, and calibrated afterwards."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

__all__ = ["Classifier", "calibrate", "label_loss"]

_WEIGHT = 50.0
"""Weight of a label relative to the counts: nats of the bound per nat of cross-entropy (as in scANVI)."""

_USUAL = 0.5
"""Standard deviation of the logarithm of a temperature, before any label is seen."""


class Classifier(nn.Module):
    """``p(y | z) = softmax((W z + b) / T)``; T is 1 until `calibrate` has seen held-out cells."""

    temperature: Tensor

    def __init__(self, latent_dim: int, n_labels: int):
        super().__init__()
        self.fc = nn.Linear(latent_dim, n_labels)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        """Compute log-probabilities of labels, ``(cells, labels)``, from z ``(cells, latent_dim)``."""
        return (self.fc(z) / self.temperature).log_softmax(-1)


def label_loss(classifier: Classifier, z: Tensor, labels: Tensor) -> Tensor:
    """``-50 mean log p(y | z)`` over the labelled cells of a minibatch; 0 where there are none.

    Parameters
    ----------
    classifier
        Of the model.
    z
        Sampled, ``(cells, latent_dim)``.
    labels
        ``(cells,)``; -1 for an unknown one.
    """
    is_known = labels >= 0
    if not is_known.any():
        return z.new_zeros(())
    return _WEIGHT * nn.functional.nll_loss(classifier(z[is_known]), labels[is_known].long())


@torch.no_grad()
def calibrate(classifier: Classifier, mu_z: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    """Set the temperature under which held-out labels are likeliest (Guo 2017, arXiv 1706.04599).

    Its logarithm is normal around 0 beforehand, so that few labels move it little, and none not at all.
    """
    is_known = labels >= 0
    logits = classifier.fc(torch.from_numpy(mu_z[is_known]).to(classifier.fc.weight.device)).double().cpu()
    truth = torch.from_numpy(labels[is_known]).long()

    def loss(log_temperature: float) -> float:
        surprise = nn.functional.cross_entropy(logits / math.exp(log_temperature), truth, reduction="sum")
        return float(surprise) + (log_temperature / _USUAL) ** 2 / 2

    minimum = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    classifier.temperature.fill_(math.exp(float(minimum.x)))
