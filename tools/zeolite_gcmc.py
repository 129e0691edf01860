"""Labels of zeolite-n2: N2 uptake of the IZA frameworks and of strained copies by x3mat_gcmc.

Model: 298 K, 1 bar, rigid frameworks, force field trappe-n2-zeolite with its charges, Lennard-Jones
interactions truncated at 12.8 Å, Ewald summation. All pores count, also closed ones. RASPA3
computed the same less precisely (tools/zeolite_labels.py).

Steps: `strained` simulates six copies of each framework, CODE~1 to CODE~6, whose cells are deformed
by about 2 % (x3mat.databases.strained), with short chains (seed 13) and, to save time, energy grids
of 0.45 Å; then 46 of them (drawn with seed 0) with grids of 0.25 Å (seed 14). `labels` simulates
the frameworks themselves with grids of 0.25 Å (seed 11), then 16 of them with grids of 0.15 Å (seed
15). What the finer grids change is no part of the standard errors; it is in the record. Both steps
append a line for each finished crystal to a file below --runs and leave out the lines that are
there, so they may be killed and started again. `table` writes labels.csv and strained.csv in
data/zeolite-n2 and the record gcmc.json among the results, with how the labels agree with the
uptakes of RASPA3 (raspa3.csv) and with an earlier run (gcmc/zeolite-n2-all.json). The rows in the
repository are of copies whose atoms had been symmetrized before, by 0.003 Å at most.

examples:
  python tools/zeolite_gcmc.py strained                    1,518 copies
  python tools/zeolite_gcmc.py labels                      253 frameworks
  python tools/zeolite_gcmc.py labels --limit 8            a try
  python tools/zeolite_gcmc.py labels --seconds 600        stops by itself after ten minutes
  python tools/zeolite_gcmc.py table
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import gcmc_checks
import numpy as np
import pandas as pd
from tqdm import tqdm

from x3mat import databases, paths, results
from x3mat.errors import X3MatError
from x3mat_gcmc import GCMCResult, GCMCSettings, gcmc, shards
from x3mat_gcmc.forcefield import guest
from x3mat_gcmc.system import settings_hash

COPIES = 6  # of each framework
STRAIN = 0.02  # standard deviation of each component, the default of databases.strained
_BASE = gcmc_checks.SETTINGS["zeolite-n2"]
LABEL = replace(_BASE, replicas=6, equilibration=200, cycles=1500, seed=11)
SHORT = replace(_BASE, replicas=2, equilibration=100, cycles=300, spacing=0.45, seed=13)
#: Settings with finer grids, and how many crystals are simulated with them, too.
CHECKS = {
    "labels": (replace(LABEL, spacing=0.15, seed=15), 16),
    "strained": (replace(SHORT, spacing=0.25, replicas=4, cycles=600, seed=14), 46),
}
FEW = 0.01  # g/L; of less no relative error is stated
GUESS = (
    "chance in the short chains of RASPA3: the earlier run of x3mat_gcmc (other seed, insertions"
    " of one trial) gives for the worst five what this one does; where counting and insertion of"
    " RASPA3 disagreed, its uptake is counting alone, and the value of this run lies between them"
)
COLUMNS = "code", "n2_g_L", "error_g_L", "molecules_per_cell", "mol_per_kg", "settings"


def copies(codes: Sequence[str]) -> list[str]:
    """Names of all copies: the first of each framework, then the second, and so on."""
    return [f"{code}~{k}" for k in range(1, COPIES + 1) for code in codes]


# ------------------------------------------------------------------------------ simulation


def row_of(result: GCMCResult) -> dict:
    """What is kept of one crystal."""
    [n2] = result.loadings.values()
    return {
        "name": result.name, "settings": settings_hash(result.settings), "n2_g_L": n2.g_per_L,
        "error_g_L": n2.error_g_per_L, "molecules_per_cell": n2.molecules_per_cell,
        "mol_per_kg": n2.mol_per_kg, "heat_kJ_per_mol": n2.heat_kJ_per_mol,
        "chains": result.counts[:, result.discarded :].mean((1, 2)) / result.n_cells,
        "discarded": result.discarded, "warnings": result.warnings, "moves": result.moves,
        "seconds": result.seconds,
    }  # fmt: skip


def simulate(names: Sequence[str], settings: GCMCSettings, file: Path, batch: int,
             until: float) -> None:  # fmt: skip
    """Append the rows of those crystals that have none with these settings, batch by batch."""
    key = settings_hash(settings)
    done = {row["name"] for row in shards.read_rows(file) if row["settings"] == key}
    todo = [name for name in names if name not in done]
    label = f"{file.stem}, seed {settings.seed}"
    with tqdm(total=len(names), initial=len(names) - len(todo), desc=label) as bar:
        for at in range(0, len(todo), batch):
            if time.monotonic() > until:
                return
            part = todo[at : at + batch]
            found = gcmc([databases.iza(name) for name in part], settings)
            rows = []
            for name, result in zip(part, found, strict=True):
                if isinstance(result, X3MatError):
                    rows.append({"name": name, "settings": key, "failed": str(result)})
                else:
                    rows.append(row_of(result))
            shards.append(file, rows)
            bar.update(len(part))


def rows_of(file: Path, settings: GCMCSettings) -> dict[str, dict]:
    """By name the rows with these settings."""
    key = settings_hash(settings)
    return {row["name"]: row for row in sorted(shards.read_rows(file), key=lambda r: r["name"])
            if row["settings"] == key and "failed" not in row}  # fmt: skip


# ------------------------------------------------------------------------------ tables


def read_table(path: Path) -> list[dict]:
    """Rows of a table."""
    return pd.read_csv(path).to_dict("records")


def summary(value: np.ndarray, error: np.ndarray) -> dict:
    """Of uptakes and their errors, g/L; relative errors of those that take up FEW or more."""
    relative = (error / np.maximum(value, 1e-300))[value >= FEW]
    return {
        "n": len(value), "n_without_uptake": int((value < FEW).sum()),
        "median_relative_error": np.median(relative),
        "relative_error_percentiles_5_25_75_95_100":
            np.percentile(relative, [5, 25, 75, 95, 100]),
        "rms_error_g_L": np.sqrt(np.mean(error**2)), "median_error_g_L": np.median(error),
        "mean_g_L": value.mean(), "sd_g_L": value.std(ddof=1),
        "min_g_L": value.min(), "max_g_L": value.max(),
    }  # fmt: skip


def agreement(
    codes: Sequence[str], value: np.ndarray, error: np.ndarray, other: np.ndarray,
    other_error: np.ndarray,
) -> dict:  # fmt: skip
    """How uptakes agree with others of the same frameworks (g/L); z in combined errors."""
    z = (value - other) / np.hypot(error, other_error)
    full = other >= FEW
    relative = (value - other)[full] / other[full]
    worst = np.argsort(-np.abs(z))[:5]
    return {
        "n": len(z), "n_compared_relatively": int(full.sum()),
        "mean_relative_deviation": relative.mean(),
        "median_relative_deviation": np.median(relative),
        "median_abs_relative_deviation": np.median(np.abs(relative)),
        "mean_deviation_g_L": (value - other).mean(),
        "rms_deviation_g_L": np.sqrt(np.mean((value - other) ** 2)),
        "mean_z": z.mean(), "rms_z": np.sqrt(np.mean(z**2)),
        "n_within_2_sigma": int((np.abs(z) <= 2).sum()),
        "worst": [{
            "code": codes[i], "z": z[i], "n2_g_L": [value[i], error[i]],
            "other_g_L": [other[i], other_error[i]],
        } for i in worst],
    }  # fmt: skip


def cost(file: Path, settings: GCMCSettings) -> dict:
    """Settings, and what the runs took."""
    key = settings_hash(settings)
    rows = [r for r in shards.read_rows(file) if r["settings"] == key]
    return {
        "settings": asdict(settings), "hash": key, "n": len(rows),
        "wall_s": sum(r.get("seconds", 0) for r in rows),
        "moves": sum(r.get("moves", 0) for r in rows),
        "failed": [r["name"] for r in rows if "failed" in r],
        "not_equilibrated": sorted(r["name"] for r in rows if r.get("warnings")),
    }  # fmt: skip


def columns_of(rows: Sequence[dict], *keys: str) -> list[np.ndarray]:
    """Columns of numbers."""
    return [np.array([float(row[key]) for row in rows]) for key in keys]


def fine_grids(file: Path, rows: dict[str, dict], step: str) -> dict:
    """How rows agree with those of the same crystals with finer grids."""
    settings, _ = CHECKS[step]
    fine = rows_of(file, settings)
    return agreement(
        list(fine), *columns_of([rows[name] for name in fine], *COLUMNS[1:3]),
        *columns_of(list(fine.values()), *COLUMNS[1:3]),
    ) | cost(file, settings)  # fmt: skip


def table(runs: Path) -> None:
    """The step `table`."""
    start, folder = time.perf_counter(), paths.data() / "zeolite-n2"
    files = [runs / f"{step}.jsonl" for step in CHECKS]
    found = [rows_of(*pair) for pair in zip(files, (LABEL, SHORT), strict=True)]
    names = ("labels.csv", COLUMNS), ("strained.csv", ("name", *COLUMNS[1:3]))
    for (name, columns), rows in zip(names, found, strict=True):
        kept = [[key, *(row[c] for c in columns[1:])] for key, row in rows.items()]
        with results.replacing(folder / name) as file:
            pd.DataFrame(kept, columns=columns).to_csv(file, float_format="%.5g", index=False)
    labels, copied = (read_table(folder / name) for name, _ in names)
    codes = [row["code"] for row in labels]
    value, error = columns_of(labels, *COLUMNS[1:3])
    raspa = {row["code"]: row for row in read_table(folder / "raspa3.csv")}
    before = {row["name"]: row["loadings"]["N2"]
              for row in results.read("gcmc/zeolite-n2-all.json")["rows"]}  # fmt: skip
    unit = guest("N2")["molar_mass"] * np.array([databases.iza(c).density for c in codes])
    earlier, earlier_error = columns_of(
        [before[code] for code in codes], "mol_per_kg", "error_mol_per_kg")  # fmt: skip
    original = dict(zip(codes, value, strict=True))
    short, short_error = columns_of(copied, *COLUMNS[1:3])
    of = np.array([original[row["name"].split("~")[0]] for row in copied])
    ratio = short[of >= FEW] / of[of >= FEW]
    relative = np.where(value >= FEW, error / np.maximum(value, FEW), 0)
    with_raspa = agreement(
        codes, value, error, *columns_of([raspa[c] for c in codes], *COLUMNS[1:3]))  # fmt: skip
    for worst in with_raspa["worst"]:  # what else is known of them
        row, i = raspa[worst["code"]], codes.index(worst["code"])
        worst["earlier_g_L"] = [earlier[i] * unit[i], earlier_error[i] * unit[i]]
        for way in ("counting", "insertion"):
            worst[f"other_{way}_g_L"] = [float(row[f"{k}{way}_g_L"]) for k in ("", "error_")]
        worst["other_counting_alone"] = row["counting_alone"] == 1
    payload = {
        "unit": "g/L of framework", "few_g_L": FEW,
        "labels": {
            **summary(value, error), **cost(files[0], LABEL),
            "mae_of_median_g_L": np.abs(value - np.median(value)).mean(),
            "named": {codes[i]: [value[i], error[i]] for i in map(codes.index, gcmc_checks.NAMED)},
            "least_precise": [
                [codes[i], value[i], error[i]] for i in np.argsort(-relative)[:5]],
            "agreement_with_fine_grids": fine_grids(files[0], found[0], "labels"),
        },
        "agreement_with_raspa3": {**with_raspa, "guess": GUESS},
        "agreement_with_zeolite_n2_all": agreement(
            codes, value, error, earlier * unit, earlier_error * unit),
        "strained": {
            **summary(short, short_error), **cost(files[1], SHORT),
            "copies": COPIES, "strain": STRAIN,
            "ratio_to_original": {
                "n": len(ratio), "mean": ratio.mean(), "sd": ratio.std(ddof=1),
                "percentiles_5_25_50_75_95": np.percentile(ratio, [5, 25, 50, 75, 95])},
            "agreement_with_fine_grids": fine_grids(files[1], found[1], "strained"),
        },
    }  # fmt: skip
    path = results.write(
        "zeolite-n2/gcmc.json", payload, command="python tools/zeolite_gcmc.py table",
        seed=[LABEL.seed, SHORT.seed, *(s.seed for s, _ in CHECKS.values())],
        wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(f"{path.name}: {len(labels)} frameworks, median relative error"
          f" {payload['labels']['median_relative_error']:.2%}; {len(copied)} copies")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["strained", "labels", "table"])
    parser.add_argument("--runs", type=Path, default=Path("runs/zeolite-gcmc"),
                        help="folder of rows (default runs/zeolite-gcmc)")  # fmt: skip
    parser.add_argument("--limit", type=int, help="the first so many frameworks only")
    parser.add_argument("--batch", type=int, default=46, help="crystals at once (default 46)")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="start no batch after so many")  # fmt: skip
    args = parser.parse_args(arguments)
    until = time.monotonic() + args.seconds
    try:
        if args.step == "table":
            table(args.runs)
            return 0
        codes, file = databases.iza_codes()[: args.limit], args.runs / f"{args.step}.jsonl"
        names, settings = (codes, LABEL) if args.step == "labels" else (copies(codes), SHORT)
        simulate(names, settings, file, args.batch, until)
        finer, number = CHECKS[args.step]
        some = np.random.default_rng(0).permutation(names)[:number].tolist()
        simulate(some, finer, file, args.batch, until)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
