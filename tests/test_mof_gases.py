"""What the chapter on gases in MOFs says, and the splits of their crystals."""

from __future__ import annotations

import hashlib

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
