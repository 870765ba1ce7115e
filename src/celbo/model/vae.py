"""The variational autoencoder: encoder, reparameterisation, decoder, likelihood head."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from celbo.errors import UsageError
from celbo.kernels.dispatch import sparse_linear
from celbo.minibatch import Minibatch, csr_tensor
from celbo.model.classifier import Classifier
from celbo.model.likelihoods import DISPERSIONS, LIKELIHOODS, Likelihood
from celbo.model.priors import PRIORS, Components, VampPrior, make_prior

__all__ = ["NORMS", "VAE", "Noise", "NormMu", "context_of", "draw_noise", "mlp", "reparameterize"]

NORMS = {"none": None, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
"""Norms of a hidden layer, by name."""


class VAE(nn.Module):
    r"""A variational autoencoder; it is conditional if ``context_dim`` is above 0.

    The model is ``z ~ N(0, I)``, ``x ~ p(x | z, c)``; the encoder gives ``q(z | x, c) = N(mu_z, exp(logvar_z))``
    (Kingma & Welling 2014, arXiv 1312.6114; with conditions, Sohn 2015). By default it is the textbook's: stacks of
    Linear, ReLU and Dropout, a Gaussian likelihood whose mean is the decoder's linear output.

    Parameters
    ----------
    input_dim
        Number of genes.
    latent_dim
        Width of z.
    hidden_dims
        Widths of the encoder's hidden layers; the decoder has them in reverse. Empty for linear maps.
    likelihood
        A row of `celbo.LIKELIHOODS`; None for the Gaussian.
    dispersion
        What theta of a negative binomial depends on: "gene", "gene-condition" or "gene-cell".
    context_dim
        Width of the encoded conditions.
    encode_context
        Whether the encoder sees the conditions too; the decoder always does.
    skip
        Give z and the context to every hidden layer of the decoder (Dieng 2019), not only to its first; needs two.
    norm
        Normalisation of hidden layers: "none", "layer" or "batch".
    dropout
        Share of hidden units zeroed in training.
    decoder_dims
        Widths of the decoder's hidden layers; None for the encoder's in reverse, empty for a linear decoder.
    decoder_dropout
        Dropout of the decoder; None for that of the encoder.
    context_skip
        Give the context alone to every hidden layer of the decoder; needs two.
    norm_mu
        Normalise mu_z over the minibatch; see `NormMu`.
    prior
        p(z | c): a name in `celbo.model.priors.PRIORS`, with a number of components after a colon where it has some.
    embedded
        Columns of the context that become ``embedding_dim`` learned numbers before anything sees them: those of a
        condition of many levels.
    interactions
        Pairs of conditions, each as its columns of the context, whose combinations have ``embedding_dim`` learned
        numbers of their own: what a combination does beyond its parts. Of one that was never seen they stay 0.
    embedding_dim
        Width of what is learned of each.
    n_labels
        Labels that a classifier on z tells apart; 0 for none.

    Examples
    --------
    >>> import torch, celbo
    >>> vae = celbo.VAE(input_dim=50, latent_dim=8, hidden_dims=[64, 32])
    >>> x_recon, mu_z, logvar_z = vae(torch.randn(5, 50))
    >>> x_recon.shape, mu_z.shape, logvar_z.shape
    (torch.Size([5, 50]), torch.Size([5, 8]), torch.Size([5, 8]))

    Counts, with a batch of two levels:

    >>> vae = celbo.VAE(50, 8, [64], likelihood=celbo.LIKELIHOODS["nb"], context_dim=2)
    >>> p = vae.likelihood(torch.randn(5, 8), context=torch.eye(2)[[0, 0, 1, 1, 1]], library=torch.full((5, 1), 1e3))
    >>> p.mean.sum(1).round()
    tensor([1000., 1000., 1000., 1000., 1000.], ...)
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int,
        hidden_dims: Sequence[int],
        *,
        likelihood: Likelihood | None = None,
        dispersion: str = "gene",
        context_dim: int = 0,
        encode_context: bool = True,
        skip: bool = False,
        norm: str = "none",
        dropout: float = 0.2,
        decoder_dims: Sequence[int] | None = None,
        decoder_dropout: float | None = None,
        context_skip: bool = False,
        norm_mu: bool = False,
        prior: str = "normal",
        embedded: Sequence[slice] = (),
        interactions: Sequence[tuple[slice, slice]] = (),
        embedding_dim: int = 10,
        n_labels: int = 0,
    ):
        super().__init__()
        likelihood = LIKELIHOODS["gaussian"] if likelihood is None else likelihood
        _check_widths(input_dim=[input_dim], latent_dim=[latent_dim], hidden_dims=hidden_dims)
        decoder_dims = hidden_dims[::-1] if decoder_dims is None else decoder_dims
        _check_widths(decoder_dims=decoder_dims)
        _check_options(likelihood, dispersion, context_dim, norm)
        for name, share in {"dropout": dropout, "decoder_dropout": decoder_dropout or 0.0}.items():
            if not isinstance(share, int | float | np.number) or not 0 <= share < 1:
                raise UsageError(f"{name} is {share}; it is the share of hidden units zeroed, from 0 to below 1")
        if (skip or context_skip) and len(decoder_dims) < 2:
            raise UsageError(
                f"{'skip' if skip else 'context_skip'}=True joins something to the decoder's layers after its first, "
                f"and it has {len(decoder_dims)} hidden layers; give hidden_dims at least two widths, or leave it out"
            )
        if not isinstance(prior, str):
            raise UsageError(f"prior={prior!r}; give the name of a prior: {', '.join(PRIORS)}")
        if prior.startswith("vamp") and (norm == "batch" or norm_mu):
            raise UsageError("prior='vamp' sends pseudo-cells through the encoder, which batch norms do not allow")
        self.values = likelihood.values
        self.input_dim = input_dim
        self.latent_dim = latent_dim
        self.context_dim = context_dim
        self.encode_context = encode_context
        self.skip = skip
        self.context_skip = context_skip
        self.embed_context = None
        if embedded or interactions:
            self.embed_context = ContextEmbedding(context_dim, embedded, interactions, embedding_dim)
        context_dim = context_dim if self.embed_context is None else self.embed_context.out_dim

        seen_dim = input_dim + (context_dim if encode_context else 0)
        self.encoder, width = mlp(seen_dim, hidden_dims, norm=norm, dropout=dropout)
        self.fc_mu = nn.Linear(width, latent_dim)
        self.fc_logvar = nn.Linear(width, latent_dim)
        self.norm_mu = NormMu(latent_dim) if norm_mu else None

        code_dim = latent_dim + context_dim
        self.decoder, width = mlp(
            code_dim,
            decoder_dims,
            norm=norm,
            dropout=dropout if decoder_dropout is None else decoder_dropout,
            extra_dim=code_dim if skip else context_dim if context_skip else 0,
        )
        self.fc_out = nn.Linear(width, input_dim)
        self.head = likelihood.make_head(input_dim, width, context_dim, dispersion)
        self.prior = make_prior(prior, latent_dim, context_dim, hidden_dims[0] if len(hidden_dims) else 0)
        self.classifier = Classifier(latent_dim, n_labels) if n_labels else None

    def encode(
        self, x: Tensor, context: Tensor | None = None, *, masks: Iterable[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the approximate posterior q(z | x, c).

        Parameters
        ----------
        x
            Values as they are stored (counts are not log-transformed beforehand), ``(cells, genes)``, dense or CSR.
        context
            ``(cells, context_dim)``, where the model has one.
        masks
            Dropout masks to use instead of drawing new ones, one per hidden layer; see `draw_noise`.

        Returns
        -------
        tuple
            ``mu_z`` and ``logvar_z``, each ``(cells, latent_dim)``.
        """
        context = self._of_levels(context)
        seen = None if context is None or not self.encode_context else context
        if x.layout == torch.sparse_csr and len(self.encoder):
            first, *others = self.encoder
            h = _first_layer(first, self.head.encoder_input(x.values()), x, seen)
            return self._posterior_of(_run(others, h, masks=masks))
        h = self.head.encoder_input(x.to_dense())
        if not len(self.encoder):
            return self._posterior_of(h, seen)
        return self._posterior_of(_run(self.encoder, h, context=seen, masks=masks))

    def prior_components(self, z: Tensor, context: Tensor | None = None) -> Components:
        """Return the components of p(z | c) for the cells of z, ``(cells, latent_dim)``; see `celbo.model.priors`."""

        def encode(first: Tensor) -> tuple[Tensor, Tensor]:
            return self._posterior_of(_run(list(self.encoder)[1:], first, masks=itertools.repeat(first.new_ones(()))))

        components: Components = self.prior(z, self._of_levels(context), encode)
        return components

    @property
    def prior_size(self) -> int:
        """Number of cells that `start_prior` needs."""
        return len(self.prior.pseudo_cells) if isinstance(self.prior, VampPrior) else 0

    @torch.no_grad()
    def start_prior(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start the pseudo-cells of a `celbo.model.priors.VampPrior` at these cells; x, context as in `encode`."""
        if isinstance(self.prior, VampPrior):
            seen = self._of_levels(context) if self.encode_context else None
            cells = _linear(self.encoder[0], self.head.encoder_input(x.to_dense()), seen)
            size = self.prior_size
            self.prior.pseudo_cells.copy_(cells[torch.arange(size, device=cells.device) % len(cells)])

    def _posterior_of(self, h: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mu_z = _linear(self.fc_mu, h, seen)
        return mu_z if self.norm_mu is None else self.norm_mu(mu_z), _linear(self.fc_logvar, h, seen)

    def reparameterize(self, mu_z: Tensor, logvar_z: Tensor, eps: Tensor | None = None) -> Tensor:
        """Sample z from q(z | x); see `celbo.model.vae.reparameterize`."""
        return reparameterize(mu_z, logvar_z, eps)

    def likelihood(
        self,
        z: Tensor,
        *,
        context: Tensor | None = None,
        library: Tensor | None = None,
        masks: Iterable[Tensor] | None = None,
    ) -> Distribution:
        """Return the distribution of values given the latent, p(x | z, c).

        Parameters
        ----------
        z
            ``(cells, latent_dim)``.
        context
            ``(cells, context_dim)``, where the model has one.
        library
            Library size on the linear scale, ``(cells, 1)``: the expected sum of counts over the modelled genes.
            Without it, the mean of a count likelihood is the expression shares, which sum to 1 (zero-inflated ones to
            less, by the zeros the gate adds).
        masks
            Dropout masks to use instead of drawing new ones, one per hidden layer; see `draw_noise`.

        Returns
        -------
        torch.distributions.Distribution
            Over ``(cells, genes)``.
        """
        context = self._of_levels(context)
        if library is not None and library.shape != (*z.shape[:-1], 1):
            raise UsageError(f"library has shape {tuple(library.shape)}; pass one number per cell, (cells, 1)")
        if not len(self.decoder):
            h = z if context is None else torch.cat([z, context], dim=-1)
        else:
            extra = z if self.skip else None
            again = self.skip or self.context_skip
            h = _run(self.decoder, z, context=context, context_again=again, extra=extra, masks=masks)
        return self.head(h, self.fc_out, context, library)

    def decode(self, z: Tensor, context: Tensor | None = None, library: Tensor | None = None) -> Tensor:
        """Compute the mean of p(x | z, c), ``(cells, genes)``; parameters as in `likelihood`."""
        mean: Tensor = self.likelihood(z, context=context, library=library).mean
        return mean

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, sample and decode with x's own library size: ``x_recon, mu_z, logvar_z``."""
        x = x.to_dense()
        mu_z, logvar_z = self.encode(x, context)
        z = self.reparameterize(mu_z, logvar_z)
        return self.decode(z, context, x.sum(-1, keepdim=True)), mu_z, logvar_z

    def _of_levels(self, context: Tensor | None) -> Tensor | None:
        """Return the context as the layers take it; raise an error if it does not have the expected width."""
        width = 0 if context is None else context.shape[-1]
        if width != self.context_dim:
            raise UsageError(
                f"the model was made with context_dim={self.context_dim}, and was given a context of width {width}; "
                "pass context=(cells, context_dim), as schema_.encode(obs) makes it"
            )
        if context is None or self.embed_context is None:
            return context
        embedded: Tensor = self.embed_context(context)
        return embedded


class ContextEmbedding(nn.Module):
    r"""``c -> c W`` for the columns of a condition of many levels, W learned, ``(levels, out)``; others pass.

    Of a one-hot level that is a row of W; of several levels in parts, what lies between theirs. For an interaction of
    conditions a and b, ``sum_ij a_i b_j V_ij`` comes behind, V ``(levels, levels, out)``, 0 at first.
    """

    def __init__(
        self, context_dim: int, embedded: Sequence[slice], interactions: Sequence[tuple[slice, slice]], dim: int
    ):
        super().__init__()
        self.embedded, self.interactions = tuple(embedded), tuple(interactions)
        self.dim = dim
        self.levels = nn.ParameterList(torch.randn(columns.stop - columns.start, dim) for columns in embedded)
        self.combinations = nn.ParameterList(
            torch.zeros(a.stop - a.start, b.stop - b.start, dim) for a, b in interactions
        )
        taken = {column for columns in embedded for column in range(columns.start, columns.stop)}
        self.passing = [column for column in range(context_dim) if column not in taken]
        self.out_dim = len(self.passing) + dim * (len(self.levels) + len(self.combinations))

    def forward(self, context: Tensor) -> Tensor:
        """``(cells, context_dim)`` to ``(cells, out_dim)``: what passes first, then the learned numbers."""
        learned = [context[:, columns] @ weight for columns, weight in zip(self.embedded, self.levels, strict=True)]
        for (a, b), weight in zip(self.interactions, self.combinations, strict=True):
            pairs = context[:, a, None] * context[:, None, b]
            learned.append(pairs.flatten(1) @ weight.flatten(0, 1))
        return torch.cat([context[:, self.passing], *learned], dim=-1)


class NormMu(nn.Module):
    r"""``mu_z -> gamma (mu_z - mean) / sd + beta`` over the minibatch, gamma fixed at .6, beta learned, per dimension.

    No dimension can then fall silent: its KL, averaged over cells, is at least ``gamma**2 / 2`` (Zhu 2020, arXiv
    2004.12585). After training, mean and sd are those of the training cells.
    """

    gamma = 0.6

    def __init__(self, latent_dim: int):
        super().__init__()
        self.standardise = nn.BatchNorm1d(latent_dim, affine=False)
        self.beta = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, mu_z: Tensor) -> Tensor:
        """``(cells, latent_dim)`` to the same shape."""
        return self.gamma * self.standardise(mu_z) + self.beta


def reparameterize(mu_z: Tensor, logvar_z: Tensor, eps: Tensor | None = None) -> Tensor:
    """``z = mu_z + exp(logvar_z / 2) * eps`` with ``eps ~ N(0, I)``, so that gradients pass through the sampling.

    Parameters
    ----------
    mu_z, logvar_z
        ``(cells, latent_dim)``.
    eps
        Noise to use, of the same shape; drawn from torch's global generator if None.

    Returns
    -------
    Tensor
        z, ``(cells, latent_dim)``.

    Examples
    --------
    >>> import torch
    >>> reparameterize(torch.zeros(1, 2), torch.log(torch.tensor([[4.0, 9.0]])), eps=torch.ones(1, 2))
    tensor([[2., 3.]])
    """
    std = torch.exp(0.5 * logvar_z)
    eps = torch.randn_like(std) if eps is None else eps
    return mu_z + eps * std


def context_of(vae: VAE, minibatch: Minibatch) -> Tensor | None:
    """Return the context of a minibatch as the model takes it: None if the model has no conditions."""
    return minibatch.context if vae.context_dim else None


def mlp(
    input_dim: int, hidden_dims: Sequence[int], *, norm: str = "none", dropout: float = 0.2, extra_dim: int = 0
) -> tuple[nn.Sequential, int]:
    """Stack Linear, norm (if any), ReLU and Dropout for each width.

    Parameters
    ----------
    input_dim
        Width of the input.
    hidden_dims
        Widths of the layers.
    norm, dropout
        As in `VAE`.
    extra_dim
        Width of what is joined to the input of every Linear after the first (skip connections).

    Returns
    -------
    tuple
        The stack, and the width of its output.

    Examples
    --------
    >>> mlp(50, [64])
    (Sequential(
      (0): Linear(in_features=50, out_features=64, bias=True)
      (1): ReLU()
      (2): Dropout(p=0.2, inplace=False)
    ), 64)
    """
    layers: list[nn.Module] = []
    width = input_dim
    make_norm = NORMS[norm]
    for hidden_dim in hidden_dims:
        layers.append(nn.Linear(width + (extra_dim if layers else 0), hidden_dim))
        if make_norm is not None:
            layers.append(make_norm(hidden_dim))
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        width = hidden_dim
    return nn.Sequential(*layers), width


class Noise(NamedTuple):
    """All random numbers of one training step; the step is a function of them."""

    eps: Tensor
    """Standard normal, ``(cells, latent_dim)``."""
    encoder: list[Tensor] | None
    """Dropout masks of the encoder's hidden layers, ``(cells, width)``: 0, or 1 / (1 - dropout); None to draw them."""
    decoder: list[Tensor] | None
    """Dropout masks of the decoder's hidden layers."""


def draw_noise(vae: VAE, n_cells: int, generator: Generator, device: torch.device | str = "cpu") -> Noise:
    """Draw a step's noise and dropout masks on the CPU, the same for every device and number of processes.

    Parameters
    ----------
    vae
        The model, for its widths and dropout.
    n_cells
        Cells in the whole minibatch.
    generator
        Where the randomness comes from.
    device
        Where the noise is needed.

    Returns
    -------
    Noise
    """

    def masks(layers: nn.Sequential) -> list[Tensor]:
        widths = (layer.out_features for layer in layers if isinstance(layer, nn.Linear))
        keeps = (1 - layer.p for layer in layers if isinstance(layer, nn.Dropout))
        return [
            torch.rand(n_cells, width, generator=generator).lt(keep).to(device) / keep
            for width, keep in zip(widths, keeps, strict=True)
        ]

    eps = torch.randn(n_cells, vae.latent_dim, generator=generator).to(device)
    return Noise(eps, masks(vae.encoder), masks(vae.decoder))


def _first_layer(linear: nn.Module, values: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
    """Apply the encoder's first layer to sparse x with other values; zeros are never multiplied."""
    assert isinstance(linear, nn.Linear)
    scaled = csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape)
    n_genes = x.shape[-1]
    if context is None:
        return sparse_linear(scaled, linear.weight) + linear.bias
    of_genes, of_context = linear.weight[:, :n_genes], linear.weight[:, n_genes:]
    return sparse_linear(scaled, of_genes) + context @ of_context.t() + linear.bias


def _linear(linear: nn.Module, h: Tensor, context: Tensor | None) -> Tensor:
    """``[h, context] W' + b``, the context by itself: further levels then change no sum of the others by a bit."""
    assert isinstance(linear, nn.Linear)
    if context is None:
        return nn.functional.linear(h, linear.weight, linear.bias)
    width = h.shape[-1]
    return nn.functional.linear(h, linear.weight[:, :width], linear.bias) + context @ linear.weight[:, width:].t()


def _run(
    layers: Iterable[nn.Module],
    h: Tensor,
    *,
    context: Tensor | None = None,
    context_again: bool = False,
    extra: Tensor | None = None,
    masks: Iterable[Tensor] | None = None,
) -> Tensor:
    """Apply a stack of `mlp`; ``masks`` replace Dropout.

    The context joins the input of the first Linear, with ``context_again`` of every other too, as ``extra`` does.
    """
    remaining: Iterator[Tensor] | None = None if masks is None else iter(masks)
    for position, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            joined = h if position == 0 or extra is None else torch.cat([h, extra], dim=-1)
            h = _linear(layer, joined, context if position == 0 or context_again else None)
        else:
            h = h * next(remaining) if remaining is not None and isinstance(layer, nn.Dropout) else layer(h)
    return h


def _check_widths(**widths: Sequence[int]) -> None:
    for name, values in widths.items():
        if not isinstance(values, list | tuple | np.ndarray):
            raise UsageError(f"{name} is {values!r}; give a list of widths")
        if bad := [width for width in values if not isinstance(width, int | np.integer) or width < 1]:
            raise UsageError(f"{name} has {bad[0]!r}; a width is a whole number of at least 1")


def _check_options(likelihood: Likelihood, dispersion: str, context_dim: int, norm: str) -> None:
    if not isinstance(likelihood, Likelihood):
        raise UsageError(
            f"likelihood is {likelihood!r}; pass a row of the table, e.g. celbo.LIKELIHOODS['nb'] "
            f"(there are {', '.join(LIKELIHOODS)})"
        )
    if dispersion not in DISPERSIONS:
        raise UsageError(f"dispersion is {dispersion!r}; choose one of {', '.join(DISPERSIONS)}")
    if dispersion not in likelihood.dispersions:
        able = ", ".join(row.name for row in LIKELIHOODS.values() if dispersion in row.dispersions)
        raise UsageError(f"dispersion={dispersion!r} is for the likelihoods {able}, not {likelihood.name!r}")
    if not isinstance(context_dim, int | np.integer) or context_dim < 0:
        raise UsageError(f"context_dim is {context_dim!r}; it is a whole number, 0 for no conditions")
    if dispersion == "gene-condition" and context_dim == 0:
        raise UsageError("dispersion='gene-condition' needs a condition to depend on; name one, or use 'gene'")
    if norm not in NORMS:
        raise UsageError(f"norm is {norm!r}; choose one of {', '.join(NORMS)}")
