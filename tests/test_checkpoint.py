"""The model folder: whole or not there, and never trusted."""

import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celbo import CelboError, ModelFileError, StorageError, __version__
from celbo.checkpoint import describe_folder, read_folder, write_folder

DOCUMENT = {"options": {"latent_dim": 2}, "schema": {"genes": ["A", "β-globin"]}}
WEIGHTS = {"fc_mu.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7)}
REFERENCE = {"mu_z": np.ones((4, 2), np.float32), "held_out": np.array([0, 1, 0, 0], np.uint8)}


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "model", DOCUMENT, WEIGHTS, REFERENCE)
    return tmp_path / "model"


def sign(folder):
    """Make the manifest agree with whatever the files hold now."""
    import hashlib

    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    files = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


def test_what_is_written_is_read(folder):
    found = read_folder(folder)
    assert found.document == DOCUMENT
    assert same(found.weights, WEIGHTS)
    assert same(found.reference, REFERENCE)
    assert (found.celbo_version, found.format_version) == (__version__, 1)


def test_a_folder_is_described_without_its_tensors(folder):
    found = describe_folder(folder)
    assert found.shapes == {"fc_mu.weight": (2, 3), "steps": ()}
    assert found.has_reference
    assert found.size == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def test_a_runs_folder_leads_to_its_model(folder):
    assert read_folder(folder.parent).document == DOCUMENT


def test_an_old_model_is_replaced_and_nothing_is_left_beside_it(folder):
    write_folder(folder, {"options": {}}, WEIGHTS)
    assert read_folder(folder).document == {"options": {}}
    assert read_folder(folder).reference is None
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("what", ["file", "other files", "link"])
def test_what_is_no_model_is_not_replaced(tmp_path, what):
    path = tmp_path / "mine"
    if what == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    if what == "link":
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match="name another place"):
        write_folder(path, DOCUMENT, WEIGHTS)
    assert (tmp_path / "mine" if what == "file" else tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_weights_that_are_not_finite_are_neither_written_nor_read(folder):
    with pytest.raises(CelboError, match=r"fc_mu\.bias"):
        write_folder(folder, DOCUMENT, {"fc_mu.bias": np.array([1, np.nan], np.float32)})
    assert same(read_folder(folder).weights, WEIGHTS)
    (folder / "weights.safetensors").write_bytes(safetensors.numpy.save({"w": np.array([1, np.inf, np.nan])}))
    sign(folder)
    with pytest.raises(ModelFileError, match="2 numbers of w are not finite"):
        read_folder(folder)


def test_a_previous_model_is_found_where_a_replacement_was_killed_between_its_renames(folder):
    folder.rename(folder.parent / ".model.previous")
    assert read_folder(folder).document == DOCUMENT
    write_folder(folder, {"options": {}}, WEIGHTS)
    assert read_folder(folder).document == {"options": {}}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_flipped_bit_is_seen_in_every_file(folder):
    for path in [path for path in folder.iterdir() if path.name != "manifest.json"]:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ModelFileError, match=f"sha256 mismatch: .*{path.name}"):
            read_folder(folder)
        path.write_bytes(whole)


def test_a_truncated_file_is_seen_by_its_size(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelFileError, match=r"has \d+ bytes and should have \d+"):
        read_folder(folder)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def header(entries, data=b""):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FORGED_WEIGHTS = {
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 100) + b"{}",
    "nothing": b"",
    "four bytes": b"abcd",
    "no JSON": header(b"\xff\xfe{]"),
    "JSON too deep": header(b"[" * 100_000),
    "a list": header(b"[]"),
    "an absurd shape": header({"w": tensor((10**9, 10**9))}, b"\0" * 8),
    "an overflowing shape": header({"w": tensor((2**32, 2**32), (0, 0))}),
    "a negative shape": header({"w": tensor((-1, -2))}, b"\0" * 8),
    "a fractional shape": header({"w": tensor((0.5, 4))}, b"\0" * 8),
    "a shape of text": header({"w": tensor("ab")}, b"\0" * 8),
    "an unknown type": header({"w": tensor(dtype="OBJECT")}, b"\0" * 8),
    "overlapping tensors": header({"v": tensor(), "w": tensor((1,), (4, 8))}, b"\0" * 8),
    "a gap": header({"w": tensor((1,), (4, 8))}, b"\0" * 8),
    "data beyond the end": header({"w": tensor()}, b"\0" * 4),
    "more data than tensors": header({"w": tensor()}, b"\0" * 12),
    "offsets that are no pair": header({"w": tensor(offsets=(0, 4, 8))}, b"\0" * 8),
}


@pytest.mark.parametrize("forgery", FORGED_WEIGHTS)
def test_forged_weights_are_refused_though_their_checksum_agrees(folder, forgery):
    (folder / "weights.safetensors").write_bytes(FORGED_WEIGHTS[forgery])
    sign(folder)
    for read in (read_folder, describe_folder):
        with pytest.raises(ModelFileError, match="is not a safetensors file of a model"):
            read(folder)


def test_a_pickle_is_refused_by_name_and_not_run(folder, tmp_path):
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    sign(folder)
    with pytest.raises(ModelFileError, match="looks like a Python pickle"):
        read_folder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "model/../../x", "manifest.json", "code.py", ""])
def test_names_that_no_model_has_are_refused(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match="which no model has"):
        read_folder(folder)


def test_links_are_not_followed(folder, tmp_path):
    shutil.move(folder / "weights.safetensors", tmp_path / "elsewhere")
    (folder / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="not a plain file"):
        read_folder(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"files": []}',
        b'{"files": {"model.json": 3}}',
        b"9" * 5000,
    ],
)
@pytest.mark.parametrize("name", ["model.json", "manifest.json"])
def test_json_that_is_none_is_refused(folder, name, text):
    (folder / name).write_bytes(text)
    if name != "manifest.json":
        sign(folder)
    with pytest.raises(ModelFileError):
        read_folder(folder)


def test_a_newer_format_is_refused_by_name(folder):
    model = json.loads((folder / "model.json").read_text()) | {"format_version": 2, "celbo_version": "9.1.0"}
    (folder / "model.json").write_text(json.dumps(model))
    sign(folder)
    with pytest.raises(ModelFileError, match=r"format 2, written by celbo 9\.1\.0.*Upgrade celbo"):
        read_folder(folder)


def test_what_is_no_folder_is_refused_in_words(tmp_path):
    with pytest.raises(ModelFileError, match="does not exist"):
        read_folder(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"has no manifest\.json"):
        read_folder(tmp_path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_any_file_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    write_folder(folder, DOCUMENT, WEIGHTS, REFERENCE)
    path = folder / data.draw(st.sampled_from(sorted(entry.name for entry in folder.iterdir())))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    if data.draw(st.booleans()) and path.name != "manifest.json":
        sign(folder)
    try:
        found = read_folder(folder)
    except ModelFileError:
        return
    assert isinstance(found.document, dict)
    assert all(np.isfinite(value).all() for value in found.weights.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_forged_folder_is_refused_quickly_and_without_memory(folder):
    (folder / "weights.safetensors").write_bytes(FORGED_WEIGHTS["an absurd shape"])
    sign(folder)
    code = (
        "import sys, time, celbo.checkpoint as c\n"
        "start = time.monotonic()\n"
        f"try: c.read_folder({str(folder)!r})\n"
        "except c.ModelFileError: print(time.monotonic() - start, 'torch' in sys.modules)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch_was_loaded, _, kilobytes, _ = done.stdout.split()
    assert float(seconds) < 1
    assert int(kilobytes) < 100_000
    assert torch_was_loaded == "False"


WRITER = """
import resource, signal, sys
import numpy as np
from celbo.checkpoint import write_folder
path, limit = sys.argv[1], int(sys.argv[2])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
version = 1
while True:
    write_folder(path, {"version": version}, {"w": np.full(20_000, version, np.float32)})
    version += 1
    if limit:
        break
"""


def test_a_disk_that_takes_no_more_leaves_the_old_model_whole(tmp_path):
    write_folder(tmp_path / "model", {"version": 0}, {"w": np.zeros(20_000, np.float32)})
    command = [sys.executable, "-c", WRITER, str(tmp_path / "model"), "50000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "StorageError" in done.stderr
    assert "What was there before is whole" in done.stderr
    assert read_folder(tmp_path / "model").document == {"version": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_writer_killed_at_any_moment_leaves_a_whole_model(tmp_path):
    write_folder(tmp_path / "model", {"version": 0}, {"w": np.zeros(20_000, np.float32)})
    moments = random.Random(0)
    versions = []
    for _ in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "model"), "0"])
        started = describe_folder(tmp_path / "model").document["version"]
        deadline = time.monotonic() + 20
        while describe_version(tmp_path) == started and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found = read_folder(tmp_path / "model")
        np.testing.assert_array_equal(found.weights["w"], np.float32(found.document["version"]))
        versions.append(found.document["version"])
    assert max(versions) > 1


def describe_version(tmp_path):
    """The version on disk now; a replacement may be under way while we look."""
    try:
        return describe_folder(tmp_path / "model").document["version"]
    except ModelFileError:
        return None
