"""Public names and options of the command line: what is gone since they were recorded is in the changelog."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BEFORE = json.loads((HERE / "recorded" / "public.json").read_text())
REMOVED = (HERE.parent / "CHANGELOG.md").read_text().partition("### Removed")[2]


@pytest.fixture(scope="module")
def now():
    spec = importlib.util.spec_from_file_location("record_public", HERE / "recorded" / "record_public.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.public()


@pytest.mark.parametrize("kind", ["names", "commands"])
def test_what_is_gone_is_in_the_changelog(now, kind):
    for name, parts in BEFORE[kind].items():
        short = name.rpartition(".")[2]
        assert name in now[kind] or f"`{short}`" in REMOVED or f".{short}`" in REMOVED, name
        gone = set(parts) - set(now[kind].get(name, parts))
        assert all(f"`{part}`" in REMOVED for part in gone), (name, gone)
