"""Draw conclusions from evidence: a verdict in one line, the findings, worst first, and remedies in order."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celbo.model.information import ACTIVE
from celbo.trust.findings import (
    DEAD,
    LEAST_ABLATION,
    Finding,
    Floats,
    active_units,
    aggregated_gap,
    condition_ablation,
    condition_leakage,
    decoder_sensitivity,
    expected_dimensions,
    falls_short,
    gain,
    kl_by_dimension,
    lasting_collapse,
    latent_ablation,
    latent_information,
    listens,
    types_kept,
)
from celbo.trust.overlap import Overlap, level_overlap

__all__ = ["Advice", "Diagnosis", "Evidence", "Settings", "conclude"]

_SCHEDULES = {"linear", "sigmoid", "cosine", "cyclical", "autoencoder_start"}
_SHORT = 0.2
"""Training with a smaller share of the epochs of a default plan may have been too short."""
_GRAVITY = {"good": 0, "watch": 1, "bad": 2}


class Advice(NamedTuple):
    """A remedy that fits the findings."""

    remedy: str
    """As ``--remedy`` and ``remedies=[...]`` take it; empty where it is another option."""
    why: str
    command: str
    """Options to add to ``celbo fit``."""
    keyword: str
    """The same for `celbo.ExpressionVAE`."""
    is_cause: bool = False
    """Whether it removes a known cause of collapse; else it works against the collapse."""


@dataclass(frozen=True)
class Diagnosis:
    """Findings about a fitted model, and remedies."""

    collapsed: bool
    """Whether the decoder hardly uses z."""
    active_units: int
    """Dimensions of z that vary and that the decoder listens to."""
    verdict: str
    """One line."""
    findings: list[Finding] = field(default_factory=list)
    """Worst first."""
    remedies: list[Advice] = field(default_factory=list)
    """The one to try first comes first."""

    def finding(self, name: str) -> Finding:
        """Return the finding of this name; raise a `KeyError` if it was not measured."""
        return {finding.name: finding for finding in self.findings}[name]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        document = asdict(self)
        document["remedies"] = [advice._asdict() for advice in self.remedies]
        plain: dict[str, Any] = json.loads(json.dumps(document, default=_plain), parse_constant=lambda _: None)
        return plain

    def __str__(self) -> str:
        """Print the verdict, the findings and the remedies."""
        lines = [self.verdict, ""]
        for finding in self.findings:
            lines.append(f"{finding.verdict:<6}{finding.name}: {finding.meaning}")
            if finding.try_next:
                lines.append(f"      try: {finding.try_next}")
        if self.remedies:
            lines += ["", "What to try, in this order:"]
            lines += [f"{n}. {advice.command}  ({advice.why})" for n, advice in enumerate(self.remedies, start=1)]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a model on which advice depends; the defaults advise nothing."""

    likelihood: str = "nb"
    objective: str = "vae"
    warmup_fraction: float = 1.0
    remedies: Sequence[str] = ()
    nuisance: Sequence[str] = ()
    """Names of the conditions that are removed."""
    beta: float = 1.0
    kl_weight: float = 1.0
    """Weight of the KL at the end of training."""
    n_hidden: tuple[int, int] = (1, 1)
    """Hidden layers of the encoder and of the decoder."""
    dispersion: str = "gene"
    norm: str = "layer"
    norm_mu: bool = False
    prior: str = "normal"
    epochs: int = 0
    """Epochs that training had."""
    planned_epochs: int = 0
    """Epochs of a default plan for as many cells; 0 if training came to its own end, or the number is not known."""

    @property
    def samples_z(self) -> bool:
        """Whether z has a posterior; not in a plain autoencoder."""
        return self.objective != "autoencoder"


class Evidence(NamedTuple):
    """Measurements of a model on cells; best on cells that it did not learn from."""

    mu_z: Floats
    """``(cells, latent_dim)``."""
    logvar_z: Floats
    anchors: tuple[Floats, Floats]
    """``mu_z, logvar_z`` of at most `ANCHORS` cells, for measurements between cells."""
    kl: Floats
    """``(cells, latent_dim)``."""
    lost: Floats
    """Reconstruction lost when all of z, and each of its dimensions, is permuted: ``(1 + latent_dim, cells)``."""
    elbo: Floats
    """``(cells,)``, as ``reconstruction``."""
    reconstruction: Floats
    gene_means: Floats
    """Log-likelihood of gene means x library size, ``(cells,)``."""
    components: Floats | None
    """Log-likelihood by as many principal components as z has dimensions, ``(cells,)``."""
    expected_dim: int | None
    """Dimensions that the data show above their noise."""
    sensitivity: Floats
    """``(latent_dim,)``."""
    lost_by_condition: Mapping[str, Floats]
    """Reconstruction lost when a condition is permuted, ``(cells,)``."""
    conditions: Mapping[str, NDArray[Any]]
    """Number of each cell's level, or its value, ``(cells,)``."""
    types: NDArray[Any] | None = None
    """Known types of the cells. Leakage is measured within types."""
    principal: Floats | None = None
    """Principal components of log-normalised values, ``(cells, n)``, where types are known."""
    level_names: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Names of the levels of each categorical condition."""
    overlaps: Sequence[Overlap] = ()
    """Whether the levels of each nuisance overlap in the counts."""
    settings: Settings = Settings()


def conclude(evidence: Evidence) -> Diagnosis:
    """Make all findings, worst first, and rank the remedies."""
    e, settings = evidence, evidence.settings
    variance_alive = e.mu_z.var(0, dtype=np.float64) > ACTIVE
    alive = int((variance_alive & listens(e.lost[1:]) & (e.kl.mean(0) >= DEAD)).sum())
    if not settings.samples_z:
        alive = int((variance_alive & listens(e.lost[1:])).sum())
    ablation = latent_ablation(e.lost, e.elbo, e.gene_means)
    findings = [
        ablation,
        active_units(e.mu_z),
        decoder_sensitivity(e.sensitivity),
        gain("gain over gene means", e.elbo, e.gene_means, "gene means x library size"),
    ]
    if settings.samples_z:
        if settings.prior in ("normal", "conditional"):  # the KL to other priors is an estimate, with noise
            findings += [kl_by_dimension(e.kl), lasting_collapse(e.kl)]
        findings.append(latent_information(*e.anchors))
        if settings.prior == "normal":
            findings.append(aggregated_gap(*e.anchors))
    if e.components is not None:
        than = "as many principal components (reconstruction)"
        findings.append(gain("gain over principal components", e.reconstruction, e.components, than))
    if e.expected_dim is not None:
        findings.append(expected_dimensions(alive, e.expected_dim, e.mu_z.shape[1]))
    for name, lost in e.lost_by_condition.items():
        nuisance = name in settings.nuisance
        findings.append(condition_ablation(name, lost, nuisance=nuisance))
        names = e.level_names.get(name, ())
        findings.append(condition_leakage(name, e.mu_z, e.conditions[name], e.types, nuisance=nuisance, names=names))
    findings += [level_overlap(overlap) for overlap in e.overlaps]
    if e.types is not None and e.principal is not None:
        removed = [levels for name, levels in e.conditions.items() if np.issubdtype(levels.dtype, np.integer)]
        batch = (
            np.unique(removed, axis=1, return_inverse=True)[1].reshape(-1) if removed else np.zeros(len(e.mu_z), int)
        )
        findings.append(types_kept(e.mu_z, e.principal, e.types, batch))
    if settings.kl_weight != 1 and settings.samples_z:
        meaning = f"the KL weight ended at {settings.kl_weight:.3g}: training did not maximise the ELBO reported here"
        findings.append(Finding("KL weight", settings.kl_weight, "1", "watch", meaning))
    collapsed = ablation.verdict == "bad" or alive == 0
    findings.sort(key=lambda finding: -_GRAVITY[finding.verdict])  # stable: within a verdict as above
    return Diagnosis(
        collapsed=collapsed,
        active_units=alive,
        verdict=_verdict(e, collapsed, alive),
        findings=findings,
        remedies=_advise(e, collapsed, alive, {finding.name: finding for finding in findings}),
    )


def _verdict(e: Evidence, collapsed: bool, alive: int) -> str:
    nats, total = max(0.0, float(e.lost[0].mean())), e.mu_z.shape[1]
    gained = float((e.elbo - e.gene_means).mean())
    carries, them = ("carries", "it") if alive == 1 else ("carry", "them")
    if collapsed and gained < 0 and nats >= LEAST_ABLATION:  # z moves the decoder, and not for the better
        return (
            f"Nothing learned that holds for other cells: the model explains {len(e.elbo):,} of them "
            f"{-gained:.0f} nats worse than gene means and library sizes do; there may be too few cells to learn from, "
            "or to measure on."
        )
    if collapsed and _little_to_find(e):
        return (
            f"Nothing in z: the decoder loses {nats:.1f} nats per cell without it. These cells hardly show more than "
            f"gene means and library sizes ({e.expected_dim} dimensions above their noise): there is little to find."
        )
    if collapsed:
        return (
            f"Collapsed: the decoder loses {nats:.1f} nats per cell without z, {alive} of {total} dimensions {carries} "
            "information; the latent space shows a blob without separation."
        )
    information = f"{alive} of {total} dimensions {carries} information; the decoder loses {nats:.0f} nats per cell "
    information += f"without {them}."
    if e.expected_dim is not None and falls_short(alive, e.expected_dim, total):
        return f"Partly collapsed: {information} The data show {e.expected_dim} above their noise."
    return information


def _little_to_find(e: Evidence) -> bool:
    """Whether the data show next to nothing beyond gene means and library sizes."""
    gained = float((e.elbo - e.gene_means).mean())
    return e.expected_dim is not None and e.expected_dim <= 1 and gained < LEAST_ABLATION


def _advise(e: Evidence, collapsed: bool, alive: int, findings: Mapping[str, Finding]) -> list[Advice]:
    """List remedies in the order in which to try them, without those that the model has."""
    settings, advice = e.settings, list[Advice]()
    had = {remedy.partition(":")[0] for remedy in settings.remedies} - {"beta"}
    may_have_vamp = settings.norm != "batch" and not settings.norm_mu and settings.n_hidden[0] > 0

    def add(remedy: str, why: str, is_cause: bool = False) -> None:
        if remedy == "vamp_prior" and not may_have_vamp:
            remedy = "mixture_prior"
        if remedy == "norm_mu" and settings.prior.startswith("vamp"):
            return  # this prior excludes batch norms
        if remedy.partition(":")[0] not in had | {other.remedy.partition(":")[0] for other in advice}:
            advice.append(Advice(remedy, why, f"--remedy {remedy}", f"remedies=[{remedy!r}]", is_cause))

    latent_dim, expected = e.mu_z.shape[1], e.expected_dim
    is_short = expected is not None and falls_short(alive, expected, latent_dim)
    if not settings.samples_z or _little_to_find(e):
        return advice
    if collapsed or (expected is not None and alive < min(expected, latent_dim)):
        if settings.epochs < _SHORT * settings.planned_epochs:
            advice.append(_longer(settings))
        for remedy, why in _causes(settings, had):
            add(remedy, why, is_cause=True)
    if collapsed:
        add("norm_mu", "no dimension can fall silent")
        add("linear_decoder", "a decoder that can say little without z")
        add("autoencoder_start", "the decoder learns to listen before the KL weighs")
    elif is_short:
        add("norm_mu", f"no dimension can fall silent; the data show {expected} above their noise, z uses {alive}")
        add("soft_free_bits", "each dimension keeps some information")
    elif expected is not None and 0 < expected <= alive < latent_dim:
        why = f"{alive} dimensions are in use, and the data show no more: the same with fewer"
        advice.append(Advice("", why, f"--latent-dim {alive}", f"latent_dim={alive}"))
    gap = findings.get("gap to the prior")
    if gap is not None and gap.verdict != "good" and not collapsed:
        add("vamp_prior", "before sampling: the prior follows the cells")
    for name in e.lost_by_condition:
        if findings[f"ablation of {name}"].verdict == "bad":
            add("conditional_prior", f"the decoder ignores {name!r}")
            if settings.n_hidden[1] >= 2:
                add("context_skip", f"the decoder ignores {name!r}")
    return advice


def _longer(settings: Settings) -> Advice:
    """Advise as many epochs as training has by default."""
    n = settings.planned_epochs
    why = f"training had {settings.epochs} epochs; without --epochs it is planned for {n}"
    return Advice("", why, f"--epochs {n}", f"train=celbo.TrainConfig(max_epochs={n})", is_cause=True)


def _causes(settings: Settings, had: set[str]) -> Iterator[tuple[str, str]]:
    """List remedies that remove a cause of collapse among the options, and why."""
    if settings.likelihood == "gaussian" and settings.dispersion == "fixed":
        yield "learned_sigma", "sigma is fixed at 1, which hides what z could say; leave out dispersion='fixed'"
    if settings.beta > 1:
        yield "beta:1", f"the KL weighs {settings.beta:g} times what the ELBO gives it"
    if max(settings.n_hidden) > 1:
        yield (
            "shallow",
            "deep stacks learn to do without z, and one hidden layer explains cells as well; leave out hidden_dims",
        )
    if settings.warmup_fraction == 0 and not had & _SCHEDULES:
        yield "linear", "the KL weighs in full from the first step, before the encoder says anything"
    if settings.norm == "none":
        yield "layer_norm", "without a norm, training settles before the encoder says anything; leave out norm='none'"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
