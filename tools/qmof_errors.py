"""Errors of a QMOF model from a few windows of each crystal, as in validation during training.

All windows of the 5,662 crystals of the rest take a GPU; eight of each, drawn evenly over the cell
and always the same, take twenty minutes of two cores. The mean over eight windows scatters about
that over all, so that these errors are a little larger. The result is
data/results/qmof-gap/drawn.json, with the predictions in drawn.csv (without the labels, which are
QMOF's); it may be killed and called again.

examples:
  X3MAT_DATA=folder python tools/qmof_errors.py
  X3MAT_DATA=folder python tools/qmof_errors.py --half 0 --limit 200
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from x3mat import paths, results
from x3mat.applications import application
from x3mat.model import load_checkpoint
from x3mat.training import CHECKED_WINDOWS, TrainConfig, collate, crystals_of, predict_mean

HALVES = ("validation", "test")
TOGETHER = 8  # crystals in a batch


def parity(label: np.ndarray, predicted: np.ndarray) -> dict:
    """Counts of (label, predicted) in squares of 0.1 eV: [row of label, row of predicted, n]."""
    edges = np.arange(0, 7.01, 0.1)
    counts, _, _ = np.histogram2d(label, predicted.clip(0, 6.99), bins=edges)
    i, j = np.nonzero(counts)
    return {"step_eV": 0.1, "counts": np.stack([i, j, counts[i, j].astype(int)], 1).tolist()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("fold0-seed0.pt"),
                        help="a file of data/models/qmof-gap")  # fmt: skip
    parser.add_argument("--half", type=int, nargs="+", default=[1, 0], choices=[0, 1],
                        help="0: validation, 1: test; default both")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only so many crystals of each half")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    qmof = application("qmof-gap")
    model, about = load_checkpoint(paths.data() / "models" / qmof.name / args.checkpoint)
    config = TrainConfig(model=model.config, seed=about["seed"])
    table = paths.results(qmof.name) / "drawn.csv"
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    known = {row["name"] for row in rows}
    for half in args.half:
        names = qmof.folds()[about["fold"]].halves[half][: args.limit]
        data = crystals_of(qmof, names, config, training=False)
        todo = [i for i, name in enumerate(names) if name not in known]
        for k in tqdm(range(0, len(todo), TOGETHER), HALVES[half]):
            part = todo[k : k + TOGETHER]
            batch = collate([data[i] for i in part])
            with torch.no_grad():
                found = predict_mean(model, batch, 1_000)[:, 0].tolist()
            rows += [
                {"name": names[i], "half": half, "predicted": round(y, 5)}
                for i, y in zip(part, found, strict=True)
            ]
            if k % (50 * TOGETHER) == 0 or k + TOGETHER >= len(todo):
                pd.DataFrame(rows).to_csv(table, index=False)
    frame, labels = pd.DataFrame(rows), qmof.labels()[qmof.columns[0]]
    payload = {
        "unit": qmof.unit, "checkpoint": args.checkpoint.name, "fold": about["fold"],
        "windows_of_each_crystal": CHECKED_WINDOWS[model.config.encoding],
        "training": about["training"],
    }  # fmt: skip
    for half, part in frame.groupby("half"):
        label = labels[part.name].to_numpy()
        error, spread = part.predicted - label, label - label.mean()
        draws = np.random.default_rng(0).integers(len(part), size=(2_000, len(part)))
        payload[HALVES[half]] = {
            "n": len(part), "mae": error.abs().mean(), "median_error": error.abs().median(),
            "rmse": float(np.sqrt((error**2).mean())),
            "r2": 1 - (error**2).sum() / (spread**2).sum(),
            "interval": np.quantile(error.abs().to_numpy()[draws].mean(1), [0.025, 0.975]),
            "parity": parity(label, part.predicted.to_numpy()),
            "mae_of_median": np.abs(label - np.median(label)).mean(),
        }  # fmt: skip
    results.write(
        f"{qmof.name}/drawn.json", payload, seed=about["seed"],
        command="python tools/qmof_errors.py", wall_s=time.perf_counter() - start,
    )  # fmt: skip
    for half in HALVES:
        if half in payload:
            shown = {k: np.round(v, 4) for k, v in payload[half].items() if k != "parity"}
            print(half, shown)


if __name__ == "__main__":
    main()
