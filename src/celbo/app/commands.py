"""Steps that several commands share: read options and cells, open a run, fit a model and write the run."""

import math
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from typer.core import TyperGroup, TyperOption

import celbo
from celbo.app.config import READING, contents, read_config
from celbo.app.terminal import interruptible, plain, say, shown_warnings, stop_on_signal
from celbo.errors import CelboError, UsageError, warn
from celbo.fit.words import celbo_words
from celbo.runs.record import record_of_run

if TYPE_CHECKING:
    from anndata import AnnData

    from celbo.app.demo import Recovery
    from celbo.checkpoint import FolderDescription
    from celbo.data.checks import Check
    from celbo.data.schema import Schema
    from celbo.estimator import ExpressionVAE
    from celbo.fit.cells import Cells
    from celbo.fit.train import Track
    from celbo.trials.comparing import Comparison
    from celbo.trials.curing import Step

__all__ = [
    "Commands",
    "Reading",
    "cells_for",
    "cells_of_fit",
    "check_cells",
    "chosen_options",
    "compare_with_record",
    "conditions_of",
    "describe",
    "draw_report",
    "fit_and_write",
    "make_model",
    "new_levels",
    "open_run",
    "point_to_report",
    "read_cells",
    "refuse_options_of_fit",
    "refuse_overwriting_data",
    "refuse_overwriting_run",
    "show_trail",
]


class Reading(NamedTuple):
    """Options of reading data, with the names of `celbo.app.config.READING`."""

    gene_column: str | None = None
    make_unique: bool = False
    na_as_level: bool = False
    on_disk: bool = False


_PYTHON_NAMES = {
    "condition": "conditions",
    "interaction": "interactions",
    "hidden_dim": "hidden_dims",
    "epochs": "max_epochs",
    "remedy": "remedies",
}
"""Options of the command line whose name in Python differs."""
_COMMAND_NAMES = {python: command for command, python in _PYTHON_NAMES.items()}


class Commands(TyperGroup):
    """The commands. They refuse options of other tools with celbo's name for them, and a second value of an option."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments name; see `TyperGroup`."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:  # which completes words in a shell
            _refuse_other_words(f"celbo {name}", command.params, rest)
            _refuse_second_values(f"celbo {name}", command.params, rest)
        return name, command, rest


def _refuse_other_words(command: str, parameters: Sequence[Any], arguments: Sequence[str]) -> None:
    """Refuse the first option that only other tools have; other unknown options are left to typer."""
    flags = {parameter.name: max(parameter.opts, key=len) for parameter in parameters}
    known = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    for argument in takewhile(lambda argument: argument != "--", arguments):
        flag = argument.partition("=")[0]
        if flag in known or not flag.startswith("--"):
            continue
        words = celbo_words(flag[2:].replace("-", "_"))
        ours = [flags[name] for word in words for name in (_COMMAND_NAMES.get(word), word) if name in flags]
        if ours := [option for option in ours if option.startswith("--")]:
            raise UsageError(f"{command} has no option {flag}; celbo calls it {ours[0]} ({command} --help).")


def _refuse_second_values(command: str, parameters: Sequence[Any], arguments: Sequence[str]) -> None:
    """Refuse an option that is given twice but takes one value: the first value would be dropped without a word."""
    single = {
        flag: max(parameter.opts, key=len)
        for parameter in parameters
        if isinstance(parameter, TyperOption) and not (parameter.multiple or parameter.is_flag)
        for flag in parameter.opts
    }
    before = takewhile(lambda part: part != "--", arguments)
    given = [single.get(part.partition("=")[0] if part.startswith("--") else part[:2]) for part in before]
    for option in single.values():
        if given.count(option) > 1:
            raise UsageError(f"{command} takes {option} once, and it is given {given.count(option)} times.")


def chosen_options(ctx: typer.Context, config: Path | None) -> tuple[dict[str, dict[str, Any]], Reading]:
    """Collect the options of model, training and reading. The command line has priority over the config file."""
    if config is not None:
        contents(config)  # refuses a missing file before torch is loaded
    defaults = celbo.ExpressionVAE().options()
    train = defaults.pop("train")
    chosen: dict[str, dict[str, Any]] = {"model": {}, "train": {}, "reading": {}}
    if config is not None:
        chosen = read_config(config, defaults, train)
    for parameter, value in ctx.params.items():
        name = _PYTHON_NAMES.get(parameter, parameter)
        source = ctx.get_parameter_source(parameter)
        if source is None or source.name != "COMMANDLINE":
            continue
        if name == "latent_dim" and value != "auto":
            value = _latent_dim(value)
        for table, known in (("model", defaults), ("train", train), ("reading", READING)):
            if name in known:
                chosen[table][name] = value
    return chosen, Reading(**chosen["reading"])


def _latent_dim(text: str) -> int:
    """Read ``--latent-dim``, which typer takes as text because it may be "auto"."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--latent-dim {text}: give a whole number, or auto.") from None


def refuse_options_of_fit(ctx: typer.Context) -> None:
    """Refuse options of fit beside ``--model``: a fitted model has its own."""
    of_fit = (
        *("condition", "nuisance", "interaction", "likelihood", "labels", "unlabelled", "layer", "size_factor"),
        *("allow_noninteger", "features", "mask_absent", "groupby", "config"),
    )
    given = [name for name in of_fit if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"the model of --model has options of its own; leave out {options}.")


def compare_with_record(cells: "Cells", expected: str | None, config: Path | None) -> None:
    """Warn if a run is repeated on other data."""
    if expected and cells.fingerprint is not None and cells.fingerprint["sha256_values"] != expected:
        say(f"warning: the values are not those of the run that {config} records; the result will differ.")


def check_cells(model: "ExpressionVAE", adata: "AnnData", *, unseen: str, genes_present: float) -> "Check":
    """Check cells for a fitted model, and whether they are unlike those of fit. Nothing is trained.

    Of new levels that would be learned from the cells (``unseen="adapt"``) only training can tell.
    """
    from celbo.ask.mapping import open_any
    from celbo.ask.unlike import describe_unlike, unlike
    from celbo.data.checks import check_query

    result = check_query(adata, model.schema_, unseen=unseen, genes_present=genes_present)
    if result.errors or (unseen == "adapt" and model.schema_.with_levels_of(adata.obs) != model.schema_):
        return result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check has found what opening the cells warns of
        fitted, cells = open_any(model.fitted_, adata, unseen=unseen, genes_present=genes_present)
        is_unlike = unlike(fitted, cells)
    if is_unlike is not None and (doubt := describe_unlike(is_unlike, cells)):
        result.add("unlike", "warning", doubt)
    return result


def cells_of_fit(model: "ExpressionVAE", adata: "AnnData") -> "Cells":
    """Open the cells of fit for a fitted model, with their fingerprint."""
    from celbo.data.fingerprint import fingerprint
    from celbo.data.stored import stored_values
    from celbo.fit.cells import open_cells

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fit has given these warnings
        cells = open_cells(model.fitted_, adata)
    cells.fingerprint = fingerprint(stored_values(adata, model.layer), adata, model.layer)
    return cells


def make_model(chosen: dict[str, dict[str, Any]]) -> "ExpressionVAE":
    """Make an unfitted model with the chosen options."""
    model = dict(chosen["model"])
    model["n_top_genes"] = model.get("n_top_genes") or None
    return celbo.ExpressionVAE(**model, train=celbo.TrainConfig(**chosen["train"]))


def read_cells(
    data: Path, reading: Reading, layer: str | None, conditions: "Sequence[str]", categorical: "Collection[str]" = ()
) -> "AnnData":
    """Open the cells, name their genes, and make missing conditions a level if ``--na-as-level`` is given."""
    from celbo.data.read import fill_missing_levels, name_genes, read_adata

    adata = name_genes(
        read_adata(data, layer=layer, on_disk=reading.on_disk), reading.gene_column, make_unique=reading.make_unique
    )
    return fill_missing_levels(adata, conditions, categorical=categorical) if reading.na_as_level else adata


def cells_for(model: "ExpressionVAE", data: Path, reading: Reading) -> "AnnData":
    """Read cells with the layer and the conditions of a fitted model."""
    conditions = model.schema_.conditions
    names, categorical = (
        [c.name for c in some] for some in (conditions, [c for c in conditions if c.levels is not None])
    )
    return read_cells(data, reading, model.schema_.layer, names, categorical)


def open_run(run: Path, data: Path | None, *, on_disk: bool) -> "tuple[ExpressionVAE, AnnData, Path, Reading]":
    """Load a fitted model, and read the named cells or those that it was fitted to."""
    record = record_of_run(run)
    recorded = record.get("reading", {})
    reading = Reading(**{name: recorded[name] for name in Reading._fields if name in recorded})
    reading = reading._replace(on_disk=on_disk or reading.on_disk)
    if data is None:
        if "path" not in recorded:
            raise UsageError(
                f"{run} does not say which cells it was fitted to; name an .h5ad file or a .zarr folder after it."
            )
        data = Path(recorded["path"])
        if not data.exists():
            raise UsageError(f"{run} was fitted to {data}, which no longer exists; name the cells.")
    model = celbo.load(run)
    return model, cells_for(model, data, reading), data, reading


def conditions_of(model: "ExpressionVAE", texts: "Sequence[str]", option: str) -> dict[str, str | float]:
    """Read texts of the form CONDITION=VALUE. Values of continuous conditions are numbers."""
    continuous = {condition.name for condition in model.schema_.conditions if condition.levels is None}
    given: dict[str, str | float] = {}
    for text in texts:
        matches = [c.name for c in model.schema_.conditions if text.startswith(f"{c.name}=")]  # names may have a "="
        name = max(matches, key=len) if matches else text.partition("=")[0]
        value = text[len(name) + 1 :]
        if not matches and name != name.strip():
            raise UsageError(f"{option} {text!r} has blanks before the '='; write it as CONDITION=VALUE.")
        if not value:
            raise UsageError(f"{option} {text} names no value; write it as CONDITION=VALUE.")
        if name in given:
            raise UsageError(f"{option} gives {name!r} more than once; give one value of each condition.")
        try:
            given[name] = float(value) if name in continuous else value
        except ValueError:
            raise UsageError(f"{option} {text}: {name!r} is continuous; give a number.") from None
    return given


def refuse_overwriting_run(run: Path, output: Path) -> None:
    """Refuse to write over the run that the command reads."""
    if (output / "model").resolve() in (run.resolve(), (run / "model").resolve()):
        raise UsageError(
            f"{output} is the run that this command reads, and would be lost; name another folder with -o."
        )


def refuse_overwriting_data(output: Path, data: Path) -> None:
    """Refuse to write over the cells that the command reads."""
    if output.exists() and data.exists() and output.samefile(data):
        raise UsageError(f"{output} is the data file; name another file with -o.")
    if data.is_dir() and output.resolve().is_relative_to(data.resolve()):
        raise UsageError(f"{output} is in the folder of the data, which would be damaged; name another place with -o.")


def new_levels(before: "Schema", after: "Schema", adata: "AnnData") -> list[str]:
    """List the levels that only the second of two models knows, with their numbers of cells."""
    from celbo.data.conditions import as_text

    levels = []
    for old, new in zip(before.conditions, after.conditions, strict=True):
        n_cells = as_text(adata.obs[old.name]).value_counts()
        levels += [f"{old.name}={level} ({n_cells[level]:,})" for level in (new.levels or ())[len(old.levels or ()) :]]
    return levels


def show_trail(trail: "Sequence[Step]") -> None:
    """Print the attempts of `celbo.cure`, a verdict and a comparison for each."""
    for step in trail:
        typer.echo(plain(f"{' + '.join(step.remedies) or 'no remedy'}: {step.verdict}"))
        price = "" if step.difference is None else f" (s.e. {step.se:.2f})"
        typer.echo(plain(f"  {step.said}{price}"))


def announce_run(model: "ExpressionVAE", output: Path) -> None:
    """Say which device computes, and whether a run is replaced."""
    from celbo.checkpoint import is_model_folder
    from celbo.fit.train import settle_device
    from celbo.kernels.dispatch import load_kernels

    device = settle_device(model.train.device)
    say(f"computing on {device}")
    load_kernels(device)  # warns now if it cannot keep compiled code, which is nothing for the report
    if is_model_folder(output / "model"):
        say(f"{output} has a run already, which this one replaces when it is done")


def fit_and_write(
    model: "ExpressionVAE",
    adata: "AnnData",
    output: Path,
    *,
    source: str,
    path: Path | None = None,
    reading: dict[str, Any] | None = None,
    keep_reference: bool = True,
    auto_remedy: bool = False,
    auto: Collection[str] = (),
    repeats: tuple[str | None, Path | None] = (None, None),
    recover: "Callable[[ExpressionVAE, AnnData], list[Recovery]] | None" = None,
) -> dict[str, Any]:
    """Train with a progress bar, then write the run. Warnings are shown, and repeated in the report.

    The first interrupt (Ctrl-C) ends training, and the run is written with the best weights so far; the second ends the
    command. If the model is one of several (``auto``, ``auto_remedy``), the first interrupt of these fits ends the
    command, and nothing is written.
    """
    from celbo.fit.progress import shown_progress
    from celbo.runs.claims import claimed_folder
    from celbo.runs.run_folder import write_run

    announce_run(model, output)
    with claimed_folder(output, path):
        started = time.perf_counter()
        with shown_warnings() as notes, shown_progress() as track:
            trail = None
            model, cells, choices = _fit_or_choose(model, adata, auto, repeats, stop_on_signal(track))
            if auto_remedy and model.fitted_.stopped:
                warn("no remedy was tried, because training was interrupted.")
            elif auto_remedy:
                fitted, n_notes = model, len(notes)
                model, trail = celbo.cure(fitted, adata, track=stop_on_signal(track))
                if model is not fitted:
                    cells = cells_of_fit(model, adata)
                    del notes[:n_notes]  # warnings about the first model no longer apply
        seconds = time.perf_counter() - started
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit warned about the data already
            summary = write_run(
                output,
                model,
                cells,
                seconds=seconds,
                source=source,
                notes=notes,
                reading=reading,
                recovery=None if recover is None else [row._asdict() for row in recover(model, adata)],
                keep_reference=keep_reference,
                trail=trail,
                choices=choices,
            )
            draw_report(output)
    for choice in choices:
        typer.echo(plain(str(choice)))
    if trail is not None:
        show_trail(trail)
    _say_result(summary, seconds)
    return summary


def _fit_or_choose(
    model: "ExpressionVAE",
    adata: "AnnData",
    auto: Collection[str],
    repeats: tuple[str | None, Path | None],
    track: "Track",
) -> "tuple[ExpressionVAE, Cells, list[Comparison]]":
    """Fit a model, or choose one; return it, the cells of fit, and the comparisons by which it was chosen."""
    choices: list[Comparison] = []
    if not auto:
        cells = model.prepare(adata, fingerprint=True)
        compare_with_record(cells, *repeats)
        with interruptible():
            model.fit(cells, track=track)
        return model, cells, choices
    wanted = {option: option in auto for option in ("likelihood", "latent_dim")}
    model, choices = celbo.choose(model, adata, track=track, **wanted)
    cells = cells_of_fit(model, adata)
    compare_with_record(cells, *repeats)
    return model, cells, choices


def _say_result(summary: dict[str, Any], seconds: float) -> None:
    """Say the verdict and the figures of a run."""
    metrics = summary["metrics"]
    elbo = "elbo_train" if metrics["elbo_validation"] is None else "elbo_validation"
    which = "training" if elbo == "elbo_train" else "held-out"
    say(
        f"{summary['verdict']} ELBO of {which} cells: {metrics[elbo]:,.1f} nats per cell; "
        f"epochs: {metrics['epochs']}, seconds: {seconds:.0f}."
    )


def draw_report(run: Path) -> None:
    """Write the report of a finished run. If it cannot be drawn, say why: the run is whole without it."""
    from celbo.runs.reporting import write_report

    try:
        write_report(run)
    except CelboError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is there, and `celbo report` shows the fault
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        say(
            f"warning: the report could not be drawn ({type(error).__name__}: {reason}). All other files of the run "
            f"are written. celbo report {run} tries again."
        )


def point_to_report(run: Path) -> None:
    """Say which file to open, if there is one."""
    if (run / "report.html").exists():
        say(f"open {run / 'report.html'}")


def describe(folder: "FolderDescription") -> dict[str, Any]:
    """List the contents of a model folder. A missing item is None."""
    document = folder.document
    options, schema = document.get("options", {}), document.get("schema", {})
    history = document.get("history") or [{}]
    return {
        "path": str(folder.path),
        "format": folder.format_version,
        "celbo_version": folder.celbo_version,
        "size_bytes": folder.size,
        "likelihood": options.get("likelihood"),
        "objective": options.get("objective"),
        "latent_dim": options.get("latent_dim"),
        "hidden_dims": options.get("hidden_dims"),
        "n_genes": len(schema.get("genes", [])),
        "genes": schema.get("genes", [])[:5],
        "selection": schema.get("selection"),
        "absent": (schema.get("absent") or {}).get("column"),
        "layer": schema.get("layer"),
        "size_factor": schema.get("size_factor"),
        "conditions": {item["name"]: item["levels"] or "continuous" for item in schema.get("conditions", [])},
        "nuisance": [item["name"] for item in schema.get("conditions", []) if item.get("nuisance")],
        "interactions": options.get("interactions"),
        "labels": (schema.get("labels") or {}).get("levels"),
        "epochs": len(document.get("history") or []),
        "kl_weight": history[-1].get("kl_weight"),
        "elbo_validation": history[-1].get("validation_elbo"),
        "n_parameters": sum(math.prod(shape) for shape in folder.shapes.values()),
        "has_reference": folder.has_reference,
    }
