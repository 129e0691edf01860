"""Intervals of means over crystals, and for an ensemble's predictions: what its spread is worth,
against one width for all."""

from __future__ import annotations

import numpy as np
import pandas as pd

NORMAL, SHARE = 1.645, 0.9  # a normal distribution has this share within so many deviations


def of_mean(values: np.ndarray) -> list[float]:
    """95 % of bootstraps of the crystals have their mean value in it."""
    draws = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    return np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist()


def intervals(fit: pd.DataFrame, test: pd.DataFrame) -> dict:
    """Intervals fitted on `fit` and counted on `test`: by the spread, and of one width.

    Both tables have a row for each crystal: `size`, the absolute error of the mean of the members,
    and `spread`, their standard deviation.
    """
    factor = np.quantile(fit["size"] / fit.spread, SHARE) / NORMAL
    widths = {
        "spread": NORMAL * test.spread, "scaled": NORMAL * factor * test.spread,
        "constant": pd.Series(np.quantile(fit["size"], SHARE), test.index),
    }  # fmt: skip
    third = pd.qcut(test.spread, 3, labels=False)
    found = {
        kind: {"coverage": (inside := test["size"] <= width).mean(),
               "coverage_by_thirds_of_spread": inside.groupby(third).mean(),
               "mean_half_width": width.mean(), "median_half_width": width.median()}
        for kind, width in widths.items()
    }  # fmt: skip
    for entry in found.values():
        entry["coverage_by_thirds_of_spread"] = list(entry["coverage_by_thirds_of_spread"])
    return {"share": SHARE, "factor": factor, **found,
            "mae_by_thirds_of_spread": list(test["size"].groupby(third).mean())}  # fmt: skip
