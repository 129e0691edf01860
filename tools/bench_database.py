"""Prediction over a whole database: crystals per second on one device, and hours for a million.

Runs x3mat.screening.screen, as `x3mat predict ... --out` does, first on a few crystals to warm up
(kernels are compiled, caches filled), then on all others, or until time is up. A million
crystals like these are reckoned from that rate; n GPUs are n times as fast, since shards have only
the folder in common that they write to. Each GPU needs as many processor cores as this one had.

Examples
    python tools/bench_database.py                               # CoRE MOF 2019, on the GPU
    python tools/bench_database.py iza --model zeolite-n2 --device cpu --limit 20 --out /tmp/x.json

Writes data/results/bench/database.json
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from x3mat import databases, paths, results, screening
from x3mat.predict import load_model

GPUS = (1, 8, 64)
MILLION = 1_000_000


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", default="core-mof:ASR",
                        help="a database or folder (default core-mof:ASR)")  # fmt: skip
    parser.add_argument("--model", default="qmof-gap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-up", type=int, default=200, help="crystals before the clock starts")
    parser.add_argument("--limit", type=int, help="only so many crystals, drawn at random")
    parser.add_argument("--seconds", type=int, default=0, help="stop the clock after so many")
    parser.add_argument("--folder", type=Path, help="for the predictions (default: thrown away)")
    parser.add_argument("--out", type=Path, default=paths.results("bench/database.json"))
    options = parser.parse_args(argv)
    names = databases.expand(options.source)
    order = np.random.default_rng(0).permutation(len(names))  # costs differ along the alphabet
    names = [names[i] for i in order[: options.limit]]
    ensemble = load_model(options.model, options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "predictions.parquet"
        began = time.perf_counter()
        screening.screen(names[: options.warm_up], ensemble, folder)
        warm_up = time.perf_counter() - began
        before = len(screening.read_results(folder))
        busy, stop = [], threading.Event()
        if options.device != "cpu":
            threading.Thread(target=watch, args=(busy, stop), daemon=True).start()
        began = time.perf_counter()
        with suppress(TimeoutError), time_limit(options.seconds):
            screening.screen(names, ensemble, folder, progress=sys.stderr.isatty())
        seconds = time.perf_counter() - began
        stop.set()
        table = screening.read_results(folder)
    done = len(table) - before
    rate = done / seconds
    failed = table[table.error != ""]
    payload = {
        "source": options.source, "model": options.model, "members": len(ensemble.members),
        "config": vars(ensemble.config), "crystals": len(names), "predicted_with_warm_up":
        len(table), "failed": failed.error.value_counts().to_dict(), "timed": done,
        "complete": len(table) == len(names), "seconds": seconds, "warm_up_s": warm_up,
        "crystals_per_s": rate, "windows_per_s": rate * float(table.n_orbits.mean()),
        "grid_points_per_s": rate * float(table.n_windows.mean()),
        "mean_atoms_of_a_cell": float(table.n_atoms[table.error == ""].mean()),
        "atoms_at_a_time": screening.GPU_ATOMS if options.device != "cpu" else screening.MAX_ATOMS,
        "processes": screening.processes(len(names)).get("num_workers", 0),
        "cores": len(os.sched_getaffinity(0)),
        "gpu_busy": float(np.mean(busy)) / 100 if busy else None,
        "hours_for_a_million": {str(n): MILLION / rate / n / 3600 for n in GPUS},
    }  # fmt: skip
    results.write(options.out.absolute(), payload, seed=0, wall_s=seconds + warm_up,
                  command=shlex.join(["python", "tools/bench_database.py", *argv]))  # fmt: skip
    print(f"{done} crystals in {seconds:.1f} s: {rate:.1f} per second;"
          f" GPU busy {payload['gpu_busy']}; hours for a million {payload['hours_for_a_million']}")


def watch(busy: list[int], stop: threading.Event) -> None:
    """Note every second how much of it the GPU was busy, in percent."""
    with suppress(Exception):  # needs nvidia-ml-py
        while not stop.wait(1.0):
            busy.append(torch.cuda.utilization())


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises a TimeoutError in the main thread after some seconds; never for 0."""

    def end(*_) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
