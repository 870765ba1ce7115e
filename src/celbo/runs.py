"""A run's folder: everything that ``celbo fit`` and ``celbo embed`` write, and the summary the report shows."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad, settings
from numpy.typing import NDArray

from celbo import __version__, checkpoint, report
from celbo.advice import Diagnosis
from celbo.comparing import Comparison
from celbo.counterfactual import Counterfactual
from celbo.curing import Step
from celbo.data.sources import empty_cells
from celbo.data.stored import stored_values
from celbo.diagnostics import ACTIVE
from celbo.errors import DataError, StorageError, UsageError
from celbo.estimator import ExpressionVAE

if sys.platform != "win32":
    import resource

__all__ = [
    "WRITTEN",
    "claimed_folder",
    "embedding",
    "fingerprint",
    "measure",
    "record_of_run",
    "refuse_no_counterfactual",
    "refuse_no_embedding",
    "refuse_no_sample",
    "refuse_no_table",
    "summarise",
    "write_counterfactual",
    "write_embedding",
    "write_run",
    "write_sample",
    "write_table",
]

WRITTEN = (
    *(
        "model",
        "embedding.h5ad",
        "metrics.json",
        "history.jsonl",
        "run.json",
        "diagnosis.json",
        "cure.json",
        "choice.json",
    ),
    *("latent.png", "report.html"),
)
"""What a run writes into its folder."""
_LOCK = ".celbo-lock"
_MOST_LEVELS = 60
"""A column of obs with more levels than this is no help as a colour of the latent picture."""
_LISTED_LEVELS = 50
"""But a condition is always shown: so many of its levels, and the others as one."""
_MOST_COLOURS = 6
_FEWEST_TO_DIAGNOSE = 20
"""Held-out cells below which no diagnosis is made unasked."""
_LIBRARIES = ("anndata", "numpy", "pandas", "safetensors", "scipy", "torch")


@contextmanager
def claimed_folder(path: Path, data: Path | None = None) -> Iterator[Path]:
    """Make a run's folder, find out before training that it can be written to, and keep others from writing there.

    A lock file names the process that writes. One left on this host by a process that is gone is taken over.

    Parameters
    ----------
    path
        The folder.
    data
        What is read meanwhile, which nothing may overwrite.

    Raises
    ------
    UsageError
        If the path is a file, or the data are what the run would write.
    StorageError
        If the folder cannot be made or written to, or another process writes there.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; name a folder to write to.")
    if data is not None:
        written = {(path / name).resolve() for name in WRITTEN}
        if data.resolve() in written or path.resolve().is_relative_to(data.resolve()):
            raise UsageError(f"{data} would be overwritten by this run; name another folder with -o.")
    if (path / "model").exists():
        checkpoint.refuse_to_replace(path / "model")
    there = [name for name in WRITTEN if (path / name).exists()]
    if there and not {"run.json", "model"} & set(there):
        raise UsageError(f"{path} has {', '.join(there)} that celbo did not write; name another folder with -o.")
    lock, was_made = path / _LOCK, not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _take_lock(lock)
    except OSError as error:
        raise StorageError(f"{path} cannot be written to: {error.strerror}. Name another folder with -o.") from error
    try:
        yield path
    finally:
        with suppress(OSError):
            lock.unlink()
        if was_made:
            with suppress(OSError):  # which is raised if there is something in it, as there should be
                path.rmdir()
        _HELD.discard(lock.resolve())


_HELD: set[Path] = set()
"""Locks of this process."""


def _take_lock(lock: Path) -> None:
    """Make the lock file, or a `StorageError` that says whose it is."""
    for _ in range(2):  # once more, if the lock's owner is gone
        with suppress(FileExistsError), lock.open("x") as file:
            json.dump({"pid": os.getpid(), "host": platform.node()}, file)
            _HELD.add(lock.resolve())
            return
        try:
            owner = json.loads(lock.read_text())
            pid, host = int(owner["pid"]), str(owner["host"])
        except (OSError, ValueError, KeyError, TypeError):
            pid, host = None, None
        if pid is not None and host == platform.node() and not _holds(pid, lock):
            lock.unlink(missing_ok=True)
            continue
        whose = "another process" if pid is None else f"process {pid} on {host}"
        raise StorageError(
            f"{lock.parent} is being written by {whose}. Wait for it, or name another folder with -o. If nobody "
            f"writes there for certain, delete {lock}."
        )
    raise StorageError(f"{lock.parent} is being written by another process. Name another folder with -o.")


def _holds(pid: int, lock: Path) -> bool:
    """Whether this process holds the lock; in a container a killed one often had the same number as its successor."""
    return lock.resolve() in _HELD if pid == os.getpid() else _runs(pid)


def _runs(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    if sys.platform == "win32":  # no way to ask without harm
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def measure(model: ExpressionVAE, adata: AnnData, mu_z: NDArray[np.float32], seconds: float) -> dict[str, Any]:
    """Figures of a fitted model for ``metrics.json``; ELBO terms are unweighted, nats per cell.

    Parameters
    ----------
    model
        Just fitted.
    adata
        To these cells.
    mu_z
        Their posterior means.
    seconds
        That fitting took.
    """
    terms = model.elbo(adata, seed=model.train.seed)
    train, validation = terms.iloc[model.split_.train], terms.iloc[model.split_.validation]
    held_out = validation if len(validation) else None
    kl_per_dim = (train if held_out is None else held_out).filter(regex=r"^kl_\d+$").mean()
    active = mu_z.var(axis=0) > ACTIVE
    history = model.history_
    return {
        "n_cells": adata.n_obs,
        "n_genes": len(model.schema_.genes),
        "likelihood": model.likelihood,
        "objective": model.objective,
        "latent_dim": model.latent_dim,
        "epochs": len(history),
        "steps": history[-1].step,
        "seconds": seconds,
        "cells_per_second": len(model.split_.train) * len(history) / sum(epoch.seconds for epoch in history),
        "peak_memory_mb": _peak_memory_mb(),
        "elbo_train": float(train["elbo"].mean()),
        "elbo_validation": None if held_out is None else float(held_out["elbo"].mean()),
        "reconstruction_validation": None if held_out is None else float(held_out["reconstruction"].mean()),
        "kl_validation": None if held_out is None else float(held_out["kl"].mean()),
        "kl_per_dim": [float(value) for value in kl_per_dim],
        "active_units": int(active.sum()),
        "kl_weight_final": history[-1].kl_weight,
        "ablation": next((epoch.ablation for epoch in reversed(history) if epoch.ablation is not None), None),
    }


def fingerprint(adata: AnnData, layer: str | None) -> dict[str, Any]:
    """Shape and SHA-256 of the values and of the names, to tell later whether data are the same."""
    parts = [hashlib.sha256() for _ in range(3)]
    for block in stored_values(adata, layer).blocks():
        block = block.copy()  # it may be a view of the caller's values
        block.eliminate_zeros()
        for part, array in zip(parts, (np.diff(block.indptr), block.indices, block.data), strict=True):
            part.update(array.astype(np.float64).tobytes())
    values = hashlib.sha256(b"".join(part.digest() for part in parts))
    names = hashlib.sha256("\n".join([*adata.obs_names, "", *adata.var_names]).encode())
    return {
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "layer": layer,
        "sha256_values": values.hexdigest(),
        "sha256_names": names.hexdigest(),
    }


def embedding(model: ExpressionVAE, adata: AnnData, *, unseen: str = "refuse", genes_present: float = 0.8) -> AnnData:
    """Cells with their obs and ``obsm["X_celbo"]``, ``obsm["X_celbo_sd"]``; no counts.

    Where there are cells without a count of the model's genes, ``obs["celbo_empty"]`` says which. Options are those of
    `celbo.ExpressionVAE.posterior`.
    """
    mu_z, sd_z = model.posterior(adata, unseen=unseen, genes_present=genes_present)
    obs = adata.obs.copy()
    if (empty := empty_cells(adata, model.schema_)).any():
        obs["celbo_empty"] = empty
    return AnnData(obs=obs, obsm={"X_celbo": mu_z, "X_celbo_sd": sd_z})


def write_embedding(cells: AnnData, path: Path) -> None:
    """Write an embedding as ``.h5ad``, in one step or not at all; what is no embedding is not replaced."""
    refuse_no_embedding(path)
    _write_cells(cells, path)


def write_counterfactual(found: Counterfactual, cells: AnnData, path: Path, *, sample: bool, seed: int) -> None:
    """Write cells as they would be as ``.h5ad``, in one step or not at all; no other file is replaced.

    X is the mean, ``layers["lower"]`` and ``layers["upper"]`` its 90 % interval; or, with ``sample``, drawn counts.
    obs has the conditions asked for and the support (``celbo_share``, ``celbo_distance``, ``celbo_verdict``), var the
    changed genes.
    """
    refuse_no_counterfactual(path)
    if sample:
        adata = found.sample(seed)
    else:
        adata = AnnData(X=found.mean, obs=found.obs.copy(), layers={"lower": found.lower, "upper": found.upper})
        adata.var_names = found.genes.index
    adata.obs_names = cells.obs_names
    for name, column in found.support.items():
        adata.obs[f"celbo_{name}"] = column.to_numpy()
    for name, column in found.genes.items():
        adata.var[str(name)] = column.to_numpy()
    _write_cells(adata, path)


def write_sample(cells: AnnData, path: Path) -> None:
    """Write drawn cells as ``.h5ad``, in one step or not at all; no other file is replaced."""
    refuse_no_sample(path)
    _write_cells(cells, path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, in one step or not at all; a file that is no such table is not replaced."""
    refuse_no_table(path)
    rows = table.index.name if table.index.name == "gene" else "cell"
    columns = f"{rows},{table.columns[0]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_ours = not path.exists() or (path.is_file() and path.read_bytes().startswith(columns.encode()))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}. Name another place with -o.") from error
    if not is_ours:
        raise UsageError(f"{path} exists, and is no table that celbo wrote; name another file with -o.")
    _write(path, table.to_csv(index_label=rows))


def refuse_no_table(path: Path) -> None:
    """Refuse a name that no table can be written to."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a .csv file to write.")
    if path.suffix != ".csv":
        raise UsageError(f"{path} is to be a .csv file; name it so.")


def refuse_no_counterfactual(path: Path) -> None:
    """Refuse a name that no counterfactual can be written to."""
    _refuse_other_cells(path, lambda found: "celbo_verdict" in found.obs.columns, "no counterfactual that celbo wrote")


def refuse_no_sample(path: Path) -> None:
    """Refuse a name that no drawn cells can be written to."""
    _refuse_other_cells(path, lambda found: "celbo_sample" in found.uns, "no sample that celbo drew")


def _write_cells(cells: AnnData, path: Path) -> None:
    path = Path(os.path.realpath(path))  # where a link leads
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with settings.override(allow_write_nullable_strings=True):  # which all text is in pandas 3
            cells.write_h5ad(beside)
        beside.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Name another place with -o."
        ) from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"obs cannot be written to {path}: {error}. Drop that column, or make it text.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def refuse_no_embedding(path: Path) -> None:
    """Refuse a name that no embedding can be written to."""
    _refuse_other_cells(path, lambda found: "X_celbo" in found.obsm, "no embedding that celbo wrote")


def _refuse_other_cells(path: Path, is_ours: Callable[[AnnData], bool], else_it_is: str) -> None:
    path = Path(os.path.realpath(path))
    if path.suffix != ".h5ad":
        raise UsageError(f"{path} is to be an .h5ad file; name it so.")
    if path.exists() and not _holds_cells(path, is_ours):
        raise UsageError(f"{path} is there, and is {else_it_is}; name another file with -o.")


def _holds_cells(path: Path, is_ours: Callable[[AnnData], bool]) -> bool:
    if not path.is_file():
        return False
    try:
        found = read_h5ad(path, backed="r")
    except Exception:  # noqa: BLE001 - whatever it is, it is not ours
        return False
    ours = is_ours(found)
    found.file.close()
    return ours


def write_run(
    folder: Path,
    model: ExpressionVAE,
    adata: AnnData,
    *,
    seconds: float,
    source: str,
    notes: Sequence[str] = (),
    reading: Mapping[str, Any] | None = None,
    recovery: Sequence[Mapping[str, Any]] | None = None,
    keep_reference: bool = True,
    trail: Sequence[Step] | None = None,
    choices: Sequence[Comparison] = (),
) -> dict[str, Any]:
    """Write model, embedding, metrics, history, record of the run, picture and report.

    Parameters
    ----------
    folder
        Where to.
    model
        Just fitted.
    adata
        To these cells.
    seconds
        That fitting took.
    source
        Name of the data, for people.
    notes
        Warnings to repeat in the report.
    reading
        How the data were read, to repeat the run: path and options.
    recovery
        How well a simulated truth was recovered, where there is one.
    keep_reference
        Whether the model folder keeps the latent positions of the cells.
    trail
        What was tried to cure it, for ``cure.json``.
    choices
        What it was chosen among, for ``choice.json``.

    Returns
    -------
    dict
        The report's summary: everything it shows.
    """
    model.save(folder / "model", keep_reference=keep_reference)  # first: nothing below may lose it
    cells = embedding(model, adata)
    metrics = measure(model, adata, cells.obsm["X_celbo"], seconds)
    diagnosis = _diagnose(model, adata)
    run = {
        "options": model.options(),
        "versions": {
            "celbo": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "seed": model.train.seed,
        "reading": dict(reading or {}),
        "data": {"name": source, **fingerprint(adata, model.layer)},
        "weights_sha256": hashlib.sha256((folder / "model" / "weights.safetensors").read_bytes()).hexdigest(),
    }
    history = [asdict(epoch) for epoch in model.history_]
    summary = {
        "title": f"celbo: {source}",
        "celbo_version": __version__,
        "verdict": _verdict(metrics) if diagnosis is None else diagnosis.verdict,
        "notes": [*notes, *map(str, choices), *_notes(model)],
        "metrics": metrics,
        "diagnosis": None if diagnosis is None else diagnosis.to_json(),
        "run": run,
        "history": history,
        "latent": summarise(cells, seed=model.train.seed, first=[*model.conditions, *model.nuisance]),
        "recovery": None if recovery is None else list(recovery),
    }
    write_embedding(cells, folder / "embedding.h5ad")
    if trail is not None:
        _write(folder / "cure.json", _json([asdict(step) for step in trail]))
    if choices:
        _write(folder / "choice.json", _json([choice.to_json() for choice in choices]))
    _write(folder / "metrics.json", _json(metrics))
    _write(folder / "history.jsonl", "".join(_json(epoch, indent=None) for epoch in history))
    if diagnosis is not None:
        _write(folder / "diagnosis.json", _json(diagnosis.to_json()))
    _write(folder / "run.json", _json(run))
    _write(folder / "latent.png", report.to_png(report.latent_figure(summary)))
    _write(folder / "report.html", report.render(summary))
    return summary


def record_of_run(run: Path) -> dict[str, Any]:
    """The ``run.json`` of a run, or of the run whose model folder this is; empty if there is none."""
    for folder in (run, run.parent):
        try:
            found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(found.get("reading", {}), dict):
            return found
    return {}


def summarise(cells: AnnData, *, seed: int, first: Sequence[str] = ()) -> dict[str, Any]:
    """Lay the latent space out in a plane, with the columns of obs that can colour it, conditions first."""
    layout = report.layout(cells.obsm["X_celbo"], seed=seed)
    obs = cells.obs.iloc[layout.rows]
    columns = [*first, *(name for name in obs.columns if name not in first)]
    colours = {str(name): colour for name in columns if (colour := _colour(obs[name], name in first)) is not None}
    return {
        "method": layout.method,
        "xy": np.round(layout.xy, 3).tolist(),
        "n_cells_shown": len(layout.rows),
        "n_cells": cells.n_obs,
        "colours": dict(list(colours.items())[:_MOST_COLOURS]),
    }


def _colour(column: "pd.Series[Any]", is_condition: bool = False) -> dict[str, Any] | None:
    """What the pictures show of a column; of a condition of very many levels those with most cells."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column) and column.nunique() > 12:
        values: NDArray[np.float64] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return {"kind": "continuous", "values": [float(v) if np.isfinite(v) else None for v in values]}
    n_levels = column.nunique()
    if is_condition and n_levels > _MOST_LEVELS:
        listed = column.value_counts().index[:_LISTED_LEVELS]
        column = column.astype(object).where(column.isin(listed) | column.isna(), f"{n_levels - len(listed):,} others")
    elif not 2 <= n_levels <= _MOST_LEVELS:
        return None
    return {"kind": "categorical", "values": [None if pd.isna(value) else str(value) for value in column]}


def _diagnose(model: ExpressionVAE, adata: AnnData) -> Diagnosis | None:
    """None for so few cells that nothing can be said of them, and for a plain autoencoder."""
    few = min(len(model.split_.train), len(model.split_.validation) or _FEWEST_TO_DIAGNOSE) < _FEWEST_TO_DIAGNOSE
    return None if few or model.objective == "autoencoder" else model.diagnose(adata, seed=model.train.seed)


def _notes(model: ExpressionVAE) -> list[str]:
    """Say so where training was on something else than the ELBO."""
    if model.recipe().is_bound:
        return []
    return [
        f"trained with {', '.join(model.remedies)}: what was maximised is not the ELBO itself. All figures here are "
        "those of the ELBO, unweighted."
    ]


def _verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence on what was learned."""
    active, total = metrics["active_units"], metrics["latent_dim"]
    if metrics["objective"] == "autoencoder":
        return f"A plain autoencoder with {total} latent dimensions: nothing ties its latent space to a prior."
    if active == 0:
        return (
            f"The latent space collapsed: none of its {total} dimensions varies between cells, "
            "so it shows a blob without separation."
        )
    unit = "dimension varies" if active == 1 else "dimensions vary"
    return f"{active} of {total} latent {unit} between cells."


def _peak_memory_mb() -> float | None:
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _json(value: Any, indent: int | None = 1) -> str:
    """JSON, where what is not finite is null."""

    def finite(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: finite(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [finite(part) for part in item]
        return None if isinstance(item, float) and not np.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def _write(path: Path, content: str | bytes) -> None:
    """Write a file in one step or not at all."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        # A file name that is no text in this locale keeps its bytes.
        beside.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Free some space, or name another place."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
