"""The search for hyper-parameters, on a few zeolites."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from x3mat import paths, results

pytest.importorskip("optuna", reason="the search needs Optuna")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import tune

SMALL = {"model.layers": [1], "model.l_max": [0, 1], "model.channels": [8],
         "model.cutoff": [2.0], "windows_per_crystal": [1], "crystals_per_step": [4],
         "learning_rate": [1e-3, 2e-3]}  # fmt: skip


def test_first_trials_change_one_thing_at_a_time():
    trials = tune.first_trials("zeolite-n2")
    assert trials[0] == trials[1]
    for trial in trials[2:]:
        assert sum(trial[key] != trials[0][key] for key in trial) == 1
    every = [tuple(trial.values()) for trial in trials[1:]]
    assert len(set(every)) == len(every)


def test_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SPACE", SMALL)
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / "results" / name)
    monkeypatch.setattr(tune, "run", lambda jobs, threads: [tune.search(*job) for job in jobs])
    counts = []
    for trials in ("2", "4"):
        monkeypatch.setattr(sys, "argv", ["tune.py", "zeolite-n2", "--trials", trials, "--limit",
                                          "5", "--epochs", "1", "--runs", str(tmp_path)])
        tune.main()
        found = results.read_json(tmp_path / "results" / "zeolite-n2" / "tuning.json")
        counts.append(len(found["trials"]))
        assert all(row["val_mae"] > 0 and row["parameters"] > 0 for row in found["trials"])
    assert counts == [2, 4]
