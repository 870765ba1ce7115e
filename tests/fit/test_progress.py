"""What is shown while a model is trained: on a terminal, in a notebook, and elsewhere."""

import os
import subprocess
import sys

import pytest

import celbo
from celbo.fit import progress

FIT = """
import celbo
cells = celbo.simulate_cells(n_cells=120, n_genes=20, seed=0)
model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=celbo.TrainConfig(max_epochs=EPOCHS))
model.fit(cells, progress=PROGRESS)
print("fitted")
"""


def fit(epochs=30, shown=True):
    return FIT.replace("EPOCHS", str(epochs)).replace("PROGRESS", str(shown))


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX terminal")
@pytest.mark.parametrize("shown", [True, pytest.param(False, marks=pytest.mark.long)])
def test_fit_shows_a_bar_on_a_terminal_unless_it_is_switched_off(shown):
    outside, inside = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", fit(shown=shown)], stdout=subprocess.PIPE, stderr=inside, text=True, env=environment
    )
    os.close(inside)
    screen = b""
    while True:
        try:
            screen += os.read(outside, 65536)
        except OSError:  # all is read
            break
    os.close(outside)
    assert done.returncode == 0
    assert ("held-out ELBO -" in screen.decode()) == shown
    assert ("left at most" in screen.decode()) == shown
    assert done.stdout == "fitted\n"


@pytest.mark.parametrize("terminal", ["file", "dumb"])
def test_elsewhere_a_line_appears_now_and_then(cells, capsys, monkeypatch, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal == "dumb" else "0")
    monkeypatch.setenv("TERM", "dumb")
    model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=celbo.TrainConfig(max_epochs=2))
    model.fit(cells)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    model.fit(cells)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 2 of at most 2, held-out ELBO -" in err
    assert "min left" in err
    assert "\x1b" not in err
    model.fit(cells, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_track_that_is_given_takes_the_place_of_the_bar(cells, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    seen = []

    def track(minibatches, plan, history):
        seen.append(len(history))
        return minibatches

    train = celbo.TrainConfig(max_epochs=2)
    is_new = (cells.obs["batch"] == "batch_1").to_numpy()
    known = cells[~is_new].copy()
    known.obs["batch"] = ["a" if row % 2 else "b" for row in range(known.n_obs)]
    model = celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), nuisance=["batch"], train=train)
    model.fit(known, track=track).map_query(cells[is_new], track=track)
    assert seen == [0, 1, 0, 1]
    assert capsys.readouterr() == ("", "")
    model.map_query(cells[is_new], progress=False)
    assert capsys.readouterr() == ("", "")
    model.map_query(cells[is_new])
    assert "epoch 1 of at most 2" in capsys.readouterr().err


def test_a_second_fit_at_the_same_time_shows_no_second_bar(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.shown_progress():
        assert "preparing" in capsys.readouterr().err
        with progress.shown_progress() as track:
            assert list(track([1, 2], None, [])) == [1, 2]
            assert capsys.readouterr() == ("", "")
    with pytest.raises(KeyboardInterrupt), progress.shown_progress():
        raise KeyboardInterrupt
    capsys.readouterr()
    with progress.shown_progress():  # the place is free again
        assert "preparing" in capsys.readouterr().err


IN_NOTEBOOK = """
import threading, warnings
import celbo
warnings.simplefilter("ignore")
cells = celbo.simulate_cells(n_cells=120, n_genes=20, seed=0)
def model(epochs):
    train = celbo.TrainConfig(max_epochs=epochs, patience=epochs)
    return celbo.ExpressionVAE(latent_dim=2, hidden_dims=(8,), train=train)
"""


@pytest.fixture(scope="module")
def notebook():
    """Run cells in a real kernel; return their outputs."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    book = nbformat.v4.new_notebook()
    client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=True)
    with client.setup_kernel():

        def run(source, during=None):
            book.cells.append(nbformat.v4.new_code_cell(source))
            client.on_cell_execute = None if during is None else (lambda **_: during(client))
            return client.execute_cell(book.cells[-1], len(book.cells) - 1)["outputs"]

        assert run(IN_NOTEBOOK) == []
        yield run


@pytest.mark.long
def test_a_notebook_shows_a_bar_and_keeps_what_was_printed_apart(notebook):
    shown, printed = notebook("fitted = model(30).fit(cells); print('done')")
    assert (printed["name"], printed["text"]) == ("stdout", "done\n")
    assert shown["output_type"] == "display_data"
    assert "epoch 30 of at most 30, held-out ELBO -" in shown["data"]["text/html"]
    assert notebook("fitted = model(2).fit(cells, progress=False)") == []
    thread = "thread = threading.Thread(target=lambda: model(3).fit(cells)); thread.start(); thread.join(); print(1)"
    outputs = notebook(thread)
    assert [output.get("text") for output in outputs if output["output_type"] == "stream"] == ["1\n"]


@pytest.mark.long
def test_the_stop_button_of_a_notebook_leaves_a_usable_model(notebook):
    import threading

    def stop_soon(client):
        threading.Timer(8, lambda: os.kill(client.km.provisioner.pid, 2)).start()

    notebook("long = model(10**6)\nlong.fit(cells)", during=stop_soon)
    (printed,) = notebook("print(long.fitted_.stopped, long.embed(cells).shape, len(long.history_) > 0)")
    assert printed["text"] == "interrupted (120, 2) True\n"
