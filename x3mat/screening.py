"""Prediction over whole databases: sharded, resumable, results in Parquet files.

Processes read crystals and cut windows; the network reads the windows of many crystals together,
up to a budget of atoms, so that a GPU neither waits nor runs out of memory. Results are a folder
of Parquet files, which pandas, polars or DuckDB read as one table. Each file appears at once and
whole, and a crystal that stands in one is not predicted again: a run that was killed goes on when
it is called again. A crystal that cannot be used has a row that says why.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from x3mat.model import X3Mat, affordable_atoms, contributions
from x3mat.predict import MAX_ATOMS, Ensemble, domain_warnings, spread

WORKERS = 12  # at most, for cutting windows
GPU_ATOMS = 100_000  # of windows at a time keep any card busy
TRIAL_ATOMS = 4_000  # of the windows by which the memory of a card is judged
PART = 1_000  # crystals in a file, at most
SECONDS = 30.0  # between files, at most
#: Columns of the results and what a crystal that cannot be used has in them; then, for each member
#: k of the ensemble, its value ``y{k}``.
COLUMNS = {
    "file": "", "name": "", "value": np.nan, "std": np.nan, "n_atoms": 0, "n_windows": 0,
    "n_orbits": 0, "warnings": "", "error": "", "cause": "", "remedy": "", "model": "",
}


@dataclass(frozen=True)
class Cut:
    """The windows of a crystal as :func:`x3mat.model.contributions` reads them."""

    row: dict  # of the results, as far as it is known
    positions: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))  # (A, 3) Å
    species: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # (A,)
    ptr: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # (W + 1,)
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (W,)


def cut(read: Callable[[str], Crystal], ensemble: Ensemble, source: str) -> Cut:
    """The windows of ``read(source)``; whatever goes wrong is noted in the row."""
    row = {**COLUMNS, "file": source}
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", UserWarning)
            crystal = read(source)
        windows = ensemble.windows(crystal)
        notes = [str(w.message) for w in noted if w.category is UserWarning]
        row |= {"name": crystal.name, "n_atoms": crystal.n_atoms, "n_windows": windows.n_windows,
                "n_orbits": windows.n_orbits,
                "warnings": "; ".join(notes + domain_warnings(crystal, ensemble))}
        return Cut(row, windows.positions.astype(np.float32), windows.species.astype(np.uint8),
                   windows.ptr, windows.weights)
    except X3MatError as error:
        row |= {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
    except Exception as error:  # no crystal may stop a run over a million
        row |= {"error": type(error).__name__, "cause": str(error), "remedy": "Report it."}
    return Cut(row)


def together(cuts: Iterable[Cut], max_atoms: int) -> Iterator[list[Cut]]:
    """Successive crystals with at most ``max_atoms`` atoms of windows, at least one crystal."""
    part, atoms = [], 0
    for one in cuts:
        if part and atoms + len(one.species) > max_atoms:
            yield part
            part, atoms = [], 0
        part.append(one)
        atoms += len(one.species)
    if part:
        yield part


def means(models: Sequence[X3Mat], part: Sequence[Cut], max_atoms: int) -> Tensor:
    """Ŷ = Σ m_w y_w / Σ m_w of some crystals, (models, crystals, outputs), float64, nan without
    windows. On a GPU the values may still be under way."""
    counts = [len(one.weights) for one in part]
    sizes = np.concatenate([np.diff(one.ptr) for one in part])
    joined = Cut({}, *(np.concatenate([getattr(one, k) for one in part])
                       for k in ("positions", "species")), np.append(0, sizes.cumsum()))
    device, outputs = models[0].shift.device, models[0].config.outputs
    weights = torch.as_tensor(np.concatenate([one.weights for one in part]), device=device).double()
    crystal = torch.arange(len(part)).repeat_interleave(torch.tensor(counts)).to(device)
    y = weights.new_zeros(len(models), len(weights), outputs)
    if len(weights):
        y = contributions(models, joined, max_atoms).double()
    total = weights.new_zeros(len(part)).index_add(0, crystal, weights)
    summed = y.new_zeros(len(models), len(part), outputs)
    return summed.index_add(1, crystal, y * weights[:, None]) / total[:, None]


def screen(
    sources: Sequence[str], ensemble: Ensemble, out: str | Path, *, shard: tuple[int, int] = (0, 1),
    read: Callable[[str], Crystal] = databases.crystal, max_atoms: int = 0, progress: bool = False,
) -> pd.DataFrame:
    """Predict a property of many crystals, and keep the results in a folder of Parquet files.

    Parameters
    ----------
    sources : sequence of str; what ``read`` takes, see :func:`x3mat.databases.expand`
    ensemble : Ensemble; its device is used
    out : path
        Folder of the results; crystals that stand there are not predicted again. To have some of
        them predicted anew, delete their file.
    shard : (i, n)
        Predict every n-th source only, from the i-th of 0 to n − 1. Shards may write to the same
        folder, at the same time.
    read : callable; from a source to a Crystal
    max_atoms : int; of windows in memory at a time; 0: what is fast and the device can hold
    progress : bool; show a progress bar

    Returns
    -------
    DataFrame
        The rows of this shard in the order of ``sources``; columns: :data:`COLUMNS`.

    Raises
    ------
    DataError
        The shard is none, ``out`` cannot be written to or has results of another model.
    """
    number, of = shard
    if not 0 <= number < of:
        raise DataError(f"shard {number}/{of}", "there is no such shard",
                        f"Number the {of} shards from 0 to {of - 1}.")
    mine, model = list(dict.fromkeys(sources))[number::of], f"{ensemble.name} {_digest(ensemble)}"
    known = read_results(out)
    if others := sorted(set(known.model) - {model}):
        raise DataError(out, f"it has results of another model, {others[0]}, not of {model}",
                        "Give another folder.")
    known, done = known[known.file.isin(mine)], set(known.file)
    todo = [source for source in mine if source not in done]
    rows, new, written = [], [], time.monotonic()
    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), unit="crystal", disable=not progress)
    try:
        for one, y in _predicted(partial(cut, read, ensemble), todo, ensemble.members, max_atoms):
            value = {} if one.row["error"] else {"value": y.mean(0)[0], "std": spread(y)[0]}
            rows.append({**one.row, **value, "model": model,
                         **{f"y{k}": v for k, v in enumerate(y.flatten())}})
            bar.update()
            if len(rows) >= PART or time.monotonic() - written > SECONDS:
                new.append(_write(out, rows))
                rows, written = [], time.monotonic()
    finally:
        if rows:
            new.append(_write(out, rows))
        bar.close()
    return pd.concat([known, *new]).set_index("file").loc[mine].reset_index()


def read_results(out: str | Path) -> pd.DataFrame:
    """All rows of a folder of results; none if there is no such folder."""
    if not any(Path(out).glob("*.parquet")):
        return pd.DataFrame({key: pd.Series(dtype=type(value)) for key, value in COLUMNS.items()})
    return pd.read_parquet(out)


def _write(out: str | Path, rows: list[dict]) -> pd.DataFrame:
    """A file with some rows, named after the first of them, which is in no other file."""
    frame = pd.DataFrame(rows)
    name = hashlib.sha256(rows[0]["file"].encode()).hexdigest()[:16]
    try:
        with results.replacing(Path(out) / f"{name}.parquet") as file:
            frame.to_parquet(file, index=False)
    except OSError as error:
        raise DataError(out, f"cannot write there ({error.strerror})",
                        "Give a folder that can be written to.") from error
    return frame


def _digest(ensemble: Ensemble) -> str:
    """Of the weights of all members."""
    found = hashlib.sha256()
    for member in ensemble.members:
        for value in member.state_dict().values():
            found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def _predicted(
    function: Callable[[str], Cut], sources: Sequence[str], models: Sequence[X3Mat], max_atoms: int
) -> Iterator[tuple[Cut, np.ndarray]]:
    """Crystals in the order of ``sources`` with their values, (members, outputs).

    The next crystals are fetched while a GPU still works on some.
    """
    cuts = iter(for_each(function, sources))
    if not max_atoms:
        cuts, max_atoms = _affordable(models, cuts)
    pending: tuple[list[Cut], Tensor] | None = None
    for part in together(cuts, max_atoms):
        y = means(models, part, max_atoms)
        if pending:
            yield from zip(pending[0], pending[1].transpose(0, 1).cpu().numpy(), strict=True)
        pending = part, y
    if pending:
        yield from zip(pending[0], pending[1].transpose(0, 1).cpu().numpy(), strict=True)


def _affordable(models: Sequence[X3Mat], cuts: Iterator[Cut]) -> tuple[Iterator[Cut], int]:
    """All the crystals, and how many atoms of windows the device should read at a time."""
    from itertools import chain

    if models[0].shift.device.type != "cuda":
        return cuts, MAX_ATOMS
    first = next((one for one in cuts if len(one.species)), None)
    if first is None:
        return cuts, GPU_ATOMS
    number = max(1, int(np.searchsorted(first.ptr, TRIAL_ATOMS, "right")) - 1)
    atoms = int(first.ptr[number])
    trial = Cut({}, first.positions[:atoms], first.species[:atoms], first.ptr[: number + 1])
    budget = affordable_atoms(lambda: contributions(models, trial, atoms), atoms,
                              models[0].shift.device)
    return chain([first], cuts), min(budget, GPU_ATOMS)


# -------------------------------------------------------------------------------- processes

def for_each(function: Callable[[str], Any], names: Sequence[str]) -> DataLoader:
    """function(name) of each name in order, by several processes where there are many."""
    return DataLoader(names, None, collate_fn=function, **processes(len(names)))


def processes(n: int, share: int = 1) -> dict:
    """A loader's options where making its n items is work for several processes; ``share`` loaders
    have the machine in common."""
    workers = min(WORKERS, ((os.cpu_count() or 1) - 1) // share) if n > 100 else 0
    if workers < 1:
        return {}
    return {"num_workers": workers, "multiprocessing_context": "fork", "prefetch_factor": 8,
            "worker_init_fn": lambda _: torch.set_num_threads(1)}
