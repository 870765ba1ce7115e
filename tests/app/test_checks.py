"""What `celbo check` says, options from files, golden folders, and data nobody thought of."""

import json
import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import celbo
from celbo import CelboError, UsageError
from celbo.app.cli import app
from celbo.app.config import read_config
from celbo.data.checks import check_adata
from celbo.data.values import KINDS

GOLDEN = sorted(path.parent for path in (Path(__file__).parents[1] / "golden").glob("*/answers.json"))


def command(*arguments):
    """Run the command line in this process; failures that celbo explains come back as `result.exception`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def bad_file(tmp_path, cells):
    bad = cells.copy()
    bad.X = sp.csr_matrix(bad.X.toarray() / 3)
    bad.obs["batch"] = "one"
    bad.obs["site"] = bad.obs["cell_type"].astype(object).where(np.arange(300) > 2, None)
    bad.var_names = ["twice", "twice", *bad.var_names[2:]]
    bad.write_h5ad(tmp_path / "bad.h5ad")
    return tmp_path / "bad.h5ad"


def test_check_says_that_good_data_are_ready(file):
    done = command("check", file, "--condition", "batch")
    assert done.exit_code == 0
    assert "300 cells x 60 genes" in done.stdout
    assert done.stdout.endswith("ready to fit\n")


def test_check_tells_every_problem_at_once_and_ends_with_3(bad_file):
    done = command("check", bad_file, "--condition", "batch", "--condition", "site", "--condition", "day")
    assert done.exit_code == 3
    for part in (
        "error (duplicate-genes): 1 gene names occur more than once: 'twice'",
        "error (not-whole): X is",
        "error (conditions): obs has no column 'day'",
        "error (conditions): obs column 'site' has no value in 3 of 300 cells",
        "warning (one-level): condition 'batch' is 'one' in every cell",
    ):
        assert part in done.stdout
    assert "ready" not in done.stdout


def test_the_documentation_names_every_kind_of_problem():
    """The names in the code, wherever they are written, are the names in the tables."""
    root = Path(__file__).parents[2]
    code = "".join(path.read_text() for path in (root / "src" / "celbo").rglob("*.py"))
    names = set(re.findall(r"\b(?:check|result)\.(?:add|noting)\(\s*\"([a-z-]+)\"", code)) | set(KINDS)
    names |= set(re.findall(r"\"name\": \"([a-z-]+)\", \"severity\"", code))
    assert {"rounded", "few-cells", "values", "unreadable"} <= names
    rows = [line for line in (root / "docs" / "check.md").read_text().splitlines() if line.startswith("|")]
    documented = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])}
    assert documented == names


def test_fit_refuses_what_check_refuses_and_trains_nothing(bad_file, tmp_path):
    done = command("fit", bad_file, "-o", tmp_path / "run", "--condition", "site", "--condition", "day")
    message = str(done.exception)
    assert isinstance(done.exception, celbo.DataError)
    assert all(part in message for part in ("'twice'", "not whole", "'day'", "'site'"))
    assert not (tmp_path / "run" / "model").exists()


def test_check_as_json_is_for_programs(bad_file, file, tmp_path):
    document = json.loads(command("check", bad_file, "--json").stdout)
    assert document["ok"] is False
    assert {problem["name"] for problem in document["problems"]} == {"duplicate-genes", "not-whole"}
    assert {problem["severity"] for problem in document["problems"]} == {"error"}
    assert json.loads(command("check", file, "--json").stdout)["ok"] is True
    nothing = command("check", tmp_path / "none.h5ad", "--json")
    assert nothing.exit_code == 3
    assert json.loads(nothing.stdout)["problems"][0]["name"] == "unreadable"


def test_check_against_a_model_looks_at_what_embed_needs(file, cells, fitted, tmp_path):
    fitted.save(tmp_path / "model")
    assert command("check", file, "--model", tmp_path / "model").stdout.endswith("ready to embed\n")
    other = cells[:, :30].copy()
    other.obs["batch"] = "elsewhere"
    other.write_h5ad(tmp_path / "other.h5ad")
    done = command("check", tmp_path / "other.h5ad", "--model", tmp_path / "model")
    assert done.exit_code == 3
    assert "error (genes): 30 of the model's 60 genes" in done.stdout
    assert "error (conditions): condition 'batch' has levels not seen in fit: 'elsewhere'" in done.stdout


def test_a_condition_of_a_few_whole_floats_is_questioned(cells):
    days = cells.copy()
    days.obs["day"] = np.repeat([0.0, 1.0, 7.0], 100)
    (problem,) = check_adata(days, conditions=["day"]).problems
    assert "3 different numbers, and is read as continuous" in problem.message


def test_a_config_file_says_what_the_command_line_leaves_open(file, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        'latent_dim = 3\nhidden_dims = [8]\nconditions = ["batch"]\n\n[train]\nmax_epochs = 2\nseed = 4\n\n'
        "[reading]\non_disk = true\n"
    )
    assert command("fit", file, "-o", tmp_path / "run", "--config", config, "--seed", "5").exit_code == 0
    model = celbo.load(tmp_path / "run")
    assert (model.latent_dim, list(model.conditions), model.train.max_epochs, model.train.seed) == (3, ["batch"], 2, 5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reading"]["on_disk"] is True


def test_a_run_is_repeated_from_its_record_to_the_byte(file, tmp_path):
    options = ["--condition", "batch", "--epochs", "2", "--hidden-dim", "8", "--n-top-genes", "30", "--seed", "3"]
    assert command("fit", file, "-o", tmp_path / "first", *options, "--threads", "1").exit_code == 0
    record = tmp_path / "first" / "run.json"
    data = json.loads(record.read_text())["reading"]["path"]
    assert command("fit", data, "-o", tmp_path / "again", "--config", record).exit_code == 0
    weights = [tmp_path / name / "model" / "weights.safetensors" for name in ("first", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.long
def test_repeating_a_run_on_other_data_is_said(file, cells, tmp_path):
    assert command("fit", file, "-o", tmp_path / "run", "--epochs", "1", "--hidden-dim", "8").exit_code == 0
    again = ["--config", tmp_path / "run" / "run.json"]
    assert "not those of the run" not in command("fit", file, "-o", tmp_path / "same", *again).stderr
    cells[:, ::-1].copy().write_h5ad(tmp_path / "other.h5ad")
    done = command("fit", tmp_path / "other.h5ad", "-o", tmp_path / "other", *again)
    assert "the values are not those of the run" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent_dims = 3\n", "unknown option 'latent_dims' (did you mean 'latent_dim'?)"),
        ("[train]\nepochs = 3\nlr = 1\n", "unknown option 'train.epochs'"),
        ("[reading]\nfast = true\n", "unknown option 'reading.fast'"),
        ('latent_dim = "ten"\n', "latent_dim must be a whole number, not 'ten'"),
        ("encode_context = 1\n", "encode_context must be true or false, not 1"),
        ("likelihood = 3\n", "likelihood must be text, not 3"),
        ('n_top_genes = "many"\n', "n_top_genes must be a whole number, not 'many'"),
        ("layer = 3\n", "layer must be text, not 3"),
        ('hidden_dims = ["wide"]\n', "hidden_dims must be a list of whole numbers"),
        ('conditions = "batch"\n', "conditions must be a list of texts, not 'batch'"),
        ("train = 3\n", "'train' must be a table of options"),
        ("latent_dim = \n", "is not valid TOML"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused_in_words(file, tmp_path, text, message):
    config = tmp_path / "run.toml"
    config.write_text(text)
    done = command("fit", file, "-o", tmp_path / "run", "--config", config)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_options_whose_default_is_nothing_are_read_from_a_file(tmp_path):
    model = celbo.ExpressionVAE().options()
    train = model.pop("train")
    chosen = {"decoder_dims": [16, 32], "n_top_genes": 40, "labels": "cell_type"}
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in {**chosen, "latent_dim": "auto"}.items())
    (tmp_path / "run.toml").write_text(f"{text}\n[train]\nthreads = 1\n")
    read = read_config(tmp_path / "run.toml", model, train)
    assert read["model"] == {**chosen, "latent_dim": "auto"}
    assert read["train"] == {"threads": 1}
    record = celbo.ExpressionVAE(**chosen, train=celbo.TrainConfig(threads=1)).options()
    (tmp_path / "run.json").write_text(json.dumps({"options": record}))
    assert read_config(tmp_path / "run.json", model, train)["model"].items() >= chosen.items()
    for text in ('decoder_dims = ["a"]', "decoder_dims = 16", 'dropout = "much"', 'latent_dim = "ten"'):
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(UsageError, match=text.split()[0]):
            read_config(tmp_path / "run.toml", model, train)


def test_every_unknown_option_is_named_at_once(tmp_path):
    (tmp_path / "run.toml").write_text("latent = 3\nnorms = 'x'\n[train]\nepoch = 1\n")
    with pytest.raises(UsageError, match=r"(?=.*'latent')(?=.*'norms')(?=.*'train.epoch')"):
        read_config(tmp_path / "run.toml", {"latent_dim": 10, "norm": "layer"}, {"max_epochs": 100})


def test_many_genes_are_chosen_from_unless_all_are_wanted(tmp_path, monkeypatch, file):
    monkeypatch.setattr("celbo.app.cli.N_TOP_GENES", 40)
    options = ["--epochs", "1", "--hidden-dim", "8"]
    done = command("fit", file, "-o", tmp_path / "some", *options)
    assert "modelling the 40 most variable of 60 genes" in done.stderr
    schema = celbo.load(tmp_path / "some").schema_
    assert len(schema.genes) == 40
    assert schema.selection == "40 of 60, the most variable (seurat_v3)"
    assert "40 of 60, the most variable" in command("inspect", tmp_path / "some").stdout
    command("fit", file, "-o", tmp_path / "all", *options, "--n-top-genes", "0")
    assert len(celbo.load(tmp_path / "all").schema_.genes) == 60
    embedding = command("embed", tmp_path / "some", file, "-o", tmp_path / "z.h5ad")
    assert embedding.exit_code == 0


def test_genes_are_chosen_within_the_first_categorical_condition(cells):
    options = {"hidden_dims": (8,), "n_top_genes": 20, "train": celbo.TrainConfig(max_epochs=1)}
    dosed = cells.copy()
    dosed.obs["dose"] = np.linspace(0, 1, 300)
    model = celbo.ExpressionVAE(conditions=["dose", "batch"], **options).fit(dosed)
    assert "within levels of 'batch'" in model.schema_.selection
    library = np.asarray(cells[:, list(model.schema_.genes)].X.sum(1)).ravel()
    np.testing.assert_array_equal(np.sort(model.reference_.library), np.sort(library))


def test_size_factors_are_on_the_scale_of_the_chosen_genes(cells):
    sized = cells.copy()
    sized.obs["size"] = np.linspace(0.5, 2.0, 300)
    options = {"hidden_dims": (8,), "n_top_genes": 20, "train": celbo.TrainConfig(max_epochs=1)}
    model = celbo.ExpressionVAE(size_factor="size", **options).fit(sized)
    chosen = sized[:, list(model.schema_.genes)].X.sum()
    assert model.reference_.library.sum() == pytest.approx(chosen, rel=1e-5)


def test_values_beyond_what_fit_saw_are_doubted(tmp_path):
    """As of a dose in another unit: in what the cells have, and in what is asked for."""
    cells = celbo.simulate_cells(n_cells=200, n_genes=40, seed=0)
    cells.obs["dose"] = np.random.default_rng(0).uniform(0, 2, 200)
    model = celbo.ExpressionVAE(latent_dim=2, conditions=["dose"], train=celbo.TrainConfig(max_epochs=2)).fit(cells)
    model.save(tmp_path / "model")
    model, query = celbo.load(tmp_path / "model"), cells[:50].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.embed(query)
        model.expected_expression(query, given={"dose": 2.05})
    for ask in (
        lambda: model.expected_expression(query, given={"dose": 1e6}),
        lambda: model.counterfactual(query, {"dose": 1e6}),
        lambda: model.interpolate(query[:1], query[1:2], given={"dose": 1e6}),
    ):
        with pytest.warns(UserWarning, match=r"dose.*1 of 1 values, the first 1e\+06, lie outside"):
            ask()
    query.obs["dose"] *= 1000
    with pytest.warns(UserWarning, match=r"of 50 values, .* lie outside the range of fit \(0.* to [12].*\).*unit"):
        model.embed(query)
    query.write_h5ad(tmp_path / "new.h5ad")
    said = command("check", tmp_path / "new.h5ad", "--model", tmp_path / "model").output
    assert "Is the unit the same?" in " ".join(said.split())


def test_a_column_of_obs_named_twice_is_refused_wherever_it_is_used():
    cells = celbo.simulate_cells(n_cells=100, n_genes=40, n_batches=2, seed=0)
    model = celbo.ExpressionVAE(latent_dim=2, conditions=["batch"], train=celbo.TrainConfig(max_epochs=1)).fit(cells)
    bad = cells.copy()
    bad.obs = pd.concat([bad.obs, bad.obs[["cell_type"]]], axis=1)
    np.testing.assert_array_equal(model.embed(bad), model.embed(cells))
    labelled = celbo.ExpressionVAE(
        latent_dim=2, conditions=["batch"], labels="cell_type", train=celbo.TrainConfig(max_epochs=1)
    ).fit(cells)
    for use in (
        lambda: labelled.counterfactual(bad, {"batch": "batch_0"}),
        lambda: celbo.pseudobulk(bad, ["cell_type"]),
    ):
        with pytest.raises(celbo.DataError, match="obs has 2 columns 'cell_type'"):
            use()
    bad.obs = pd.concat([bad.obs, bad.obs[["batch"]]], axis=1)
    for use in (
        lambda: celbo.ExpressionVAE(nuisance=["batch"]).fit(bad),
        lambda: celbo.ExpressionVAE(labels="batch").fit(bad),
        lambda: model.embed(bad, unseen="nearest"),
        lambda: model.map_query(bad),
        lambda: model.diagnose(bad, groupby="batch"),
        lambda: model.differential_expression(bad, groupby="batch"),
        lambda: model.differential_expression(bad, groupby="treatment", pair_by="batch"),
        lambda: model.counterfactual(bad, {"batch": "batch_0"}),
    ):
        with pytest.raises(celbo.DataError, match="obs has 2 columns 'batch'"):
            use()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embedding_dim": 0}, "embedding_dim=0"),
        ({"embedding_dim": 2.5}, "embedding_dim=2.5"),
        ({"labels": ["cell_type"]}, "the name of one column"),
    ],
)
def test_options_that_are_none_are_refused_before_training(options, said):
    cells = celbo.simulate_cells(n_cells=50, n_genes=20, seed=0)
    with pytest.raises(celbo.UsageError, match=said):
        celbo.ExpressionVAE(latent_dim=2, **options, train=celbo.TrainConfig(max_epochs=1)).fit(cells)


def test_levels_that_may_be_mistakes_are_doubted():
    cells = celbo.simulate_cells(n_cells=120, n_genes=40, seed=0)
    cells.obs["batch"] = ["a 1", "A_1", "b", "nan", "1_1", "11"] * 20
    found = [problem for problem in check_adata(cells, nuisance=["batch"]).problems if problem.name == "levels"]
    assert [problem.severity for problem in found] == ["warning"] * 2
    alike, missing = (problem.message for problem in found)
    assert "nearly the same spelling" in alike
    assert {"'a 1'", "'A_1'"} <= set(re.findall(r"'[^']*'", alike))
    assert "11" not in alike
    assert "'nan' is used as a level" in missing
    for pair in (["donor-1", "donor_1"], ["Sample.1", "sample_1"], ["P1-T", "P1_T"], ["1-A", "1_A"], ["b ", "b"]):
        cells.obs["batch"] = [*pair, "c"] * 40
        (found,) = [each for each in check_adata(cells, nuisance=["batch"]).problems if each.name == "levels"]
        assert all(repr(level) in found.message for level in pair)
    cells.obs["batch"] = ["a", str(None), "b"] * 40
    (found,) = [each for each in check_adata(cells, nuisance=["batch"]).problems if each.name == "levels"]
    assert "'None' is used as a level" in found.message
    for usual in (
        ["donor_1", "donor_11", "+", "-", "(missing)", "none"],
        ["-1", "1", "-0.5", "0.5", ".5", "5"],
        ["d-1", "d1", "KO", "KO-", "CD4", "CD4-"],
        ["Na", "K", "Cl", "1.5", "15", "1_5"],
    ):
        cells.obs["batch"] = usual * 20
        assert not [problem for problem in check_adata(cells, nuisance=["batch"]).problems if problem.name == "levels"]


def test_a_check_says_what_becomes_of_new_levels(tmp_path):
    cells = celbo.simulate_cells(n_cells=100, n_genes=40, n_batches=2, seed=0)
    celbo.ExpressionVAE(latent_dim=2, conditions=["batch"], train=celbo.TrainConfig(max_epochs=1)).fit(cells).save(
        tmp_path / "model"
    )
    new = cells.copy()
    new.obs["batch"] = "batch_9"
    new.write_h5ad(tmp_path / "new.h5ad")
    for way, said in {"marginal": "in equal parts", "nearest": "fits its cells best", "adapt": "each learned"}.items():
        done = command("check", tmp_path / "new.h5ad", "--model", tmp_path / "model", "--unseen", way)
        assert done.exit_code == 0
        assert said in " ".join(done.output.split())


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_models_saved_long_ago_say_what_they_said(folder):
    answers = json.loads((folder / "answers.json").read_text())
    counts = np.array(answers["counts"], np.float32)
    cells = anndata.AnnData(counts, obs=pd.DataFrame(answers["obs"]), var=pd.DataFrame(index=answers["genes"]))
    model = celbo.load(folder)
    mu_z, sd_z = model.posterior(cells)
    np.testing.assert_allclose(mu_z, answers["mu_z"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sd_z, answers["sd_z"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.expected_expression(cells), answers["expected"], rtol=1e-4, atol=1e-6)
    assert command("inspect", folder).exit_code == 0


def test_golden_folders_are_there():
    assert {"format-1-nb", "format-1-gaussian", "format-1-selected-zinb"} <= {folder.name for folder in GOLDEN}


NUMBERS = st.sampled_from([0, 0, 0, 1, 2, 7, 300]) | st.sampled_from([0.5, -1, np.nan, np.inf, 1e7, 3e38, 2**24 + 1])
TYPES = st.sampled_from(["f4", "f8", "f2", "i1", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "O"])
LAYOUTS = st.sampled_from([np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array])
NAMES = st.text(max_size=6) | st.sampled_from(["g", "g", "a/b", "nan", "\x1b[31m", "</script>", "ENSG00000000001.2"])
LEVELS = (
    st.sampled_from(["a", "b", "é", "", "nan", "None", "a/b"])
    | st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from([pd.Timestamp("2020-01-01"), pd.NA, np.float32(1.5), ("tu", "ple")])
)
COLUMNS = st.sampled_from([lambda v: v, lambda v: pd.Categorical(v), lambda v: pd.array(list(map(str, v)), "string")])


@st.composite
def some_data(draw):
    """Cells of any size, type, layout, names and condition; most of them good for nothing."""
    n_cells, n_genes = draw(st.integers(0, 9)), draw(st.integers(0, 6))
    numbers = draw(st.lists(NUMBERS, min_size=n_cells * n_genes, max_size=n_cells * n_genes))
    if draw(st.booleans()):
        numbers = [abs(int(v)) % 50 if np.isfinite(v) else 0 for v in numbers]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = np.array(numbers, dtype=object).reshape(n_cells, n_genes).astype(np.float64).astype(draw(TYPES))
        layout = draw(LAYOUTS)
        x = layout(x) if x.dtype != object and not (x.dtype == np.float16 and layout is not np.asarray) else x
        obs = pd.DataFrame(index=draw(st.lists(NAMES, min_size=n_cells, max_size=n_cells)))
        values = draw(st.lists(LEVELS, min_size=n_cells, max_size=n_cells))
        try:
            obs["column"] = draw(COLUMNS)(values)
        except (TypeError, ValueError):
            obs["column"] = [str(value) for value in values]
        var = pd.DataFrame(index=draw(st.lists(NAMES, min_size=n_genes, max_size=n_genes)))
        try:
            return anndata.AnnData(x, obs=obs, var=var)
        except (TypeError, ValueError, AttributeError):
            return anndata.AnnData(np.zeros((n_cells, n_genes)), obs=obs, var=var)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_data_are_fitted_or_refused_in_words(data):
    cells = data.draw(some_data())
    likelihood = data.draw(st.sampled_from(list(celbo.LIKELIHOODS)))
    conditions = data.draw(st.sampled_from([[], ["column"], ["column", "other"]]))
    options = {"latent_dim": 2, "hidden_dims": (3,), "n_top_genes": data.draw(st.sampled_from([None, 2]))}
    train = celbo.TrainConfig(max_epochs=1, batch_size=4)
    model = celbo.ExpressionVAE(likelihood=likelihood, conditions=conditions, train=train, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.fit(cells)
            assert np.isfinite(model.embed(cells)).all()
        except CelboError as error:
            refusal = error
        else:
            refusal = None
    if refusal is not None:
        assert len(str(refusal)) > 20
        assert refusal.exit_code in (2, 3, 5)


def test_what_can_hardly_be_learned_is_said_before_anything_is_trained():
    """Few cells; and a condition that goes with another in all of them."""
    cells = celbo.simulate_cells(n_cells=120, n_genes=20, n_batches=3, seed=0)
    cells.obs["arm"] = np.where(cells.obs["batch"] == "batch_0", "x", "y")
    found = celbo.ExpressionVAE(conditions=["arm", "treatment"], nuisance=["batch"]).check(cells)
    assert [each.name for each in found.problems if each.name in ("nested", "few-cells")] == ["nested"]
    assert "'arm' is nested in the others" in next(each.message for each in found.problems if each.name == "nested")
    few = celbo.ExpressionVAE().check(cells[:5].copy())
    assert "only 5 cells" in next(each.message for each in few.problems if each.name == "few-cells")


@pytest.mark.long
def test_types_that_go_with_the_levels_of_a_nuisance_are_doubted(tmp_path):
    """By a column that is named, by labels that are learned, and not if the levels share types."""
    cells = celbo.simulate_cells(n_cells=400, n_genes=40, n_types=4, seed=0)
    cells.obs["sample"] = np.where(cells.obs["cell_type"].isin(["type_0", "type_1"]), "A", "B")
    cells.obs["some"] = cells.obs["cell_type"].astype(object).where(np.arange(400) % 3 > 0, "unknown")
    cells.obs["few"] = cells.obs["cell_type"].astype(object).where(np.arange(400) % 3 > 0, None)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for options in (["--groupby", "cell_type"], ["--labels", "cell_type"], ["--groupby", "some"], ["--labels", "few"]):
        done = command("check", tmp_path / "cells.h5ad", "--nuisance", "sample", *options)
        assert done.exit_code == 0
        found = done.stdout.partition("warning (types-of-one-level): ")[2]
        assert found.startswith(
            "nuisance 'sample': 4 of 4 types (100% of the cells) occur in one level of 'sample' only"
        )
        assert repr(options[1]) in found
        assert "ready to fit" in found
        done = command("check", tmp_path / "cells.h5ad", "--nuisance", "batch", *options)
        assert "types-of-one-level" not in done.stdout
    for condition in (["--condition", "sample"], []):  # nothing is removed
        done = command("check", tmp_path / "cells.h5ad", *condition, "--groupby", "cell_type")
        assert "types-of-one-level" not in done.stdout
    model = celbo.ExpressionVAE(nuisance=["sample"], labels="cell_type", train=celbo.TrainConfig(max_epochs=1))
    with pytest.warns(UserWarning, match="4 of 4 types"):
        model.fit(cells)
    found = celbo.ExpressionVAE(nuisance=["sample"]).check(cells, groupby="cell_type").problems
    assert [each.name for each in found] == ["types-of-one-level"]


def test_a_column_of_types_that_cannot_be_used_is_refused(file, tmp_path):
    done = command("check", file, "--nuisance", "batch", "--groupby", "kind")
    assert done.exit_code == 3
    assert "obs has no column 'kind' for groupby; it has 'cell_type'" in done.stdout
    done = command("check", file, "--nuisance", "batch", "--groupby", "batch")
    assert isinstance(done.exception, UsageError)
    assert "is a nuisance too" in str(done.exception)
    done = command("check", file, "--nuisance", "batch", "--groupby", "library")
    assert done.exit_code == 3
    assert "obs column 'library' holds floating-point numbers" in done.stdout
    celbo.ExpressionVAE(latent_dim=2, train=celbo.TrainConfig(max_epochs=1)).fit(anndata.read_h5ad(file)).save(
        tmp_path / "model"
    )
    done = command("check", file, "--model", tmp_path / "model", "--groupby", "cell_type")
    assert "leave out --groupby" in str(done.exception)
