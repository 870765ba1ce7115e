"""The report: a pure function from a JSON summary to one page that is safe to open and to send."""

import json
import math
import shutil
import subprocess
import sys
import threading
import warnings
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from celbo.errors import DataError
from celbo.report.figures import MISSING, OTHER, PALETTE, history_figure, kl_figure, latent_figure, legend, to_png
from celbo.report.latent import layout
from celbo.report.page import render
from celbo.report.text import DASH, MINUS, clean, number, shorten
from celbo.runs.reporting import summarise

ATTACK = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def summary_of(n_cells=60, n_types=4, name="type"):
    """A summary with made-up numbers; ``name`` goes into every text."""
    rng = np.random.default_rng(0)
    types = [f"{name} {i}" for i in rng.integers(n_types, size=n_cells)]
    epochs = [
        {
            "epoch": i,
            "step": 10 * i,
            "kl_weight": min(1.0, i / 5),
            "train_elbo": -900 - 900 * math.exp(-i),
            "validation_elbo": -910 - 900 * math.exp(-i),
        }
        for i in range(1, 21)
    ]
    return {
        "title": f"Report on {name}",
        "celbo_version": "0.1.0",
        "verdict": f"Two of three dimensions of {name} are active.",
        "notes": [f"note on {name}"],
        "metrics": {
            "n_cells": 12345,
            "n_genes": 2000,
            "likelihood": "nb",
            "latent_dim": 3,
            "epochs": 20,
            "steps": 200,
            "seconds": 75.2,
            "cells_per_second": 4321.9,
            "peak_memory_mb": 512.5,
            "elbo_train": -901.25,
            "elbo_validation": -911.3,
            "reconstruction_validation": -905.0,
            "kl_validation": 6.25,
            "kl_per_dim": [3.0, 0.05, 0.001],
            "active_units": 2,
            "kl_weight_final": 1.0,
        },
        "run": {"options": {name: name, "train": {"seed": 1}}, "versions": {"celbo": "0.1.0"}, "data": {"path": name}},
        "history": epochs,
        "latent": {
            "method": "t-SNE",
            "xy": rng.normal(size=(n_cells, 2)).tolist(),
            "n_cells_shown": n_cells,
            "n_cells": 12345,
            "colours": {
                name: {"kind": "categorical", "values": types},
                f"{name} depth": {"kind": "continuous", "values": rng.normal(size=n_cells).tolist()},
            },
        },
        "recovery": [{"name": name, "value": 0.9, "reference": None, "meaning": f"of {name}"}],
    }


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_same_summary_gives_the_same_bytes_and_stays_as_it_was():
    summary = summary_of()
    before = json.dumps(summary)
    assert render(summary) == render(json.loads(before))
    assert json.dumps(summary) == before


def test_the_page_says_what_the_summary_says():
    page = Page(render(summary_of()))
    for text in (
        "Two of three dimensions",
        "note on type",
        f"{MINUS}911.3",
        "nats per cell",
        "12,345",
        "negative binomial",
    ):
        assert text in page.text
    for text in ("1 min 15 s", "4,322", "of type", "train.seed"):
        assert text in page.text
    assert page.text.index("Two of three") < page.text.index("note on type") < page.text.index(f"{MINUS}911.3")


def test_the_page_can_be_read_without_seeing_it():
    page = Page(render(summary_of()))
    assert page.of("html") == [{"lang": "en"}]
    assert [len(page.of(tag)) for tag in ("h1", "img")] == [1, 4]
    assert all(image["alt"] for image in page.of("img"))
    assert len(page.of("th")) == 4 + 1 + 5  # the recovery's columns and row; seed, two options, data, version
    assert all("scope" in header for header in page.of("th"))


def test_the_page_asks_for_nothing_from_outside():
    page = Page(render(summary_of()))
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not page.of("script")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))
    assert [link["href"] for link in page.of("link")] == ["data:,"]


@pytest.mark.parametrize("name", [ATTACK, '"><svg onload=alert(1)>', "' autofocus onfocus=alert(1) x='", "{{ 7 * 7 }}"])
def test_a_hostile_name_is_shown_as_text(name):
    plain, hostile = Page(render(summary_of())), Page(render(summary_of(name=name)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attrs) for _, attrs in hostile.tags] == [sorted(attrs) for _, attrs in plain.tags]
    assert f"note on {name}" in hostile.text


def test_any_name_can_be_drawn_and_written():
    names = [
        "$x^$ \\frac{",
        "_hidden",
        "单核细胞",
        "τ δ ß",
        "خلية",
        "🧬",
        "a\x00\x1b[31m\nb",
        "\ud800",
        "\u202eflip",
        "",
    ]
    summary = summary_of(name="".join(names))
    summary["latent"]["colours"]["n" * 5000] = {"kind": "categorical", "values": [*names, "n" * 5000] * 5 + names[:5]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render(summary)
        to_png(latent_figure(summary))
    page.encode("utf-8")
    assert not set("\x00\x1b\u202e") & set(page)
    assert "n" * 200 not in page


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    axes = latent_figure(summary_of(name="_a", n_types=2)).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["_a 0", "_a 1"]


def test_what_is_not_known_is_a_dash():
    summary = summary_of()
    summary["metrics"] = dict.fromkeys(summary["metrics"])
    summary["history"] = [{"epoch": 1, "step": 10, "train_elbo": -3.0, "validation_elbo": None}]
    page = Page(render(summary))
    assert DASH in page.text
    assert "None" not in page.text


def test_parts_that_are_not_there_are_left_out():
    page = Page(render({"title": "t", "verdict": "v", "latent": None, "recovery": None, "history": []}))
    assert not page.of("img")
    assert "Latent space" not in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0])
def test_no_number_breaks_the_page(value):
    summary = summary_of()
    summary["metrics"] |= {k: value for k, old in summary["metrics"].items() if isinstance(old, float)}
    summary["metrics"]["kl_per_dim"] = [value, value]
    for epoch in summary["history"][3:]:
        epoch |= {"train_elbo": value, "validation_elbo": value, "kl_weight": value}
    summary["latent"]["xy"][0] = [value, value]
    summary["latent"]["colours"]["type depth"]["values"][:59] = [value] * 59
    summary["recovery"][0]["value"] = value
    assert len(Page(render(summary)).of("img")) == 4


def test_a_whole_column_may_be_missing():
    summary = summary_of()
    for colour in summary["latent"]["colours"].values():
        colour["values"] = [None] * 60
    assert "missing" in Page(render(summary)).text


@pytest.mark.parametrize("n_cells", [0, 1, 2])
def test_few_cells_have_a_picture(n_cells):
    summary = summary_of(n_cells)
    render(summary)
    assert to_png(latent_figure(summary)).startswith(b"\x89PNG")


def test_cells_without_colours_have_a_picture():
    summary = summary_of()
    summary["latent"]["colours"] = {}
    assert len(Page(render(summary)).of("img")) == 3


def test_a_colour_for_other_cells_is_refused():
    summary = summary_of()
    summary["latent"]["colours"]["type"]["values"].pop()
    with pytest.raises(DataError, match="'type' has 59 values for 60 cells"):
        render(summary)


# --- colours and curves ---------------------------------------------------------------------------------------------


def test_the_twenty_largest_of_sixty_levels_keep_their_names():
    levels = legend([f"C{i}" for i in range(60) for _ in range(i + 1)] + [None, math.nan]).levels
    assert [level.label for level in levels[:20]] == [f"C{i}" for i in range(40, 60)]
    assert [(level.label, level.colour) for level in levels[20:]] == [
        ("other (40 levels)", OTHER),
        ("missing", MISSING),
    ]
    assert sum(level.n_cells for level in levels) == 60 * 61 // 2 + 2


def test_no_two_levels_share_a_colour():
    assert len({*PALETTE, OTHER, MISSING}) == 22


def test_the_page_lists_sixty_levels_as_twenty_and_other():
    page = Page(render(summary_of(n_cells=900, n_types=60)))
    assert len(page.of("li")) == 1 + 21
    assert "other (40 levels)" in page.text


def test_curves_hold_the_numbers_of_the_summary():
    upper, lower = history_figure(summary_of()).axes
    train, validation = (line.get_ydata() for line in upper.lines)
    np.testing.assert_allclose(validation - train, -10)
    assert lower.lines[0].get_ydata()[-1] == 1
    assert "below the axis" in upper.get_title("left")  # the first fall is cut off, and the figure says so


def test_bars_are_the_kl_of_each_dimension_with_lines_where_it_is_weak_or_dead():
    axes = kl_figure(summary_of()).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [3.0, 0.05, 0.001]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 3
    assert sorted(line.get_ydata()[0] for line in axes.lines) == [0.01, 0.1]


def test_a_readers_matplotlib_settings_change_nothing():
    import matplotlib

    plain = to_png(latent_figure(summary_of()))
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "red", "text.parse_math": True}):
        assert to_png(latent_figure(summary_of())) == plain
        assert matplotlib.rcParams["font.size"] == 30


# --- the plane ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_cells", [0, 1, 2, 5, 11, 40])
@pytest.mark.parametrize("latent_dim", [1, 2, 3, 10])
def test_every_latent_space_has_a_plane(n_cells, latent_dim):
    rows, xy, method = layout(np.random.default_rng(0).normal(size=(n_cells, latent_dim)).astype(np.float32))
    assert rows.tolist() == list(range(n_cells))
    assert xy.shape == (n_cells, 2)
    assert np.isfinite(xy).all()
    assert (method == "t-SNE") == (n_cells >= 10 and latent_dim >= 3)


@pytest.mark.parametrize("z", [np.zeros((30, 4)), np.full((30, 4), 1e-30), np.repeat(np.eye(4), 10, axis=0) * 1e-12])
def test_a_collapsed_latent_space_has_a_plane(z):
    assert np.isfinite(layout(z).xy).all()


def test_the_same_seed_gives_the_same_plane():
    z = np.random.default_rng(0).normal(size=(80, 5))
    first, again, other = layout(z, max_cells=50), layout(z, max_cells=50), layout(z, max_cells=50, seed=1)
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(first.xy, again.xy)
    assert len(first.rows) == 50
    assert (np.diff(first.rows) > 0).all()
    assert (first.rows != other.rows).any()


def test_groups_stay_apart():
    rng = np.random.default_rng(0)
    group = rng.integers(3, size=300)
    xy = layout(5 * np.eye(3, 6)[group] + rng.normal(size=(300, 6)) * 0.3).xy
    centres = np.stack([xy[group == i].mean(axis=0) for i in range(3)])
    nearest = np.linalg.norm(xy[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == group).mean() > 0.99


def test_cells_that_are_nowhere_are_not_shown():
    z = np.random.default_rng(0).normal(size=(20, 3))
    z[3, 1], z[7, 0] = np.nan, np.inf
    assert set(range(20)) - set(layout(z).rows.tolist()) == {3, 7}


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_long_name_keeps_both_ends():
    assert shorten("a" * 100 + "z", 11) == "aaaaa…aaaaz"
    assert shorten("short") == "short"
    assert clean("a\u202eb\x07c\ud800") == "ab c\ufffd"


def test_numbers_are_written_for_readers():
    written = [number(value) for value in (0, -0.0, 12, 12.34, 999.99, 1e5 + 0.5, 1e-5, 1e300, math.nan, -math.inf)]
    assert written == [
        "0",
        "0",
        "12",
        "12.3",
        "1,000.0",
        "100,000",
        f"1.00e{MINUS}05",
        "1.00e+300",
        "not a number",
        f"{MINUS}∞",
    ]


# --- outside --------------------------------------------------------------------------------------------------------


def test_neither_import_nor_page_needs_torch(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary_of()))
    code = """
import json, sys
import celbo.report.text
assert not {"matplotlib", "sklearn", "jinja2"} & set(sys.modules), "celbo.report is not cheap to import"
from celbo.report.page import render; render(json.load(open(sys.argv[1])))
from celbo.report.latent import layout; layout([[0, 1, 2], [2, 1, 0]])
assert not {"torch", "anndata", "matplotlib.pyplot"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "summary.json"], check=True)


@pytest.fixture
def visits():
    """A local server, and the paths that anybody asked it for."""
    paths = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_shows_the_page_runs_nothing_and_asks_nobody(tmp_path: Path, visits):
    address, paths = visits
    name = f"<img src={address}/x>{ATTACK}<link rel=stylesheet href={address}/y>"
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(render(summary_of(name=name)), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    browser = [
        CHROMIUM,
        *flags.split(),
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}/b",
    ]
    run = subprocess.run([*browser, "--dump-dom", page.as_uri()], capture_output=True, timeout=120, check=True)
    shown = Page(run.stdout.decode())
    assert f"note on {name}" in shown.text
    assert not shown.of("script")
    assert b"<title>Report on " in run.stdout  # and not "owned"
    subprocess.run([*browser, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 10_000
    assert paths == []


def test_23_of_a_condition_of_very_many_levels_the_largest_are_listed_and_the_others_counted():
    donors = np.concatenate([np.repeat(np.arange(60), 5), np.arange(60, 400)]).astype(str)
    obs = pd.DataFrame({"donor": donors, "barcode": donors}, index=np.arange(len(donors)).astype(str))
    z = np.random.default_rng(0).normal(size=(len(donors), 2)).astype(np.float32)
    found = summarise(anndata.AnnData(obs=obs, obsm={"X_celbo": z}), seed=0, first=["donor"])["colours"]
    assert list(found) == ["donor"]
    names = found["donor"]["values"]
    assert len(set(names)) == 51
    assert names.count("350 others") == len(donors) - 50 * 5
