"""Crystals shared out among processes: shards, their devices, and files of rows.

torchrun starts the processes and tells each its number, in the environment variables RANK,
WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. They have only a folder in common. Each appends the
rows of its crystals to a file of its own there, and reads all of them when it starts: what is
done is not done again, however many processes go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from x3mat import results
from x3mat.errors import DataError

SHOWN = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # what this process was started with


def own_shard() -> str:
    """I/N of this process, as torchrun says; 0/1 without it."""
    return f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"


def shard_of(text: str) -> tuple[int, int]:
    """Number of a shard, from 0, and how many there are.

    Raises
    ------
    DataError
        It is no shard, or there is no such one.

    Examples
    --------
    >>> shard_of("1/4")
    (1, 4)
    """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise DataError(text, "it is no shard", "Give two numbers such as 0/4.")
    if int(number) >= int(of):
        raise DataError(f"shard {text}", "there is no such shard",
                        f"Number the {of} shards from 0 to {int(of) - 1}.")  # fmt: skip
    return int(number), int(of)


def cores() -> int:
    """Cores for this process: an equal share, where torchrun started several on the host."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def take_device(device: str) -> None:
    """Leave cores to the other processes that torchrun started here, or take a GPU of its own.

    The GPU is the one numbered LOCAL_RANK of those that CUDA shows; from then on it is the only
    one. Must come before anything uses CUDA; processes that are forked inherit it.

    Raises
    ------
    DataError
        CUDA_VISIBLE_DEVICES names fewer GPUs. (Where it names none, the first use of CUDA tells.)
    """
    if device == "cpu":
        from x3mat_gcmc import kernel

        kernel.config.NUMBA_NUM_THREADS = min(kernel.config.NUMBA_NUM_THREADS, cores())
    elif "LOCAL_RANK" in os.environ:
        number = int(os.environ["LOCAL_RANK"])
        names = SHOWN.split(",") if SHOWN else [str(i) for i in range(number + 1)]
        if number >= len(names):
            raise DataError(
                f"process {number} of this host", f"CUDA_VISIBLE_DEVICES names {len(names)} GPUs",
                "Start at most as many processes on a host.",
            )  # fmt: skip
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number]


def rows_file(folder: Path, shard: tuple[int, int]) -> Path:
    """The file in `folder` to which a shard appends.

    Examples
    --------
    >>> rows_file(Path("out"), (1, 4)).name, rows_file(Path("out"), (0, 1)).name
    ('rows-1-of-4.jsonl', 'rows.jsonl')
    """
    number, of = shard
    return folder / ("rows.jsonl" if of == 1 else f"rows-{number}-of-{of}.jsonl")


def read_rows(place: Path) -> list[dict]:
    """Lines of a file, or of all files of rows in a folder; one that a kill cut off is left out."""
    rows = []
    for file in sorted(place.glob("rows*.jsonl")) if place.is_dir() else [place]:
        for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def append(file: Path, rows: Sequence[dict]) -> None:
    """Write rows at the end of a file, on lines of their own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut_off = file.is_file() and not file.read_bytes().endswith(b"\n")
    text = "".join(json.dumps(results.plain(row)) + "\n" for row in rows)
    with file.open("a", encoding="utf-8") as out:
        out.write("\n" * cut_off + text)
        out.flush()
        os.fsync(out.fileno())
