"""N2 uptake of CoRE MOF 2019 crystals at 77 K and 1 bar by grand-canonical Monte Carlo.

Model: rigid frameworks (UFF) and nitrogen (the two nitrogen sites of TraPPE), Lennard-Jones
interactions truncated at 12.8 Å, no charges on either. All pores count, also closed ones.

Which crystals: of the subset ASR those that are not marked DISORDER, whose largest cavity (LCD) is
wider than 3.7 Å, and that have at most 500 atoms. They are taken in one random order, so that a run
that is cut off leaves a random sample. Each is simulated twice, from the empty and from the filled
framework. The first pass has short chains; what its two chains do not agree on is simulated again
in the next pass, with longer ones. A label is the mean of both, and its error at least half the gap
between them. That is no bound: where pores are full, short chains stay below long ones from either
start. How far is in data/results/mof-n2/longer.json (tools/mof_n2_errors.py --longer).

Steps, each resumable: `run` appends a line for each finished crystal to rows.jsonl below --runs and
leaves out the lines that are there; `table` makes data/mof-n2/labels.csv and the record
data/results/mof-n2/labels.json of them. Crystals can be packed into one file first, with which a
run needs numpy, scipy, tqdm and numba (for NVIDIA cards also numba-cuda) only. On CUDA a batch
should be as large as memory allows (a crystal takes about 1.5 MB), because a launch ends with its
slowest chain.

examples:
  python tools/mof_labels.py run --device cuda                  all crystals, first pass
  python tools/mof_labels.py run --device cuda --pass 2         again where chains disagreed
  python tools/mof_labels.py run --limit 8 --batch 8            a try on processor cores
  python tools/mof_labels.py run --device cuda --seconds 500    stops itself in time
  python tools/mof_labels.py table
  python tools/mof_labels.py pack --to mofs.npz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import gcmc_checks
import numpy as np
from tqdm import tqdm

from x3mat import paths, results
from x3mat.errors import X3MatError
from x3mat_gcmc import Framework, GCMCSettings, engine
from x3mat_gcmc.forcefield import framework_parameters, guest
from x3mat_gcmc.system import System, insertion_cdfs, make_grids, make_guests, make_system

PASSES = (
    replace(gcmc_checks.SETTINGS["mof-n2"], equilibration=500, cycles=250, replicas=2),
    replace(gcmc_checks.SETTINGS["mof-n2"], equilibration=1000, cycles=500, replicas=2),
    # packing relaxes by motion: fewer trials and swaps leave time for longer chains
    replace(gcmc_checks.SETTINGS["mof-n2"], equilibration=3000, cycles=1500, replicas=2, trials=16,
            moves=(0.4, 0.3, 0.02, 0.28, 0.0)),
)
TARGET = 0.02  # relative error, and gap between the two starts
FEW = 0.01  # molecules per cell; an uptake below it counts as none
COLUMNS = (
    "name", "mol_per_kg", "error_mol_per_kg", "g_per_L", "mg_per_g", "molecules_per_cell",
    "gap", "equilibrated", "pass",
)  # fmt: skip


def settings_hash(settings: GCMCSettings) -> str:
    """16 hexadecimal digits that stand for the settings and the parameters that they name."""
    content = [asdict(settings), guest(settings.gases[0]),
               framework_parameters(settings.force_field)]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------ simulation


def prepare(
    framework: Framework, settings: GCMCSettings, device: str = "cpu"
) -> tuple[System, list] | X3MatError:
    """Simulated cell with its energy grid, and the distribution of places for insertions."""
    try:
        guests = make_guests(settings)
        system = make_system(framework, settings, guests)
        make_grids(system, guests, settings, device)
        return system, insertion_cdfs([system], guests, [(0, settings)], device)[0]
    except X3MatError as error:
        return error


def _one_thread() -> None:
    from x3mat_gcmc import kernel

    kernel.config.NUMBA_NUM_THREADS = 1


def row_of(result: engine.GCMCResult, framework: Framework, system: System) -> dict:
    """What is kept of one crystal: molecules per unit cell with error, by chain and quarter."""
    n_cells = result.n_cells
    [loading] = result.loadings.values()
    mean, error = loading.counting
    chains = result.counts[:, :, 0] / n_cells
    after = chains[:, result.discarded :].mean(1)
    quarters = [[float(q.mean()) for q in np.array_split(c, 4)] for c in chains]
    return {
        "name": result.name, "settings": settings_hash(result.settings),
        "molecules_per_cell": mean, "error": error,
        "gap": float(np.ptp(after) * np.sign(after[1] - after[0]) / mean) if mean > 0 else 0.0,
        "quarters": np.round(quarters, 5).tolist(), "discarded": result.discarded,
        "swaps": result.swaps.tolist(), "acceptance": result.acceptance,
        "warnings": list(result.warnings), "n_cells": n_cells,
        "n_atoms": len(framework.species), "volume": system.volume / n_cells,
        "mass": system.mass, "moves": result.moves,
    }  # fmt: skip


def compile_chains(settings: GCMCSettings, device: str) -> None:
    """Have the chains compiled, by one step in a framework without energy."""
    guests = make_guests(settings)
    system = make_system(Framework(9.0 * np.eye(3), np.array([14]), np.zeros((1, 3))),
                         settings, guests)  # fmt: skip
    system.grids[0] = np.zeros(system.shape + 3, np.float32)
    uniform = np.arange(1, np.prod(system.voxels) + 1) / np.prod(system.voxels)
    short = replace(settings, equilibration=1, cycles=10, start="empty", replicas=1)
    engine.Run([system], guests, [(0, short)], device, None, [[uniform]]).step()


def simulate(
    frameworks: Sequence[Framework], settings: GCMCSettings, *, device: str, batch: int,
    seconds: float, workers: int,
) -> Iterator[list[dict]]:  # fmt: skip
    """Rows of finished crystals, then a record of what the batch took, batch by batch.

    The grids of the next batch are made by `workers` processes, each with a CUDA context of its own
    where there is a device, while the chains of this one run. `seconds` from now all shall be done:
    the last batch is made smaller, judged by the time of the one before.
    """
    start = time.perf_counter()
    if device == "cpu":  # compiles once for all processes
        prepare(Framework(9.0 * np.eye(3), np.array([14]), np.zeros((1, 3))), settings)
    context = multiprocessing.get_context("fork")  # before there is a CUDA context
    with context.Pool(workers, _one_thread) as pool:

        def submit(part: Sequence[Framework]) -> list:
            return [(f, pool.apply_async(prepare, (f, settings, device))) for f in part]

        at, took, waiting = batch, 0.0, submit(frameworks[:batch])
        compile_chains(settings, device)
        compiled = time.perf_counter() - start
        while waiting:
            begun = time.perf_counter()
            left = start + seconds - begun
            if left < max(took, 1.0):
                waiting = waiting[: int(0.85 * batch * max(left, 0.0) / max(took, 1.0))]
                at = len(frameworks)
                if len(waiting) < batch / 8:
                    break
            rows, ready = [], []
            for framework, job in waiting:
                made = job.get()
                if isinstance(made, X3MatError):
                    rows.append({"name": framework.name, "settings": settings_hash(settings),
                                 "failed": made.cause})  # fmt: skip
                else:
                    ready.append((framework, *made))
            waiting, at = submit(frameworks[at : at + batch]), at + batch
            times = [begun, time.perf_counter()]
            record = {"crystals": len(rows) + len(ready), "device": device, "moves": 0}
            if ready:
                run = engine.Run(
                    [system for _, system, _ in ready], make_guests(settings),
                    [(j, settings) for j in range(len(ready))], device, None,
                    [cdfs for *_, cdfs in ready],
                )  # fmt: skip
                times.append(time.perf_counter())
                with tqdm(total=run.cycles_left, unit="cycle", mininterval=5) as bar:
                    while run.cycles_left:
                        bar.update(run.step())
                times.append(time.perf_counter())
                rows += [row_of(r, f, s) for r, (f, s, _) in
                         zip(run.results(0.0), ready, strict=True)]  # fmt: skip
                record["device"] = gcmc_checks.device_name(device)
                record["moves"] = int(run.chains.moves.sum())
            times.append(time.perf_counter())
            took = times[-1] - begun
            names = ("waited_for_grids_s", "tables_s", "chains_s", "averages_s")
            record |= dict(zip(names, np.diff(times).round(3).tolist(), strict=False))
            command = [re.sub(r".*/", "", part) for part in sys.argv[1:]]  # without folders
            record |= {"compiled_s": round(compiled, 3), "provenance": results.provenance(
                seed=settings.seed, wall_s=took,
                command=" ".join(["python", "tools/mof_labels.py", *command]))}
            compiled = 0.0
            yield [*rows, {"batch": record, "settings": settings_hash(settings)}]


def read_rows(file: Path) -> list[dict]:
    """Lines of an earlier run; one that a kill cut off is left out."""
    rows = []
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


def is_reached(row: dict) -> bool:
    """Whether error and gap between the starts are within TARGET, or there is no uptake."""
    if row["molecules_per_cell"] < FEW:
        return row["error"] < FEW
    return max(abs(row["gap"]), row["error"] / row["molecules_per_cell"]) <= TARGET


def run(args: argparse.Namespace) -> int:
    """The step `run`."""
    from x3mat_gcmc import kernel

    kernel.REGISTERS = args.registers
    file = args.runs / "rows.jsonl"
    changes = {k: getattr(args, k) for k in ("cycles", "equilibration", "trials")}
    settings = replace(PASSES[args.number], **{k: v for k, v in changes.items() if v})
    if args.moves:
        settings = replace(settings, moves=tuple(args.moves))
    if args.packed:
        with np.load(args.packed) as pack:
            frameworks = gcmc_checks.frameworks_of({k: pack[k] for k in pack.files}, args.limit)
    else:
        pack = gcmc_checks.load("mof-n2", args.limit, None)
        frameworks = gcmc_checks.frameworks_of(pack, 0)
    frameworks = frameworks[args.skip :]
    old = [row for row in read_rows(file) if "name" in row]
    enough = {settings_hash(s) for s in (settings, *PASSES[args.number :])}
    here = {row["name"] for row in old if row["settings"] in enough}
    done = {row["name"]: row for row in old}
    todo = [f for f in frameworks if f.name not in here]
    if args.number:  # again what an earlier pass did not settle
        todo = [f for f in todo if f.name in done and "failed" not in done[f.name]
                and not is_reached(done[f.name])]  # fmt: skip
    print(f"{len(todo)} crystals to simulate, {len(frameworks) - len(todo)} are there or settled")
    for rows in simulate(todo, settings, device=args.device, batch=args.batch,
                         seconds=args.seconds, workers=args.workers):  # fmt: skip
        append(file, rows)
        print(json.dumps({k: v for k, v in rows[-1]["batch"].items() if k != "provenance"}),
              flush=True)  # fmt: skip
    return 0


# ------------------------------------------------------------------------------ labels


def label_of(row: dict, number: int) -> dict[str, str]:
    """A row of the table: uptake in several units, its error and flags.

    mol/kg is 1000 n / m with n molecules in a unit cell of m g/mol; g/L is of framework volume.
    """
    mass = guest("N2")["molar_mass"]
    n, molar = row["molecules_per_cell"], 1000 / row["mass"]
    litre = mass / 6.02214076e23 * 1e27 / row["volume"]
    values = n * molar, row["error"] * molar, n * litre, n * molar * mass, n
    return dict(zip(COLUMNS, [
        row["name"], *(f"{v:.5g}" for v in values), f"{row['gap']:.3f}",
        str(int(not row["warnings"])), str(number),
    ], strict=True))  # fmt: skip


def latest(rows: Sequence[dict]) -> dict[str, tuple[int, dict]]:
    """By name the row of the last pass, and its number."""
    numbers = {settings_hash(s): i for i, s in enumerate(PASSES)}
    found: dict[str, tuple[int, dict]] = {}
    for row in rows:
        number = numbers.get(row["settings"], -1)
        if "name" in row and number >= found.get(row["name"], (0,))[0]:
            found[row["name"]] = number, row
    return found


def summary(rows: Sequence[dict]) -> dict:
    """How well the chains of some rows agree, and how precise their means are."""
    full = [r for r in rows if r["molecules_per_cell"] >= FEW]
    gaps = np.array([r["gap"] for r in full])
    errors = np.array([r["error"] / r["molecules_per_cell"] for r in full])
    if not full:
        return {"n": len(rows), "n_without_uptake": len(rows)}
    return {
        "n": len(rows), "n_without_uptake": len(rows) - len(full),
        "n_equilibrated": sum(not r["warnings"] for r in rows),
        "n_within_target": sum(map(is_reached, rows)),
        "median_gap": np.median(gaps), "median_abs_gap": np.median(np.abs(gaps)),
        "abs_gap_percentiles_75_90_99": np.percentile(np.abs(gaps), [75, 90, 99]),
        "n_gap_within_2_percent": int((np.abs(gaps) <= 0.02).sum()),
        "n_gap_within_5_percent": int((np.abs(gaps) <= 0.05).sum()),
        "median_relative_error": np.median(errors),
        "n_error_within_2_percent": int((errors <= 0.02).sum()),
    }  # fmt: skip


def table(args: argparse.Namespace) -> int:
    """The step `table`."""
    start = time.perf_counter()
    rows = read_rows(args.runs / "rows.jsonl")
    found = latest(rows)
    good = {k: v for k, v in sorted(found.items()) if "failed" not in v[1]}
    order, left_out = gcmc_checks.mof_candidates()
    path = paths.data() / "mof-n2" / "labels.csv"
    with results.replacing(path) as file:
        lines = [",".join(COLUMNS)]
        lines += [",".join(label_of(row, number).values()) for number, row in good.values()]
        file.write(("\n".join(lines) + "\n").encode())
    passes = []
    for settings in PASSES:
        key = settings_hash(settings)
        here = [r for r in rows if r["settings"] == key]
        batches = [r["batch"] for r in here if "batch" in r]
        passes.append({
            "settings": asdict(settings), "hash": key,
            **summary([r for r in here if "name" in r and "failed" not in r]),
            "wall_s": sum(b["provenance"]["wall_s"] for b in batches),
            "moves": sum(b["moves"] for b in batches), "batches": batches,
        })  # fmt: skip
    n = np.array([float(label_of(row, 0)["mol_per_kg"]) for _, row in good.values()])
    payload = {
        "data_set": "mof-n2", "labels": "data/mof-n2/labels.csv", "gas": "N2",
        "temperature_K": PASSES[0].temperature, "pressure_Pa": PASSES[0].pressure,
        "target": TARGET, "rule": {
            "subset": "CoRE MOF 2019 ASR", "least_LCD_A": gcmc_checks.LEAST_CAVITY,
            "most_atoms": gcmc_checks.MOST_ATOMS, "order": "random, seed 0",
            "n_candidates": len(order), "left_out": left_out,
        },
        "n_labels": len(good), "n_not_simulated": len(set(order) - set(found)),
        "failed": {k: r["failed"] for k, (_, r) in sorted(found.items()) if "failed" in r},
        "all": summary([row for _, row in good.values()]),
        "mol_per_kg": {"mean": n.mean(), "sd": n.std(),
                       "percentiles_5_25_50_75_95": np.percentile(n, [5, 25, 50, 75, 95])},
        "passes": passes, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    record = results.write(
        "mof-n2/labels.json", payload, seed=PASSES[0].seed,
        command="python tools/mof_labels.py table", wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(f"{path}: {len(good)} labels; {record}")
    return 0


def pack(args: argparse.Namespace) -> int:
    """The step `pack`."""
    np.savez_compressed(args.to, **gcmc_checks.load("mof-n2", args.limit, None))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/mof-n2"),
                        help="folder of rows.jsonl (default runs/mof-n2)")  # fmt: skip
    steps = parser.add_subparsers(required=True, metavar="STEP")
    step = steps.add_parser("run", help="simulate")
    step.set_defaults(function=run)
    step.add_argument("--runs", type=Path, default=argparse.SUPPRESS, help="as above")
    step.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    step.add_argument("--pass", dest="number", type=int, default=0, choices=range(len(PASSES)))
    step.add_argument("--limit", type=int, default=0, help="first so many crystals, 0: all")
    step.add_argument("--skip", type=int, default=0, help="leave out the first so many")
    step.add_argument("--packed", type=Path, help="crystals from such a file")
    step.add_argument("--batch", type=int, default=6000, help="crystals at once (default 6000)")
    step.add_argument("--seconds", type=float, default=np.inf, help="stop by then")
    step.add_argument("--workers", type=int, default=os.cpu_count(), help="processes for grids")
    step.add_argument("--registers", type=int, default=0,
                      help="of a CUDA thread at most, 0: as the compiler likes")  # fmt: skip
    for name in ("cycles", "equilibration", "trials"):
        step.add_argument(f"--{name}", type=int, help="instead of that of the pass, for tries")
    step.add_argument("--moves", type=float, nargs=5, help="likewise")
    step = steps.add_parser("table", help="labels and record")
    step.set_defaults(function=table)
    step = steps.add_parser("pack", help="write the crystals to one file")
    step.set_defaults(function=pack)
    step.add_argument("--to", type=Path, required=True)
    step.add_argument("--limit", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        return args.function(args)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
