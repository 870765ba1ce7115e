"""The machine of a container: nothing but the output folder can be written to, and there is no home folder."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
import pytest

import celbo

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the mount namespaces of Linux"),
]

NOBODY = 65534
READ_ONLY = """
set -e
mount --make-rprivate /
for folder in $KEPT; do mount --bind "$folder" "$folder"; done
for place in $(cut -d ' ' -f 5 /proc/self/mountinfo); do
    case " $KEPT /proc " in *" $place "*) ;; *) mount -o remount,bind,ro "$place" 2>/dev/null || true ;; esac
done
cd /
exec "$@"
"""
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AS_NOBODY += [f"--{kind}-caps={only}+dac_read_search" for kind, only in (("inh", "-all,"), ("ambient", ""))]
"""This user owns nothing and may write nowhere, but enter every folder: that of the tests may be private."""


def works(command):
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def folder():
    """A folder that another user can enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def container(folder):
    """Run a command of celbo where only the given folders can be written to, as another user if that can be had."""
    if os.getuid() == 0:
        namespace = ["unshare", "--mount"]
        import_celbo = [*AS_NOBODY, "env", f"PYTHONPATH={source()}", sys.executable, "-c", "import celbo"]
        user = AS_NOBODY if works(import_celbo) else []
    else:
        namespace, user = ["unshare", "--map-root-user", "--mount"], []
    if not works([*namespace, "mount", "--make-rprivate", "/"]):
        pytest.skip("this process may make no mount namespace (docker run --privileged allows it)")

    def run(*arguments, writable, **variables):
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": source(),
            "HOME": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "KEPT": " ".join(map(str, writable)),
            **variables,
        }
        for path in writable:
            path.mkdir(exist_ok=True)
            os.chown(path, *((NOBODY, NOBODY) if user else (-1, -1)))
        return subprocess.run(
            [*namespace, "sh", "-c", READ_ONLY, "sh", *user, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def source():
    return str(Path(celbo.__file__).parents[1])


@pytest.fixture(scope="module")
def data(folder, cells):
    cells.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def lines_of(done):
    """Lines on stderr of a command that ended well. Every line is celbo's own."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "atplotlib" not in done.stderr, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("temporary", ["with a temporary folder", "with nothing else"])
def test_only_the_output_folder_can_be_written_to(container, folder, data, temporary):
    has_temporary = temporary == "with a temporary folder"
    out, spare = folder / temporary.replace(" ", "-"), folder / "temporary"
    writable = [out, spare] if has_temporary else [out]
    variables = {"TMPDIR": str(spare)} if has_temporary else {}

    for place in (Path(celbo.__file__).parent, "/tmp", "/var/tmp", "/dev/shm", folder):
        assert container("touch", f"{place}/file", writable=writable).returncode != 0, place
    assert container("touch", out / "file", writable=writable).returncode == 0
    (out / "file").unlink()

    def command(*arguments):
        celbo_command = (sys.executable, "-m", "celbo", *arguments)
        return lines_of(container(*celbo_command, writable=writable, **variables))

    small = ("--epochs", "2", "--hidden-dim", "8", "--condition", "batch", "--likelihood", "poisson")
    lines = command("fit", data, "-o", out / "run", *small)
    of_model = ("posterior collapse", "condition")
    warnings = [line for line in lines if line.startswith("warning: ") and not any(word in line for word in of_model)]
    assert len(warnings) == (0 if has_temporary else 1), warnings
    assert all("set NUMBA_CACHE_DIR to a folder" in line for line in warnings)
    page, picture = (out / "run" / "report.html").read_bytes(), (out / "run" / "latent.png").read_bytes()
    assert b"NUMBA_CACHE_DIR" not in page

    assert len([line for line in command("embed", out / "run", data, "-o", out / "z.h5ad") if "warning" in line]) <= 1
    assert anndata.read_h5ad(out / "z.h5ad").obsm["X_celbo"].shape == (300, 10)

    (out / "run" / "report.html").unlink()
    assert command("report", out / "run") == [f"open {out / 'run' / 'report.html'}"]
    assert (out / "run" / "report.html").read_bytes() == page
    assert (out / "run" / "latent.png").read_bytes() == picture

    assert {path.name for path in out.iterdir()} == {"run", "z.h5ad"}
    assert not [path.name for path in (out / "run").iterdir() if path.name.startswith(".")]
    if has_temporary:
        (kept,) = spare.glob("celbo-cache-*")
        assert [path.name for path in spare.iterdir()] == [kept.name]
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700
        assert list(kept.rglob("compiled.poisson*.nbc"))


def test_the_demo_runs_there_too(container, folder):
    out = folder / "of-the-demo"
    lines = lines_of(container(sys.executable, "-m", "celbo", "demo", "-o", out / "demo", writable=[out]))
    assert lines[-1] == f"open {out / 'demo' / 'report.html'}"
    assert (out / "demo" / "report.html").exists()
