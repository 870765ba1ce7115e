"""Every tier of kernels against the reference in float64, values and gradients."""

import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

import celbo
from celbo.errors import UsageError
from celbo.kernels import dispatch as kernels
from celbo.kernels import reference
from celbo.kernels.reference import DecodedCounts
from celbo.kernels.threads import threads
from celbo.minibatch import Minibatch, csr_tensor

TIERS = {"cpu": "numba", "gpu": "triton"}
CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the latter Triton's kernels are interpreted
SHAPES = [(1, 1), (1, 7), (33, 2), (41, 1271), (130, 60)]
FUSED = ["nb", "zinb", "poisson"]


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
    n = {"poisson": 3, "nb": 4, "zinb": 6}[name]
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
    device = where(module)
    leaves = [part.detach().clone().to(device, dtype).requires_grad_() for part in take(name, inputs)]
    h = torch.eye(len(x), dtype=dtype, device=device).requires_grad_()
    value = module.decoded_log_prob(DecodedCounts(x.to(device), h, *leaves))
    (value * weight.to(device, dtype)).sum().backward()
    return value.detach().cpu(), [leaf.grad.cpu() for leaf in (*leaves, h)]


def where(module):
    """The device that a module of kernels computes on here."""
    return CUDA if module is kernels and kernels._forced == "gpu" else torch.device("cpu")


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
    inputs = inputs._replace(gates=torch.full_like(inputs.gates, -1e8))
    shut, _ = run(kernels, "zinb", x, inputs, torch.ones(20), torch.float32)
    expected, _ = run(kernels, "nb", x, inputs, torch.ones(20), torch.float32)
    torch.testing.assert_close(shut, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_what_is_not_a_number_stays_so(tier, name):
    device, x = where(kernels), some_counts(5, 9)
    h = torch.eye(5, device=device)
    h[3, 3] = torch.nan
    weight, *others = (part.to(device) for part in take(name, some_inputs(x)))
    value = kernels.decoded_log_prob(DecodedCounts(x.to(device), h, weight.requires_grad_(), *others))
    value.sum().backward()
    assert value.isnan().tolist() == [False, False, False, True, False]
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("name", FUSED)
def test_threads_share_the_work(tier, name):
    counts = some_counts(300, 60)
    inputs, results = some_inputs(counts), []
    for n_threads in (1, 2, 2, 3):
        with threads(n_threads):
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
    weight = torch.randn(units, shape[1] + 2, generator=generator)[:, : shape[1]]
    grad = torch.randn(shape[0], units, generator=generator)
    device = where(kernels)
    leaf = weight.to(device).requires_grad_()
    out = kernels.sparse_linear(to_csr(x).to(device), leaf)
    (gradient,) = torch.autograd.grad(out, leaf, grad.to(device))
    torch.testing.assert_close(out.cpu(), x @ weight.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.cpu(), grad.t() @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 1000, 300_001])
def test_adam_is_torchs_in_float64(tier, n):
    """Gradients of all sizes, a factor, an average; from 200,000 numbers on threads share the work."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator)
    weights, state = start.clone(), reference.AdamState.of(start)
    exact = torch.nn.Parameter(start.double())
    optimizer, average = torch.optim.Adam([exact], lr=0.01), start.double()
    with threads(2):
        for step in range(1, 9):
            gradient = torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)
            kernels.adam(weights, gradient, state, factor=0.5, rate=0.01, step=step, share=9 / (step + 8))
            exact.grad = 0.5 * gradient.double()
            optimizer.step()
            average.lerp_(exact.detach(), 9 / (step + 8))
    torch.testing.assert_close(weights.double(), exact.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(state.average.double(), average, rtol=0, atol=2e-6)


def test_adam_leaves_numbers_without_a_gradient_alone(tier):
    n = 1000
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
    before, state = weights.clone(), reference.AdamState.of(weights)
    gradient = torch.zeros(n)
    gradient[::2] = 1
    for step in (1, 2):
        kernels.adam(weights, gradient, state, factor=1.0, rate=0.1, step=step, share=0.5)
    assert torch.equal(weights[1::2], before[1::2])
    torch.testing.assert_close(weights[::2], before[::2] - 0.2)


def test_float64_is_the_references(tier):
    x = some_counts(4, 6).double()
    inputs = take("nb", [part.double() for part in some_inputs(x.float())])
    counts = DecodedCounts(x, torch.eye(4, dtype=torch.float64), *inputs)
    assert torch.equal(kernels.decoded_log_prob(counts), reference.decoded_log_prob(counts))


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_a_model_has_the_same_bound_and_gradients_under_every_tier(tier, likelihood):
    x = to_csr(some_counts(64, 80).clamp(max=50))
    torch.manual_seed(0)
    vae = celbo.VAE(80, 3, [16], likelihood=celbo.LIKELIHOODS[likelihood], context_dim=2, dropout=0.0)
    context, library = torch.eye(2)[torch.arange(64) % 2], x.to_dense().sum(1, keepdim=True)
    found = {}
    for name in ("reference", tier):
        kernels.use(name)
        device = where(kernels)
        vae.to(device)
        minibatch = Minibatch(x, context, library).to(device)
        noise = celbo.model.vae.draw_noise(vae, 64, torch.Generator().manual_seed(0), device)
        terms = celbo.elbo_terms(vae, *minibatch[:3], noise)
        gradients = torch.autograd.grad(terms.elbo.mean(), list(vae.parameters()))
        found[name] = [part.cpu() for part in (terms.reconstruction, terms.kl, *gradients)]
    for ours, expected in zip(found[tier], found["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.detach().abs().max().item())


def test_an_unknown_tier_is_refused():
    with pytest.raises(UsageError, match="choose one of auto, reference, cpu, gpu"):
        kernels.use("fast")


@pytest.mark.parametrize("name", FUSED)
def test_blocks_of_genes_and_cells_join_without_a_seam(name, monkeypatch):
    pytest.importorskip("triton")
    from celbo.kernels import gpu

    x = some_counts(5, 40)
    inputs, results = some_inputs(x), []
    kernels.use("gpu")
    for block, most_genes in ((512, 64), (32, 16), (32, 32)):
        monkeypatch.setattr(gpu, "_BLOCK", block)
        monkeypatch.setattr(gpu, "_MOST_GENES", most_genes)
        value, gradients = run(kernels, name, x, inputs, torch.linspace(-1, 2, 5), torch.float32)
        results.append([value, *gradients])
    kernels.use("auto")
    for whole, *parts in zip(*results, strict=True):
        for part in parts:
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def without_interpreter(code, folder):
    """What a Python prints that has triton, but not its interpreter; what it compiles goes to the folder."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_gpu_kernels_refuse_tensors_that_are_not_there(tmp_path):
    found = without_interpreter(
        "import torch\n"
        "from celbo.kernels import dispatch as kernels\n"
        "from celbo.kernels.reference import DecodedCounts\n"
        "kernels.use('gpu')\n"
        "kernels.decoded_log_prob(DecodedCounts(*[torch.zeros(1, 1)] * 3, torch.zeros(1), torch.zeros(1, 1)))",
        tmp_path,
    )
    assert "UsageError: the gpu kernels take tensors on a CUDA device, these are on cpu" in found.stderr


@pytest.mark.parametrize("capability", [pytest.param(75, marks=pytest.mark.long), 90])
def test_the_gpu_kernels_can_be_compiled_where_there_is_no_gpu(capability, tmp_path):
    found = without_interpreter(
        "import triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from celbo.kernels import blocks\n"
        "for kernel in (blocks.poisson, blocks.nb):\n"
        "    names = kernel.arg_names\n"
        "    types = {name: '*fp32' if name.endswith('_at') else 'i32' for name in names}\n"
        "    constants = {'WANT': True, 'INFLATED': True, 'CELLS': 1, 'GENES': 512}\n"
        "    constants = {name: value for name, value in constants.items() if name in names}\n"
        "    source = ASTSource(kernel, types | dict.fromkeys(constants, 'constexpr'), constants)\n"
        f"    triton.compile(source, target=GPUTarget('cuda', {capability}, 32))\n"
        "    print(kernel.__name__)",
        tmp_path,
    )
    assert found.stdout.split() == ["poisson", "nb"], found.stderr


def test_without_numba_the_reference_serves(monkeypatch):
    monkeypatch.setattr(kernels, "_is_installed", lambda library: False)
    assert kernels._tier(torch.zeros(1)) is reference
    with pytest.raises(UsageError, match="pip install numba"):
        kernels.use("cpu")
