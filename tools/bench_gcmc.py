"""What a move of x3mat_gcmc costs, and how that grows with atoms, molecules and chains.

    atoms      N2 at 298 K and 1 bar in zeolites of more and more atoms
    molecules  N2 at 298 K in LTA, from 1 to 1000 bar
    chains     N2 at 298 K and 1 bar in LTA, from one chain to more than the device can run at once

each with charges (predicted) and without. Chains are equilibrated first; then a number of cycles is
timed. What a move computes is counted in the same state of the chains, by the same functions as
plain Python (numba switched off, in a process of its own): values of the framework's grids,
distances, pairs of sites, waves of Ewald's sum. For a GPU the counts are those of cost-cpu.json,
where it has the state. FLOPS has the floating-point operations in each, by
hand from the source, so that `gflop_per_s` can be set against the limit of the device.

Examples
    python tools/bench_gcmc.py
    python tools/bench_gcmc.py --device cuda --registers 128
    python tools/bench_gcmc.py --quick --out /tmp/cost.json

Writes data/results/gcmc/cost-cpu.json (cost-cuda.json); anew after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shlex
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from gcmc_checks import device_name, predicted
from mof_labels import prepare
from tqdm import tqdm

from x3mat import databases, paths, results
from x3mat_gcmc import Framework, GCMCSettings, engine, kernel
from x3mat_gcmc.kernel import Chains
from x3mat_gcmc.system import System, make_guests

SETTINGS = GCMCSettings(equilibration=100, cycles=100, replicas=16, start="empty")
ZEOLITES = ["ABW", "SOD", "CHA", "LTA", "MFI", "FAU", "TSC"]
PRESSURES = [1e5, 1e6, 1e7, 1e8]
KINDS = "atoms", "molecules", "chains"
CHAINS = {"cpu": [1, 2, 4, 16, 64], "cuda": [1, 16, 64, 256, 512, 1024, 2048, 4096]}
COUNTED = 300  # moves of one chain, counted in plain Python
#: Floating-point operations, by hand from the source: of a spline 220 in single precision, then a
#: hyperbolic sine; with one site pair its Lennard-Jones and its rough Coulomb energy.
FLOPS = {"spline": 250, "distance2": 32, "site_pair": 18, "screened": 45, "wave": 36, "line": 150}
#: Of cards, in double precision without tensor cores, 10¹² s⁻¹ (data sheets).
LIMITS_TFLOPS = {"H100": 34.0, "H200": 34.0}


def measure(
    framework: Framework, settings: GCMCSettings, device: str, counts: dict | None = None
) -> dict:
    """Time of a move, and what it computes, unless that is known."""
    begun = time.perf_counter()
    system, cdfs = prepare(framework, settings, device)
    run = engine.Run([system], make_guests(settings), [(0, settings)], device, None, [cdfs])
    prepared = time.perf_counter() - begun
    while run.phase == 0:
        run.step()
    counts = counts or in_plain_python(system, settings, cdfs, run.chains)
    before, begun = int(run.chains.moves.sum()), time.perf_counter()
    while run.cycles_left:
        run.step()
    seconds, moves = time.perf_counter() - begun, int(run.chains.moves.sum()) - before
    [result] = run.results(0.0)
    rate, flop = moves / seconds, sum(FLOPS[name] * n for name, n in counts.items())
    return {
        "name": framework.name, "charges": settings.charges, "pressure_Pa": settings.pressure,
        "chains": settings.replicas, "atoms": len(framework.species),
        "atoms_of_cells": len(system.atoms), "molecules": float(result.counts.sum(-1).mean()),
        "waves": len(system.coefficients), "prepared_s": prepared, "seconds": seconds,
        "moves": moves, "moves_per_s": rate, "us_per_move": 1e6 / rate,
        "per_move": counts, "flop_per_move": flop, "gflop_per_s": 1e-9 * flop * rate,
    }  # fmt: skip


def in_plain_python(*state) -> dict[str, float]:
    """What :func:`count` gives, in a process without numba's compiler."""
    run = subprocess.run(
        [sys.executable, __file__, "--count"], input=pickle.dumps(state), stdout=subprocess.PIPE,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, check=True)  # fmt: skip
    return json.loads(run.stdout)


def count(system: System, settings: GCMCSettings, cdfs: list, chains: Chains) -> dict[str, float]:
    """Calls of the functions that compute, for a move of the chain with the median of molecules."""
    run = engine.Run([system], make_guests(settings), [(0, settings)], "cpu", None, [cdfs])
    tables = run.tables
    found: Counter[str] = Counter()

    def counted(name: str, number=lambda *_: 1, key: str | None = None) -> None:
        function = getattr(kernel, name)

        def wrapper(*arguments):
            found[key or name] += number(*arguments)
            return function(*arguments)

        setattr(kernel, name, wrapper)

    for name in ("spline", "distance2", "screened"):
        counted(name)
    counted("pair_energy", lambda _, s, k, one, m, *rest: int(
        tables.n_sites[k] * tables.n_sites[m]), "site_pair")  # fmt: skip
    counted("waves_change", lambda *_: len(system.coefficients), "wave")
    counted("waves_change", lambda *_: int(tables.line_start[1]), "line")
    median, number = len(chains.n) // 2, len(chains.n)  # places in their order
    cycles = max(1, COUNTED // int(chains.length[chains.order[median]]))
    before = int(chains.moves.sum())
    with np.errstate(over="ignore"):
        kernel.advance(median, number, 0, 1, tables, chains, 0, cycles, 0)
    moves = int(chains.moves.sum()) - before
    return {name: n / moves for name, n in found.items()}


def plan(device: str, quick: bool, kinds: list[str]) -> list[tuple[str, str, GCMCSettings]]:
    """Kind of row, framework, settings."""
    base = replace(SETTINGS, replicas=4, equilibration=20, cycles=20) if quick else SETTINGS
    if device == "cuda" and not quick:
        base = replace(base, replicas=1024, equilibration=40, cycles=10)
    rows = []
    for charges in ("none", "cif"):
        each = replace(base, charges=charges)
        rows += [("atoms", z, each) for z in (ZEOLITES[:2] if quick else ZEOLITES)]
        rows += [("molecules", "LTA", replace(each, pressure=p))
                 for p in (PRESSURES[:1] if quick else PRESSURES)]  # fmt: skip
        rows += [("chains", "LTA", replace(each, replicas=n))
                 for n in (CHAINS[device][:2] if quick else CHAINS[device])]  # fmt: skip
    return [row for row in rows if row[0] in kinds]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=list(CHAINS))
    parser.add_argument("--registers", type=int, default=0, metavar="N",
                        help="of a GPU's thread at most, so that more chains run at a time;"
                        " 0: as many as the compiler likes")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.count:
        print(json.dumps(count(*pickle.load(sys.stdin.buffer))))
        return
    kernel.REGISTERS = options.registers
    out = options.out or paths.results(f"gcmc/cost-{options.device}.json")
    begun, rows, compiled = time.perf_counter(), [], set()
    frameworks: dict[str, Framework] = {}
    known = {}
    if options.device == "cuda":
        known = {(r["name"], r["charges"], r["pressure_Pa"]): r["per_move"]
                 for r in results.read("gcmc/cost-cpu.json")["rows"]}  # fmt: skip
    planned = plan(options.device, options.quick, options.kinds)
    for kind, code, settings in tqdm(planned, unit="row"):
        if code not in frameworks:
            crystal = databases.iza(code)
            frameworks[code] = predicted(Framework(
                crystal.lattice, crystal.species, crystal.frac_coords, None, code))  # fmt: skip
        counts = known.get((code, settings.charges, settings.pressure))
        if settings.charges not in compiled:
            measure(frameworks[code], replace(settings, cycles=20, equilibration=2),
                    options.device, counts)  # fmt: skip
            compiled.add(settings.charges)
        rows.append({"kind": kind, **measure(frameworks[code], settings, options.device, counts)})
        results.write(out.absolute(), {
            "device": device_name(options.device), "threads": os.cpu_count(), "flops": FLOPS,
            "limits_tflops": LIMITS_TFLOPS, "registers": options.registers, "rows": rows,
        }, seed=SETTINGS.seed, wall_s=time.perf_counter() - begun,
            command=shlex.join(["python", "tools/bench_gcmc.py", *argv]))  # fmt: skip


if __name__ == "__main__":
    main()
