"""What a look-alike in the training set is worth."""

from __future__ import annotations

import os
from pathlib import Path

import lookalikes
import numpy as np
import pandas as pd
import pytest

from x3mat import results
from x3mat.applications import application

NAMES = "mof-n2", "mof-co2n2", "qmof-gap"
labels_are_there = pytest.mark.skipif(
    not (Path(os.environ.get("X3MAT_DATA", "/none")) / "qmof.npz").is_file(),
    reason="X3MAT_DATA names no folder with qmof.npz, so that labels are unknown",
)


@pytest.mark.parametrize("name", [*NAMES[:2], pytest.param(NAMES[2], marks=labels_are_there)])
def test_the_results_are_of_the_records(name):
    found = results.read(f"{name}/lookalikes.json")
    before, after = (lookalikes.errors(name, fold) for fold in (0, 1))
    kept, mixed = application(name).folds()
    assert (set(before.index), set(after.index)) == (set(kept.rest), set(mixed.rest))
    both = before.index.intersection(after.index)
    parts, of_fold1 = ([found[key][kind] for kind in ("with", "without")]
                       for key in ("both", "fold1"))  # fmt: skip
    assert sum(p["n"] for p in parts) == len(both)
    for key, errors in (("mae_fold0", before), ("mae_fold1", after)):
        mean = sum(p["n"] * p[key] for p in parts) / len(both)
        assert mean == pytest.approx(errors[both].mean())
    split = results.read(f"{name}/split.json")["splits"]["random"]["near_duplicate_in_train"]
    assert [p["n"] for p in of_fold1] == [split["rest"], len(after) - split["rest"]]
    assert sum(p["n"] * p["mae"] for p in of_fold1) == pytest.approx(after.sum())
    for p in parts:
        assert p["gain"] == pytest.approx(p["mae_fold0"] - p["mae_fold1"])
        assert p["interval"][0] < p["gain"] < p["interval"][1]


def test_what_the_chapters_say_of_them():
    for name in NAMES:
        both = results.read(f"{name}/lookalikes.json")["both"]
        assert both["with"]["interval"][0] > 0 > both["without"]["interval"][0]
        assert both["without"]["interval"][1] > 0
        assert both["interval"][0] > 0
    both = results.read("mof-n2/lookalikes.json")["both"]["with"]
    assert 1 / 3 < both["gain"] / both["mae_fold0"] < 0.45  # "more than a third of it"
    both = results.read("qmof-gap/lookalikes.json")["both"]
    assert both["with"]["gain"] / both["with"]["mae_fold0"] == pytest.approx(1 / 3, abs=0.03)
    assert abs(both["without"]["gain"]) < 0.005  # "err alike"
    found = results.read("qmof-gap/summary.json")
    random = found["other_splits"]["1"]
    assert random["n_seeds"] == 3
    assert abs(random["test_mae"] - found["test_mae"]) < 0.005  # "hardly flatters"


def test_groups_are_drawn_together():
    """Ten crystals of one group tell no more than one crystal does."""
    rng = np.random.default_rng(0)
    gains = rng.normal(2.0, 1.0, 40)

    def width(repeats):
        table = pd.DataFrame({"group": np.repeat(np.arange(40), repeats), "known": True,
                              "before": np.repeat(gains, repeats), "after": 0.0})  # fmt: skip
        control = table.assign(known=False, before=0.5)
        found = lookalikes.compared(pd.concat([table, control]))
        assert found["with"]["gain"] == pytest.approx(gains.mean())
        assert found["without"]["interval"] == pytest.approx([0.5, 0.5])
        assert found["difference"] == pytest.approx(gains.mean() - 0.5)
        return np.diff(found["with"]["interval"])[0]

    assert width(10) == pytest.approx(width(1), rel=0.05)
    assert width(1) == pytest.approx(2 * 1.96 * gains.std() / 40**0.5, rel=0.1)
