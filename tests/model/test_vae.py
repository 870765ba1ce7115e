"""The VAE is the textbook's class where only the textbook's options are used; then its further options."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import celbo
from celbo import LIKELIHOODS, VAE, UsageError
from celbo.model.vae import draw_noise, mlp, reparameterize

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

NB = LIKELIHOODS["nb"]


class DocumentVAE(nn.Module):
    """The class of the document that celbo grew from, statement for statement."""

    def __init__(self, input_dim: int, latent_dim: int, hidden_dims: list[int]):
        super().__init__()
        self.input_dim = input_dim
        self.latent_dim = latent_dim

        encoder_layers = []
        current_dim = input_dim
        for h in hidden_dims:
            encoder_layers.extend([nn.Linear(current_dim, h), nn.ReLU(), nn.Dropout(0.2)])
            current_dim = h

        self.encoder = nn.Sequential(*encoder_layers)
        self.fc_mu = nn.Linear(current_dim, latent_dim)
        self.fc_logvar = nn.Linear(current_dim, latent_dim)

        decoder_layers = []
        current_dim = latent_dim
        for h in reversed(hidden_dims):
            decoder_layers.extend([nn.Linear(current_dim, h), nn.ReLU(), nn.Dropout(0.2)])
            current_dim = h

        self.decoder = nn.Sequential(*decoder_layers)
        self.fc_out = nn.Linear(current_dim, input_dim)

    def encode(self, x: torch.Tensor):
        h = self.encoder(x)
        mu_z = self.fc_mu(h)
        logvar_z = self.fc_logvar(h)
        return mu_z, logvar_z

    def reparameterize(self, mu_z: torch.Tensor, logvar_z: torch.Tensor):
        std = torch.exp(0.5 * logvar_z)
        eps = torch.randn_like(std)
        return mu_z + eps * std

    def decode(self, z):
        h = self.decoder(z)
        x_recon = self.fc_out(h)
        return x_recon

    def forward(self, x):
        mu_z, logvar_z = self.encode(x)
        z = self.reparameterize(mu_z, logvar_z)
        x_recon = self.decode(z)
        return x_recon, mu_z, logvar_z


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def make(vae_class, *args, seed=0, **options):
    """A model with the same starting weights every time, the global generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return vae_class(*args, **options)


def two_alike(hidden_dims=(64, 32)):
    """The document's model and ours, with the document's weights."""
    document = make(DocumentVAE, 50, 8, list(hidden_dims))
    vae = VAE(50, 8, list(hidden_dims))
    vae.load_state_dict(document.state_dict(), strict=False)
    return document, vae


# The document's class


@pytest.mark.parametrize("hidden_dims", [[64, 32], [16], []])
def test_the_documents_weights_load_and_only_the_head_is_left_to_itself(hidden_dims):
    document = make(DocumentVAE, 50, 8, hidden_dims)
    missing, unexpected = VAE(50, 8, hidden_dims).load_state_dict(document.state_dict(), strict=False)
    assert unexpected == []
    assert missing == ["head.log_sigma"]


def test_our_weights_are_the_documents_and_the_heads():
    ours = VAE(50, 8, [64, 32]).state_dict()
    theirs = DocumentVAE(50, 8, [64, 32]).state_dict()
    assert {name: value.shape for name, value in ours.items() if not name.startswith("head.")} == {
        name: value.shape for name, value in theirs.items()
    }
    assert list(ours)[: len(theirs)] == list(theirs)


def test_the_same_seed_gives_the_documents_starting_weights():
    theirs = make(DocumentVAE, 50, 8, [64, 32], seed=3).state_dict()
    ours = make(VAE, 50, 8, [64, 32], seed=3).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("hidden_dims", [[64, 32], [16], []])
def test_with_the_documents_weights_everything_equals_the_document(hidden_dims):
    document, vae = (model.eval() for model in two_alike(hidden_dims))
    x = normal(7, 50)
    mu_z, logvar_z = vae.encode(x)
    assert torch.equal(mu_z, document.encode(x)[0])
    assert torch.equal(logvar_z, document.encode(x)[1])
    eps = normal(7, 8, seed=1)
    z = vae.reparameterize(mu_z, logvar_z, eps)
    assert torch.equal(z, mu_z + eps * torch.exp(0.5 * logvar_z))
    assert torch.equal(vae.decode(z), document.decode(z))


@pytest.mark.parametrize("training", [False, True])
def test_forward_equals_the_document_under_one_seed(training):
    found = []
    for model in two_alike():
        with torch.random.fork_rng():
            torch.manual_seed(11)
            found.append(model.train(training)(normal(7, 50)))
    assert all(torch.equal(ours, theirs) for theirs, ours in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("args", "options"),
    [((50, 8, [64, 32]), {}), ((), {"input_dim": 50, "latent_dim": 8, "hidden_dims": [64, 32]})],
    ids=["positional", "keyword"],
)
def test_a_training_loop_written_for_the_document_gives_the_same_losses(args, options):
    def losses(vae_class):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = vae_class(*args, **options)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            x = normal(64, 3) @ normal(3, 50, seed=1)
            for _ in range(30):
                x_recon, mu_z, logvar_z = model(x)
                kl = -0.5 * (1 + logvar_z - mu_z.pow(2) - logvar_z.exp()).sum(1).mean()
                loss = F.mse_loss(x_recon, x, reduction="sum") / len(x) + kl
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()

    ours = list(losses(VAE))
    assert ours == pytest.approx(list(losses(DocumentVAE)), rel=1e-6)
    assert ours[-1] < 0.8 * ours[0]


def test_new_data_are_generated_as_the_document_says():
    vae = make(VAE, input_dim=50, latent_dim=8, hidden_dims=[64, 32])
    assert (vae.input_dim, vae.latent_dim) == (50, 8)
    assert vae.decode(normal(5, 8)).shape == (5, 50)
    assert [type(layer) for layer in vae.encoder] == [nn.Linear, nn.ReLU, nn.Dropout] * 2
    assert [type(layer) for layer in vae.decoder] == [nn.Linear, nn.ReLU, nn.Dropout] * 2
    assert {layer.p for layer in vae.modules() if isinstance(layer, nn.Dropout)} == {0.2}


# Encoder and decoder


def some_counts(n_cells=9, n_genes=20):
    return torch.poisson(torch.full((n_cells, n_genes), 0.8), generator=seeded(4))


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_sparse_cells_are_encoded_as_dense_ones(name, context_dim):
    vae = make(VAE, 20, 3, [16], likelihood=LIKELIHOODS[name], context_dim=context_dim).eval()
    x, context = (some_counts() > 0).float(), normal(9, context_dim) if context_dim else None
    for sparse, dense in zip(vae.encode(x.to_sparse_csr(), context), vae.encode(x, context), strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


def test_counts_are_encoded_on_a_log_scale():
    counts = make(VAE, 20, 3, [16], likelihood=NB).eval()
    reals = VAE(20, 3, [16]).eval()
    reals.load_state_dict(counts.state_dict(), strict=False)
    x = some_counts()
    assert torch.equal(counts.encode(x)[0], reals.encode(torch.log1p(x))[0])


@pytest.mark.parametrize("hidden_dims", [[16], [16, 8], []])
def test_the_context_joins_the_encoder_after_the_genes_and_the_decoder_after_z(hidden_dims):
    vae = make(VAE, 20, 3, hidden_dims, context_dim=2).eval()
    first = vae.encoder[0] if hidden_dims else vae.fc_mu
    first_of_decoder = vae.decoder[0] if hidden_dims else vae.fc_out
    assert first.in_features == 22
    assert first_of_decoder.in_features == 5
    x, z, one, other = normal(4, 20), normal(4, 3), normal(4, 2, seed=1), normal(4, 2, seed=2)
    assert not torch.allclose(vae.encode(x, one)[0], vae.encode(x, other)[0])
    assert not torch.allclose(vae.decode(z, one), vae.decode(z, other))

    with torch.no_grad():
        first.weight[:, 20:] = 0
        first_of_decoder.weight[:, 3:] = 0
    assert torch.equal(vae.encode(x, one)[0], vae.encode(x, other)[0])
    assert torch.equal(vae.decode(z, one), vae.decode(z, other))
    assert not torch.allclose(vae.decode(z, one), vae.decode(z + 1, one))


def test_a_context_of_zeros_gives_the_model_without_context():
    with_context = make(VAE, 20, 3, [16], context_dim=2).eval()
    without = VAE(20, 3, [16]).eval()
    weights = with_context.state_dict()
    weights["encoder.0.weight"] = weights["encoder.0.weight"][:, :20]
    weights["decoder.0.weight"] = weights["decoder.0.weight"][:, :3]
    without.load_state_dict(weights)
    x, z, nothing = normal(4, 20), normal(4, 3), torch.zeros(4, 2)
    torch.testing.assert_close(with_context.encode(x, nothing), without.encode(x))
    torch.testing.assert_close(with_context.decode(z, nothing), without.decode(z))


def test_the_context_can_be_kept_out_of_the_encoder():
    vae = make(VAE, 20, 3, [16], context_dim=2, encode_context=False).eval()
    assert vae.encoder[0].in_features == 20
    x, z, one, other = normal(4, 20), normal(4, 3), normal(4, 2, seed=1), normal(4, 2, seed=2)
    assert torch.equal(vae.encode(x, one)[0], vae.encode(x, other)[0])
    assert not torch.allclose(vae.decode(z, one), vae.decode(z, other))


def test_skip_connections_bring_z_and_context_to_every_layer_of_the_decoder():
    vae = make(VAE, 20, 3, [16, 12, 8], context_dim=2, skip=True).eval()
    linears = [layer for layer in vae.decoder if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linears] == [3 + 2, 8 + 5, 12 + 5]
    with torch.no_grad():  # shut the way through the layers before
        for layer in linears:
            layer.weight[:, : layer.in_features - 5] = 0
        linears[0].weight.zero_()
        linears[1].weight.zero_()
    z, context = normal(4, 3).requires_grad_(), normal(4, 2, seed=1).requires_grad_()
    vae.decode(z, context).square().sum().backward()
    assert (z.grad.abs().sum(1) > 1e-6).all()
    assert (context.grad.abs().sum(1) > 1e-6).all()


def test_without_skip_connections_later_layers_see_the_layer_before_alone():
    vae = make(VAE, 20, 3, [16, 12, 8], context_dim=2)
    assert [layer.in_features for layer in vae.decoder if isinstance(layer, nn.Linear)] == [5, 8, 12]


def test_no_hidden_layers_make_linear_maps():
    vae = make(VAE, 20, 3, [])
    x, z = normal(4, 20), normal(4, 3)
    torch.testing.assert_close(vae.encode(x)[0], x @ vae.fc_mu.weight.T + vae.fc_mu.bias)
    torch.testing.assert_close(vae.decode(z), z @ vae.fc_out.weight.T + vae.fc_out.bias)


def test_forward_uses_the_cells_own_library_and_context():
    vae = make(VAE, 20, 3, [16], likelihood=NB, context_dim=2).eval()
    x, context = some_counts(), normal(9, 2)
    x_recon, mu_z, logvar_z = vae(x, context)
    torch.testing.assert_close(x_recon.sum(1), x.sum(1))
    assert torch.equal(mu_z, vae.encode(x, context)[0])
    assert torch.equal(logvar_z, vae.encode(x, context)[1])


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("skip", [False, True])
def test_cells_do_not_touch_each_other_once_trained(norm, skip):
    vae = make(VAE, 20, 3, [16, 8], likelihood=NB, norm=norm, skip=skip).eval()
    x = some_counts()
    z = vae.encode(x)[0]
    torch.testing.assert_close(vae.encode(x[3:5])[0], z[3:5])
    torch.testing.assert_close(vae.decode(z[3:5]), vae.decode(z)[3:5])


def test_mlp_puts_the_norm_before_the_relu_and_tells_its_width():
    layers, width = mlp(20, [16, 8], norm="layer", dropout=0.1, extra_dim=5)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout] * 2
    assert [layer.in_features for layer in layers if isinstance(layer, nn.Linear)] == [20, 21]
    assert width == 8


# Reparameterisation and noise


def test_reparameterized_samples_have_the_posteriors_mean_and_sd():
    mu_z, logvar_z = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -3.0]])
    z = reparameterize(mu_z.expand(50_000, 2), logvar_z.expand(50_000, 2), normal(50_000, 2))
    sd = torch.exp(logvar_z[0] / 2)
    assert ((z.mean(0) - mu_z[0]) / (sd / 50_000**0.5)).abs().max() < 4
    torch.testing.assert_close(z.std(0), sd, rtol=0.02, atol=0)


def test_gradients_pass_through_the_sampling():
    mu_z, logvar_z, eps = torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    mu_z.requires_grad_(), logvar_z.requires_grad_()
    reparameterize(mu_z, logvar_z, eps).sum().backward()
    torch.testing.assert_close(mu_z.grad, torch.ones(1, 2))
    torch.testing.assert_close(logvar_z.grad, 0.5 * eps * torch.exp(0.5 * logvar_z.detach()))


def with_noise(vae, x, noise):
    """What a training step computes of its cells."""
    terms = celbo.elbo_terms(vae, x, noise=noise)
    return torch.cat([terms.reconstruction[:, None], terms.kl], dim=1).detach()


def test_the_same_noise_gives_the_same_step_and_the_layers_own_dropout_is_not_used():
    vae = make(VAE, 20, 3, [16, 8], likelihood=NB, dropout=0.5)
    x, noise = some_counts(), draw_noise(vae, 9, seeded(1))
    before = torch.get_rng_state()
    first = with_noise(vae, x, noise)
    assert torch.equal(with_noise(vae, x, noise), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(with_noise(vae, x, draw_noise(vae, 9, seeded(2))), first)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_process_with_half_the_cells_and_their_rows_of_the_noise_computes_the_same_rows(norm):
    vae = make(VAE, 20, 3, [16, 8], likelihood=NB, norm=norm, dropout=0.5, skip=True)
    x, noise = some_counts(10), draw_noise(vae, 10, seeded(1))
    whole = with_noise(vae, x, noise)
    for rows in (slice(0, 5), slice(5, 10)):
        part = type(noise)(noise.eps[rows], [m[rows] for m in noise.encoder], [m[rows] for m in noise.decoder])
        torch.testing.assert_close(with_noise(vae, x[rows], part), whole[rows])


def test_masks_have_the_layers_widths_drop_the_stated_share_and_keep_the_mean():
    vae = make(VAE, 20, 3, [400, 100], dropout=0.3)
    noise = draw_noise(vae, 500, seeded(0))
    assert noise.eps.shape == (500, 3)
    assert [mask.shape for mask in noise.encoder] == [(500, 400), (500, 100)]
    assert [mask.shape for mask in noise.decoder] == [(500, 100), (500, 400)]
    for mask in (*noise.encoder, *noise.decoder):
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        assert mask.mean().item() == pytest.approx(1.0, abs=0.02)
        assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert noise.eps.std().item() == pytest.approx(1.0, abs=0.1)


def test_noise_depends_on_its_generator_alone():
    vae = make(VAE, 20, 3, [16, 8])
    first, again, other = (draw_noise(vae, 6, seeded(seed)) for seed in (1, 1, 2))
    for name in ("encoder", "decoder"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(first, name), getattr(again, name), strict=True))
    assert torch.equal(first.eps, again.eps)
    assert not torch.equal(first.eps, other.eps)
    assert not torch.equal(first.encoder[0], other.encoder[0])


def test_masks_of_ones_are_a_model_without_dropout():
    vae = make(VAE, 20, 3, [16, 8], dropout=0.5).train()
    x, z = normal(4, 20), normal(4, 3)
    ones = [torch.ones(4, 16), torch.ones(4, 8)]
    found = vae.encode(x, masks=ones)[0], vae.likelihood(z, masks=ones[::-1]).mean
    vae.eval()
    assert torch.equal(found[0], vae.encode(x)[0])
    assert torch.equal(found[1], vae.decode(z))


def test_a_mask_of_zeros_leaves_the_bias_alone():
    vae = make(VAE, 20, 3, [16, 8]).train()
    zeros = [torch.ones(4, 16), torch.zeros(4, 8)]
    torch.testing.assert_close(vae.encode(normal(4, 20), masks=zeros)[0], vae.fc_mu.bias.expand(4, -1))


def test_no_dropout_gives_masks_of_ones():
    vae = make(VAE, 20, 3, [16], dropout=0.0)
    assert torch.equal(draw_noise(vae, 4, seeded()).encoder[0], torch.ones(4, 16))


def test_dropout_acts_in_training_and_not_in_use():
    vae = make(VAE, 20, 3, [64], dropout=0.5)
    x = normal(4, 20)
    assert not torch.equal(vae.encode(x)[0], vae.encode(x)[0])
    vae.eval()
    assert torch.equal(vae.encode(x)[0], vae.encode(x)[0])


# Mistakes


@pytest.mark.parametrize(
    ("options", "found", "advice"),
    [
        ({"likelihood": "nb"}, "likelihood is 'nb'", "LIKELIHOODS['nb'] (there are gaussian, bernoulli, poisson, nb"),
        ({"dispersion": "cell", "likelihood": NB}, "dispersion is 'cell'", "gene, gene-condition, gene-cell"),
        ({"dispersion": "gene-cell"}, "'gene-cell' is for the likelihoods", "nb, zinb"),
        ({"dispersion": "gene-condition", "likelihood": NB}, "needs a condition", "name one, or use 'gene'"),
        ({"norm": "group"}, "norm is 'group'", "none, layer, batch"),
        ({"dropout": 1.0}, "dropout is 1.0", "from 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1", "from 0 to below 1"),
        ({"input_dim": 0}, "input_dim has 0", "whole number of at least 1"),
        ({"latent_dim": 2.5}, "latent_dim has 2.5", "whole number of at least 1"),
        ({"hidden_dims": [64, 0]}, "hidden_dims has 0", "whole number of at least 1"),
        ({"hidden_dims": ["64"]}, "hidden_dims has '64'", "whole number of at least 1"),
    ],
)
def test_an_option_out_of_range_says_what_was_found_and_what_may_be_chosen(options, found, advice):
    with pytest.raises(UsageError, match=f"{re.escape(found)}.*{re.escape(advice)}"):
        VAE(**{"input_dim": 20, "latent_dim": 3, "hidden_dims": [16], **options})


@pytest.mark.parametrize("call", ["encode", "decode", "likelihood", "forward"])
@pytest.mark.parametrize(("context_dim", "width"), [(0, 2), (2, 0), (2, 3)])
def test_a_context_of_another_width_is_refused_with_both_numbers(call, context_dim, width):
    vae = VAE(20, 3, [16], context_dim=context_dim)
    values = normal(4, 20) if call in ("encode", "forward") else normal(4, 3)
    with pytest.raises(UsageError, match=f"context_dim={context_dim}.*width {width}; pass context="):
        getattr(vae, call)(values, context=normal(4, width) if width else None)


def test_options_beyond_the_documents_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        VAE(20, 3, [16], NB)


@pytest.mark.parametrize("shape", [(5,), (1,), (1, 5), (5, 5)])
def test_a_library_of_another_shape_is_refused_not_broadcast(shape):
    vae = celbo.VAE(5, 2, [4], likelihood=celbo.LIKELIHOODS["nb"])
    with pytest.raises(celbo.UsageError, match=r"one number per cell, \(cells, 1\)"):
        vae.likelihood(torch.zeros(5, 2), library=torch.ones(shape))


@pytest.mark.parametrize("context_dim", [-1, 1.5])
def test_a_context_dim_that_is_no_width_is_refused(context_dim):
    with pytest.raises(celbo.UsageError, match="0 for no conditions"):
        celbo.VAE(5, 2, [4], context_dim=context_dim)
