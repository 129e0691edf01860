"""Gas uptake of CoRE MOF 2019 crystals by grand-canonical Monte Carlo: labels of two data sets.

mof-n2: N2 at 77 K and 1 bar, the two nitrogen sites of TraPPE, no charges on either side.
mof-co2n2: CO2 and N2 of a mixture 15:85 at 298 K and 1 bar, TraPPE with its charges; those of the
frameworks are predicted (x3mat_gcmc.charges), and crystals of elements whose charges were never
learned are refused.

Model: rigid frameworks (UFF), Lennard-Jones interactions truncated at 12.8 Å, Ewald summation of
the charges. All pores count, also closed ones.

Which crystals: of the subset ASR those that are not marked DISORDER, whose largest cavity (LCD) is
wider than 3.7 Å, and that have at most 500 atoms. They are taken in one random order, so that a run
that is cut off leaves a random sample. The first pass has short chains; what is not precise, or on
what two chains do not agree, is simulated again in the next pass, with longer ones. A label is the
mean of all; of two chains its error is at least half the gap between them.

At 77 K every other chain starts from the filled framework. The gap between the starts is no bound:
where pores are full, short chains stay below long ones from either start. How far is in
data/results/mof-n2/longer.json (tools/mof_n2_errors.py --longer). At 298 K all chains start from
the empty framework: to fill it takes long, and CO2 in the 20 MOFs of
data/results/gcmc/co2-n2-all.json differs by 1 % between the starts (median; 10 % at most).

Steps, each resumable: `run` appends a line for each finished crystal to rows.jsonl below --runs and
leaves out the lines that are there; `table` makes labels.csv in the data set's folder and the
record labels.json among its results of them; `rate` records only how fast a run went. Crystals can
be packed into one file first, with which a run needs numpy, scipy, tqdm and numba (for NVIDIA cards
also numba-cuda) only, and for predicted charges x3mat. On CUDA a batch should be as large as memory
allows (a crystal takes about 1.5 MB, with charges 4 MB), because a launch ends with its slowest
chain.

GPUs and hosts share the work, started by torchrun or each with its --shard: process I of N takes
every N-th crystal and appends to rows-I-of-N.jsonl. All rows*.jsonl are read, so that a run may go
on with another number of processes. A crystal's row does not depend on that number.

examples:
  python tools/mof_labels.py run mof-n2 --device cuda                all crystals, first pass
  python tools/mof_labels.py run mof-n2 --device cuda --pass 2       again where chains disagreed
  python tools/mof_labels.py run mof-co2n2 --limit 8 --batch 8       a try on processor cores
  python tools/mof_labels.py run mof-co2n2 --device cuda --seconds 500    stops itself in time
  torchrun --nproc-per-node 8 tools/mof_labels.py run mof-n2 --device cuda    8 GPUs of a host
  python tools/mof_labels.py run mof-n2 --device cuda --shard 0/4    one of four hosts
  python tools/mof_labels.py table mof-n2
  python tools/mof_labels.py rate mof-n2 --runs runs/try      how many an hour, to what precision
  python tools/mof_labels.py pack --to mofs.npz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gcmc_checks
import numpy as np
from tqdm import tqdm

from x3mat import paths, results
from x3mat.errors import DataError, X3MatError
from x3mat_gcmc import Framework, GCMCSettings, engine, shards
from x3mat_gcmc.forcefield import guest
from x3mat_gcmc.system import (
    System,
    insertion_cdfs,
    make_grids,
    make_guests,
    make_system,
    settings_hash,
)


@dataclass(frozen=True)
class Plan:
    """How the labels of a data set are made."""

    passes: tuple[GCMCSettings, ...]
    insertions: bool  # whether means take in what insertions tell: they fail where pores are full
    gap: float  # relative; chains, or starts, that differ by more do not agree


_N2, _CO2_N2 = gcmc_checks.SETTINGS["mof-n2"], gcmc_checks.SETTINGS["co2-n2"]
PLANS = {
    "mof-n2": Plan((
        replace(_N2, equilibration=500, cycles=250, replicas=2),
        replace(_N2, equilibration=1000, cycles=500, replicas=2),
        # packing relaxes by motion: fewer trials and swaps leave time for longer chains
        replace(_N2, equilibration=3000, cycles=1500, replicas=2, trials=16,
                moves=(0.4, 0.3, 0.02, 0.28, 0.0)),
    ), insertions=False, gap=0.02),
    "mof-co2n2": Plan((
        replace(_CO2_N2, equilibration=300, cycles=600, replicas=2, start="empty"),
        replace(_CO2_N2, equilibration=1000, cycles=2000, replicas=4, start="empty"),
    ), insertions=True, gap=0.1),
}  # fmt: skip
TARGET = 0.02  # relative error
FEW = 0.01  # molecules per cell; an uptake below it counts as none, a smaller error always suffices
UNITS = "mol_per_kg", "error_mol_per_kg", "g_per_L", "mg_per_g", "molecules_per_cell", "gap"
FLAGS = "equilibrated", "pass"


def fronts(gases: Sequence[str]) -> dict[str, str]:
    """What stands in front of a gas's columns and keys: its name where there are several."""
    return {gas: f"{gas.lower()}_" * (len(gases) > 1) for gas in gases}


def columns(gases: Sequence[str]) -> list[str]:
    """Of the table of labels."""
    return ["name", *(front + unit for front in fronts(gases).values() for unit in UNITS), *FLAGS]


# ------------------------------------------------------------------------------ simulation


def prepare(
    framework: Framework, settings: GCMCSettings, device: str = "cpu"
) -> tuple[System, list] | X3MatError:
    """Simulated cell with its energy grids, and the distribution of places for insertions."""
    try:
        if settings.charges == "cif" and framework.charges is None:
            from x3mat_gcmc.charges import with_predicted_charges  # takes long: PyTorch

            framework = with_predicted_charges(framework)
        guests = make_guests(settings)
        system = make_system(framework, settings, guests)
        make_grids(system, guests, settings, device)
        return system, insertion_cdfs([system], guests, [(0, settings)], device)[0]
    except X3MatError as error:
        return error


def _one_thread() -> None:
    from x3mat_gcmc import kernel

    kernel.config.NUMBA_NUM_THREADS = 1


def row_of(
    result: engine.GCMCResult, framework: Framework, system: System, insertions: bool
) -> dict:
    """What is kept of one crystal: of each gas molecules per unit cell with error and the relative
    gap between every other chain (with start="both" from full) and the rest; quarters of chains."""
    n_cells = result.n_cells
    chains = result.counts / n_cells  # (chains, cycles, gases)
    after = chains[:, result.discarded :].mean(1)
    gaps = after[1::2].mean(0) - after[::2].mean(0)
    loadings = {}
    for gap, (gas, x) in zip(gaps, result.loadings.items(), strict=True):
        mean, error = x.counting
        if insertions:
            mean, error = x.molecules_per_cell, x.error_molecules_per_cell
        loadings[gas] = {"molecules_per_cell": mean, "error": error,
                         "gap": float(gap / mean) if mean > 0 else 0.0}  # fmt: skip
    quarters = [[float(q.mean()) for q in np.array_split(c, 4)] for c in chains.sum(-1)]
    return {
        "name": result.name, "settings": settings_hash(result.settings), "loadings": loadings,
        "quarters": np.round(quarters, 5).tolist(), "discarded": result.discarded,
        "swaps": result.swaps.tolist(), "acceptance": result.acceptance,
        "warnings": list(result.warnings), "n_cells": n_cells,
        "n_atoms": len(framework.species), "volume": system.volume / n_cells,
        "mass": system.mass, "moves": result.moves,
    }  # fmt: skip


def _silicon() -> Framework:
    return Framework(9.0 * np.eye(3), np.array([14]), np.zeros((1, 3)), np.zeros(1))


def compile_chains(settings: GCMCSettings, device: str) -> None:
    """Have the chains compiled, by one step in a framework without energy."""
    guests = make_guests(settings)
    system = make_system(_silicon(), settings, guests)
    grid = np.zeros(system.shape + 3, np.float32)
    system.grids.update(dict.fromkeys(range(len(guests.types)), grid))
    uniform = np.arange(1, np.prod(system.voxels) + 1) / np.prod(system.voxels)
    short = replace(settings, equilibration=1, cycles=10, start="empty", replicas=1)
    cdfs = [[uniform] * len(settings.gases)]
    engine.Run([system], guests, [(0, short)], device, None, cdfs).step()


def in_time(known: Sequence[tuple[int, float]], left: float) -> float:
    """How many crystals a batch may have to end in `left` seconds, by what earlier ones took.

    A launch takes a time of its own, that of its slowest chain, and some for each crystal; of one
    batch the two cannot be told apart. How slow the slowest chain is differs between batches; of
    the last one the own time is taken as 0.8 at most. A tenth of the time is kept for what is not
    known.
    """
    if left <= 0:
        return 0
    if math.isinf(left) or not known:
        return math.inf
    (n, took), own = known[-1], 0.0
    for m, other in known[:-1]:
        if m < n:
            own = min(max(0.0, (other * n - took * m) / (n - m)), 0.8 * took)
    rate = (took - own) / n
    return max(0, int((0.9 * left - own) / rate))


def simulate(
    frameworks: Sequence[Framework], settings: GCMCSettings, *, insertions: bool, device: str,
    batch: int, seconds: float, workers: int,
) -> Iterator[list[dict]]:  # fmt: skip
    """Rows of finished crystals, then a record of what the batch took, batch by batch.

    The grids of the next batch are made by `workers` processes, each with a CUDA context of its own
    where there is a device, while the chains of this one run. `seconds` from now all shall be done:
    the first batch is small, to learn how long they take, and the last one as large as time allows.
    """
    start = time.perf_counter()
    if settings.charges == "cif":  # imported once for all processes
        import x3mat_gcmc.charges  # noqa: F401
    if device == "cpu":  # compiled once for all processes
        prepare(_silicon(), settings)
    context = multiprocessing.get_context("fork")  # before there is a CUDA context
    shards.take_device(device)
    with context.Pool(workers, _one_thread) as pool:

        def submit(part: Sequence[Framework]) -> list:
            return [(f, pool.apply_async(prepare, (f, settings, device))) for f in part]

        at = batch if math.isinf(seconds) else max(1, batch // 8)
        waiting, known = submit(frameworks[:at]), []
        engine.free_memory(device)  # checks that there is one
        compile_chains(settings, device)
        compiled = time.perf_counter() - start
        while waiting:
            begun = time.perf_counter()
            allowed = in_time(known, start + seconds - begun)
            if allowed < len(waiting):
                waiting, at = waiting[:allowed], len(frameworks)
                if len(waiting) < batch / 16:
                    break
            rows, ready = [], []
            for framework, job in waiting:
                made = job.get()
                if isinstance(made, X3MatError):
                    rows.append({"name": framework.name, "settings": settings_hash(settings),
                                 "failed": made.cause})  # fmt: skip
                else:
                    ready.append((framework, *made))
            size = len(waiting)
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
                rows += [row_of(r, f, s, insertions) for r, (f, s, _) in
                         zip(run.results(0.0), ready, strict=True)]  # fmt: skip
                record["device"] = gcmc_checks.device_name(device)
                record["moves"] = int(run.chains.moves.sum())
            times.append(time.perf_counter())
            took = times[-1] - begun
            known.append((size, took))
            names = ("waited_for_grids_s", "tables_s", "chains_s", "averages_s")
            record |= dict(zip(names, np.diff(times).round(3).tolist(), strict=False))
            command = [re.sub(r".*/(?!\d+$)", "", part) for part in sys.argv[1:]]  # without folders
            record |= {"compiled_s": round(compiled, 3), "provenance": results.provenance(
                seed=settings.seed, wall_s=took,
                command=" ".join(["python", "tools/mof_labels.py", *command]))}
            compiled = 0.0
            yield [*rows, {"batch": record, "settings": settings_hash(settings)}]


def is_reached(row: dict, gap: float) -> bool:
    """Whether errors are within TARGET and the gaps within `gap`, or small."""
    return all(
        max(x["error"] / TARGET, abs(x["gap"]) * x["molecules_per_cell"] / gap)
        <= max(x["molecules_per_cell"], FEW / TARGET)
        for x in row["loadings"].values()
    )


def run(args: argparse.Namespace) -> int:
    """The step `run`."""
    from x3mat_gcmc import kernel

    kernel.REGISTERS = args.registers
    shard = shards.shard_of(args.shard)
    plan = PLANS[args.data_set]
    if not 0 <= args.number < len(plan.passes):
        raise DataError(f"--pass {args.number}", "there is no such pass",
                        f"The last one of {args.data_set} is {len(plan.passes) - 1}.")  # fmt: skip
    changes = {k: getattr(args, k) for k in ("cycles", "equilibration", "trials", "replicas")}
    settings = replace(plan.passes[args.number], **{k: v for k, v in changes.items() if v})
    if args.moves:
        settings = replace(settings, moves=tuple(args.moves))
    if args.packed:
        with np.load(args.packed) as pack:
            frameworks = gcmc_checks.frameworks_of({k: pack[k] for k in pack.files}, args.limit)
    else:
        pack = gcmc_checks.load("mof-n2", args.limit, None)
        frameworks = gcmc_checks.frameworks_of(pack, 0)
    frameworks = frameworks[args.skip :][shard[0] :: shard[1]]
    passes = {settings_hash(s): i for i, s in enumerate(plan.passes)}
    old = [row for row in shards.read_rows(args.runs) if "name" in row]
    old.sort(key=lambda row: passes.get(row["settings"], -1))  # the last pass counts
    enough = {settings_hash(s) for s in (settings, *plan.passes[args.number :])}
    here = {row["name"] for row in old if row["settings"] in enough}
    done = {row["name"]: row for row in old}
    todo = [f for f in frameworks if f.name not in here]
    if args.number:  # again what an earlier pass did not settle
        todo = [f for f in todo if f.name in done and "failed" not in done[f.name]
                and not is_reached(done[f.name], plan.gap)]  # fmt: skip
    print(f"{len(todo)} crystals to simulate, {len(frameworks) - len(todo)} are there or settled")
    batches = simulate(todo, settings, insertions=plan.insertions, device=args.device,
                       batch=args.batch, seconds=args.seconds, workers=args.workers)  # fmt: skip
    for rows in batches if todo else ():
        rows[-1]["batch"]["shard"] = args.shard
        shards.append(shards.rows_file(args.runs, shard), rows)
        print(json.dumps({k: v for k, v in rows[-1]["batch"].items() if k != "provenance"}),
              flush=True)  # fmt: skip
    return 0


# ------------------------------------------------------------------------------ labels


def label_of(row: dict, number: int) -> dict[str, str]:
    """A row of the table: uptake in several units, its error and flags.

    mol/kg is 1000 n / m with n molecules in a unit cell of m g/mol; g/L is of framework volume.
    """
    values = [row["name"]]
    for gas, x in row["loadings"].items():
        mass, n, molar = guest(gas)["molar_mass"], x["molecules_per_cell"], 1000 / row["mass"]
        litre = mass / 6.02214076e23 * 1e27 / row["volume"]
        found = n * molar, x["error"] * molar, n * litre, n * molar * mass, n
        values += [*(f"{v:.5g}" for v in found), f"{x['gap']:.3f}"]
    values += [str(int(not row["warnings"])), str(number)]
    return dict(zip(columns(list(row["loadings"])), values, strict=True))


def by_pass(
    rows: Sequence[dict], passes: Sequence[GCMCSettings]
) -> dict[str, dict[int, dict]]:
    """By name the rows of a crystal, by the number of their pass, in order."""
    found: dict[str, dict[int, dict]] = {}
    for number, key in enumerate(map(settings_hash, passes)):
        for row in rows:
            if "name" in row and row["settings"] == key:
                found.setdefault(row["name"], {})[number] = row
    return found


def latest(rows: Sequence[dict], passes: Sequence[GCMCSettings]) -> dict[str, tuple[int, dict]]:
    """By name the row of the last pass, and its number."""
    return {name: list(of.items())[-1] for name, of in by_pass(rows, passes).items()}


def summary(rows: Sequence[dict], gap: float) -> dict:
    """How well the chains of some rows agree, and how precise their means are, by gas."""
    out = {"n": len(rows), "n_equilibrated": sum(not r["warnings"] for r in rows),
           "n_within_target": sum(is_reached(r, gap) for r in rows)}  # fmt: skip
    for gas, front in fronts(list(rows[0]["loadings"]) if rows else []).items():
        every = [r["loadings"][gas] for r in rows]
        full = [x for x in every if x["molecules_per_cell"] >= FEW]
        found: dict = {"n_without_uptake": len(every) - len(full)}
        if full:
            gaps = np.array([x["gap"] for x in full])
            errors = np.array([x["error"] / x["molecules_per_cell"] for x in full])
            found |= {
                "median_gap": np.median(gaps), "median_abs_gap": np.median(np.abs(gaps)),
                "abs_gap_percentiles_75_90_99": np.percentile(np.abs(gaps), [75, 90, 99]),
                "n_gap_within_2_percent": int((np.abs(gaps) <= 0.02).sum()),
                "n_gap_within_5_percent": int((np.abs(gaps) <= 0.05).sum()),
                "median_relative_error": np.median(errors),
                "n_error_within_2_percent": int((errors <= 0.02).sum()),
            }  # fmt: skip
        out |= {front + key: value for key, value in found.items()}
    return out


def passes_of(rows: Sequence[dict], plan: Plan) -> list[dict]:
    """How each pass of a plan went, with what its batches took."""
    out = []
    for settings in plan.passes:
        key = settings_hash(settings)
        here = [r for r in rows if r["settings"] == key]
        batches = [r["batch"] for r in here if "batch" in r]
        out.append({
            "settings": asdict(settings), "hash": key,
            **summary([r for r in here if "name" in r and "failed" not in r], plan.gap),
            "wall_s": sum(b["provenance"]["wall_s"] for b in batches),
            "moves": sum(b["moves"] for b in batches), "batches": batches,
        })  # fmt: skip
    return out


def rate(args: argparse.Namespace) -> int:
    """The step `rate`."""
    start, plan = time.perf_counter(), PLANS[args.data_set]
    rows = shards.read_rows(args.runs)
    good = [row for _, row in latest(rows, plan.passes).values() if "failed" not in row]
    if not good:
        raise DataError(args.runs, "no crystal was simulated there", "Let `run` make some first.")
    precise = [is_reached(row, math.inf) for row in good]
    passes = [p for p in passes_of(rows, plan) if p["n"]]
    repeated = [list(of.values()) for of in by_pass(rows, plan.passes).values()
                if len(of) > 1 and not any("failed" in row for row in of.values())]  # fmt: skip
    seconds = sum(p["wall_s"] + sum(b["compiled_s"] for b in p["batches"]) for p in passes)
    record = results.write(f"gcmc/rate-{args.data_set}.json", {
        "data_set": args.data_set, "target": TARGET, "n": len(good), "n_precise": sum(precise),
        "seconds": seconds, "crystals_per_hour": 3600 * len(good) / seconds,
        "precise_per_hour": 3600 * sum(precise) / seconds,
        "all": summary(good, plan.gap), "repeated": {
            "n": len(repeated), **{gas: {
                "median_gap_first": np.median([r[0]["loadings"][gas]["gap"] for r in repeated]),
                "median_gap_last": np.median([r[-1]["loadings"][gas]["gap"] for r in repeated]),
                "median_ratio": np.median([
                    r[-1]["loadings"][gas]["molecules_per_cell"]
                    / max(r[0]["loadings"][gas]["molecules_per_cell"], FEW) for r in repeated]),
            } for gas in plan.passes[0].gases if repeated}}, "passes": passes,
    }, seed=plan.passes[0].seed, wall_s=time.perf_counter() - start,
        command=f"python tools/mof_labels.py rate {args.data_set}")  # fmt: skip
    print(f"{record}: {sum(precise)} of {len(good)} to {TARGET:.0%} in {seconds:.0f} s")
    return 0


def table(args: argparse.Namespace) -> int:
    """The step `table`."""
    start, plan, name = time.perf_counter(), PLANS[args.data_set], args.data_set
    rows, first = shards.read_rows(args.runs), plan.passes[0]
    found = latest(rows, plan.passes)
    good = {k: v for k, v in sorted(found.items()) if "failed" not in v[1]}
    order, left_out = gcmc_checks.mof_candidates()
    labels = [label_of(row, number) for number, row in good.values()]
    path = paths.data() / name / "labels.csv"
    with results.replacing(path) as file:
        lines = [",".join(columns(first.gases)), *(",".join(x.values()) for x in labels)]
        file.write(("\n".join(lines) + "\n").encode())
    distributions = {}
    for column in columns(first.gases):
        if column.endswith(("mol_per_kg", "g_per_L")) and "error" not in column:
            n = np.array([float(x[column]) for x in labels])
            distributions[column] = {
                "mean": n.mean(), "sd": n.std(),
                "percentiles_5_25_50_75_95": np.percentile(n, [5, 25, 50, 75, 95])}  # fmt: skip
    payload = {
        "data_set": name, "labels": f"data/{name}/labels.csv", "gases": first.gases,
        "fractions": first.fractions, "temperature_K": first.temperature,
        "pressure_Pa": first.pressure, "target": TARGET, "gap": plan.gap, "rule": {
            "subset": "CoRE MOF 2019 ASR", "least_LCD_A": gcmc_checks.LEAST_CAVITY,
            "most_atoms": gcmc_checks.MOST_ATOMS, "order": "random, seed 0",
            "n_candidates": len(order), "left_out": left_out,
        },
        "n_labels": len(good), "n_not_simulated": len(set(order) - set(found)),
        "failed": {k: r["failed"] for k, (_, r) in sorted(found.items()) if "failed" in r},
        "all": summary([row for _, row in good.values()], plan.gap), **distributions,
        "passes": passes_of(rows, plan), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    record = results.write(
        f"{name}/labels.json", payload, seed=first.seed,
        command=f"python tools/mof_labels.py table {name}", wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(f"{path}: {len(good)} labels; {record}")
    return 0


def pack(args: argparse.Namespace) -> int:
    """The step `pack`."""
    np.savez_compressed(args.to, **gcmc_checks.load("mof-n2", args.limit, None))
    return 0


def _add_data_set(step: argparse.ArgumentParser) -> None:
    step.add_argument("data_set", choices=list(PLANS))
    step.add_argument("--runs", type=Path, help="folder of rows*.jsonl (default runs/DATA_SET)")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(required=True, metavar="STEP")
    step = steps.add_parser("run", help="simulate")
    step.set_defaults(function=run)
    _add_data_set(step)
    step.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    step.add_argument("--pass", dest="number", type=int, default=0, help="from 0 (default)")
    step.add_argument("--limit", type=int, default=0, help="first so many crystals, 0: all")
    step.add_argument("--skip", type=int, default=0, help="leave out the first so many")
    step.add_argument("--packed", type=Path, help="crystals from such a file")
    step.add_argument("--shard", default=shards.own_shard(), metavar="I/N",
                      help="only every N-th crystal from the I-th, from 0; default: torchrun's"
                      " rank")  # fmt: skip
    step.add_argument("--batch", type=int, default=6000, help="crystals at once (default 6000)")
    step.add_argument("--seconds", type=float, default=np.inf, help="stop by then")
    step.add_argument("--workers", type=int, default=shards.cores(),
                      help="processes for grids (default: a share of the cores)")  # fmt: skip
    step.add_argument("--registers", type=int, default=0,
                      help="of a CUDA thread at most, 0: as the compiler likes")  # fmt: skip
    for name in ("cycles", "equilibration", "trials", "replicas"):
        step.add_argument(f"--{name}", type=int, help="instead of that of the pass, for tries")
    step.add_argument("--moves", type=float, nargs=5, help="likewise")
    step = steps.add_parser("table", help="labels and record")
    step.set_defaults(function=table)
    _add_data_set(step)
    step = steps.add_parser("rate", help="record of how fast a run went, without labels")
    step.set_defaults(function=rate)
    _add_data_set(step)
    step = steps.add_parser("pack", help="write the crystals to one file")
    step.set_defaults(function=pack)
    step.add_argument("--to", type=Path, required=True)
    step.add_argument("--limit", type=int, default=0)
    args = parser.parse_args(arguments)
    if "runs" in args and args.runs is None:
        args.runs = Path("runs", args.data_set)
    try:
        return args.function(args)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
