"""The committed results of the survey and of the zeolite baselines, and the code behind them."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from x3mat import paths, results
from x3mat.applications import application
from x3mat.databases import iza, iza_codes
from x3mat.errors import CrystalError


def tool(name):
    """A script of tools/ as a module."""
    path = paths.data().parent / "tools" / f"{name}.py"
    if not path.is_file():
        pytest.skip("tools/ is only in the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_every_crystal_is_accounted_for_and_none_crashed():
    survey = results.read("survey.json")
    expected = {"iza": 253, "core-mof-asr": 12_020, "core-mof-fsr": 7_061}
    assert {key: s["crystals"] for key, s in survey["sets"].items()} == expected
    for part in survey["sets"].values():
        assert part["crashes"] == 0
        assert part["read_and_windowed"] + part["refused"] == part["crystals"]
        assert sum(part["refused_by_cause"].values()) == part["refused"]
    assert survey["sets"]["iza"]["refused"] == 0
    refusals = pd.read_csv(paths.results("survey-refusals.csv"))
    assert Counter(refusals["set"]) == {
        key: s["refused"] for key, s in survey["sets"].items() if s["refused"]
    }
    assert survey["sets"]["iza"]["orbits"] < 20_000 < 200_000 < survey["sets"]["iza"]["grid_points"]


def test_survey_counts_refusals_crashes_and_points():
    survey = tool("survey")
    settings = survey.Settings()
    good = survey.survey_one(iza, "SOD", settings)
    assert sum(good["atoms"].values()) == good["n_windows"] == 216

    def refuse(name):
        raise CrystalError(name, "Si (atom 1) and O (atom 2) are 0.1 Å apart; 2 overlap", "Fix it.")

    def crash(name):
        raise ZeroDivisionError

    records = {
        "SOD": good,
        "bad": survey.survey_one(refuse, "bad", settings),
        "worse": survey.survey_one(crash, "worse", settings),
    }
    found = survey.summary(records)
    assert (found["read_and_windowed"], found["refused"], found["crashes"]) == (1, 1, 1)
    assert found["refused_by_cause"] == {"overlapping atoms": 1}
    assert found["atoms_per_window"]["max"] == max(good["atoms"])


def test_quantiles_of_a_histogram():
    quantiles = tool("survey").quantiles
    values = np.random.default_rng(0).integers(0, 60, 1001)
    found = quantiles(Counter(values.tolist()))
    assert found["median"] == np.median(values)
    assert (found["min"], found["max"]) == (values.min(), values.max())
    assert found["mean"] == pytest.approx(values.mean())


def test_baselines_are_those_of_the_shipped_labels_and_predictions():
    found = results.read("zeolite-n2/baselines.json")
    table = pd.read_csv(paths.results("zeolite-n2/baselines.csv"), index_col=0)
    labels = application("zeolite-n2").labels()
    assert sorted(table.index) == sorted(iza_codes())
    np.testing.assert_allclose(table["n2_g_L"], labels.loc[table.index, "n2_g_L"], atol=1e-4)
    for name, model in found["models"].items():
        error = (table[name] - table["n2_g_L"]).abs()
        assert error.mean() == pytest.approx(model["test"]["mae"], abs=1e-3)
        folds = error.groupby(table["fold"]).mean()
        np.testing.assert_allclose(folds, [f["mae"] for f in model["per_fold"]], atol=1e-3)
    boosting = found["models"]["gradient boosting"]["test"]["mae"]
    assert found["label_error"]["mae_of_a_perfect_model"] < boosting
    assert boosting < found["models"]["mean"]["test"]["mae"]


def test_baseline_models_learn_a_smooth_function():
    baselines = tool("zeolite_baselines")
    rng = np.random.default_rng(0)
    x = rng.random((120, 3))
    y = 3 * x[:, 0] - x[:, 1]
    for name, limit in {"mean": 1.5, "ridge": 0.05}.items():
        fits = baselines.MODELS[name](x[:100], y[:100], x[100:], 0)
        assert min(np.abs(values - y[100:]).mean() for _, values in fits) < limit
