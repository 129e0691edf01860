"""Choose hyper-parameters by cross-validation that never looks at the half it is judged by.

Every candidate of ``data/<application>/candidates.json`` trains on all folds. The rest of each fold
has two halves, 0 and 1. The candidate with the smallest mean absolute error over all halves 0 is
the one to be tested on the halves 1, and the other way round. Result:
``data/results/<application>/choice.json``.

    python tools/choose.py zeolite-n2 --device cuda --jobs 8
    python tools/choose.py zeolite-n2 --collect

A killed search resumes: finished runs are kept below ``runs/choice``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

from x3mat import paths, results
from x3mat.applications import application
from x3mat.training import train_config, train_fold


def run(name: str, key: str, changes: list[str], fold: int, folder: Path, device: str,
        latest: float) -> bool:
    """Train one candidate on one fold unless it is done or too late; is it done?"""
    record = folder / key / f"fold{fold}-seed0.json"
    if record.exists():
        return True
    if time.time() > latest:
        return False
    chosen = application(name)
    train_fold(chosen, fold, train_config(chosen, changes), models=folder / key,
               records=folder / key, runs=folder / key / "states", device=device, progress=False)
    return True


def collect(name: str, folder: Path) -> dict:
    """Errors of all candidates that have all folds, and which one is tested on which half."""
    chosen = application(name)
    candidates = json.loads((chosen.folder / "candidates.json").read_text())
    table, wall, hardware = {}, 0.0, Counter()
    for key, changes in candidates.items():
        records = [folder / key / f"fold{k}-seed0.json" for k in range(len(chosen.folds()))]
        if not all(r.exists() for r in records):
            continue
        records = [results.read_json(r) for r in records]
        errors = [
            [float(np.mean([np.abs(np.subtract(p["predicted"], p["label"]))
                            for p in r["predictions"] if p["half"] == half])) for r in records]
            for half in (0, 1)
        ]
        table[key] = {
            "changes": changes, "mae_of_halves": [float(np.mean(e)) for e in errors],
            "mae_of_each_fold": errors,
            "train_mae_at_the_end": float(np.mean([r["history"][-1]["train_mae"]
                                                   for r in records])),
            "wall_s": sum(r["provenance"]["wall_s"] for r in records),
        }
        wall += table[key]["wall_s"]
        hardware.update(r["provenance"]["hardware"] for r in records)
    best = [min(table, key=lambda key, h=half: table[key]["mae_of_halves"][h]) for half in (0, 1)]
    payload = {
        "application": name, "unit": chosen.unit, "candidates": table,
        "rule": "tested on halves 1: smallest mean absolute error on halves 0; and vice versa",
        "chosen_for_halves": {"0": best[1], "1": best[0]},
        "training_hardware": hardware.most_common(1)[0][0],
    }
    return results.read_json(results.write(
        f"{name}/choice.json", payload, seed=0, wall_s=wall,
        command=f"python tools/choose.py {name}",
    ))


def main(
    name: Annotated[str, typer.Argument(metavar="APPLICATION")],
    device: str = "auto",
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where finished runs lie.")] = Path("runs/choice"),
    seconds: Annotated[float, typer.Option(help="Start no run after this time.")] = float("inf"),
    only: Annotated[list[str] | None, typer.Option(help="Candidates; default all.")] = None,
    collect_only: Annotated[bool, typer.Option("--collect", help="Train nothing.")] = False,
) -> None:
    """Train all candidates on all folds and say which one is tested on which half."""
    candidates = json.loads((paths.data() / name / "candidates.json").read_text())
    if not collect_only:
        latest = time.time() + seconds
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"),
                                 initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [
                pool.submit(run, name, key, candidates[key], fold, folder, device, latest)
                for key in only or candidates for fold in range(len(application(name).folds()))
            ]
            for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                future.result()
    table = collect(name, folder)["candidates"]
    for key, row in table.items():  # halves 0 only: people choose, too
        print(f"{key:24s} {row['mae_of_halves'][0]:.3f}  train {row['train_mae_at_the_end']:.3f}"
              f"  {row['wall_s']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
