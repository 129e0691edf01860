"""Networks that know where the gas is: densities, what is told, and what the chapter says of it."""

from __future__ import annotations

import argparse
from dataclasses import replace

import mof_co2n2_errors
import numpy as np
import pandas as pd
import places
import pytest
import torch

from x3mat import results
from x3mat.applications import application
from x3mat.model import X3MatConfig
from x3mat.predict import load_model, predict
from x3mat.training import collate, set_constants, train_config

SMALL = ["model.l_max=1", "model.m_max=1", "model.channels=8", "model.heads=2",
         "model.radial_functions=8", "model.radial_hidden=8", "model.feed_forward=8",
         "windows_per_crystal=4", "crystals_per_step=2"]  # fmt: skip
NAMES = "AXUDII04_clean", "BOCTOE01_clean"  # small, and with little in them


@pytest.fixture(scope="module")
def app():
    return application(places.NAME)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    places.label_part(folder / "0000.npz", NAMES, None, "cpu")
    return folder


@pytest.fixture(scope="module")
def labels(made):
    return places.read_labels(made)


@pytest.fixture(scope="module")
def told(app, labels):
    config = train_config(app, SMALL)
    targets = app.labels().loc[list(NAMES), list(app.columns)].to_numpy(float)
    mean, seen = ([part[name] for name in NAMES] for part in labels)
    return config, places.ToldWindows(
        NAMES, app.crystal, targets, config.model, 4, mean=mean, seen=seen,
        spread=list(map(places.distribution, mean, seen)))  # fmt: skip


def test_few_molecules_are_where_the_simulation_has_them(app, labels):
    for name in NAMES:
        simulated = app.labels().loc[name, list(app.columns)].to_numpy(float)
        assert labels[0][name] == pytest.approx(simulated, rel=0.06)


def test_a_coarse_grid_has_a_hole(app):
    """ "Told of nitrogen that is not there" """
    framework, found = places.framework_of("SIPVOD_clean", {}), []
    for spacing in (0.4, 0.25):
        zb = places.dilute(framework, replace(places.SETTINGS, spacing=spacing))
        found.append(places.densities(framework.lattice, zb, places.SETTINGS.gases)[1].mean())
    assert found[0] > 10
    assert found[1] == pytest.approx(app.labels().N2["SIPVOD_clean"], rel=0.2)


def test_windows_see_what_the_crystal_holds(labels):
    for name in NAMES:
        assert labels[1][name].shape == (2, len(places.PLACES))
        assert labels[1][name].astype(float).mean(1) == pytest.approx(labels[0][name], rel=0.05)


def test_places_are_taken_in_a_row_and_again(told):
    _, data = told
    data = places.PlacedWindows(**{k: v for k, v in vars(data).items()
                                     if k != "spread"})
    item, again, other = data[2, 1], data[2, 1], data[3, 1]
    assert item.target.shape == (8,)
    assert (item.target == again.target).all()
    assert (item.target != other.target).any()
    seen = data.seen[1].astype(float)
    first = int(np.flatnonzero((item.target[:2] == seen.T).all(1))[0])
    chosen = (first + np.arange(4)) % len(places.PLACES)
    assert item.target.reshape(4, 2) == pytest.approx(seen[:, chosen].T)
    assert item.windows.centers == pytest.approx(places.PLACES[chosen])


def test_who_has_learned_nothing_says_what_it_is_told(told, labels):
    config, data = told
    torch.manual_seed(0)
    model = places.told_network(NAMES, *labels, config.model)
    set_constants(model, data)
    found = places.told_predictions(model.eval(), data)
    assert found == pytest.approx(np.array([labels[0][n] for n in NAMES]), rel=1e-3)
    batch = collate([data[0, 0], data[0, 1]])
    y = places.told_means(model, batch.graph(), batch.share, batch.crystal, 2)
    off = batch.target.numpy() - data.targets  # as much as the label is off
    assert y.detach().numpy() - off == pytest.approx(found, rel=1e-3, abs=1e-3)


def test_corrections_are_learned_from_atoms_and_from_densities(told):
    config, data = told
    torch.manual_seed(0)
    model = places.TrainedX3Mat(config.model)
    with torch.no_grad():
        model.head[-1].weight.normal_()
    batch = collate([data[0, 0], data[0, 1]])
    share = batch.share.clone().requires_grad_()
    places.told_means(model, batch.graph(), share, batch.crystal, 2).sum().backward()
    assert share.grad[:, 3:].abs().max() > 0  # beyond share and densities
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in unused if "blocks" in name or "embedding" in name]


@pytest.mark.parametrize("how", ["told", "first"])
def test_a_training_is_kept_and_begins_where_it_should(how, app, tmp_path, monkeypatch, made):
    fold = app.folds()[0]
    small = type(fold)(NAMES, ((NAMES[0],), (NAMES[1],)))
    monkeypatch.setattr(type(app), "folds", lambda self: [small])
    args = argparse.Namespace(first=2, epochs=2, limit=None, set=SMALL, labels=made, jobs=1,
                              runs=tmp_path, device="cpu", how=[how], seeds=[0])  # fmt: skip
    run = places.one("then", how, 0, args)
    assert set(run["predicted"]) == set(NAMES)
    assert len(run["history"]) == 2
    monkeypatch.setattr(places.training, "train", None)  # would fail
    assert places.one("then", how, 0, args)["predicted"] == run["predicted"]
    if how == "first":
        begun = torch.load(places.one("first", how, 0, args)["weights"], weights_only=True)
        started = places.started(places.one("first", how, 0, args)["weights"],
                                 train_config(app, SMALL).model)  # fmt: skip
        assert all(torch.equal(begun[k], v) for k, v in started.state_dict().items())


@pytest.mark.filterwarnings("ignore:divide by zero")  # R² of one crystal
def test_what_is_shipped_is_what_predicts(app, tmp_path, monkeypatch, made):
    fold = app.folds()[0]
    small = type(fold)(NAMES, ((NAMES[0],), (NAMES[1],)))
    monkeypatch.setattr(type(app), "folds", lambda self: [small])
    args = argparse.Namespace(first=1, epochs=2, limit=None, set=SMALL, labels=made, jobs=1,
                              runs=tmp_path, device="cpu", seeds=[0, 1], out=tmp_path)  # fmt: skip
    places.ship(args)
    found = results.read_json(tmp_path / "results" / "mof-co2n2-told" / "summary.json")
    models = load_model(tmp_path / "models" / "mof-co2n2-told:CO2")
    assert models.about[0]["lattice_gas"] == found["lattice_gas"]
    crystal = app.crystal(NAMES[1])
    label = app.labels().loc[NAMES[1], list(app.columns)].to_numpy(float)
    windows = models.windows(crystal)
    every = np.array([m.contributions(windows).double().numpy() for m in models.members])
    y = np.einsum("mwk,w->mk", every, windows.weights / windows.n_windows)
    error = np.abs(y - label)
    assert found["test_mae"] == pytest.approx(error.mean(), rel=1e-4)
    assert [s["test_mae"] for s in found["outputs"].values()] == pytest.approx(
        error.mean(0), rel=1e-4)  # fmt: skip
    assert predict(crystal, models).value == pytest.approx(y[:, 0].mean(), rel=1e-4)
    again = np.mean([[*places.one("then", "told", seed, args)["predicted"].values()]
                     for seed in args.seeds], 0)  # fmt: skip
    assert found["around_places"]["test_mae"] == pytest.approx(
        np.mean([np.abs(np.array(places.one("then", "told", seed, args)["predicted"][NAMES[1]])
                        - label).mean() for seed in args.seeds]))  # fmt: skip
    assert again[1] == pytest.approx(y.mean(0), rel=0.05)  # around other places


# ----------------------------------------------------------------------------------- the record


@pytest.fixture(scope="module")
def record():
    return results.read("mof-co2n2/places.json")


def rows_of(record):
    return {row["how"]: row for row in record["rows"]}


def test_the_record_is_of_these_halves(record, app):
    fold = app.folds()[0]
    assert record["n"] == {k: len(h) for k, h in zip(record["n"], fold.halves, strict=True)}
    assert record["n_train"] == len(fold.train)
    ours = record["volume_A3"], record["range_A"], record["seen_A"], record["places"]
    assert ours == (places.EXCLUDED, places.RANGE, places.SEEN, len(places.PLACES))
    label = app.labels().loc[list(fold.halves[1]), list(app.columns)].to_numpy()
    error = np.abs(np.array(record["told"]) - label).mean()
    assert error == pytest.approx(rows_of(record)["told"]["test"]["mae_of_mean_over_seeds"],
                                  abs=0.02)  # fmt: skip
    summary = results.read("mof-co2n2/summary.json")
    usual = rows_of(record)["usual"]
    assert usual["test"]["mae"] == pytest.approx(summary["test_mae"], abs=1e-3)
    assert usual["validation"]["mae"] == pytest.approx(summary["validation_mae"], abs=1e-3)


def test_the_constants_are_the_best_of_those_tried(record):
    found = results.read("mof-co2n2/lattice_gas.json")
    assert (found["part"], found["n"]) == ("training", places.TRIED)
    assert len(found["rows"]) == len(places.VOLUMES) * len(places.RANGES) == 25
    best = min(found["rows"], key=lambda row: row["mae"])
    assert (best["volume_A3"], best["range_A"]) == (record["volume_A3"], record["range_A"])


def test_what_is_said_of_places(record):
    """ "All three seeds err less", "less than half", "no more than the networks" ..."""
    rows = rows_of(record)
    assert list(rows) == ["usual", "lattice gas", "gradient boosting", "first", "told"]
    for half in ("validation", "test"):
        usual, first, told = (rows[how][half] for how in ("usual", "first", "told"))
        assert (np.array(first["mae_of_each_seed"]) < usual["mae_of_each_seed"]).all()
        assert first["gain_interval"][0] > 0
        assert told["gain_interval"][0] > 0
        assert told["mae"] < usual["mae"] / 2
        assert told["interval"][1] < 8.5
        assert rows["lattice gas"][half]["mae"] < usual["mae"]
        assert told["mae"] < rows["gradient boosting"][half]["mae"] < first["mae"]
    assert rows["first"]["train_mae"][0] < rows["first"]["validation"]["mae"] / 2
    assert record["cost"]["crystals"] == 20  # by which the chapter divides
    assert 0.5 < record["cost"]["seconds"] / 20 < 1.5  # "about 1 s"
    low, middle, high = record["dilute"]["ratio_quartiles"][0]
    assert 0.95 < low < middle < high < 1.05  # "agree"


def test_one_crystal_stands_out(record, app):
    names = list(app.folds()[0].halves[1])
    error = np.array(record["told"])[:, 1] - app.labels().N2[names].to_numpy()
    first, second = np.sort(np.abs(error))[[-1, -2]]
    assert names[int(error.argmax())] == "SIPVOD_clean"
    assert first > 2 * second


@pytest.fixture(scope="module")
def told_records():
    return [rows_of(results.read(f"mof-co2n2/{name}.json")) for name in ("told", "told-64")]


def test_what_is_said_of_the_finer_grid(record, told_records):
    coarse, (narrow, wide) = rows_of(record), told_records
    for half in ("validation", "test"):
        gains = {how: coarse[how][half]["mae"] - wide[how][half]["mae"]
                 for how in ("lattice gas", "told")}  # fmt: skip
        assert gains["lattice gas"] > gains["told"] > 0  # "gain less"
        for how in ("usual", "lattice gas", "gradient boosting"):
            assert narrow[how][half]["mae"] == wide[how][half]["mae"]
    # "half of the channels do as well"
    best, other = narrow["told"]["validation"]["mae"], wide["told"]["validation"]["mae"]
    assert best == pytest.approx(other, rel=0.02)


def test_what_is_shipped_is_what_the_chapter_says(record, app, told_records):
    summary, found = (results.read(f"mof-co2n2{name}.json") for name in ("-told/summary", "/told"))
    assert found["set"] == ["model.channels=32"]
    assert 1 < found["cost"]["seconds"] / found["cost"]["crystals"] < 5
    assert found["cost"]["crystals"] == 20  # by which the chapter divides
    sizes = [sum(p.numel() for p in places.ToldX3Mat(X3MatConfig(**{
        **summary["config"]["model"], "channels": channels})).parameters())
        for channels in (32, 64)]  # fmt: skip
    assert sizes[0] / sizes[1] == pytest.approx(1 / 3, abs=0.02)
    narrow = told_records[0]["told"]
    for half in ("validation", "test"):
        assert summary["around_places"][f"{half}_mae"] == pytest.approx(
            narrow[half]["mae"], abs=1e-3)  # fmt: skip
    assert summary["interval"][0] < narrow["test"]["mae"] < summary["interval"][1]
    assert summary["test_mae"] < rows_of(record)["usual"]["test"]["mae"] / 2  # README, too
    assert summary["test_mae"] < 8.5
    fold = app.folds()[0]
    assert (summary["n_train"], summary["n_test"]) == ([len(fold.train)], len(fold.halves[1]))
    shown = pd.read_csv(results.paths.results("mof-co2n2-told/predictions.csv"), index_col=0)
    assert set(shown.index) == set(fold.halves[1])
    labels = app.labels()
    assert shown.label.to_numpy() == pytest.approx(
        [labels[gas][name] for name, gas in shown.output.items()], abs=1e-3)  # fmt: skip
    for gas, part in shown.groupby("output"):
        error, widths = (part.predicted - part.label).abs(), summary["intervals"][gas]
        assert error.mean() == pytest.approx(
            summary["outputs"][gas]["mae_of_mean_over_seeds"], abs=1e-3)  # fmt: skip
        for kind, width in (("constant", widths["constant"]["mean_half_width"]),
                            ("spread", 1.645 * part.spread),
                            ("scaled", 1.645 * widths["factor"] * part.spread)):  # fmt: skip
            covered = (error <= width).mean()
            assert covered == pytest.approx(widths[kind]["coverage"], abs=5e-3)
            if kind != "spread":  # "as good"
                assert covered == pytest.approx(0.9, abs=0.04)
        assert widths["spread"]["coverage"] < 0.5  # "no error bar"


def test_the_shipped_networks_predict_what_the_record_says(app):
    shown = pd.read_csv(results.paths.results("mof-co2n2-told/predictions.csv"), index_col=0)
    shown = shown.pivot(columns="output", values=["predicted", "spread"])
    small = sorted(shown.index, key=lambda name: app.crystal(name, symprec=0.0).n_atoms)[:3]
    for gas in app.columns:
        models = load_model(f"mof-co2n2-told:{gas}")
        assert len(models.members) == 3
        for name in small:
            found = predict(app.crystal(name), models)
            assert found.value == pytest.approx(shown.predicted[gas][name], rel=1e-3, abs=2e-3)
            assert found.std == pytest.approx(shown.spread[gas][name], rel=2e-2, abs=2e-3)
            assert not any("trained on" in warning for warning in found.warnings)


def test_the_worst_are_told_better():
    """ "The ten worst from above, once more" """
    shown = pd.read_csv(results.paths.results("mof-co2n2-told/predictions.csv"), index_col=0)
    told = shown[shown.output == "CO2"].predicted
    worst = results.read("mof-co2n2/errors.json")["gases"]["CO2"]["worst"]
    better = [abs(told[w["name"]] - w["label"]) < abs(w["predicted"] - w["label"])
              for w in worst]  # fmt: skip
    assert len(better) == 10
    assert all(better)


@pytest.mark.parametrize("name", ["places", "told"])
def test_what_is_said_of_selectivities(name, app):
    """The errors' own figures, and those of the networks that are told, from their predictions."""
    record = results.read(f"mof-co2n2/{name}.json")
    errors, found = results.read("mof-co2n2/errors.json"), record["selectivity"]
    usual = dict(found["usual"])
    assert usual.pop("found_of_top_co2") == errors["gases"]["CO2"]["found_of_top_tenth"]
    assert usual.keys() == errors["selectivity"].keys()
    assert all(usual[k] == pytest.approx(x) for k, x in errors["selectivity"].items())
    label = app.labels().loc[list(app.folds()[0].halves[1]), list(app.columns)]
    told = pd.DataFrame(record["told"], label.index, app.columns)
    again = mof_co2n2_errors.of_selectivities(label, told)
    for key in ("median_factor", "spearman", "found_of_top_tenth"):
        assert again[key] == pytest.approx(found["told"][key], rel=0.03)
    assert found["told"]["median_factor"] < found["lattice gas"]["median_factor"]
