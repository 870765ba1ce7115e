"""Labels, partly known: what is told of cells, how surely, and of which nothing is."""

import re
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score, silhouette_score

import celbo
from celbo.ask.labels import NONE_OF_THESE, Labelled, _at_least_as_far, predictions
from celbo.data.conditions import known_labels
from celbo.model.classifier import Classifier, calibrate, label_loss

TRAIN = celbo.TrainConfig(max_epochs=60, seed=0)


@pytest.fixture(scope="module")
def many():
    """Five types; the label of a fifth of the cells is known."""
    cells = celbo.simulate_cells(n_cells=2500, n_genes=150, n_types=5, type_strength=1.5, median_library=1500, seed=4)
    known = np.random.default_rng(0).random(cells.n_obs) < 0.2
    cells.obs["known"] = cells.obs["cell_type"].astype(str).where(known, "unknown")
    return cells


def fitted(cells, **options):
    options = {"latent_dim": 5, "labels": "known", "conditions": ["batch"], "train": TRAIN} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return celbo.ExpressionVAE(**options).fit(cells)


@pytest.fixture(scope="module")
def model(many):
    return fitted(many)


def test_unlabelled_cells_are_told_and_probabilities_are_honest(many, model):
    found = model.predict(many)
    asked = (many.obs["known"] == "unknown").to_numpy()
    names = list(model.schema_.labels.levels)
    truth = many.obs["cell_type"].astype(str).to_numpy()[asked]
    assert (found["label"][asked] == truth).mean() > 0.9
    likeliest = found[names].idxmax(axis=1)[asked] == truth  # what the probability is of, none of these or not
    assert abs(found["probability"][asked].mean() - likeliest.mean()) < 0.05
    np.testing.assert_allclose(found[names].sum(axis=1), 1, atol=1e-5)
    assert (found["label"] == NONE_OF_THESE)[asked].mean() < 0.05


@pytest.mark.long
def test_a_type_that_was_never_labelled_is_told_from_the_others_by_p_known(many):
    """It is among the cells of fit, so that it can have a place of its own.

    How many of its cells fall below the threshold differs from fit to fit (0.16 to 0.95 in nine fits, see
    docs/labels.md); that they rank below the cells of known types does not (0.985 to 0.992).
    """
    hidden = many.copy()
    is_it = (many.obs["cell_type"] == "type_0").to_numpy()
    hidden.obs["known"] = hidden.obs["known"].where(~is_it, "unknown")
    found = fitted(hidden).predict(hidden)
    assert "type_0" not in found.columns
    asked = (hidden.obs["known"] == "unknown").to_numpy()
    assert roc_auc_score(is_it[asked], -found["p_known"][asked]) > 0.95
    told, wrong = ((found["label"][cells] == NONE_OF_THESE).mean() for cells in (is_it, ~is_it))
    assert wrong < 0.02
    assert told > max(20 * wrong, 0.05)


@pytest.mark.long
def test_labels_pull_types_apart(many, model):
    """Beside a model without them: silhouettes of the cells whose label was not known."""
    asked = (many.obs["known"] == "unknown").to_numpy()
    truth = many.obs["cell_type"].astype(str)[asked]
    apart = [silhouette_score(each.embed(many)[asked], truth) for each in (model, fitted(many, labels=None))]
    assert apart[0] > apart[1] + 0.02


def test_a_model_with_labels_is_saved_and_loaded(many, model, tmp_path):
    model.save(tmp_path / "model")
    loaded = celbo.load(tmp_path / "model")
    assert loaded.schema_.labels == model.schema_.labels
    pd.testing.assert_frame_equal(loaded.predict(many), model.predict(many))
    assert float(loaded.vae_.classifier.temperature) == float(model.vae_.classifier.temperature)


def test_a_new_batch_is_told_as_its_nearest(many, model):
    renamed = many[(many.obs["batch"] == "batch_1").to_numpy()].copy()
    renamed.obs["batch"] = "batch_new"
    with pytest.warns(UserWarning, match="is read as 'batch_"):
        found = model.predict(renamed, unseen="nearest")
    truth = renamed.obs["cell_type"].astype(str).to_numpy()
    assert (found["label"] == truth).mean() > 0.85


def test_a_query_needs_no_labels(many, model):
    query = many[:50].copy()
    del query.obs["known"]
    pd.testing.assert_frame_equal(model.predict(query), model.predict(many[:50].copy()))


def test_bad_use_is_told(many, model):
    with pytest.raises(celbo.UsageError, match="fitted without labels"):
        fitted(many[:200].copy(), labels=None, train=celbo.TrainConfig(max_epochs=1)).predict(many)
    with pytest.raises(celbo.DataError, match="no column 'types' for labels"):
        fitted(many[:200].copy(), labels="types")
    one = many[:200].copy()
    one.obs["known"] = "type_1"
    with pytest.raises(celbo.DataError, match="1 known labels"):
        fitted(one)


def test_missing_and_unlabelled_cells_are_unknown():
    column = pd.Series(pd.Categorical(["b", None, "?", "a"]), name="type")
    labels, codes = known_labels(column, "?")
    assert labels.levels == ("a", "b")
    np.testing.assert_array_equal(codes, [1, -1, -1, 0])


def test_several_words_for_unknown_are_given_one_name_by_the_advice():
    obs = pd.DataFrame({"type": pd.Series(["a", "NA", "", "b", None], dtype=object)})
    adata = anndata.AnnData(np.ones((5, 1)), obs)
    with pytest.warns(UserWarning, match=r"'', 'NA' \(2 cells\) are used as labels") as warned:
        known_labels(adata.obs["type"], "unknown")
    advice, one = re.findall(r"one name, (.*), and unlabelled=(.*) \(--unl", str(warned[0].message))[0]
    exec(advice, {"adata": adata})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown label")
        labels, codes = known_labels(adata.obs["type"], one.strip("'"))
    assert labels.levels == ("a", "b")
    np.testing.assert_array_equal(codes, [0, -1, -1, 1, -1])
    with pytest.warns(UserWarning, match="replace"):  # one of two is given
        known_labels(pd.Series(["a", "NA", "", "b"], name="type"), "NA")


def test_the_loss_is_that_of_the_labelled_cells_alone():
    torch.manual_seed(0)
    classifier, z = Classifier(3, 4), torch.randn(6, 3)
    labels = torch.tensor([0, -1, 3, -1, -1, 2])
    by_hand = -classifier(z)[[0, 2, 5], [0, 3, 2]].mean() * 50
    torch.testing.assert_close(label_loss(classifier, z, labels), by_hand)
    assert label_loss(classifier, z, torch.full((6,), -1)) == 0


def test_the_temperature_is_that_of_the_truth():
    """Labels drawn with logits a third as large as the classifier's."""
    torch.manual_seed(0)
    classifier, z = Classifier(2, 3), torch.randn(20_000, 2)
    with torch.no_grad():
        classifier.fc.weight.mul_(6)
        truth = torch.distributions.Categorical(logits=classifier.fc(z) / 3).sample().int()
    calibrate(classifier, z.numpy(), truth.numpy())
    assert abs(float(classifier.temperature) - 3) < 0.15


def test_few_labels_move_the_temperature_little_and_none_not_at_all():
    torch.manual_seed(0)
    classifier, z = Classifier(2, 2), 5 * torch.randn(2000, 2)
    told = classifier.fc(z).argmax(1).int().numpy()  # always right: the likeliest temperature is 0
    found = []
    for n in (0, 5, 50, 2000):
        calibrate(classifier, z[:n].numpy(), told[:n])
        found.append(float(classifier.temperature))
    assert found[0] == pytest.approx(1, abs=1e-3)
    assert 0.4 < found[1] < 0.95
    assert found[1] > found[2] > found[3]


def test_without_enough_labelled_cells_nothing_is_called_none_of_these():
    rng = np.random.default_rng(0)
    z, odds = rng.normal(size=(300, 2)).astype(np.float32), np.full((300, 2), 0.5, np.float32)
    labels, index = np.arange(300, dtype=np.int32) % 2, pd.RangeIndex(300)
    known = Labelled(z[:99], labels[:99], np.arange(99) < 9)
    found = predictions(odds, z + 100, known, ("a", "b"), index)
    assert found["p_known"].isna().all()
    assert (found["label"] == "a").all()
    known = Labelled(z, labels, np.arange(300) < 60)
    assert (predictions(odds, z + 100, known, ("a", "b"), index)["label"] == NONE_OF_THESE).all()
    among = rng.normal(size=(300, 2)).astype(np.float32)
    assert (predictions(odds, among, known, ("a", "b"), index)["label"] == NONE_OF_THESE).mean() < 0.04


def test_what_is_far_is_told_by_the_label_dense_or_loose():
    """Of two labels one is ten times as loose: cells of either are known alike, and one far from the dense is not."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.array([0, 1], np.int32), 3000)

    def drawn():
        spread = np.where(labels == 0, 0.1, 1.0)[:, None]
        return (rng.normal(size=(6000, 2)) * spread + 20 * labels[:, None]).astype(np.float32)

    odds = np.eye(2, dtype=np.float32)[labels]
    known = Labelled(drawn(), labels, np.arange(6000) % 2 == 0)
    p_known = predictions(odds, drawn(), known, ("a", "b"), pd.RangeIndex(6000))["p_known"]
    for label in (0, 1):
        assert abs((p_known[labels == label] < 0.1).mean() - 0.1) < 0.03
    outside = np.array([[1.0, 0.0]], np.float32)  # usual among the loose, and ten spreads from the dense
    far = predictions(odds[:1], outside, known, ("a", "b"), pd.RangeIndex(1))
    assert (far["label"] == NONE_OF_THESE).all()


def test_the_command_line_predicts(many, model, tmp_path, celbo_command):
    model.save(tmp_path / "run" / "model")
    many[:40].write_h5ad(tmp_path / "new.h5ad")
    command = ["predict", tmp_path / "run", tmp_path / "new.h5ad", "-o", tmp_path / "labels.csv"]
    done = celbo_command(*command)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "labels.csv", index_col="cell")
    assert list(table.index) == list(many.obs_names[:40])
    assert list(table.columns[:3]) == ["label", "probability", "p_known"]
    for mine in ("mine\n", "cell,label,curated_by\ncell_0,T,anna\n"):
        (tmp_path / "labels.csv").write_text(mine)
        done = celbo_command(*command)
        assert done.returncode == 2
        assert "no table that celbo wrote" in done.stderr
        assert (tmp_path / "labels.csv").read_text() == mine


@pytest.mark.parametrize("spread", [0.2, 0.3])
@pytest.mark.parametrize("mean", [0.1, 0.4])
def test_twenty_held_out_cells_call_few_known_ones_none_of_these(mean, spread):
    """In the mean about one in a hundred, as the threshold says; and seldom many."""
    rng = np.random.default_rng(0)
    asked = np.exp(rng.normal(mean, spread, 2000))
    wrong = [(_at_least_as_far(np.exp(rng.normal(mean, spread, 20)), asked) < 0.01).mean() for _ in range(300)]
    assert np.mean(wrong) < 0.015
    assert np.quantile(wrong, 0.95) < 0.06
    far = _at_least_as_far(np.exp(rng.normal(mean, spread, 20)), np.exp(mean + np.array([6.0]) * 0.3))
    assert far[0] < 0.01


def test_a_label_of_few_cells_is_measured_among_its_own():
    """Three labelled cells of one type: what is far from them is none of these, though other types are farther off."""
    rng = np.random.default_rng(0)
    of_a, of_b = rng.normal(size=(500, 2)), 100 + rng.normal(size=(3, 2))
    z, labels = np.vstack([of_a, of_b]).astype(np.float32), np.repeat(np.array([0, 1], np.int32), [500, 3])
    known = Labelled(z, labels, np.arange(503) < 100)
    asked = np.vstack([100 + rng.normal(size=(50, 2)), 150 + rng.normal(size=(50, 2))]).astype(np.float32)
    odds = np.tile(np.array([[0.0, 1.0]], np.float32), (100, 1))
    found = predictions(odds, asked, known, ("a", "b"), pd.RangeIndex(100))["label"]
    assert (found[:50] == "b").mean() > 0.8
    assert (found[50:] == NONE_OF_THESE).all()


def test_of_a_cell_without_a_count_nothing_is_told(many, model):
    some = many[:4].copy()
    some.X[2] = 0
    with pytest.warns(UserWarning, match="1 of 4 cells have no counts"):
        found = model.predict(some)
    assert found.iloc[2].drop("unlike", errors="ignore").isna().all()
    pd.testing.assert_frame_equal(found.drop(index=found.index[2]), model.predict(many[[0, 1, 3]].copy()))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0, 1.0, 2.0, None], "floating-point"),
        (["label", "T", "B", None], "has the label 'label'"),
        (["none of these", "T", "T", "B"], "has the label 'none of these'"),
    ],
)
def test_columns_that_are_no_labels_are_refused(values, said):
    with pytest.raises(celbo.DataError, match=said):
        known_labels(pd.Series(values, name="type"), "unknown")


def test_doubtful_labels_are_warned_of_or_refused(many):
    with pytest.warns(UserWarning, match="3 of 4 labels have one cell"):
        known_labels(pd.Series(["a", "b", "c", "d", "d"], name="type"), "unknown")
    with pytest.raises(celbo.UsageError, match=r"'Unassigned' .* does not occur"):
        fitted(many[:200].copy(), unlabelled="Unassigned")


@pytest.mark.parametrize("word", ["Unknown", "", "NA", "Unassigned", "-1"])
def test_a_label_that_reads_as_none_is_doubted(word):
    column = pd.Series(["T", "B", word, "T", "B", word], name="type")
    with pytest.warns(UserWarning, match=rf"'{word}' \(2 cells\) is used as a label"):
        labels, _ = known_labels(column, "unknown")
    assert word in labels.levels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known_labels(column, word)[0].levels == ("B", "T")


def test_labels_are_numbers_or_text_and_so_is_what_stands_for_none():
    labels, codes = known_labels(pd.Series([0, 1, -1, 0], name="type"), -1)
    assert labels.levels == ("0", "1")
    assert codes.tolist() == [0, 1, -1, 0]


def test_what_stands_for_none_is_kept_as_text(tmp_path):
    cells = celbo.simulate_cells(n_cells=100, n_genes=30, n_types=2, seed=0)
    cells.obs["type"] = np.where(np.arange(100) < 40, -1, np.arange(100) % 2)
    quick = celbo.TrainConfig(max_epochs=1)
    celbo.ExpressionVAE(latent_dim=2, labels="type", unlabelled=cells.obs["type"].min(), train=quick).fit(cells).save(
        tmp_path / "model"
    )
    assert celbo.load(tmp_path / "model").schema_.labels.levels == ("0", "1")
    assert celbo.load(tmp_path / "model").unlabelled == "-1"


def test_what_is_usual_is_told_by_the_cells_held_out():
    """Training draws labelled cells together; those held out lie as new ones do, and p_known is uniform of these."""
    rng, index = np.random.default_rng(1), pd.RangeIndex(4000)
    z = np.vstack([0.5 * rng.normal(size=(400, 2)), rng.normal(size=(60, 2))]).astype(np.float32)
    known = Labelled(z, np.zeros(460, np.int32), np.arange(460) >= 400)
    odds, asked = np.ones((4000, 1), np.float32), rng.normal(size=(4000, 2)).astype(np.float32)
    found = predictions(odds, asked, known, ("a",), index)
    for share in (0.01, 0.05, 0.1):
        assert abs((found["p_known"] < share).mean() - share) < max(0.02, share / 2)
    far = predictions(odds[:50], asked[:50] + 30, known, ("a",), index[:50])
    assert (far["label"] == NONE_OF_THESE).all()


def test_labels_are_no_condition(many):
    with pytest.raises(celbo.UsageError, match="is a condition and the column of labels"):
        fitted(many[:200].copy(), labels="batch")


def test_where_none_of_these_cannot_be_told_it_is_said(many):
    few = many[:300].copy()
    few.obs["known"] = few.obs["cell_type"].astype(str).where(np.arange(300) < 40, "unknown")
    model = fitted(few, train=celbo.TrainConfig(max_epochs=2))
    with pytest.warns(UserWarning, match="no cell is called 'none of these'"):
        assert model.predict(few)["p_known"].isna().all()
