"""N2 uptake of the 253 IZA frameworks by GCMC (298 K, 1 bar): runs, resumes and collects."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from x3mat import raspa, results
from x3mat.errors import X3MatError


def _iza(code):
    from ase.db import connect
    import importlib.util
    from x3mat.crystal import crystal_from_arrays

    root = Path(importlib.util.find_spec("zse").submodule_search_locations[0])
    atoms = connect(root / "collections" / "frameworks.db").get(fw=code).toatoms()
    return crystal_from_arrays(
        atoms.cell.array, atoms.numbers, atoms.get_scaled_positions(), name=code
    )


def _codes():
    from ase.db import connect
    import importlib.util

    root = Path(importlib.util.find_spec("zse").submodule_search_locations[0])
    return sorted(row.fw for row in connect(root / "collections" / "frameworks.db").select())


def run_one(code: str, settings: raspa.GCMCSettings, folder: Path) -> dict:
    """One run, kept as ``CODE-seed.json`` and ``CODE-seed.npz``; a failure is kept too."""
    stem = folder / f"{code}-{settings.seed}"
    try:
        crystal = _iza(code)
        result = raspa.simulate(crystal, settings)
    except X3MatError as error:
        record = {"code": code, "seed": settings.seed, "error": str(error)}
        results.write_json(stem.with_suffix(".failed.json"), record)
        return record
    np.savez_compressed(
        stem.with_suffix(".npz"),
        counts=result.counts.astype(np.uint16),
        centres=np.floor(result.centres * 65536).astype(np.uint16),
        lattice=crystal.lattice,
    )
    record = {
        "code": code,
        "seed": settings.seed,
        "n2_g_L": result.g_per_litre,
        "error_g_L": result.g_per_litre_error,
        "counting_g_L": result.counting,
        "insertion_g_L": result.insertion,
        "molecules_per_cell": result.molecules_per_cell,
        "mol_per_kg": result.mol_per_kg,
        "cycles": result.cycles,
        "n_cells": result.n_cells,
        "fugacity_coefficient": result.fugacity_coefficient,
        "wall_s": result.seconds,
        "settings": asdict(settings),
        "versions": results.versions(("raspalib", "zeose")),
    }
    results.write_json(stem.with_suffix(".json"), record)
    return record


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--target", type=float, default=0.035)
    parser.add_argument("--absolute", type=float, default=0.03)
    parser.add_argument("--max-seconds", type=float, default=25.0)
    parser.add_argument("--out", type=Path, default=Path("runs/zeolite-n2"))
    args = parser.parse_args()
    os.nice(10)
    args.out.mkdir(parents=True, exist_ok=True)
    codes = _codes()
    todo = [
        (c, s) for s in args.seeds for c in codes if not (args.out / f"{c}-{s}.json").is_file()
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        futures = [
            pool.submit(
                run_one,
                c,
                raspa.GCMCSettings(
                    seed=s,
                    target_relative=args.target,
                    target_absolute=args.absolute,
                    max_seconds=args.max_seconds,
                ),
                args.out,
            )
            for c, s in todo
        ]
        for future in tqdm(as_completed(futures), total=len(todo)):
            record = future.result()
            tqdm.write(json.dumps({k: v for k, v in record.items() if k not in ("settings", "versions")}))
