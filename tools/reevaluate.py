"""Predict the rest of every fold again with the checkpoints as the present code reads them.

A change of the code that changes what trained networks predict, such as another constant in a
layer, makes the predictions in the records stale. This rewrites them, notes when and with which
code, and then the summary. Learning curves stay those of the training.

    python tools/reevaluate.py zeolite-n2 --jobs 2
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

from x3mat import paths, results
from x3mat.applications import application
from x3mat.model import contributions, load_checkpoint
from x3mat.sampling import sample_windows
from x3mat.training import summarize

MAX_ATOMS = 1_000


def again(name: str, path: Path) -> None:
    """Rewrite the predictions of one run."""
    started, chosen = time.perf_counter(), application(name)
    model, about = load_checkpoint(path)
    file = paths.results(f"{name}/runs/{path.stem}.json")
    record, config = results.read_json(file), model.config
    for row in record["predictions"]:
        windows = sample_windows(chosen.crystal(row["name"]), config.radius, config.step)
        y = contributions((model,), windows, MAX_ATOMS)[0].double().numpy()
        row["predicted"] = (windows.weights @ y / windows.weights.sum()).tolist()
    record["rest_mae"] = float(np.mean([np.abs(np.subtract(row["predicted"], row["label"]))
                                        for row in record["predictions"]]))
    record["evaluation"] = results.provenance(
        seed=about["seed"], command=f"python tools/reevaluate.py {name}",
        wall_s=time.perf_counter() - started,
    )
    results.write_json(file, record)


def main(
    name: Annotated[str, typer.Argument(metavar="APPLICATION")],
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
) -> None:
    """Predict again with all checkpoints of an application and rewrite its summary."""
    files = sorted((paths.data() / "models" / name).glob("*.pt"))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"),
                             initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(again, name, file) for file in files]
        for future in tqdm(futures, unit="run"):
            future.result()
    summary = summarize(application(name))
    print(f"test MAE {summary['test_mae']:.3f} {summary['unit']}, R² {summary['test_r2']:.3f}")


if __name__ == "__main__":
    typer.run(main)
