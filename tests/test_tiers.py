"""Every tier of kernels against the reference in float64, values and gradients."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import celbo
from celbo import kernels
from celbo.errors import UsageError
from celbo.kernels import reference
from celbo.minibatch import csr_tensor

TIERS = {"cpu": "numba"}
SHAPES = [(1, 1), (1, 7), (33, 2), (41, 1271), (130, 60)]
FUSED = ["softmax_nb", "softmax_zinb", "softmax_poisson"]


@pytest.fixture(params=TIERS)
def tier(request):
    pytest.importorskip(TIERS[request.param])
    kernels.use(request.param)
    yield request.param
    kernels.use("auto")


class Inputs(NamedTuple):
    """Logits and gates are the transposed weights of linear maps from one-hot cells: they pass through exactly."""

    logits: torch.Tensor
    bias: torch.Tensor
    log_library: torch.Tensor
    log_theta: torch.Tensor
    gates: torch.Tensor
    gate_bias: torch.Tensor


def take(name, inputs):
    """Arguments of a fused function after x and h."""
    n = {"softmax_poisson": 3, "softmax_nb": 4, "softmax_zinb": 6}[name]
    return inputs[:n]


def some_counts(n_cells, n_genes, seed=0):
    """Mostly zeros and small counts; with an empty row, a full one and one with counts to a million where it fits."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.3, 4.0, (n_cells, n_genes))).astype(np.float32)
    if n_cells > 3:
        x[0] = 0
        x[1] = 1 + np.arange(n_genes)
        x[2, :: max(1, n_genes // 5)] = 1e6
    return torch.from_numpy(x)


def some_inputs(x, by_cell=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    library = x.sum(1, keepdim=True).clamp(min=1e-8)
    log_theta = 3 * normal(*x.shape) if by_cell else 3 * normal(x.shape[1])
    n_cells, n_genes = x.shape
    return Inputs(
        2 * normal(n_genes, n_cells), torch.zeros(n_genes), library.log(), log_theta, 3 * normal(n_genes, n_cells),
        torch.zeros(n_genes),
    )  # fmt: skip


def run(module, name, x, inputs, weight, dtype):
    """Value of a fused function, and the gradient of its weighted sum in each input that it has."""
    leaves = [part.detach().clone().to(dtype).requires_grad_() for part in take(name, inputs)]
    h = torch.eye(len(x), dtype=dtype).requires_grad_()
    value = getattr(module, name)(x, h, *leaves)
    (value * weight.to(dtype)).sum().backward()
    return value.detach(), [leaf.grad for leaf in (*leaves, h)]


def to_csr(x):
    sparse = x.to_sparse_csr()
    return csr_tensor(sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values(), x.shape)


@pytest.mark.parametrize("weights", ["equal", "unequal"])
@pytest.mark.parametrize("by_cell", [False, True], ids=["theta-gene", "theta-cell"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_tier_equals_the_reference(tier, name, shape, by_cell, weights):
    x = some_counts(*shape)
    inputs = some_inputs(x, by_cell)
    weight = torch.full((len(x),), -0.25) if weights == "equal" else torch.linspace(-1, 2, len(x))
    truth, gradients = run(reference, name, x.double(), inputs, weight, torch.float64)
    for layout in (x, to_csr(x)):
        value, found = run(kernels, name, layout, inputs, weight, torch.float32)
        assert ((value - truth).abs() / truth.abs().clamp(min=1)).max() < 1e-5
        for part, expected, gradient in zip((*take(name, Inputs._fields), "h"), gradients, found, strict=True):
            by_cell_of = expected.t() if part in ("logits", "gates") else expected
            largest = by_cell_of.abs().amax(-1, keepdim=True)
            if part == "log_theta":
                largest = largest.clamp(min=1e-3)
            elif part not in ("logits", "gates"):  # sums of both signs, which nearly cancel
                largest = largest.clamp(min=1)
            error = (gradient.t() if part in ("logits", "gates") else gradient) - by_cell_of
            # An empty cell's gradients are 1e-8 at most, and cancel.
            assert (error.abs() <= 1e-5 * largest + 1e-12).all(), part


def test_counts_that_are_not_whole_and_stored_zeros_are_taken_as_they_are(tier):
    x = torch.tensor([[0.5, 0.0, 17.25], [0.0, 0.0, 3.0]])
    stored = csr_tensor(
        torch.tensor([0, 3, 5]), torch.tensor([0, 1, 2, 0, 2]), x[[0, 0, 0, 1, 1], [0, 1, 2, 0, 2]], x.shape
    )
    inputs = some_inputs(x)
    for name in FUSED:
        truth, gradients = run(reference, name, x.double(), inputs, torch.ones(2), torch.float64)
        value, found = run(kernels, name, stored, inputs, torch.ones(2), torch.float32)
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)
        for gradient, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_closed_gate_leaves_the_negative_binomial(tier):
    x = some_counts(20, 50)
    inputs = some_inputs(x)
    h, inputs = torch.eye(20), inputs._replace(gates=torch.full_like(inputs.gates, -1e8))
    shut = kernels.softmax_zinb(x, h, *inputs)
    torch.testing.assert_close(shut, kernels.softmax_nb(x, h, *take("softmax_nb", inputs)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_what_is_not_a_number_stays_so(tier, name):
    x, h = some_counts(5, 9), torch.eye(5)
    h[3, 3] = torch.nan
    weight, *others = take(name, some_inputs(x))
    value = getattr(kernels, name)(x, h, weight.requires_grad_(), *others)
    value.sum().backward()
    assert value.isnan().tolist() == [False, False, False, True, False]
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("name", FUSED)
def test_threads_share_the_work(tier, name):
    counts = some_counts(300, 60)
    inputs, results = some_inputs(counts), []
    for n_threads in (1, 2, 2, 3):
        with kernels.threads(n_threads):
            value, gradients = run(kernels, name, to_csr(counts), inputs, torch.ones(300), torch.float32)
        results.append([value, *gradients])
    alone, two, again, three = results
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    for a, b, c in zip(alone, two, three, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("units", [1, 5, 128])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sparse_product_equals_the_dense_one(tier, shape, density, units):
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(shape, generator=generator) < density
    x = torch.rand(shape, generator=generator) * kept
    weight = torch.randn(units, shape[1] + 2, generator=generator)[:, : shape[1]].requires_grad_()
    grad = torch.randn(shape[0], units, generator=generator)
    out = kernels.sparse_linear(to_csr(x), weight)
    (gradient,) = torch.autograd.grad(out, weight, grad)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, grad.t() @ x, rtol=1e-5, atol=1e-5)


def test_float64_is_the_references(tier):
    x = some_counts(4, 6).double()
    inputs = take("softmax_nb", [part.double() for part in some_inputs(x.float())])
    h = torch.eye(4, dtype=torch.float64)
    assert torch.equal(kernels.softmax_nb(x, h, *inputs), reference.softmax_nb(x, h, *inputs))


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_a_model_has_the_same_bound_and_gradients_under_every_tier(tier, likelihood):
    x = to_csr(some_counts(64, 80).clamp(max=50))
    torch.manual_seed(0)
    vae = celbo.VAE(80, 3, [16], likelihood=celbo.LIKELIHOODS[likelihood], context_dim=2, dropout=0.0)
    noise = celbo.vae.draw_noise(vae, 64, torch.Generator().manual_seed(0))
    context, library = torch.eye(2)[torch.arange(64) % 2], x.to_dense().sum(1, keepdim=True)
    found = {}
    for name in ("reference", tier):
        kernels.use(name)
        terms = celbo.elbo_terms(vae, x, context, library, noise)
        gradients = torch.autograd.grad(terms.elbo.mean(), list(vae.parameters()))
        found[name] = [terms.reconstruction, terms.kl, *gradients]
    for ours, expected in zip(found[tier], found["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.detach().abs().max().item())


def test_an_unknown_tier_is_refused():
    with pytest.raises(UsageError, match="choose one of auto, reference, cpu, gpu"):
        kernels.use("fast")


def test_without_numba_the_reference_serves(monkeypatch):
    monkeypatch.setattr(kernels, "_is_there", lambda library: False)
    assert kernels._tier(torch.zeros(1)) is reference
    with pytest.raises(UsageError, match="pip install numba"):
        kernels.use("cpu")
