"""Prediction over whole databases: sharded, resumable, results in Parquet files.

Processes read crystals and cut windows; the network reads the windows of many crystals together,
up to a budget of atoms, so that a GPU neither waits nor runs out of memory. Results are a folder
of Parquet files, which pandas, polars or DuckDB read as one table. Each file appears at once and
whole, and a crystal that stands in one is not predicted again: a run that was killed goes on when
it is called again. A crystal that cannot be used has a row that says why."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import SimpleQueue, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from x3mat import databases, results
from x3mat.crystal import Crystal
from x3mat.errors import DataError, X3MatError
from x3mat.model import X3Mat, contributions, fitting_atoms, graphs
from x3mat.predict import MAX_ATOMS, Ensemble, domain_warnings, spread
from x3mat.sampling import Windows, crystal_pairs

WORKERS = 12  # at most, for cutting windows
GPU_ATOMS = 250_000  # of windows at a time keep any card busy
TRIAL_ATOMS = 4_000  # of the windows by which the memory of a card is judged
PART = 1_000  # crystals in a file, at most
SECONDS = 30.0  # between files, at most
#: Columns of the results, and what stands in them for a crystal that cannot be used; after them the
#: value that each member k of the ensemble gives, ``y{k}`` (several, if it has several outputs).
COLUMNS = {"file": "", "name": "", "value": np.nan, "std": np.nan, "n_atoms": 0, "n_windows": 0,
           "n_orbits": 0, "warnings": "", "error": "", "cause": "", "remedy": "", "model": ""}


def screen(sources: Sequence[str], ensemble: Ensemble, out: str | Path, *,
           shard: tuple[int, int] = (0, 1), read: Callable[[str], Crystal] = databases.crystal,
           max_atoms: int = 0, progress: bool = False) -> pd.DataFrame:
    """Predict a property of many crystals, and keep the results in a folder of Parquet files.

    Parameters
    ----------
    sources : sequence of str; what ``read`` takes, see :func:`x3mat.databases.expand`
    ensemble : Ensemble; its device is used
    out : path; crystals that stand there are not predicted again, unless their file is deleted
    shard : (i, n)
        Predict every n-th source only, from the i-th of 0 to n − 1. Shards may write to the same
        folder, at the same time.
    read : callable; from a source to a Crystal
    max_atoms : int; of windows in memory at a time; 0: what is fast and the device can hold
    progress : bool; show a progress bar

    Returns the rows of this shard in the order of ``sources``, with the columns :data:`COLUMNS`.
    Raises a DataError if the shard is none, or ``out`` cannot be written to or has results of
    another model."""
    number, of = shard
    if not 0 <= number < of:
        raise DataError(f"shard {number}/{of}", "there is no such shard",
                        f"Number the {of} shards from 0 to {of - 1}.")
    mine, model = list(dict.fromkeys(sources))[number::of], f"{ensemble.name} {digest(ensemble)}"
    known = read_results(out)
    if others := sorted(set(known.model) - {model}):
        raise DataError(out, f"it has results of another model, {others[0]}, not of {model}",
                        "Give another folder.")
    known = known[known.file.isin(mine)]
    done = set(known.file)
    todo = [source for source in mine if source not in done]
    rows, new, written = [], [], time.monotonic()
    bar = tqdm(total=len(mine), initial=len(known), unit="crystal", disable=not progress)
    try:
        for source in todo[:1]:  # fills the caches that the processes then share
            cut(read, ensemble, source)
        cuts = for_each(partial(cut, read, ensemble), todo)
        for row, y in evaluate(ensemble.members, cuts, max_atoms):
            if not row["error"]:
                k = ensemble.output
                row |= {"value": y.mean(0)[k], "std": spread(y)[k]}
            rows.append({**row, "model": model, **{f"y{k}": v for k, v in enumerate(y.flatten())}})
            bar.update()
            if len(rows) >= PART or time.monotonic() - written > SECONDS:
                new.append(_write(out, rows))
                rows, written = [], time.monotonic()
    finally:
        bar.close()
        if rows:
            new.append(_write(out, rows))
    return pd.concat([known, *new]).set_index("file").loc[mine].reset_index()


def read_results(out: str | Path) -> pd.DataFrame:
    """All rows of a folder of results; none if there is no such folder."""
    if any(Path(out).glob("*.parquet")):
        return pd.read_parquet(out)
    return pd.DataFrame([COLUMNS]).iloc[:0]


def digest(ensemble: Ensemble) -> str:
    """A name for the weights of all members."""
    values = (v.cpu().numpy().tobytes() for m in ensemble.members for v in m.state_dict().values())
    return hashlib.sha256(b"".join(values)).hexdigest()[:12]


def _write(out: str | Path, rows: list[dict]) -> pd.DataFrame:
    """A file with some rows, named after the first of them, which is in no other file."""
    frame, name = pd.DataFrame(rows), hashlib.sha256(rows[0]["file"].encode()).hexdigest()[:16]
    try:
        with results.replacing(Path(out) / f"{name}.parquet") as file:
            frame.to_parquet(file, index=False)
    except OSError as error:
        raise DataError(out, f"cannot write there ({error.strerror})",
                        "Give a folder that can be written to.") from error
    return frame


def cut(read: Callable[[str], Crystal], ensemble: Ensemble,
        source: str) -> tuple[dict, Windows | None]:
    """A row of the results as far as it is known, and the windows of ``read(source)``; None, and
    why in the row, if something goes wrong."""
    row = {**COLUMNS, "file": source}
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            crystal = read(source)
        found, cutoff = ensemble.windows(crystal), max(m.config.cutoff for m in ensemble.members)
        pairs = crystal_pairs(crystal, cutoff) if ensemble.config.encoding == "crystal" else None
        positions = found.positions.astype(np.float32)  # half to send
        windows = replace(found, positions=positions, pairs=pairs)
        notes = [str(w.message) for w in noted if w.category is UserWarning]
        notes += domain_warnings(crystal, ensemble)
    except Exception as error:  # no crystal may stop a run over a million
        typed = isinstance(error, X3MatError)
        return {**row, "error": type(error).__name__, "cause": error.cause if typed else str(error),
                "remedy": error.remedy if typed else "Report it."}, None
    return {**row, "name": crystal.name, "n_atoms": crystal.n_atoms, "warnings": "; ".join(notes),
            "n_windows": windows.n_windows, "n_orbits": windows.n_orbits}, windows


def evaluate(models: Sequence[X3Mat], cuts: Iterable[tuple[Any, Windows | None]],
             max_atoms: int = 0) -> Iterator[tuple[Any, np.ndarray]]:
    """What came with the windows of each crystal, and its :func:`means`, (models, outputs); nan
    without windows. The next crystals are fetched while a GPU still works on some."""
    abouts, part, launched = [], [], []

    def arrived() -> Iterator[tuple[Any, np.ndarray]]:
        for before, values in launched:
            yield from zip(before, values.transpose(0, 1).cpu().numpy(), strict=True)

    for about, windows in cuts:
        if windows is None:
            yield about, np.full((len(models), models[0].config.outputs), np.nan)
            continue
        if not max_atoms and models[0].shift.device.type == "cuda":
            trial = next(graphs([windows], models[0].config, TRIAL_ATOMS, models[0].shift))
            max_atoms = min(GPU_ATOMS, fitting_atoms(models[0], trial, gradient=False))
        max_atoms = max_atoms or MAX_ATOMS
        if part and sum(w.ptr[-1] for w in [*part, windows]) > max_atoms:
            new = [(abouts, means(models, part, max_atoms))]
            yield from arrived()
            launched, abouts, part = new, [], []
        abouts.append(about)
        part.append(windows)
    launched += [(abouts, means(models, part, max_atoms))] if part else []
    yield from arrived()


def means(models: Sequence[X3Mat], every: Sequence[Windows], max_atoms: int = MAX_ATOMS) -> Tensor:
    """Ŷ = Σ m_w y_w / Σ m_w of some crystals, (models, crystals, outputs), float64."""
    y = contributions(models, every, max_atoms).double()
    share = np.concatenate([w.weights / w.n_windows for w in every])
    weighted = y * torch.as_tensor(share, device=y.device)[:, None]
    return torch.stack([x.sum(1) for x in weighted.split([w.n_orbits for w in every], 1)], 1)


def for_each(function: Callable[[str], Any], names: Sequence[str]) -> DataLoader:
    """function(name) of each name in order, by several processes where there are many."""
    own = torch.Generator()  # leaves the global one alone
    return DataLoader(names, None, collate_fn=function, generator=own, **processes(len(names)))


def processes(n: int, share: int = 1) -> dict:
    """A loader's options where making its n items is work for several processes; ``share`` loaders
    have the machine in common."""
    workers = min(WORKERS, ((os.cpu_count() or 1) - 1) // share) if n > 100 else 0
    if workers < 1:
        return {}
    # a thread hands over what is made; it waits 0.1 ms for Python's lock, by default 5
    return {"num_workers": workers, "multiprocessing_context": "fork", "prefetch_factor": 8,
            "worker_init_fn": lambda _: (torch.set_num_threads(1), sys.setswitchinterval(1e-4))}


def side_by_side(function: Callable, plan: Iterable[tuple], jobs: int, devices: int = 1) -> list:
    """function(*arguments) of each of the ``plan``, ``jobs`` at a time; results in this order. Each
    process has its share of the threads and sees as many GPUs as it has devices, in turn."""
    n, spawn = torch.cuda.device_count(), get_context("spawn")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n)))).split(",")
    gpus, queue = gpus[: n or 1], spawn.SimpleQueue()
    for k in range(0, jobs * devices, devices):
        queue.put(",".join(dict.fromkeys(gpus[i % len(gpus)] for i in range(k, k + devices))))
    threads = torch.get_num_threads() // jobs or 1
    with ProcessPoolExecutor(jobs, spawn, _settle, (threads, queue)) as pool:
        futures = [pool.submit(function, *arguments) for arguments in plan]
        for _ in tqdm(as_completed(futures), total=len(futures), unit="run",
                      disable=not sys.stderr.isatty()):
            pass
        return [future.result() for future in futures]


def _settle(threads: int, gpus: SimpleQueue) -> None:
    # whoever called may be killed; then its processes should not go on, unseen
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
