"""N2 uptake of the 253 IZA frameworks at 298 K and 1 bar by GCMC with RASPA3.

The labels of zeolite-n2 are those of tools/zeolite_gcmc.py, which are compared with these. Steps,
each resumable: runs (one small file per framework and seed below --runs), the table
data/zeolite-n2/raspa3.csv (and the record raspa3.json among the results), which also has the uptake
of accessible pores, longer runs of named frameworks for density maps, and runs with closed cages
blocked. Runs that exist are kept, so the command may be killed and started again.

examples:
  python tools/zeolite_labels.py                       all: pilot and seed 2, then the table
  python tools/zeolite_labels.py --codes LTA --seeds 3 --steps runs   one more run
  python tools/zeolite_labels.py --steps table         only collect what is there
  python tools/zeolite_labels.py --steps density       density maps of the named frameworks
  python tools/zeolite_labels.py --steps blocking      real runs with closed cages blocked
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pockets
import raspa
from raspa_job import statistical_inefficiency
from tqdm import tqdm

from x3mat import databases, paths, results
from x3mat.errors import X3MatError
from x3mat_book.densities import grams_per_litre

# the pilot stops at a target error; further seeds have a length fixed from it
LABEL = raspa.GCMCSettings(
    target_relative=0.05, target_absolute=0.04, min_cycles=300, max_seconds=25.0)
PILOT = 1  # the seed that sets the lengths of the others
DIFFER = 2.5  # combined standard errors between counting and insertion, beyond which counting holds
NAMED = ["LTA", "ASV", "MFI", "CHA", "FAU", "MOR", "FER", "TON", "BEA", "RHO", "KFI", "MWW"]
LONG = {"LTA": 4000, "ASV": 4000}  # cycles of the runs for density maps, else 800
CHECKED = ("LTA", "FAU", "DDR", "EMT")  # frameworks simulated again with their closed cages blocked
THRESHOLDS = (10.0, 15.0, 20.0)  # k_B T


def run_one(code: str, settings: raspa.GCMCSettings, folder: Path) -> str | None:
    """One run, kept as ``CODE-SEED.json`` and ``CODE-SEED.npz``; returns the error, if any."""
    stem = folder / f"{code}-{settings.seed}"
    try:
        result = raspa.simulate(databases.iza(code), settings)
    except X3MatError as error:
        results.write_json(stem.with_suffix(".failed.json"), {"code": code, "error": str(error)})
        return str(error)
    np.savez_compressed(
        stem.with_suffix(".npz"),
        counts=result.counts.astype(np.uint16),
        centres=np.floor(result.centres * 65536).astype(np.uint16),
    )
    record = {**result.summary(), "versions": results.versions(("raspalib", "zeose"))}
    results.write_json(stem.with_suffix(".json"), record)
    stem.with_suffix(".failed.json").unlink(missing_ok=True)
    return None


def follow_up(code: str, seed: int, folder: Path) -> raspa.GCMCSettings:
    """Settings of a further seed: a length fixed beforehand, from the error of the pilot run.

    A run that stops when its own error looks small is slightly biased; one of fixed length is
    not. The length aims at an error of 3 % or 0.03 g per litre, between 500 and 1,500 cycles.
    """
    record = results.read_json(folder / f"{code}-{PILOT}.json")
    target = max(0.03 * record["n2_g_L"], 0.03)
    cycles = record["cycles"] * (record["error_g_L"] / target) ** 2
    return replace(LABEL, seed=seed).fixed(10 * round(min(max(cycles, 500), 1500) / 10))


def run_all(jobs: list[tuple[str, raspa.GCMCSettings]], folder: Path, workers: int) -> list[str]:
    """Run those jobs whose result is not there yet, several at a time; returns the errors."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [(c, s) for c, s in jobs if not (folder / f"{c}-{s.seed}.json").is_file()]
    errors = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(todo), desc=folder.name) as bar:
        futures = [pool.submit(run_one, c, s, folder) for c, s in todo]
        for future in as_completed(futures):
            error = future.result()
            bar.update()
            if error:
                errors.append(error)
                tqdm.write(error, file=sys.stderr)
    return errors


def pores(code: str, folder: Path) -> dict[float, pockets.PoreMap]:
    """Pore maps of a framework at each threshold, from a cache."""
    path = folder / "pores" / f"{code}.npz"
    crystal = databases.iza(code)
    if path.is_file():
        with np.load(path) as cached:
            labels, open_ = cached["labels"], cached["accessible"]
    else:
        energy = pockets.energy_grid(crystal, LABEL)
        maps = [pockets.pore_map(crystal, LABEL, energy=energy, threshold=t) for t in THRESHOLDS]
        labels = np.stack([m.labels for m in maps]).astype(np.uint16)
        open_ = np.stack([m.accessible for m in maps])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, labels=labels, accessible=open_)
    return {
        t: pockets.PoreMap(o, (n > 0) & ~o, np.array(crystal.lattice), n)
        for t, n, o in zip(THRESHOLDS, labels.astype(int), open_, strict=True)
    }


def run_files(code: str, folder: Path) -> list[Path]:
    """Records of all runs of a framework, those for density maps included, by seed."""
    files = [*folder.glob(f"{code}-*[0-9].json"), *folder.glob(f"density/{code}-*[0-9].json")]
    return sorted(files, key=lambda p: int(p.stem.split("-")[1]))


def accessible_fraction(
    pore: pockets.PoreMap, runs: list[dict[str, np.ndarray]]
) -> tuple[float, float]:
    """Fraction of the sampled molecules that is in accessible pores, and its standard error."""
    if not pore.closed.any():
        return 1.0, 0.0
    total = sum(int(r["counts"].sum()) for r in runs)
    if not pore.accessible.any() or total == 0:
        return 0.0, 0.0
    inside = []
    for run in runs:
        flags = pore.contains((run["centres"] + 0.5) / 65536)
        owner = np.repeat(np.arange(len(run["counts"])), run["counts"])
        inside.append(np.bincount(owner, weights=flags, minlength=len(run["counts"])))
    fraction = sum(float(x.sum()) for x in inside) / total
    variance = 0.0
    for x, run in zip(inside, runs, strict=True):
        residual = x - fraction * run["counts"]
        variance += len(x) * residual.var() * statistical_inefficiency(residual)
    return fraction, float(np.sqrt(variance)) / total


def pooled(values: np.ndarray, cycles: np.ndarray) -> tuple[float, float]:
    """Mean over runs weighted by their cycles, of (runs, 2) means and errors, and its error."""
    share = cycles / cycles.sum()
    return float(share @ values[:, 0]), float(np.sqrt(np.sum((share * values[:, 1]) ** 2)))


def combined(records: list[dict]) -> list[dict]:
    """The runs with counting and insertion combined, each with weights from the *other* runs.

    A weight from the run's own errors would be correlated with its values, so the weights are
    the inverse variances per cycle, averaged over the other runs. Test insertion has a heavy
    tail (rarely, one insertion outweighs thousands); where a run's own variance is more than
    thirty times that of the others, its own is taken.
    """
    keys = ("counting_g_L", "insertion_g_L")
    variance = np.array([[r[k][1] ** 2 * r["cycles"] for k in keys] for r in records])
    result = []
    for i, record in enumerate(records):
        others = np.delete(variance, i, axis=0) if len(records) > 1 else variance
        expected = others.mean(0)
        weights = 1 / np.where(variance[i] > 30 * expected, variance[i], expected)
        weights /= weights.sum()
        values = np.array([record[k] for k in keys])
        both = [float(weights @ values[:, 0]), float(np.hypot(*(weights * values[:, 1])))]
        result.append({**record, "combined_g_L": both})
    return result


def collect(
    code: str, folder: Path, seeds: list[int] | None = None, blocked: bool = True
) -> tuple[dict, dict] | None:
    """The table's row of a framework, and what the summary needs besides.

    The uptake is that of the given seeds (all, if none are given), the share of accessible pores
    that of all runs. Without `blocked` the pores are not looked at.
    """
    files = run_files(code, folder)
    if not files:
        return None
    records = [results.read_json(f) for f in files]
    runs = []
    for file in files:
        with np.load(file.with_suffix(".npz")) as arrays:
            runs.append({k: arrays[k].astype(np.int64) for k in ("counts", "centres")})
    records = combined([r for r in records if seeds is None or r["seed"] in seeds])
    cycles = np.array([r["cycles"] for r in records], dtype=float)
    counting, insertion, both = (
        pooled(np.array([r[key] for r in records]), cycles)
        for key in ("counting_g_L", "insertion_g_L", "combined_g_L")
    )
    # test insertion that has missed rare, strong sites: its error is too small, its mean too low
    differ = abs(counting[0] - insertion[0]) > DIFFER * np.hypot(counting[1], insertion[1])
    uptake, error = counting if differ else both
    crystal = databases.iza(code)
    guest = raspa.load_force_field(LABEL.force_field)["guest"]["molar_mass"]
    fractions = dict.fromkeys(THRESHOLDS, (np.nan, np.nan))
    closed = -1
    if blocked:
        maps = pores(code, folder)
        fractions = {t: accessible_fraction(p, runs) for t, p in maps.items()}
        closed = len(np.unique(maps[15.0].labels[maps[15.0].closed]))
    fraction, fraction_error = fractions[15.0]
    row = {
        "code": code,
        "n2_g_L": uptake,
        "error_g_L": error,
        "n2_blocked_g_L": uptake * fraction,
        "error_blocked_g_L": float(np.hypot(error * fraction, uptake * fraction_error)),
        "molecules_per_cell": uptake / grams_per_litre(guest, crystal.volume),
        "mol_per_kg": uptake / guest / crystal.density,
        "counting_g_L": counting[0],
        "error_counting_g_L": counting[1],
        "insertion_g_L": insertion[0],
        "error_insertion_g_L": insertion[1],
        "counting_alone": int(differ),
        "n_closed_regions": closed,
        "interrupted": int(np.sum(crystal.species == 8) != 2 * np.sum(crystal.species == 14)),
        "cycles": sum(r["cycles"] for r in records),
        "seeds": " ".join(str(r["seed"]) for r in records),
        "cycles_per_seed": " ".join(str(r["cycles"]) for r in records),
        "wall_s": sum(r["wall_s"] for r in records),
        "raspalib": "/".join(sorted({r["versions"]["raspalib"] for r in records})),
    }
    extra = {
        "records": records,
        "blocked": {t: uptake * f for t, (f, _) in fractions.items()},
    }
    return row, extra


def mean_difference(runs: list[list[dict]]) -> list[float] | None:
    """Mean of first seed minus mean of the others, over frameworks, and its standard error."""
    difference = [
        r[0]["combined_g_L"][0] - np.mean([x["combined_g_L"][0] for x in r[1:]])
        for r in runs
        if len(r) > 1
    ]
    if len(difference) < 2:
        return None
    return [float(np.mean(difference)), float(np.std(difference) / np.sqrt(len(difference)))]


def write_table(
    codes: list[str], folder: Path, seeds: list[int], path: Path, command: str, blocked: bool = True
) -> None:
    """Write the table to `path`, and ``data/results/zeolite-n2/raspa3.json``."""
    start = time.perf_counter()
    found = [collect(c, folder, seeds, blocked) for c in tqdm(codes, desc="table")]
    rows = [f[0] for f in found if f]
    extras = {f[0]["code"]: f[1] for f in found if f}
    # do the errors describe the scatter between seeds?
    chi2, freedom = 0.0, 0
    for extra in extras.values():
        values = np.array([r["combined_g_L"] for r in extra["records"]])
        weights = values[:, 1] ** -2.0
        centre = weights @ values[:, 0] / weights.sum()
        chi2 += float(weights @ (values[:, 0] - centre) ** 2)
        freedom += len(values) - 1
    methods = [
        (r["counting_g_L"][0] - r["insertion_g_L"][0])
        / np.hypot(r["counting_g_L"][1], r["insertion_g_L"][1])
        for e in extras.values()
        for r in e["records"]
    ]
    scale = max(1.0, float(np.sqrt(chi2 / freedom))) if freedom >= 50 else 1.0
    for row in rows:
        row["error_g_L"] *= scale
        row["error_blocked_g_L"] *= scale
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    uptake = np.array([r["n2_g_L"] for r in rows])
    error = np.array([r["error_g_L"] for r in rows])
    blocked = np.array([r["n2_blocked_g_L"] for r in rows])
    other = {t: np.array([extras[r["code"]]["blocked"][t] for r in rows]) for t in THRESHOLDS}
    relative = error / np.maximum(uptake, 1e-12)
    payload = {
        "unit": "g/L of framework",
        "n_frameworks": len(rows),
        "median_relative_error": float(np.median(relative)),
        "rms_error_g_L": float(np.sqrt(np.mean(error**2))),
        "mean_g_L": float(uptake.mean()),
        "sd_g_L": float(uptake.std(ddof=1)),
        "min_g_L": float(uptake.min()),
        "max_g_L": float(uptake.max()),
        "mae_of_median_g_L": float(np.abs(uptake - np.median(uptake)).mean()),
        "blocked_mean_g_L": float(blocked.mean()),
        "n_with_closed_pores_that_matter": int((blocked < 0.95 * uptake).sum()),
        "blocked_changes_between_10_and_20_kT": sorted(
            r["code"] for r, a, b in zip(rows, other[10.0], other[20.0], strict=True)
            if abs(a - b) > 0.05 * r["n2_g_L"]
        ),
        "named": {
            r["code"]: {
                "n2_g_L": [round(r["n2_g_L"], 3), round(r["error_g_L"], 3)],
                "n2_blocked_g_L": [
                    round(r["n2_blocked_g_L"], 3), round(r["error_blocked_g_L"], 3)
                ],
            }
            for r in rows
            if r["code"] in NAMED
        },
        "named_all_runs": {
            c: [round(row["n2_g_L"], 3), round(row["error_g_L"], 3), row["cycles"]]
            for c in NAMED
            if c in extras
            for row in [collect(c, folder, blocked=False)[0]]
        },
        "error_kind": (
            "standard error within runs, corrected for autocorrelation; counting and test "
            "insertion combined with inverse variances of the other runs (of the run itself where "
            "thirty times larger), counting alone where the two differ by more than 2.5 standard "
            "errors; runs pooled by cycles; times error_scale = sqrt(chi2 / degrees "
            "of freedom) between seeds where that "
            "exceeds 1"
        ),
        "error_scale": scale,
        "chi2_between_seeds": chi2,
        "degrees_of_freedom": freedom,
        "mean_z_between_estimators": float(np.mean(methods)),
        "rms_z_between_estimators": float(np.sqrt(np.mean(np.square(methods)))),
        "total_cycles": int(sum(r["cycles"] for r in rows)),
        "total_run_wall_s": float(sum(r["wall_s"] for r in rows)),
        "pilot_minus_others_g_L": mean_difference([e["records"] for e in extras.values()]),
        "mean_counting_g_L": float(np.mean([r["counting_g_L"] for r in rows])),
        "mean_insertion_g_L": float(np.mean([r["insertion_g_L"] for r in rows])),
        "settings": {k: v for k, v in asdict(LABEL).items() if k != "seed"},
        "counting_alone": [r["code"] for r in rows if r["counting_alone"]],
        "interrupted": [r["code"] for r in rows if r["interrupted"]],
        "note": "atoms at the open ends of interrupted frameworks have charges in proportion to "
        "their bonds (bond_charges), which makes them neutral without the hydrogens they lack; "
        "wall_s of provenance is that of collecting, total_run_wall_s adds up all runs",
    }  # fmt: skip
    wall = time.perf_counter() - start
    results.write("zeolite-n2/raspa3.json", payload, seed=seeds, command=command, wall_s=wall)
    print(f"{len(rows)} frameworks, median relative error {payload['median_relative_error']:.3%}")


def write_densities(codes: list[str], folder: Path, workers: int) -> None:
    """Longer runs, and ``data/zeolite-n2/density/CODE.npz`` from all runs of a framework."""
    jobs = [(c, replace(LABEL, seed=101).fixed(LONG.get(c, 800))) for c in codes]
    run_all(jobs, folder / "density", workers)
    target = paths.data() / "zeolite-n2" / "density"
    target.mkdir(parents=True, exist_ok=True)
    for code in codes:
        crystal = databases.iza(code)
        files = run_files(code, folder)
        records = [results.read_json(f) for f in files]
        centres = []
        for file in files:
            with np.load(file.with_suffix(".npz")) as arrays:
                centres.append((arrays["centres"] + 0.5) / 65536)
        points = np.concatenate(centres)
        cells = sum(r["cycles"] * r["n_cells"] for r in records)
        density = raspa.density_grid(points, crystal, 0.5, cells)
        np.savez_compressed(
            target / f"{code}.npz",
            density=density.astype(np.float32),  # molecules per Å3, averaged over the space group
            lattice=np.array(crystal.lattice),
            cycles=sum(r["cycles"] for r in records),
            n_centres=len(points),
            seeds=np.array([r["seed"] for r in records]),
        )


def check_blocking(folder: Path, workers: int, command: str) -> None:
    """Real runs with blocking spheres against the share of accessible pores in open runs."""
    start = time.perf_counter()
    base = replace(LABEL, seed=202).fixed(1500)
    jobs = []
    for code in CHECKED:
        spheres = pores(code, folder)[15.0].blocking_spheres()
        jobs.append((code, replace(base, blocking_pockets=spheres)))
    run_all(jobs, folder / "blocked", workers)
    payload = {}
    for code, settings in jobs:
        row, _ = collect(code, folder)  # from all runs
        record = results.read_json(folder / "blocked" / f"{code}-{settings.seed}.json")
        error = float(np.hypot(record["error_g_L"], row["error_blocked_g_L"]))
        payload[code] = {
            "unblocked_g_L": [row["n2_g_L"], row["error_g_L"]],
            "from_density_g_L": [row["n2_blocked_g_L"], row["error_blocked_g_L"]],
            "blocked_run_g_L": [record["n2_g_L"], record["error_g_L"]],
            "z": (record["n2_g_L"] - row["n2_blocked_g_L"]) / error,
            "n_spheres": len(settings.blocking_pockets),
            "cycles": record["cycles"],
        }
    wall = time.perf_counter() - start
    results.write("zeolite-n2/blocking.json", payload, seed=base.seed, command=command, wall_s=wall)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", nargs="+", help="frameworks (default: all 253)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2], help="seeds after the pilot")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--nice", type=int, default=10, help="raise niceness by this")
    parser.add_argument("--runs", type=Path, default=Path("runs/zeolite-n2"), help="folder of runs")
    parser.add_argument(
        "--table", type=Path, default=paths.data() / "zeolite-n2" / "raspa3.csv",
        help="table to write",
    )  # fmt: skip
    parser.add_argument(
        "--steps", nargs="+", default=["runs", "table"],
        choices=["runs", "table", "density", "blocking"],
    )  # fmt: skip
    args = parser.parse_args()
    os.nice(args.nice)
    command = "python tools/zeolite_labels.py " + " ".join(sys.argv[1:])
    every = list(databases.iza_codes())
    codes = args.codes or every
    errors: list[str] = []
    seeds = [PILOT, *(s for s in args.seeds if s != PILOT)]
    if "runs" in args.steps:
        for seed in seeds:  # a complete table of the pilot comes first
            if seed == PILOT:
                jobs = [(c, replace(LABEL, seed=seed)) for c in codes]
            else:
                done = [c for c in codes if (args.runs / f"{c}-{PILOT}.json").is_file()]
                jobs = [(c, follow_up(c, seed, args.runs)) for c in done]
            last = seed == seeds[-1]
            waiting = [c for c, s in jobs if not (args.runs / f"{c}-{s.seed}.json").is_file()]
            errors += run_all(jobs, args.runs, args.workers)
            if "table" in args.steps and (last or (waiting and len(codes) == len(every))):
                write_table(every, args.runs, seeds, args.table, command.strip(), blocked=last)
    elif "table" in args.steps:
        write_table(every, args.runs, seeds, args.table, command.strip())
    if "density" in args.steps:
        write_densities(args.codes or NAMED, args.runs, args.workers)
    if "blocking" in args.steps:
        check_blocking(args.runs, args.workers, command.strip())
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
