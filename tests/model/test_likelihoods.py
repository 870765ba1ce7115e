"""What every row of LIKELIHOODS promises, under every dispersion it knows; then what single heads promise."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from celbo import LIKELIHOODS, VAE, NegativeBinomial, elbo_terms
from celbo.minibatch import Minibatch, gene_moments
from celbo.model.vae import Noise

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

N_CELLS, N_GENES, LATENT = 96, 12, 3

CASES = [
    pytest.param(row, dispersion, id=f"{row.name}-{dispersion}")
    for row in LIKELIHOODS.values()
    for dispersion in row.dispersions
]
each_case = pytest.mark.parametrize(("row", "dispersion"), CASES)
each_row = pytest.mark.parametrize("row", LIKELIHOODS.values(), ids=LIKELIHOODS)
each_row_of_counts = pytest.mark.parametrize(
    "row", [row for row in LIKELIHOODS.values() if row.values == "counts"], ids=lambda row: row.name
)

OPTIONS = {
    "plain": {},
    "context": {"context_dim": 2},
    "context in the decoder alone": {"context_dim": 2, "encode_context": False},
    "skip": {"skip": True},
    "skip and context": {"skip": True, "context_dim": 2},
    "layer norm": {"norm": "layer"},
    "batch norm": {"norm": "batch"},
}


class Cells(NamedTuple):
    """A Source of cells that are all in memory."""

    x: torch.Tensor
    context: torch.Tensor
    library: torch.Tensor

    @property
    def n_cells(self):
        return len(self.x)

    @property
    def n_genes(self):
        return self.x.shape[1]

    def take(self, rows):
        return Minibatch(self.x[rows].to_sparse_csr(), self.context[rows], self.library[rows])

    @property
    def moments(self):
        return gene_moments(self, torch.arange(self.n_cells).numpy(), chunk=40)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def simulate_counts(n_cells=N_CELLS, n_genes=N_GENES, theta=2.0, median_library=200.0, seed=0):
    """NB counts whose cells differ in depth alone, two technical batches in turn."""
    generator = seeded(seed)
    library = median_library * torch.randn(n_cells, 1, generator=generator).mul(0.4).exp()
    share = torch.softmax(torch.randn(n_genes, generator=generator), 0)
    x = NegativeBinomial(library * share, torch.as_tensor(theta)).sample(generator=generator)
    return Cells(x, torch.eye(2)[torch.arange(n_cells) % 2], x.sum(1, keepdim=True))


def cells_for(row, **options):
    """Simulated cells as this likelihood takes them."""
    cells = simulate_counts(**options)
    seen = {"counts": cells.x, "detected": (cells.x > 0).float(), "real": torch.log1p(cells.x)}
    return cells._replace(x=seen[row.values])


def make_vae(row, dispersion="gene", seed=0, **options):
    if dispersion == "gene-condition":
        options["context_dim"] = 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = VAE(N_GENES, LATENT, [16, 8], likelihood=row, dispersion=dispersion, dropout=0.0, **options)
    return vae


def elbo_of(vae, cells):
    """ELBO of each cell, the same noise every time."""
    noise = Noise(torch.randn(cells.n_cells, LATENT, generator=seeded(5)), None, None)
    return elbo_terms(vae, cells.x, cells.context if vae.context_dim else None, cells.library, noise).elbo


def some_z(n_cells=N_CELLS):
    return torch.randn(n_cells, LATENT, generator=seeded(3))


def likelihood_of(vae, cells, library=True):
    context = cells.context if vae.context_dim else None
    return vae.likelihood(some_z(cells.n_cells), context=context, library=cells.library if library else None)


@each_row
def test_a_row_says_what_it_is(row):
    assert LIKELIHOODS[row.name] is row
    assert row.values in {"counts", "detected", "real"}
    assert len(row.meaning.split()) >= 4


@each_case
def test_log_prob_has_a_finite_value_for_every_cell_and_gene(row, dispersion):
    cells = cells_for(row)
    log_prob = likelihood_of(make_vae(row, dispersion), cells).log_prob(cells.x)
    assert log_prob.shape == (N_CELLS, N_GENES)
    assert log_prob.isfinite().all()
    if row.values != "real":
        assert (log_prob <= 0).all()


def without_effect(vae):
    """Names of the biases that a batch norm right after them subtracts again."""
    return {
        f"{part}.{position}.bias"
        for part in ("encoder", "decoder")
        for position, (_, following) in enumerate(pairwise(getattr(vae, part)))
        if isinstance(following, torch.nn.BatchNorm1d)
    }


@each_case
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_of_the_elbo_reaches_every_parameter(row, dispersion, options):
    vae, cells = make_vae(row, dispersion, **options), cells_for(row)
    (-elbo_of(vae, cells).mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6 or name in without_effect(vae), name


@each_case
def test_decode_returns_the_mean_of_the_likelihood(row, dispersion):
    vae, cells = make_vae(row, dispersion).eval(), cells_for(row)
    context = cells.context if vae.context_dim else None
    decoded = vae.decode(some_z(), context, cells.library)
    assert decoded.shape == (N_CELLS, N_GENES)
    assert torch.equal(decoded, likelihood_of(vae, cells).mean)


@each_case
def test_samples_lie_in_the_support_and_have_a_density(row, dispersion):
    p = likelihood_of(make_vae(row, dispersion), cells_for(row))
    x = p.sample()
    assert x.shape == (N_CELLS, N_GENES)
    assert p.support.check(x).all()
    assert p.log_prob(x).isfinite().all()
    assert x.std() > 0


@each_row
def test_the_encoder_sees_counts_on_a_log_scale_and_all_else_as_it_is(row):
    x = cells_for(row).x
    expected = torch.log1p(x) if row.values == "counts" else x
    assert torch.equal(make_vae(row).head.encoder_input(x), expected)


def expected_counts(p):
    """Mean before zero inflation."""
    return getattr(p, "base", p).mean


@each_row_of_counts
def test_means_of_counts_sum_to_the_library_and_without_one_to_1(row):
    vae, cells = make_vae(row), cells_for(row)
    torch.testing.assert_close(expected_counts(likelihood_of(vae, cells)).sum(1, keepdim=True), cells.library)
    shares = expected_counts(likelihood_of(vae, cells, library=False))
    torch.testing.assert_close(shares.sum(1), torch.ones(N_CELLS))
    torch.testing.assert_close(expected_counts(likelihood_of(vae, cells)), shares * cells.library)


@each_row
def test_the_library_moves_counts_alone(row):
    vae, cells = make_vae(row), cells_for(row)
    found, without = likelihood_of(vae, cells).mean, likelihood_of(vae, cells, library=False).mean
    assert torch.equal(found, without) == (row.values != "counts")


def test_zero_inflation_takes_its_share_of_the_mean():
    vae, cells = make_vae(LIKELIHOODS["zinb"]), cells_for(LIKELIHOODS["zinb"])
    p = likelihood_of(vae, cells)
    torch.testing.assert_close(p.mean, p.base.mean * (1 - torch.sigmoid(p.gate_logits)))
    assert p.gate_logits.shape == (N_CELLS, N_GENES)


@each_case
def test_starting_values_raise_the_elbo(row, dispersion):
    vae, cells = make_vae(row, dispersion), cells_for(row)
    before = elbo_of(vae, cells).mean()
    vae.head.initialise(vae.fc_out, cells.moments)
    assert elbo_of(vae, cells).mean() > before + 1.0


@each_case
def test_empty_genes_and_empty_cells_give_finite_values_and_gradients(row, dispersion):
    cells = cells_for(row)
    cells.x[:, 2] = 0
    cells.x[5] = 0
    cells.library[5] = 0
    vae = make_vae(row, dispersion)
    for _ in range(2):  # as made, then from its starting values
        elbo = elbo_of(vae, cells)
        gradients = torch.autograd.grad(-elbo.mean(), list(vae.parameters()))
        assert elbo.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        vae.head.initialise(vae.fc_out, cells.moments)
        assert all(parameter.isfinite().all() for parameter in vae.parameters())


@each_row_of_counts
def test_an_empty_cell_costs_nothing_and_its_library_may_be_left_to_the_model(row):
    cells = cells_for(row)
    cells.x[5] = 0
    reconstruction = elbo_terms(make_vae(row), cells.x).reconstruction
    assert reconstruction[5].abs() < 1e-4
    assert reconstruction[4] < -5


@each_row
def test_a_table_of_nothing_but_zeros_gives_finite_starting_values(row):
    cells = Cells(torch.zeros(7, N_GENES), torch.zeros(7, 0), torch.zeros(7, 1))
    vae = make_vae(row)
    vae.head.initialise(vae.fc_out, cells.moments)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())
    assert elbo_of(vae, cells).isfinite().all()


@each_row_of_counts
def test_a_cell_of_a_million_counts_gives_finite_gradients(row):
    vae = make_vae(row)
    x = torch.zeros(2, N_GENES)
    x[0, 0], x[1, 1] = 1e6, 1.0
    gradients = torch.autograd.grad(-elbo_terms(vae, x).elbo.sum(), list(vae.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@each_row_of_counts
def test_counts_start_at_the_observed_shares(row):
    vae, cells = make_vae(row), cells_for(row)
    vae.head.initialise(vae.fc_out, cells.moments)
    observed = cells.x.sum(0) / cells.x.sum()
    torch.testing.assert_close(vae.fc_out.bias, observed.log(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.softmax(vae.fc_out.bias, 0), observed)


def test_a_gene_without_counts_starts_at_half_a_count():
    vae, cells = make_vae(LIKELIHOODS["poisson"]), simulate_counts()
    cells.x[:, 2] = 0
    vae.head.initialise(vae.fc_out, cells.moments)
    share = torch.softmax(vae.fc_out.bias, 0)[2]
    torch.testing.assert_close(share, 0.5 / (cells.x.sum() + 0.5))


def theta_at_start(cells, name="nb", dispersion="gene"):
    vae = make_vae(LIKELIHOODS[name], dispersion)
    vae.head.initialise(vae.fc_out, cells.moments)
    return likelihood_of(vae, cells).theta.detach()


@pytest.mark.parametrize("theta", [0.5, 2.0, 10.0])
def test_theta_by_moments_recovers_theta_within_a_fifth(theta):
    # Depth is known here, as moments assume: the sum of counts of few genes would itself vary with them.
    generator = seeded(1)
    library = 500 * torch.randn(4000, 1, generator=generator).mul(0.4).exp()
    x = NegativeBinomial((library / N_GENES).expand(-1, N_GENES), torch.tensor(theta)).sample(generator=generator)
    found = theta_at_start(Cells(x, torch.zeros(4000, 0), library))
    assert found.shape == (N_GENES,)
    assert (found / theta - 1).abs().max() < 0.2
    assert (found.mean() / theta - 1).abs() < 0.05


def test_theta_of_each_gene_is_its_own():
    theta = torch.linspace(-1, 2, N_GENES).exp()
    generator = seeded(2)
    library = torch.full((4000, 1), 500.0)
    x = NegativeBinomial((library / N_GENES).expand(-1, N_GENES), theta).sample(generator=generator)
    found = theta_at_start(Cells(x, torch.zeros(4000, 0), library))
    assert (found / theta - 1).abs().max() < 0.2


def test_theta_of_poisson_counts_starts_large_and_within_bounds():
    generator = seeded(3)
    library = torch.full((4000, 1), 500.0)
    x = torch.poisson((library / N_GENES).expand(-1, N_GENES), generator=generator)
    theta = theta_at_start(Cells(x, torch.zeros(4000, 0), library))
    assert theta.min() > 200
    assert theta.max() <= 1000.01


@pytest.mark.parametrize("dispersion", ["gene-condition", "gene-cell"])
def test_every_level_and_cell_starts_with_the_theta_of_the_gene(dispersion):
    cells = simulate_counts()
    found = theta_at_start(cells, dispersion=dispersion)
    assert found.shape == (N_CELLS, N_GENES)
    torch.testing.assert_close(found, theta_at_start(cells).expand_as(found))


@pytest.mark.parametrize("name", [row.name for row in LIKELIHOODS.values() if "gene-cell" in row.dispersions])
def test_theta_depends_on_the_condition_or_on_the_cell_as_told(name):
    cells = simulate_counts()
    thetas = {}
    for dispersion in LIKELIHOODS[name].dispersions:
        vae = make_vae(LIKELIHOODS[name], dispersion, context_dim=2)
        for module, parameter in vae.head.named_parameters():
            if module.endswith("fc_theta.weight"):
                torch.nn.init.normal_(parameter, generator=seeded(4))
        p = likelihood_of(vae, cells)
        thetas[dispersion] = getattr(p, "base", p).theta
    by_level = thetas["gene-condition"]
    assert thetas["gene"].shape == (N_GENES,)
    assert torch.equal(by_level[0::2], by_level[:1].expand(N_CELLS // 2, -1))
    assert torch.equal(by_level[1::2], by_level[1:2].expand(N_CELLS // 2, -1))
    assert not torch.equal(by_level[0], by_level[1])
    assert len(thetas["gene-cell"].unique(dim=0)) == N_CELLS
    through_decoder = torch.autograd.grad(thetas["gene-cell"].sum(), vae.decoder[0].weight)[0]
    assert through_decoder.abs().max() > 1e-3


def test_a_gaussian_starts_at_gene_means_and_standard_deviations():
    row = LIKELIHOODS["gaussian"]
    vae, cells = make_vae(row), cells_for(row)
    vae.head.initialise(vae.fc_out, cells.moments)
    torch.testing.assert_close(vae.fc_out.bias, cells.x.mean(0))
    # To within the floor of 0.01 that keeps a density finite.
    sd = likelihood_of(vae, cells).stddev[0]
    torch.testing.assert_close(sd, cells.x.std(0, correction=0), rtol=0, atol=0.0101)


def test_a_constant_gene_has_a_gaussian_of_finite_density():
    row = LIKELIHOODS["gaussian"]
    vae, cells = make_vae(row), cells_for(row)
    cells.x[:, 0] = 3.0
    vae.head.initialise(vae.fc_out, cells.moments)
    assert 0.005 < likelihood_of(vae, cells).stddev[0, 0] < 0.05


def test_a_bernoulli_starts_at_the_shares_of_cells_that_detect_a_gene():
    row = LIKELIHOODS["bernoulli"]
    vae, cells = make_vae(row), cells_for(row)
    vae.head.initialise(vae.fc_out, cells.moments)
    expected = (cells.x.sum(0) + 0.5) / (N_CELLS + 1)
    torch.testing.assert_close(torch.sigmoid(vae.fc_out.bias), expected)


def test_the_gate_starts_nearly_shut_and_opens_by_the_zeros_left_unexplained():
    generator = seeded(6)
    library = torch.full((4000, 1), 600.0)
    x = NegativeBinomial((library / N_GENES).expand(-1, N_GENES), torch.tensor(20.0)).sample(generator=generator)
    x[:, : N_GENES // 2] *= torch.bernoulli(torch.full((4000, N_GENES // 2), 0.7), generator=generator)
    vae = make_vae(LIKELIHOODS["zinb"])
    vae.head.initialise(vae.fc_out, Cells(x, torch.zeros(4000, 0), library).moments)
    gate = torch.sigmoid(vae.head.fc_gate.bias)
    assert ((gate[: N_GENES // 2] > 0.15) & (gate[: N_GENES // 2] < 0.35)).all()
    torch.testing.assert_close(gate[N_GENES // 2 :], torch.full((N_GENES // 2,), 0.01))


def test_moments_are_the_sums_they_name():
    cells = simulate_counts()
    x, library = cells.x.double(), cells.library.double()
    expected = (N_CELLS, x.sum(0), x.square().sum(0), (x * library).sum(0), (x > 0).double().sum(0))
    for found, value in zip(cells.moments, (*expected, library.sum(), library.square().sum()), strict=True):
        torch.testing.assert_close(found, value)
