"""The model folder: whole or not there, and never trusted."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celbo import CelboError, ModelFileError, StorageError, __version__, checkpoint
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


@pytest.mark.parametrize("kind", ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f4", ">i8"])
def test_tensors_of_every_kind_and_layout_come_back(tmp_path, kind):
    square = np.arange(9).reshape(3, 3).astype(kind)
    weights = {
        "square": square,
        "turned": square.T,
        "spread": square[::2, ::2],
        "one": square[1, 1],
        "none": square[:0],
    }
    write_folder(tmp_path / "model", {}, weights)
    found = read_folder(tmp_path / "model").weights
    assert all(
        np.array_equal(found[name], value) and found[name].shape == value.shape for name, value in weights.items()
    )
    assert {value.dtype for value in found.values()} == {np.dtype(kind).newbyteorder("=")}
    assert all(value.flags.writeable for value in found.values())


def test_a_header_whose_length_begins_like_a_pickle_is_none(tmp_path):
    lengths = set()
    for n in range(240, 270):
        write_folder(tmp_path / "model", {}, {"w" * n: np.zeros(2), "v" * n: np.zeros(2)})
        assert len(read_folder(tmp_path / "model").weights) == 2
        lengths.add((tmp_path / "model" / "weights.safetensors").read_bytes()[:1])
    assert b"\x80" in lengths


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


def test_a_link_to_a_model_stays_and_what_it_leads_to_is_replaced(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    write_folder(tmp_path / "link", {"options": {}}, WEIGHTS)
    assert (tmp_path / "link").is_symlink()
    assert read_folder(folder).document == read_folder(tmp_path / "link").document == {"options": {}}


def test_a_model_can_be_written_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_folder(".", DOCUMENT, WEIGHTS)
    assert read_folder(tmp_path / "here").document == DOCUMENT


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
    with pytest.raises(ModelFileError, match="2 numbers of 'w' are not finite"):
        read_folder(folder)


def test_a_reference_that_could_not_be_read_again_is_not_written(folder):
    with pytest.raises(CelboError, match="mu_z"):
        write_folder(folder, DOCUMENT, WEIGHTS, {"mu_z": np.array([np.nan])})
    assert same(read_folder(folder).reference, REFERENCE)


@pytest.mark.parametrize(
    ("document", "weights"),
    [
        ({"value": float("nan")}, WEIGHTS),
        ({"value": {1, 2}}, WEIGHTS),
        ({"value": "\ud800"}, WEIGHTS),
        ({"format_version": 2}, WEIGHTS),
        ({"value": "a" * (33 << 20)}, WEIGHTS),
        ({}, {"w": np.array(["text"])}),
        ({}, {"w": np.array([None])}),
        ({}, {"w": np.zeros(2, np.complex64)}),
        ({}, {f"{n:0200}": np.zeros(1) for n in range(6000)}),
    ],
    ids=["NaN", "a set", "half a character", "a version", "too long", "text", "objects", "complex", "many names"],
)
def test_what_could_not_be_read_again_replaces_nothing(folder, document, weights):
    with pytest.raises(CelboError) as raised:
        write_folder(folder, document, weights)
    assert type(raised.value) is CelboError
    assert read_folder(folder).document == DOCUMENT
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_disk_without_room_is_noticed_before_writing(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes, and its disk has 100 left"):
        write_folder(folder, {"options": {}}, WEIGHTS)
    assert read_folder(folder).document == DOCUMENT


@pytest.mark.parametrize(
    "interruption", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"]
)
def test_an_interruption_between_the_renames_puts_the_old_model_back(folder, monkeypatch, interruption):
    rename = Path.rename

    def interrupted(self, target):
        if ".new-" in self.name:
            raise interruption
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        write_folder(folder, {"options": {}}, WEIGHTS)
    assert read_folder(folder).document == DOCUMENT
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_killed_writers_left_is_cleared_once_it_is_old(folder):
    old, young, foreign = (
        folder.parent / name for name in (".model.new-01234567", ".model.new-89abcdef", ".model.new")
    )
    for left in (old, young, foreign):
        left.mkdir()
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))
    write_folder(folder, DOCUMENT, WEIGHTS)
    assert [left.exists() for left in (old, young, foreign)] == [False, True, True]


def test_a_model_replaced_while_it_is_read_is_not_mixed_with_the_new_one(folder, monkeypatch):
    check = checkpoint._check

    def check_then_lose(path):
        checked = check(path)
        monkeypatch.undo()
        write_folder(folder, {"options": {}}, {name: value + 1 for name, value in WEIGHTS.items()})
        return checked

    monkeypatch.setattr(checkpoint, "_check", check_then_lose)
    with pytest.raises(ModelFileError, match="sha256 mismatch"):
        read_folder(folder)


def test_a_half_deleted_previous_model_is_none(folder):
    (folder / "manifest.json").unlink()
    folder.rename(folder.parent / ".model.previous")
    with pytest.raises(ModelFileError, match="does not exist"):
        read_folder(folder)


def test_a_previous_model_is_found_where_a_replacement_was_killed_between_its_renames(folder):
    folder.rename(folder.parent / ".model.previous")
    assert read_folder(folder).document == DOCUMENT
    write_folder(folder, {"options": {}}, WEIGHTS)
    assert read_folder(folder).document == {"options": {}}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_36_a_flipped_bit_is_seen_in_every_file(folder):
    for path in [path for path in folder.iterdir() if path.name != "manifest.json"]:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ModelFileError, match=f"sha256 mismatch: .*{path.name}"):
            read_folder(folder)
        path.write_bytes(whole)


def test_36_a_truncated_file_is_seen_by_its_size(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelFileError, match=r"sha256 mismatch: .* is truncated: it has \d+ bytes and should have \d+"):
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
    "a shape of endless numbers": header(
        b'{"w": {"dtype": "F32", "data_offsets": [0, 0], "shape": [' + b",".join([b"9" * 4000] * 200) + b"]}}"
    ),
    "more dimensions than numpy has": header({"w": tensor([1] * 100, (0, 4))}, b"\0" * 4),
    "offsets that are no pair": header({"w": tensor(offsets=(0, 4, 8))}, b"\0" * 8),
}


@pytest.mark.parametrize("forgery", FORGED_WEIGHTS)
def test_35_forged_weights_are_refused_though_their_checksum_agrees(folder, forgery):
    (folder / "weights.safetensors").write_bytes(FORGED_WEIGHTS[forgery])
    sign(folder)
    for read in (read_folder, describe_folder):
        with pytest.raises(ModelFileError, match="is not a safetensors file of a model"):
            read(folder)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_35_a_pickle_is_refused_by_name_and_not_run(folder, tmp_path, protocol, signed):
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol))
    if signed:
        sign(folder)
    with pytest.raises(ModelFileError, match="looks like a Python pickle"):
        read_folder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "model/../../x", "manifest.json", "code.py", ""])
def test_37_names_that_no_model_has_are_refused(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match="which no model has"):
        read_folder(folder)


FILES = ["model.json", "weights.safetensors", "reference.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_37_links_are_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="not a plain file"):
        read_folder(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [None, Path.mkdir, os.mkfifo], ids=["nothing", "a folder", "a pipe"])
def test_what_is_no_file_is_refused_without_waiting_for_it(folder, name, make):
    (folder / name).unlink()
    if make is not None:
        make(folder / name)
    with pytest.raises(ModelFileError, match=r"is missing|not a plain file|no manifest\.json"):
        read_folder(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX users")
def test_a_folder_without_permission_is_a_matter_of_storage(folder):
    (folder / "weights.safetensors").chmod(0)
    if child := os.fork():  # in a process that may become nobody, as root may read everything
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == StorageError.exit_code
        return
    outcome = 0
    try:
        for part in (folder, *folder.parents[:3]):
            part.chmod(0o755)
        if os.geteuid() == 0:
            os.setuid(65534)
        read_folder(folder)
    except CelboError as error:
        outcome = error.exit_code
    finally:
        os._exit(outcome)


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
    (folder / "files-of-the-future.json").write_text("{}")
    sign(folder)
    with pytest.raises(ModelFileError, match="Upgrade celbo"):
        read_folder(folder)


@pytest.mark.parametrize(
    "versions",
    [
        {"format_version": 0},
        {"format_version": -1},
        {"format_version": True},
        {"format_version": "1"},
        {"format_version": 1.0},
        {"format_version": None},
        {"celbo_version": None},
        {"celbo_version": ""},
        {"format_version": 2, "celbo_version": "\x1b[2Jcelbo"},
    ],
)
def test_versions_that_are_none_are_refused_and_not_shown(folder, versions):
    model = json.loads((folder / "model.json").read_text()) | versions
    (folder / "model.json").write_text(json.dumps(model))
    sign(folder)
    with pytest.raises(ModelFileError, match="does not say which format") as raised:
        read_folder(folder)
    assert "\x1b" not in str(raised.value)


def test_what_is_no_folder_is_refused_in_words(tmp_path):
    with pytest.raises(ModelFileError, match="does not exist"):
        read_folder(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"has no manifest\.json"):
        read_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFileError, match="is not a folder"):
        read_folder(tmp_path / "file")


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
    signed = data.draw(st.booleans()) and path.name != "manifest.json"
    if signed:
        sign(folder)
    try:
        found = read_folder(folder)
    except ModelFileError:
        return
    assert signed or (found.document == DOCUMENT and same(found.weights, WEIGHTS))
    assert isinstance(found.document, dict)
    assert all(np.isfinite(value).all() for value in found.weights.values())


HOSTILE_FILES = {
    "an absurd shape": ("weights.safetensors", FORGED_WEIGHTS["an absurd shape"]),
    "a header of 2**63 bytes": ("weights.safetensors", FORGED_WEIGHTS["a header of 2**63 bytes"]),
    "a wide header": ("weights.safetensors", header(b"[" + b"[]," * 20_000_000 + b"0]")),
    "endless numbers": ("weights.safetensors", FORGED_WEIGHTS["a shape of endless numbers"]),
    "a pickle": ("weights.safetensors", pickle.dumps([0] * 1_000_000)),
    "weights of NaN": ("weights.safetensors", safetensors.numpy.save({"w": np.full(1_000_000, np.nan, np.float32)})),
    "deep JSON": ("model.json", b'{"a":' * 900_000),
    "wide JSON": ("model.json", b'{"x": [' + b"[]," * 10_000_000 + b"0]}"),
    "wide JSON, just allowed": ("model.json", b'{"x": [' + b"[]," * 499_000 + b"0]}"),
    "long JSON": ("model.json", b" " * 100_000_000),
    "a long manifest": ("manifest.json", b" " * 100_000_000),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("forgery", HOSTILE_FILES)
def test_35_a_hostile_folder_is_refused_quickly_and_without_memory_or_torch(folder, forgery):
    name, content = HOSTILE_FILES[forgery]
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        sign(folder)
    code = """
        import sys, time
        from celbo import ModelFileError, checkpoint
        start = time.process_time()
        try:
            checkpoint.read_folder(sys.argv[1])
        except ModelFileError:
            print(time.process_time() - start, "torch" in sys.modules)
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, torch_was_loaded, _, kilobytes, _ = done.stdout.split()
    print(f"{forgery}: {float(seconds):.3f} s, {int(kilobytes) / 1024:.0f} MiB")
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


def test_25_a_disk_that_takes_no_more_leaves_the_old_model_whole(tmp_path):
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
