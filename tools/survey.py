"""Read and window every crystal of the databases; write data/results/survey.json.

Counted for the 253 IZA frameworks and the 12,020 + 7,061 CoRE MOF 2019 crystals: those read, those
refused by cause, crashes (any error that is not a CrystalError), windows, orbits, atoms per
window, seconds. A journal below runs/ lets an interrupted survey go on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from x3mat import results
from x3mat.crystal import SYMPREC, Crystal
from x3mat.databases import core_mof, core_mof_names, iza, iza_codes
from x3mat.errors import CrystalError
from x3mat.sampling import sample_windows

EXAMPLES = """examples:
  nice -n 10 python tools/survey.py              # everything; type it again after a kill
  python tools/survey.py --sets iza              # the zeolites alone, a few seconds
  python tools/survey.py --limit 50 --output survey-smoke.json --journal runs/smoke.jsonl
"""
SETS: dict[str, tuple[Callable[[], Iterable[str]], Callable[[str], Crystal]]] = {
    "iza": (iza_codes, iza),
    "core-mof-asr": (lambda: core_mof_names("ASR"), lambda name: core_mof(name, "ASR")),
    "core-mof-fsr": (lambda: core_mof_names("FSR"), lambda name: core_mof(name, "FSR")),
}


@dataclass(frozen=True)
class Settings:
    """What the windows are cut with (radius and step in Å)."""

    radius: float = 6.0
    step: float = 2.0
    symmetry: bool = True
    grid: str = "auto"


def survey_one(read: Callable[[str], Crystal], name: str, settings: Settings) -> dict:
    """Record of one crystal.

    `atoms` maps atoms per window to grid points that have that many; seconds are processor time.
    """
    start = time.process_time()
    try:
        crystal = read(name)
    except CrystalError as error:
        return {"refused": error.cause, "read_s": time.process_time() - start}
    except Exception as error:
        return {"crashed": f"reading: {type(error).__name__}: {error}"}
    middle = time.process_time()
    try:
        windows = sample_windows(crystal, **asdict(settings))
    except Exception as error:
        return {"crashed": f"windows: {type(error).__name__}: {error}"}
    end = time.process_time()
    sizes, inverse = np.unique(windows.atoms_per_window, return_inverse=True)
    counts = np.bincount(inverse, weights=windows.weights).astype(int)
    return {
        "n_atoms": crystal.n_atoms,
        "operations": len(crystal.rotations),
        "n_windows": windows.n_windows,
        "n_orbits": windows.n_orbits,
        "atoms_in_orbits": len(windows.species),
        "atoms": dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
        "read_s": middle - start,
        "window_s": end - middle,
    }


def kind_of(cause: str) -> str:
    """Cause of a refusal without the numbers and names of one crystal."""
    if "overlap" in cause:
        return "overlapping atoms"
    return re.sub(r"[\d.,]+", "#", cause)


def quantiles(histogram: Counter) -> dict[str, float]:
    """Distribution of the integers counted in `histogram`."""
    sizes = np.array(sorted(histogram))
    counts = np.array([histogram[s] for s in sizes.tolist()])
    share = np.cumsum(counts) / counts.sum()
    named = {
        "p1": 0.01,
        "p5": 0.05,
        "p25": 0.25,
        "median": 0.5,
        "p75": 0.75,
        "p95": 0.95,
        "p99": 0.99,
    }
    found = {key: int(sizes[np.searchsorted(share, q - 1e-12)]) for key, q in named.items()}
    mean = float((sizes * counts).sum() / counts.sum())
    return {"min": sizes[0], **found, "max": sizes[-1], "mean": mean}


def summary(records: dict[str, dict]) -> dict:
    """Numbers of one set of crystals."""
    good = {name: r for name, r in records.items() if "n_atoms" in r}
    crashed = {name: r["crashed"] for name, r in records.items() if "crashed" in r}
    histogram: Counter = Counter()
    for r in good.values():
        histogram.update({int(size): count for size, count in r["atoms"].items()})
    n_windows = sum(r["n_windows"] for r in good.values())
    n_orbits = sum(r["n_orbits"] for r in good.values())
    window_s = np.array([r["window_s"] for r in good.values()])
    read_s = np.array([r["read_s"] for r in records.values() if "read_s" in r])
    names = list(good)
    return {
        "crystals": len(records),
        "read_and_windowed": len(good),
        "refused": sum("refused" in r for r in records.values()),
        "refused_by_cause": Counter(
            kind_of(r["refused"]) for r in records.values() if "refused" in r
        ),
        "crashes": len(crashed),
        "crashed": crashed,
        "grid_points": n_windows,
        "orbits": n_orbits,
        "points_per_orbit": n_windows / n_orbits,
        "with_symmetry": sum(r["operations"] > 1 for r in good.values()),
        "atoms_per_cell": quantiles(Counter(r["n_atoms"] for r in good.values())),
        "orbits_per_crystal": quantiles(Counter(r["n_orbits"] for r in good.values())),
        "atoms_per_window": quantiles(histogram),
        "empty_windows": histogram[0],
        "read_s": {"total": read_s.sum(), "median": np.median(read_s), "max": read_s.max()},
        "window_s": {
            "total": window_s.sum(), "median": np.median(window_s), "max": window_s.max(),
            "slowest": names[int(window_s.argmax())],
        },
    }  # fmt: skip


def load_journal(path: Path, settings: Settings) -> dict[str, dict[str, dict]]:
    """Records of an earlier run by set and name; a last line cut by a kill is left out."""
    records: dict[str, dict[str, dict]] = {key: {} for key in SETS}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry.pop("settings") == asdict(settings):
                records[entry.pop("set")][entry.pop("name")] = entry
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--radius", type=float, default=6.0, help="Å (default 6)")
    parser.add_argument("--step", type=float, default=2.0, help="Å (default 2)")
    parser.add_argument("--limit", type=int, help="only the first so many crystals of each set")
    parser.add_argument("--journal", type=Path, default=Path("runs/survey.jsonl"))
    parser.add_argument("--output", default="survey.json", help="below data/results")
    arguments = parser.parse_args()
    settings = Settings(radius=arguments.radius, step=arguments.step)
    arguments.journal.parent.mkdir(parents=True, exist_ok=True)
    known = load_journal(arguments.journal, settings)
    summaries, refusals, wall_s = {}, [], 0.0
    with arguments.journal.open("a") as journal:
        journal.write("\n")  # ends a line that a kill cut short
        for key in arguments.sets:
            names, read = list(SETS[key][0]())[: arguments.limit], SETS[key][1]
            for name in tqdm([n for n in names if n not in known[key]], desc=key, unit="crystal"):
                start = time.perf_counter()
                record = survey_one(read, name, settings)
                record["wall_s"] = time.perf_counter() - start
                known[key][name] = record
                line = {"set": key, "name": name, "settings": asdict(settings), **record}
                journal.write(json.dumps(line) + "\n")
                journal.flush()
            records = {name: known[key][name] for name in names}
            summaries[key] = summary(records)
            refusals += [(key, n, r["refused"]) for n, r in records.items() if "refused" in r]
            wall_s += sum(r["wall_s"] for r in records.values())
            shown = summaries[key]
            print(
                f"{key}: {shown['read_and_windowed']} of {shown['crystals']} windowed,"
                f" {shown['refused']} refused, {shown['crashes']} crashes; {shown['orbits']} orbits"
                f" of {shown['grid_points']} grid points"
            )
    path = results.write(
        arguments.output,
        {
            "settings": {**asdict(settings), "symprec": SYMPREC},
            "sets": summaries,
            "crashes": sum(s["crashes"] for s in summaries.values()),
            "seconds": "processor time of one core; wall_s of provenance is wall time",
            "peak_memory_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "processes": 1,
        },
        seed=None,
        command="python tools/survey.py --sets " + " ".join(arguments.sets),
        wall_s=wall_s,
    )
    with path.with_name(path.stem + "-refusals.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("set", "name", "cause"))
        writer.writerows(refusals)


if __name__ == "__main__":
    main()
