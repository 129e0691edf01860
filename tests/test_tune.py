"""The search for hyper-parameters, on a few zeolites."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from x3mat import paths, results
from x3mat.applications import application

pytest.importorskip("optuna", reason="the search needs Optuna")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import tune

SMALL = ["model.layers=1", "model.l_max=0,1", "model.channels=8", "model.cutoff=2.0",
         "windows_per_crystal=1", "crystals_per_step=4", "learning_rate=1e-3,2e-3"]  # fmt: skip


def test_first_trials_change_one_thing_at_a_time():
    trials = tune.first_trials("zeolite-n2", tune.SPACE)
    assert trials[0] == trials[1]
    for trial in trials[2:]:
        assert sum(trial[key] != trials[0][key] for key in trial) == 1
    every = [tuple(trial.values()) for trial in trials[1:]]
    assert len(set(every)) == len(every)


def test_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / "results" / name)
    monkeypatch.setattr(tune, "run", lambda jobs: [tune.search(*job) for job in jobs])
    counts = []
    for trials in ("2", "4", "4"):
        monkeypatch.setattr(sys, "argv", ["tune.py", "zeolite-n2", "--trials", trials, "--limit",
                                          "5", "--epochs", "1", "--runs", str(tmp_path),
                                          "--vary", *SMALL])
        tune.main()
        found = results.read_json(tmp_path / "results" / "zeolite-n2" / "tuning.json")
        counts.append(len(found["trials"]))
        assert all(row["val_mae"] > 0 and row["parameters"] > 0 for row in found["trials"])
        assert {(row["model.cutoff"], row["model.channels"]) for row in found["trials"]} == {(2, 8)}
    assert counts == [2, 4, 4]
    sys.argv[-1] = "learning_rate=1e-3,4e-3"
    with pytest.raises(SystemExit):  # the journal is of another search
        tune.main()


@pytest.mark.parametrize("what", ["model.depth=1,2", "model.layers=", "model.layers=a", "layers",
                                  "epochs=2", "model.encoding=crystal,window"])  # fmt: skip
def test_unknown_hyper_parameters_are_refused(what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "zeolite-n2", "--vary", what])
    with pytest.raises(SystemExit):
        tune.main()
    assert what in capsys.readouterr().err


def test_what_is_said_of_the_search():
    """Chapter 9 reads single trials by their place."""
    record, known = results.read("mof-n2/tuning.json"), application("mof-n2").hyper_parameters
    trials, first = record["trials"], tune.first_trials("mof-n2", tune.SPACE)
    keys = list(tune.SPACE)
    assert [{k: t[k] for k in keys} for t in trials[:2]] == first[:2]
    assert first[0]["windows_per_crystal"] == known["windows_per_crystal"] == 8
    assert first[0]["model.l_max"] == known["model"]["l_max"] == 2
    assert record["limit"] // 5 == 200  # crystals of the validation half
    base = [t["val_mae"] for t in trials[:2]]
    changed = {}
    for place, trial in enumerate(trials):
        different = [k for k in keys if trial[k] != first[0][k]]
        if len(different) == 1:
            changed[different[0], trial[different[0]]] = place, trial["val_mae"]
    windows = [changed["windows_per_crystal", k] for k in (1, 2, 4)]
    assert [place for place, _ in windows] == [5, 6, 7]
    assert np.all(np.diff([*(mae for _, mae in windows), np.mean(base)]) < -2)
    degrees = [changed["model.l_max", k] for k in (0, 1, 3)]
    assert [place for place, _ in degrees] == [14, 15, 16]
    maes = [mae for _, mae in degrees]
    assert maes[0] > maes[1] > np.mean(base) + 1 > np.mean(base) - 1 > maes[2]
    assert [changed["model.cutoff", k][0] for k in (3.0, 5.0)] == [8, 10]
    assert changed["model.cutoff", 5.0][1] < min(base) - 1
    best = min(trials, key=lambda t: t["val_mae"])
    assert best is trials[29]
    assert {k for k in keys if best[k] != first[0][k]} == {"model.l_max", "model.cutoff"}
    assert (best["model.l_max"], best["model.cutoff"]) == (3, 5.0)
    assert abs(base[0] - base[1]) < 1
