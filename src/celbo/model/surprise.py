"""How surprising the values of a cell are to the model that decodes them."""

import torch
from torch import Tensor

from celbo.minibatch import Minibatch
from celbo.model.vae import VAE, context_of

__all__ = ["surprise"]

_SMALLEST = 1e-9


def surprise(vae: VAE, cells: Minibatch, mu_z: Tensor) -> Tensor:
    r"""Compute how much worse the decoded profile explains a cell than cells that it draws, ``(cells,)``.

    For counts it is the cross entropy of the n counts of a cell and the decoded shares :math:`s_g`, compared with its
    mean and standard deviation over n multinomial draws:

    .. math::
        \frac{-\sum_g x_g \log s_g - n H}{\sqrt{n V}}, \quad H = -\sum_g s_g \log s_g, \quad
        V = \sum_g s_g \log^2 s_g - H^2

    For other values it is the mean over genes of ``log p(m) - log p(x)``, m the mean of p. Only measured genes count.
    It depends less on type and depth than log p(x) does.

    Parameters
    ----------
    vae
        The model.
    cells
        The cells; genes that they lack are filled in.
    mu_z
        Their positions, ``(cells, latent_dim)``.

    Examples
    --------
    >>> import celbo, numpy as np
    >>> from celbo.fit.cells import open_cells
    >>> adata = celbo.simulate_cells(n_cells=300, n_genes=50, seed=0)
    >>> model = celbo.ExpressionVAE(latent_dim=2, train=celbo.TrainConfig(max_epochs=20)).fit(adata)
    >>> cells = open_cells(model.fitted_, adata).source.take(np.arange(300))
    >>> with torch.no_grad():
    ...     usual = surprise(model.vae_, cells, model.vae_.encode(cells.x)[0])
    >>> bool(usual.mean() < 1)
    True
    """
    context, x, observed = context_of(vae, cells), cells.x.to_dense(), cells.observed
    if vae.values != "counts":
        p = vae.likelihood(mu_z, context=context, library=cells.library)
        lost = p.log_prob(p.mean) - p.log_prob(x)
        return lost.mean(-1) if observed is None else torch.where(observed, lost, 0).sum(-1) / observed.sum(-1)
    share = vae.decode(mu_z, context, torch.ones_like(cells.library)).clamp(min=_SMALLEST)
    if observed is not None:
        share, x = torch.where(observed, share, 0), torch.where(observed, x, 0)
    share = share / share.sum(-1, keepdim=True)
    log_share = share.clamp(min=_SMALLEST).log()
    n, weighted = x.sum(-1), share * log_share
    entropy = -weighted.sum(-1)
    variance = (weighted * log_share).sum(-1) - entropy.square()
    return (-(x * log_share).sum(-1) - n * entropy) / (n * variance).clamp(min=_SMALLEST).sqrt()
