"""Summary of the records of an application's runs.

examples:
  python tools/summarize.py zeolite-n2
  X3MAT_DATA=folder python tools/summarize.py qmof-gap mof-co2o2n2

Writes data/results/<application>/summary.json and predictions.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
from intervals import of_mean

from x3mat import paths, results
from x3mat.applications import APPLICATIONS, Application, application
from x3mat.errors import DataError, X3MatError


def summarize(chosen: Application) -> dict:
    """Collect all records of an application into ``data/results/<application>/summary.json``.

    With folds each crystal is in the rest of one, so each seed predicts every crystal once, by a
    model that never saw it. An application of one split (``drawn``) is tested on the second half
    of its rest; errors on other splits stand under ``other_splits``. Of several outputs each has
    its scores under ``outputs``, and the others are their means. Errors are against the labels as
    they stand now. ``test_mae`` and ``test_r2`` are means over seeds; the interval is the 2.5-97.5
    % range of ``test_mae`` over 10,000 bootstrap samples of the crystals.
    """
    folder = paths.results(chosen.name)
    records = [json.loads(p.read_text()) for p in sorted((folder / "runs").glob("fold*.json"))]
    if not records:
        raise DataError(chosen.name, "no training run is recorded",
                        f"run x3mat train {chosen.name}")
    table, wanted = chosen.labels(), 1 if chosen.drawn else len(chosen.folds())
    rows = pd.DataFrame([
        {"name": p["name"], "seed": r["provenance"]["seed"], "fold": r["fold"], "half": p["half"],
         "output": column, "label": table[column][p["name"]], "predicted": y}
        for r in records for p in r["predictions"]
        for column, y in zip(chosen.columns, p["predicted"], strict=True)
    ]).assign(error=lambda r: (r.predicted - r.label).abs())
    drawn = {}
    if chosen.drawn:
        others = {str(fold): {"test_mae": float(part.error.mean()), "n_seeds": part.seed.nunique()}
                  for fold, part in rows[rows.half == 1].groupby("fold") if fold > 0}
        first = rows[rows.fold == 0]
        drawn = {"validation_mae": float(first.error[first.half == 0].mean()),
                 "other_splits": others}
        rows = first[first.half == 1]
    complete = rows.groupby("seed").fold.nunique()
    seeds = sorted(int(s) for s in complete.index[complete == wanted])
    if not seeds:
        raise DataError(chosen.name, "no seed has runs of all folds",
                        f"run x3mat train {chosen.name} for the missing folds")
    rows = rows[rows.seed.isin(seeds)]
    scores, shown, errors = zip(
        *(scores_of(part) for _, part in rows.groupby("output", sort=False)), strict=True)
    # others' labels are not written down
    hidden = ["label"] * bool(chosen.source) + ["output"] * (len(scores) == 1)
    pd.concat(shown).drop(columns=hidden).round(4).to_csv(folder / "predictions.csv")
    used = [r for r in records if r["provenance"]["seed"] in seeds and r["fold"] < wanted]
    summary = {
        "application": chosen.name, "property": chosen.property,
        "conditions": chosen.conditions, "unit": chosen.unit,
        **of_outputs(chosen.columns, scores, errors),
        "test_mae_of_each_fold": rows.groupby("fold").error.mean().tolist(),
        "n_train": [r["n_train"] for r in used if r["provenance"]["seed"] == seeds[0]],
        "n_test": rows.name.nunique(), "folds": wanted, "seeds": seeds, "n_seeds": len(seeds),
        "config": used[0]["config"],
        "training_hardware": sorted({r["provenance"]["hardware"] for r in used}),
        "training_wall_s": sum(r["provenance"]["wall_s"] for r in used), **drawn,
    }
    return results.read_json(results.write(
        folder / "summary.json", summary, seed=seeds, wall_s=summary["training_wall_s"],
        command=f"python tools/summarize.py {chosen.name}"))


def of_outputs(columns: Sequence[str], scores: Sequence[dict],
               errors: Sequence[np.ndarray]) -> dict:  # fmt: skip
    """Means over the outputs, and of several the :func:`scores_of` each."""
    return {**{key: np.mean([score[key] for score in scores], 0).tolist() for key in scores[0]},
            "interval": of_mean(np.mean(errors, 0)),
            **({"outputs": dict(zip(columns, scores, strict=True))} if len(scores) > 1 else {})}


def scores_of(rows: pd.DataFrame) -> tuple[dict, pd.DataFrame, np.ndarray]:
    """Scores of one output; of each crystal the mean over seeds and the mean error."""
    wide = rows.pivot(index="name", columns="seed", values="predicted")
    label = rows.groupby("name").label.first()
    deviation, variation = wide.sub(label, axis=0), ((label - label.mean()) ** 2).sum()
    errors = deviation.abs().to_numpy()  # (crystals, seeds)
    together = wide.mean(axis=1)
    return {
        "test_mae": float(errors.mean()),
        "test_r2": float((1 - (deviation**2).sum() / variation).mean()),
        "test_mae_of_each_seed": errors.mean(0).tolist(),
        "interval": of_mean(errors.mean(1)),
        "mae_of_mean_over_seeds": float((together - label).abs().mean()),
        "r2_of_mean_over_seeds": float(1 - ((together - label) ** 2).sum() / variation),
    }, pd.DataFrame({"output": rows.output.iloc[0], "label": label, "predicted": together,
                     "spread": wide.std(axis=1)}), errors.mean(1)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("applications", nargs="+", metavar="APPLICATION",
                        help=f"of {', '.join(APPLICATIONS)}")  # fmt: skip
    for name in parser.parse_args(argv).applications:
        try:
            chosen = application(name)
            found = summarize(chosen)
        except X3MatError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{name}: test MAE {found['test_mae']:.3f} {chosen.unit},"
              f" R² {found['test_r2']:.3f}, {found['n_test']} crystals")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
