"""Several fits at the same time in one process, and fits in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ["threads", "spawn", *(["fork"] if sys.platform == "linux" else [])]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_beside_others_gives_the_same_bytes_as_alone(kind):
    """In two Python threads at a time, and in processes that are started after torch computed on several threads."""
    program = Path(__file__).with_name("side_by_side.py")
    done = subprocess.run(
        [sys.executable, program, kind],
        capture_output=True,
        text=True,
        timeout=1800,  # a process that waits for ever fails the test
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout == f"{kind} same weights 2\n", done.stderr
