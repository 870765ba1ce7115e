"""Read the record of a run, ``run.json``, without a library."""

import json
from pathlib import Path
from typing import Any

__all__ = ["record_of_run", "run_of"]


def run_of(path: Path) -> Path:
    """Return the folder of a run, which may be named by its model folder.

    Examples
    --------
    >>> run_of(Path("run/model")) == run_of(Path("run"))
    True
    """
    return path.parent if path.name == "model" and not (path / "run.json").exists() else path


def record_of_run(run: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run, or of the run whose model folder this is; empty if there is none."""
    try:
        record = json.loads((run_of(run) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("reading", {}), dict) else {}
