"""The tool that trains on fewer crystals, with other windows, or predicts on other grids."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import convergence
import numpy as np
import pytest

from x3mat import paths, results
from x3mat.applications import application
from x3mat.predict import load_model
from x3mat.training import train_config

NAME = "mof-n2"
SMALL = "GORQAF_clean", "JOHFIW_manual"


def run(monkeypatch, folder, *arguments):
    """The record that a command writes, below `folder`."""
    monkeypatch.setattr(sys, "argv", ["convergence.py", NAME, *arguments])
    monkeypatch.setattr(paths, "results", lambda name="": folder / name)
    convergence.main()
    return results.read_json(folder / NAME / f"{arguments[0]}.json")


def test_parts_are_nested():
    names = application(NAME).folds()[0].train
    small, large = (convergence.part(names, 1, n) for n in (100, 1000))
    assert large[:100] == small
    assert set(large) < set(names)
    assert len(set(large)) == 1000
    assert convergence.part(names[::-1], 1, 100) == small
    assert convergence.part(names, 2, 100) != small


def test_plan_of_sizes_changes_only_epochs_and_seed():
    usual = train_config(application(NAME))
    jobs = convergence.plan("sizes", NAME, [100, 2000], [0, 1], (10, 1))
    assert [(value, seed, n) for value, seed, n, _ in jobs] == [
        (v, s, v) for v in (100, 2000) for s in (0, 1)]  # fmt: skip
    for _, seed, n, config in jobs:
        assert config.epochs * n / config.crystals_per_step >= convergence.LEAST_STEPS
        assert config.seed == seed
        assert asdict(config) == asdict(usual) | {"seed": seed, "epochs": config.epochs}
    assert jobs[-1][-1].epochs == usual.epochs


def test_plan_of_radii_is_brief():
    usual = train_config(application(NAME))  # parts follow from seed and n: the same for all radii
    for value, seed, n, config in convergence.plan("radii", NAME, [4.0, 8.0], [3], (50, 2)):
        assert (n, seed, config.epochs) == (50, 3, 2)
        assert config.model.radius == value
        model = asdict(usual.model) | {"radius": value}
        assert asdict(config) == asdict(usual) | {"seed": 3, "epochs": 2, "model": model}


def test_plan_of_degrees_changes_them_alone():
    usual = train_config(application(NAME))
    jobs = convergence.plan("degrees", NAME, [0, 1, 4], [0], (50, 2))
    for (value, _, n, config), m_max in zip(jobs, (0, 1, usual.model.m_max), strict=True):
        assert n == 50
        model = asdict(usual.model) | {"l_max": value, "m_max": m_max}
        assert asdict(config) == asdict(usual) | {"seed": 0, "epochs": 2, "model": model}


def test_shipped_networks_predict_what_is_recorded():
    models = load_model(NAME).members
    found, windows = convergence.predicted(models, NAME, SMALL, models[0].config.step)
    assert found.shape == (3, 2, 1)
    assert windows > 100
    for seed, of_seed in enumerate(found):
        record = results.read(f"{NAME}/runs/fold0-seed{seed}.json")["predictions"]
        known = {row["name"]: row["predicted"] for row in record}
        assert of_seed.tolist() == [pytest.approx(known[name], rel=1e-3) for name in SMALL]


def test_errors_follow_from_what_was_found():
    found, labels = np.array([[[1.0], [2.0]], [[3.0], [2.0]]]), np.array([[2.0], [4.0]])
    [row] = convergence.with_errors([{"value": 1.0, "found": found}], labels)
    assert row["mae_of_each_seed"].tolist() == [1.5, 1.5]
    assert (row["mae"], row["mae_of_mean_over_seeds"]) == (1.5, 1.0)
    assert "found" not in row


def test_steps_of_two_crystals(tmp_path, monkeypatch):
    shipped = results.read(f"{NAME}/steps.json")
    record = run(monkeypatch, tmp_path, "steps", "--values", "3", "6", "--limit", "2")
    assert set(record) == set(shipped)
    assert all(set(row) == set(shipped["rows"][0]) for row in record["rows"])
    first, second = record["rows"]
    assert first["windows"] > second["windows"] > 0
    assert (first["mean_change_from_first"], record["n"]) == (0, 2)
    assert second["mean_change_from_first"] > 0


def test_a_tiny_training(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setattr(convergence, "train_config", lambda chosen, changes: train_config(
        chosen, [*changes, "model.channels=8", "windows_per_crystal=2"]))  # fmt: skip
    shipped = results.read(f"{NAME}/radii.json")
    command = ["radii", "--values", "4", "--brief", "8", "1", "--seeds", "0", "--limit", "2",
               "--runs", str(tmp_path / "runs")]  # fmt: skip
    record = run(monkeypatch, tmp_path, *command)
    assert set(record) == set(shipped)
    [row] = record["rows"]
    assert set(row) == set(shipped["rows"][0])
    assert (row["value"], row["n_train"], row["epochs"]) == (4.0, 8, [1])
    assert row["mae"] == row["mae_of_each_seed"][0] == row["mae_of_mean_over_seeds"]
    [file] = (tmp_path / "runs").rglob("model.pt")
    written = file.stat().st_mtime_ns
    again = run(monkeypatch, tmp_path, *command)  # nothing is left to train
    assert file.stat().st_mtime_ns == written
    assert again["rows"] == record["rows"]


def test_what_is_said_of_sizes():
    record, whole = (results.read(f"{NAME}/{what}.json") for what in ("sizes", "summary"))
    histogram = results.read(f"{NAME}/energy_histogram.json")["splits"][0]
    assert record["half"] == "test"
    assert record["n"] == whole["n_test"] == len(application(NAME).folds()[0].halves[1])
    assert record["seeds"] == whole["seeds"]
    rows = {row["n_train"]: row for row in record["rows"]}
    assert list(rows) == [100, 300, 1000, 2000]
    for n, row in rows.items():
        assert row["mae"] == pytest.approx(np.mean(row["mae_of_each_seed"]))
        for epochs in row["epochs"]:
            assert epochs * n / 16 >= convergence.LEAST_STEPS == 1500
    assert rows[1000]["epochs"] == rows[2000]["epochs"] == [40] * 3
    errors = [*(row["mae"] for row in rows.values()), whole["test_mae"]]
    assert np.all(np.diff(errors) < 0)
    assert rows[300]["mae"] < histogram["test_mae"] < rows[100]["mae"]


def test_what_is_said_of_grids_of_zeolites():
    record = results.read("zeolite-n2/steps.json")
    rows = {row["value"]: row for row in record["rows"]}
    assert list(rows) == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert record["half"] == "validation"
    assert record["n"] == len(application("zeolite-n2").folds()[0].halves[0])
    assert all(len(row["mae_of_each_seed"]) == 1 for row in rows.values())
    assert rows[1.5]["mae"] < rows[1.0]["mae"] < rows[2.0]["mae"] < 1.25 * rows[1.0]["mae"]
    assert 0.4 < rows[2.0]["mean_change_from_first"] / rows[2.0]["mae"] < 0.6
    assert rows[4.0]["mae"] > rows[3.0]["mae"] > 1.2 * rows[2.0]["mae"]
    relative = {}
    for name in ("zeolite-n2", NAME):
        row = {r["value"]: r for r in results.read(f"{name}/steps.json")["rows"]}[2.0]
        relative[name] = row["mean_change_from_first"] / row["mae"]
    assert relative[NAME] < relative["zeolite-n2"]


def test_only_networks_that_never_saw_the_crystals(tmp_path, monkeypatch):
    """Of zeolite-n2 other folds' networks were trained on this validation half."""
    command = ["steps", "--values", "4", "--limit", "1"]
    monkeypatch.setattr(sys, "argv", ["convergence.py", "zeolite-n2", *command])
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    convergence.main()
    [row] = results.read_json(tmp_path / "zeolite-n2" / "steps.json")["rows"]
    model, name = load_model("zeolite-n2"), application("zeolite-n2").folds()[0].halves[0][0]
    unseen = model.without(name)
    assert len(model.members) > len(row["mae_of_each_seed"])
    windows = unseen.windows(application("zeolite-n2").crystal(name), step=4.0)
    of_fold = [about["fold"] == 0 for about in unseen.about]
    errors = np.abs(unseen.values(windows) - application("zeolite-n2").labels().n2_g_L[name])
    assert row["mae_of_each_seed"] == pytest.approx(errors[of_fold].tolist(), rel=1e-3)
