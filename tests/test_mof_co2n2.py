"""What the chapter on CO2 and N2 in MOFs says, and where its numbers come from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from x3mat import paths, results
from x3mat.applications import application
from x3mat.databases import core_mof_table
from x3mat.predict import load_model
from x3mat.training import TrainConfig, train_config

GASES = "CO2", "N2"


@pytest.fixture(scope="module")
def errors():
    return results.read("mof-co2n2/errors.json")


@pytest.fixture(scope="module")
def summary():
    return results.read("mof-co2n2/summary.json")


@pytest.fixture(scope="module")
def runs():
    return [results.read(f"mof-co2n2/runs/fold0-seed{seed}.json") for seed in range(3)]


@pytest.fixture(scope="module")
def labels():
    return application("mof-co2n2").labels()


@pytest.fixture(scope="module")
def fold():
    return application("mof-co2n2").folds()[0]


@pytest.fixture(scope="module")
def tested(runs, fold):
    """By gas, label, mean and spread of the networks on the test half."""
    tables = [pd.DataFrame(run["predictions"]).set_index("name") for run in runs]
    for half in (0, 1):
        assert set(tables[0].index[tables[0].half == half]) == set(fold.halves[half])
    names, out = list(fold.halves[1]), {}
    for k, gas in enumerate(GASES):
        members = np.array([[p[k] for p in table.predicted[names]] for table in tables])
        out[gas] = pd.DataFrame({"label": [y[k] for y in tables[0].label[names]],
                                 "predicted": members.mean(0), "spread": members.std(0, ddof=1),
                                 "alone": np.abs(members - [y[k] for y in tables[0].label[names]])
                                 .mean(0)}, index=names)  # fmt: skip
        out[gas]["size"] = (out[gas].predicted - out[gas].label).abs()
    return out


def test_labels_are_those_of_the_record(labels):
    record = results.read("mof-co2n2/labels.json")
    assert record["n_labels"] == len(labels) == 5409  # as the chapter's summary says
    content = (paths.data() / "mof-co2n2" / "labels.csv").read_bytes()
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert {cause.split()[2] for cause in record["failed"].values()} == {"Eu", "Be"}
    assert record["all"]["n_equilibrated"] == labels.equilibrated.sum() > 0.9 * len(labels)
    batches = record["passes"][0]["batches"]
    assert batches[4]["crystals"] == max(b["crystals"] for b in batches)
    assert batches[-1] == batches[4]
    assert batches[0]["chains_s"] > batches[4]["chains_s"]
    assert sum(b["crystals"] for b in batches) == len(labels) + len(record["failed"])


def test_units_agree(labels):
    """g/L and mg/g say the same as mol/kg: no factor of two."""
    for name, mass in (("CO2", 44.01), ("N2", 28.0134)):
        gas = name.lower()
        some = labels[labels[f"{gas}_mol_per_kg"] > 0.01]
        ratio = some[f"{gas}_mg_per_g"] / some[f"{gas}_mol_per_kg"]
        assert ratio.to_numpy() == pytest.approx(mass, rel=1e-3)
        density = pd.Series({n: float(row["cm3_g"]) for n, row in core_mof_table().items()})
        per_litre = some[f"{gas}_mg_per_g"] * density[some.index]
        assert np.median(some[name] / per_litre) == pytest.approx(1, abs=1e-3)


def test_split_keeps_look_alikes_together(fold):
    split = results.read("mof-co2n2/split.json")
    assert split["splits"]["grouped"]["near_duplicate_in_train"]["rest"] == 0
    assert split["splits"]["grouped"]["test"] == len(fold.halves[1])
    assert split["splits"]["random"]["near_duplicate_in_train"]["test"] > 100


def test_hyper_parameters_are_those_of_nitrogen_but_for_four():
    here, there = (dict(application(n).hyper_parameters) for n in ("mof-co2n2", "mof-n2"))
    model = {"outputs": 1, **there["model"]}
    assert {**here["model"], "outputs": 1} == {**model, "l_max": 3, "cutoff": 5.0}
    assert (model["l_max"], model["cutoff"]) == (2, 4.0)
    changed = {"epochs": 24, "windows_per_crystal": 4 * there["windows_per_crystal"]}
    assert {**here, "model": 0} == {**there, "model": 0, **changed}
    assert there["epochs"] == 40


def test_networks_have_these_hyper_parameters(runs):
    for seed, run in enumerate(runs):
        used = train_config(application("mof-co2n2"), [f"seed={seed}"])
        stated = {k: v for k, v in run["config"].items() if k != "refine"}  # has gone since
        assert {**asdict(TrainConfig()), **stated} == asdict(used)
        assert "1 x NVIDIA H200" in run["provenance"]["hardware"]


def test_nitrogen_has_hardly_any_weight(fold, labels):
    """One scale for both: the share of an output in the loss is that of its deviations."""
    deviations = labels.loc[list(fold.train), list(GASES)].std()
    scale = load_model("mof-co2n2:CO2").members[0].scale
    assert scale.tolist() == pytest.approx(deviations.tolist(), rel=0.01)
    assert deviations.N2 / deviations.sum() < 0.05


def test_training_overfits(runs):
    """Validation falls slowly in the last third, training to about two fifths of it."""
    for run in runs:
        history = pd.DataFrame(run["history"])
        checked = history.dropna(subset="val_mae")
        late = checked.val_mae[checked.epoch >= 14]
        assert len(late) > 1
        assert 0.9 < late.iloc[-1] / late.iloc[0] < 1
        assert 0.36 < history.train_mae.iloc[-1] / late.iloc[-1] < 0.44


def test_higher_degrees_and_a_longer_cutoff_help_a_little(runs, summary):
    before = results.read("mof-co2n2/l_max-2.json")
    model = application("mof-co2n2").hyper_parameters["model"]
    gain, seeds = before["validation_gain"], before["validation_mae_of_each_seed"]
    assert (gain["l_max"], gain["cutoff"]) == (model["l_max"], model["cutoff"])
    assert before["validation_mae"] == pytest.approx(np.mean(seeds))
    assert before["test_mae"] == pytest.approx(np.mean(before["test_mae_of_each_seed"]))
    now = [np.mean([np.abs(np.subtract(p["predicted"], p["label"])).mean()
                    for p in run["predictions"] if p["half"] == 0]) for run in runs]  # fmt: skip
    assert summary["validation_mae"] == pytest.approx(np.mean(now))
    assert gain["mean"] == pytest.approx(np.mean(seeds) - np.mean(now))
    assert gain["interval"][0] < 0 < gain["mean"] < gain["interval"][1]
    assert np.all(np.array(now) < seeds)
    rest = [run["rest_mae"] for run in runs]
    assert np.sum(np.array(rest) < before["rest_mae_of_each_seed"]) == 2
    assert min(rest) > 1.5 * 8.5  # "far from that"


def test_summary_is_of_the_predictions(summary, tested, labels):
    for gas in GASES:
        found, part = summary["outputs"][gas], tested[gas]
        assert labels[gas][part.index].to_numpy() == pytest.approx(part.label)
        assert found["test_mae"] == pytest.approx(part.alone.mean())
        assert found["mae_of_mean_over_seeds"] == pytest.approx(part["size"].mean())
    both = np.mean([summary["outputs"][gas]["test_mae"] for gas in GASES])
    assert summary["test_mae"] == pytest.approx(both)
    low, high = summary["interval"]
    assert low < summary["test_mae"] < high
    table = pd.read_csv(paths.results("mof-co2n2") / "predictions.csv")
    for gas in GASES:
        mean = table[table.output == gas].set_index("name").predicted
        assert mean[tested[gas].index].to_numpy() == pytest.approx(tested[gas].predicted, abs=1e-3)
    share = summary["outputs"]["CO2"]["test_mae"] / 2 / summary["test_mae"]
    assert share > 0.9  # "nearly all CO2"


def test_errors_are_of_the_predictions(errors, tested):
    for gas, part in tested.items():
        found = errors["gases"][gas]
        assert found["test"]["mae"] == pytest.approx(part["size"].mean())
        spread = ((part.label - part.label.mean()) ** 2).sum()
        r2 = 1 - ((part.predicted - part.label) ** 2).sum() / spread
        assert found["test"]["r2"] == pytest.approx(r2)
        quarters = part["size"].groupby(pd.qcut(part.label, 4, labels=False)).mean()
        assert found["mae_by_quarters_of_label"] == pytest.approx(quarters.tolist())
        inside = part["size"] <= found["intervals"]["constant"]["mean_half_width"]
        assert found["intervals"]["constant"]["coverage"] == pytest.approx(inside.mean())
        assert abs(inside.mean() - 0.9) < 0.03
        assert found["intervals"]["spread"]["coverage"] < 0.6
        worst = part["size"].nlargest(10).index.tolist()
        assert [row["name"] for row in found["worst"]] == worst


def test_what_is_said_of_carbon_dioxide(errors):
    found = errors["gases"]["CO2"]
    assert np.all(np.diff(found["mae_by_quarters_of_label"]) > 0)
    assert found["pores"]["closed"]["mae"] > found["pores"]["open"]["mae"]
    assert found["test"]["mae"] > 10 * found["test"]["median_label_error"]
    assert found["worst_too_high"] == 0
    for row in found["worst"]:
        assert -row["error"] > row["spread"]
        assert -row["error"] > 10 * row["label_error"]
        assert row["label"] > found["test"]["mean_label"]


def test_selectivity(errors, tested):
    found, least = errors["selectivity"], errors["selectivity"]["least_n2"]
    kept = tested["N2"].label >= least
    assert found["n"] == kept.sum()
    ratios = []
    for column in ("label", "predicted"):
        co2, n2 = (tested[gas][column][kept].clip(lower=least) for gas in GASES)
        ratios.append(co2 / 44.01 / (n2 / 28.0134) * 0.85 / 0.15)
    simulated, predicted = ratios
    factor = np.exp(np.abs(np.log(predicted / simulated)))
    assert found["median_factor"] == pytest.approx(factor.median(), rel=1e-3)
    assert abs(found["n_within_factor_2"] - (factor <= 2).sum()) <= 1
    correlation = simulated.corr(predicted, method="spearman")
    assert found["spearman"] == pytest.approx(correlation, abs=1e-3)


def test_exercise_on_the_mean_of_two(errors, tested):
    scaled = {gas: part["size"].mean() / part.label.std() for gas, part in tested.items()}
    assert scaled["CO2"] < scaled["N2"]
    lazy = {gas: errors["gases"][gas]["always_the_mean"]["test_mae"] / 2 for gas in GASES}
    assert lazy["N2"] < 2 < 40 < lazy["CO2"]


def test_outputs_can_be_asked_for(labels, fold, runs):
    """The shipped networks give the recorded predictions, in the order of the gases."""
    small = min(fold.halves[1], key=lambda n: labels.co2_molecules_per_cell[n])
    crystal = application("mof-co2n2").crystal(small)
    place = [p["name"] for p in runs[0]["predictions"]].index(small)
    for k, gas in enumerate(GASES):
        ensemble = load_model(f"mof-co2n2:{gas}")
        values = ensemble.values(ensemble.windows(crystal))
        recorded = [run["predictions"][place]["predicted"][k] for run in runs]
        assert values == pytest.approx(recorded, rel=2e-3, abs=2e-3)


def test_charges_make_the_worst(errors, fold):
    found = results.read("mof-co2n2/charges.json")
    assert [r["name"] for r in found["worst"]["rows"]] == [
        r["name"] for r in errors["gases"]["CO2"]["worst"]
    ]
    assert {r["name"] for r in found["random"]["rows"]} <= set(fold.halves[1])
    for part in (found["worst"], found["random"]):
        share = [r["without_charges"] / r["label"] for r in part["rows"]]
        assert part["median_share"] == pytest.approx(np.median(share))
        assert part["greatest_share"] == pytest.approx(max(share))
    assert found["worst"]["greatest_share"] < 0.5
    assert found["worst"]["median_share"] < found["random"]["median_share"]


def test_the_histogram_is_of_the_same_crystals(fold, summary):
    first, second = results.read("mof-co2n2/energy_histogram.json")["splits"]
    assert first["n_test"] == len(fold.halves[1])
    assert first["interval"][0] < first["test_mae"] < first["interval"][1]
    assert summary["interval"][1] < 0.5 * first["interval"][0]  # "less than half"
    for k, gas in enumerate(GASES):
        assert summary["outputs"][gas]["interval"][1] < first["test_mae_of_each_output"][k]
    assert second["test_mae"] < first["interval"][0]
