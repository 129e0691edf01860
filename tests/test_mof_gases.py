"""What the chapter on gases in MOFs says, and the splits of their crystals."""

from __future__ import annotations

import hashlib

import numpy as np
import published_uptakes
import pytest

from x3mat import results
from x3mat.applications import application
from x3mat.errors import DataError

NAMES = ["mof-co2o2n2", "mof-ch4n2"]


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
    app = application(name)
    try:
        table = app.labels()
    except DataError as error:
        pytest.skip(f"labels of others are not shipped: {error}")
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
