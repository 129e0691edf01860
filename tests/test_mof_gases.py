"""What the chapter on gases in MOFs says, and the splits of their crystals."""

from __future__ import annotations

import hashlib
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import published_uptakes
import pytest
import torch

from x3mat import paths, results, training
from x3mat.applications import application
from x3mat.errors import DataError, ModelError
from x3mat.predict import available_models, load_model

NAMES = ["mof-co2o2n2", "mof-ch4n2"]


def runs_of(name):
    return [results.read(f"{name}/runs/fold0-seed{seed}.json") for seed in range(3)]


def labels_of(name):
    try:
        return application(name).labels()
    except DataError as error:
        pytest.skip(f"labels of others are not shipped: {error}")


def predictions_of(name):
    """Of the crystals outside of the training set: half (n,), predictions (seed, n, gas), names."""
    parts = [pd.DataFrame(run["predictions"]).set_index("name") for run in runs_of(name)]
    names = parts[0].index
    assert all((part.half[names] == parts[0].half).all() for part in parts)
    predicted = np.array([part.predicted[names].tolist() for part in parts])
    return parts[0].half.to_numpy(), predicted, names


def keys(content):
    """All keys of nested objects."""
    if isinstance(content, dict):
        return {*content, *(k for value in content.values() for k in keys(value))}
    if isinstance(content, list):
        return {k for value in content for k in keys(value)}
    return set()


def errors_by_gas(name):
    """A row for each gas: errors and intervals as in the chapter's table."""
    summary = results.read(f"{name}/summary.json")
    found = results.read(f"{name}/energy_histogram.json")
    histogram = found["splits"][0]
    assert found["columns"] == list(summary["outputs"])
    rows = pd.DataFrame(summary["outputs"]).T[["test_mae", "mae_of_mean_over_seeds", "interval"]]
    rows["histogram"] = histogram["test_mae_of_each_output"]
    rows["lazy"] = histogram["mae_of_the_mean_label"]
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_splits(name):
    """Parts are disjoint and of the same crystals; the record counts them."""
    split = results.read(f"{name}/split.json")
    for fold, kind in zip(application(name).folds(), ("grouped", "random"), strict=True):
        parts = [fold.train, *fold.halves]
        ids = sorted(name for part in parts for name in part)
        assert len(set(ids)) == len(ids) == split["crystals"]
        assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == split["ids_sha256"]
        row = split["splits"][kind]
        assert [row[k] for k in ("train", "validation", "test")] == list(map(len, parts))
        assert len(fold.train) == pytest.approx(0.8 * len(ids), rel=0.01)
    assert split["splits"]["grouped"]["near_duplicate_in_train"]["rest"] == 0


def test_many_have_a_look_alike():
    for name in NAMES:
        rest = results.read(f"{name}/split.json")["splits"]["random"]
        assert 0.3 < rest["near_duplicate_in_train"]["test"] / rest["test"] < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_baseline_is_of_these_splits(name):
    found = results.read(f"{name}/energy_histogram.json")
    for fold, split in zip(application(name).folds(), found["splits"], strict=True):
        assert split["n_test"] == len(fold.halves[1])
        assert split["interval"][0] < split["test_mae"] < split["interval"][1]
        for error, mean in zip(split["test_mae_of_each_output"], split["mae_of_the_mean_label"],
                               strict=True):  # fmt: skip
            assert error < mean
    assert found["splits"][1]["test_mae"] < found["splits"][0]["test_mae"]


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_read(name):
    app, table = application(name), labels_of(name)
    assert list(table.columns) == list(app.columns)
    assert {*app.folds()[0].train, *app.folds()[0].rest} <= set(table.index)
    assert (table >= 0).all().all()
    assert table.max().max() < 50  # mol/kg


def test_published_nitrogen_is_that_of_no_charges():
    found = results.read("gcmc/published-n2.json")
    charged, bare = (found["against_published"][kind] for kind in ("predicted", "none"))
    for part in (charged, bare, found["predicted_against_none"]):
        assert np.array(part["counts"])[:, 2].sum() == found["n"]
        assert not {"name", "reference", "published"} & set(part)
    assert found["n"] > 50
    assert abs(bare["median_ratio"] - 1) < 0.06 < 0.1 < charged["median_ratio"] - 1
    assert bare["n_within_10_percent"] > 0.8 * found["n"]
    assert charged["n_within_10_percent"] < 0.3 * found["n"]
    assert bare["pearson_of_logarithms"] > charged["pearson_of_logarithms"]
    assert bare["mae"] < charged["mae"]


def test_agreement_counts_pairs():
    x, y = np.array([1.0, 2.0, 0.5, 20.0]), np.array([1.05, 1.0, 0.5, 9.0])
    found = published_uptakes.agreement(x, y)
    assert found["n_within_10_percent"] == 2
    assert found["mean_difference"] == pytest.approx((x - y).mean())
    assert found["median_ratio"] == pytest.approx(np.exp(np.median(np.log(x / y))))
    rows = found["counts"]
    assert rows[:, 2].sum() == 4
    edges = published_uptakes.EDGES
    i, j, _ = rows[rows[:, 0].argmin()]
    assert edges[i] <= 0.5 <= edges[i + 1]
    assert edges[j] <= 0.5 <= edges[j + 1]


@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    """Three seeds of fold 0 at the same time on one GPU, with the parameters of mof-n2."""
    assert sorted(p.stem for p in (paths.results(name) / "runs").glob("*.json")) == [
        f"fold0-seed{seed}" for seed in range(3)
    ]
    assert name in available_models()
    runs = runs_of(name)
    dates = [datetime.fromisoformat(run["provenance"]["date"]) for run in runs]
    assert (max(dates) - min(dates)).seconds < 60 < min(r["provenance"]["wall_s"] for r in runs)
    longest = {"mof-ch4n2": 1, "mof-co2o2n2": 0}[name]  # that the chapter states
    assert np.argmax([run["provenance"]["wall_s"] for run in runs]) == longest
    for run in runs:
        assert run["provenance"]["hardware"].endswith("1 x NVIDIA H100 80GB HBM3")
        assert run["n_train"] == len(application(name).folds()[0].train)
    here, there = (dict(application(n).hyper_parameters) for n in (name, "mof-n2"))
    assert here["model"].pop("outputs") == len(application(name).columns)
    assert here == {**there, "model": {k: v for k, v in there["model"].items() if k != "outputs"}}


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_of_the_fold_and_without_labels(name):
    (half, predicted, names), fold = predictions_of(name), application(name).folds()[0]
    for number, part in enumerate(fold.halves):
        assert sorted(names[half == number]) == sorted(part)
    assert predicted.shape == (3, len(fold.rest), len(application(name).columns))
    for run in runs_of(name):
        assert not {"label", "labels"} & keys(run)
        assert {k for row in run["predictions"] for k in row} == {"name", "half", "predicted"}
    table = pd.read_csv(paths.results(name) / "predictions.csv")
    assert list(table.columns) == ["name", "output", "predicted", "spread"]
    assert len(table) == len(fold.halves[1]) * predicted.shape[2]
    where = names.get_indexer(fold.halves[1])
    for k, gas in enumerate(application(name).columns):
        rows = table[table.output == gas].set_index("name").loc[list(fold.halves[1])]
        assert rows.predicted.to_numpy() == pytest.approx(predicted[:, where, k].mean(0), abs=1e-4)
        spread = predicted[:, where, k].std(0, ddof=1)
        assert rows.spread.to_numpy() == pytest.approx(spread, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_summary_agrees_with_itself(name):
    summary, split = results.read(f"{name}/summary.json"), results.read(f"{name}/split.json")
    outputs = summary["outputs"]
    assert list(outputs) == list(application(name).columns)
    for scores in (summary, *outputs.values()):
        assert np.mean(scores["test_mae_of_each_seed"]) == pytest.approx(scores["test_mae"])
        assert len(scores["test_mae_of_each_seed"]) == summary["n_seeds"] == 3
        assert scores["interval"][0] < scores["test_mae"] < scores["interval"][1]
        assert scores["mae_of_mean_over_seeds"] < scores["test_mae"]
    for key in ("test_mae", "test_r2", "mae_of_mean_over_seeds", "r2_of_mean_over_seeds"):
        assert np.mean([o[key] for o in outputs.values()]) == pytest.approx(summary[key])
    assert summary["n_train"] == [split["splits"]["grouped"]["train"]]
    assert summary["n_test"] == split["splits"]["grouped"]["test"]
    assert summary["other_splits"] == {}  # no network was trained on the random split
    assert summary["training_wall_s"] == pytest.approx(
        sum(run["provenance"]["wall_s"] for run in runs_of(name))
    )


@pytest.mark.parametrize("name", NAMES)
def test_summary_is_of_the_labels(name):
    """With labels: errors, R² and intervals again; and what the model card says of them."""
    labels, summary = labels_of(name), results.read(f"{name}/summary.json")
    half, predicted, names = predictions_of(name)
    predicted, truth = predicted[:, half == 1], labels.loc[names[half == 1]].to_numpy()
    deviation = predicted - truth
    assert np.abs(deviation).mean() == pytest.approx(summary["test_mae"])
    before = np.abs(predictions_of(name)[1] - labels.loc[names].to_numpy())[:, half == 0].mean()
    assert before == pytest.approx(summary["validation_mae"])
    for k, (gas, found) in enumerate(summary["outputs"].items()):
        error, variation = deviation[:, :, k], ((truth[:, k] - truth[:, k].mean()) ** 2).sum()
        assert labels.columns[k] == gas
        assert np.abs(error).mean(1) == pytest.approx(found["test_mae_of_each_seed"])
        assert (1 - (error**2).sum(1) / variation).mean() == pytest.approx(found["test_r2"])
        size = np.abs(error.mean(0))
        assert size.mean() == pytest.approx(found["mae_of_mean_over_seeds"])
        covered = size <= 1.645 * predicted[:, :, k].std(0, ddof=1)
        assert 0.3 < covered.mean() < 0.5  # "less than half"
        quarters = pd.Series(size).groupby(pd.qcut(truth[:, k], 4, labels=False)).mean()
        assert quarters.idxmax() == 3
        histogram = results.read(f"{name}/energy_histogram.json")["splits"][0]
        mean = labels.iloc[:, k][list(application(name).folds()[0].train)].mean()
        assert np.abs(truth[:, k] - mean).mean() == pytest.approx(
            histogram["mae_of_the_mean_label"][k]
        )


def test_training_overfits():
    """Over the last ten epochs training falls, validation hardly; CO2, O2 and N2 more."""
    ratios = {}
    for name in NAMES:
        for run in runs_of(name):
            before, last = run["history"][29], run["history"][39]
            assert (before["epoch"], last["epoch"], len(run["history"])) == (29, 39, 40)
            assert last["train_mae"] < 0.9 * before["train_mae"]
            assert abs(last["val_mae"] / before["val_mae"] - 1) < 0.025
            ratios.setdefault(name, []).append(last["val_mae"] / last["train_mae"])
    assert min(ratios["mof-co2o2n2"]) > 1.5
    assert all(1.15 < ratio < 1.25 for ratio in ratios["mof-ch4n2"])
    first = runs_of("mof-ch4n2")[0]["history"]
    assert abs(first[39]["val_mae"] / first[29]["val_mae"] - 1) < 0.01  # "hardly a change"


def test_gases_count_by_their_errors_in_the_loss(monkeypatch):
    """The loss takes errors in mol/kg: twice as far off counts twice, in whichever gas."""
    monkeypatch.setattr(training, "predict_mean", lambda model, batch, atoms: model.predicted)
    learner = SimpleNamespace(
        model=SimpleNamespace(scale=torch.tensor([1.6, 0.2])), global_rank=0,
        weights=SimpleNamespace(predicted=None),
        config=SimpleNamespace(crystals_per_step=1), trainer=SimpleNamespace(world_size=1),
        _replayed=None, _max_atoms=0, _sums={}, log=lambda *_, **__: None,
    )  # fmt: skip
    losses = []
    for off in ([1.0, 0.0], [0.0, 1.0]):
        learner.weights.predicted = torch.tensor([off])
        batch = SimpleNamespace(target=torch.zeros(1, 2))
        losses.append(float(training.Learner._mean_error(learner, "train_mae", batch, 0, 1)))
    assert losses[0] == pytest.approx(losses[1])
    shares = {}
    for name in NAMES:
        scale = load_model(name + ":" + application(name).columns[0]).members[0].scale
        shares[name] = float(scale.max() / scale.sum())
        assert scale.argmax() == 0  # CO2, CH4
    assert min(shares.values()) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_the_network_errs_less_than_the_histogram(name):
    """In each gas and with each seed; in the mean the intervals are apart."""
    summary = results.read(f"{name}/summary.json")
    histogram = results.read(f"{name}/energy_histogram.json")["splits"][0]
    assert histogram["n_test"] == summary["n_test"]
    assert len(histogram["networks_tried"]) == 4
    assert np.mean(histogram["test_mae_of_each_seed"]) == pytest.approx(histogram["test_mae"])
    assert summary["interval"][1] < histogram["interval"][0]
    if name == "mof-ch4n2":  # "not by much"
        assert summary["interval"][1] > 0.95 * histogram["interval"][0]
    rows = errors_by_gas(name)
    for gas, row in rows.iterrows():
        assert max(summary["outputs"][gas]["test_mae_of_each_seed"]) < row.histogram < row.lazy
    less = (1 - rows.test_mae / rows.histogram).round(2).to_dict()
    if name == "mof-co2o2n2":
        assert less == {"CO2": 0.38, "O2": 0.24, "N2": 0.12}  # two fifths, ..., an eighth
    else:
        assert less == {"CH4": 0.19, "N2": 0.39}


def test_where_the_network_is_not_clearly_better():
    """With the relative interval of the mean for each gas of the histogram."""
    gap = {}
    for name in NAMES:
        histogram = results.read(f"{name}/energy_histogram.json")["splits"][0]
        lowest = histogram["interval"][0] / histogram["test_mae"]
        for gas, row in errors_by_gas(name).iterrows():
            gap[name, gas] = lowest * row.histogram / row.interval[1] - 1
    assert gap["mof-co2o2n2", "CO2"] > 0.05
    assert gap["mof-co2o2n2", "O2"] > 0.05
    assert gap["mof-ch4n2", "N2"] > 0.05
    assert -0.02 < gap["mof-ch4n2", "CH4"] < 0  # "just"
    assert gap["mof-co2o2n2", "N2"] < -0.05  # "by much"


def test_carbon_dioxide_dominates_the_mean():
    rows = errors_by_gas("mof-co2o2n2")
    assert rows.test_mae["CO2"] > 0.8 * rows.test_mae.sum()
    network, histogram = rows.test_mae / rows.lazy, rows.histogram / rows.lazy
    assert network.idxmax() == histogram.idxmax() == "CO2"
    others = ["O2", "N2"]
    assert network["CO2"] - network[others].max() < 0.05  # "a little"
    assert histogram["CO2"] - histogram[others].max() > 0.15  # "by far"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_can_be_asked_for(name):
    """The shipped networks give the recorded predictions, in the order of the gases."""
    app, runs = application(name), runs_of(name)
    some = sorted(app.folds()[0].halves[1])[:15]
    crystal, small = min(((app.crystal(n), n) for n in some), key=lambda c: len(c[0].species))
    place = [p["name"] for p in runs[0]["predictions"]].index(small)
    for k, gas in enumerate(app.columns):
        ensemble = load_model(f"{name}:{gas}")
        values = ensemble.values(ensemble.windows(crystal))
        recorded = [run["predictions"][place]["predicted"][k] for run in runs]
        assert values == pytest.approx(recorded, rel=2e-3, abs=2e-3)
    with pytest.raises(ModelError, match=", ".join(app.columns)):
        load_model(name)
