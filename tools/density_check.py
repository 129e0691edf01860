"""Adsorbate densities of x3mat_gcmc against published argon positions.

Argon in zeolites at 87 K and 1 atm. The folder that X3MAT_DATA names holds the crystals
(iza_ar87.npz) and, for some of them, argon positions of a RASPA2 simulation folded to the unit cell
(iza_ar87_positions/CODE.npz, at most 20,000 each). The positions refer to these crystals, cell and
origin: no argon may be close to an atom, which the result states for each crystal.

Zeolites of at most --atoms atoms are taken in a random order. For each, one chain from the empty
and one from the filled framework collect densities on a grid of voxels of at most 0.5 Å. Positions
are counted on the same grid, both maps are averaged over the space group, and compared by Pearson's
correlation over the voxels. Sampling noise bounds it:

  halves    correlation r of two random halves of the positions; 2 r / (1 + r) is then how well
            all of them correlate with another such sample; the frames are the same in both
            halves, so that this noise is a lower bound
  chains    the same of the two chains
  ceiling   root of the product of the two: what equal densities would give; too low where the
            chains err in opposite directions
  baseline  correlation of the positions with a map that is the same wherever there is room

The result is data/results/gcmc/argon-density.json, written after each zeolite. A call with the
same settings goes on from it.

examples:
  X3MAT_DATA=folder NUMBA_NUM_THREADS=1 python tools/density_check.py
  python tools/density_check.py --codes LTA ABW --name try --maps maps
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gcmc_checks

from x3mat import paths, results
from x3mat.crystal import crystal_from_arrays
from x3mat.errors import DataError, X3MatError
from x3mat_gcmc import Framework, GCMCSettings, gcmc
from x3mat_gcmc.density import POINTS, orbit_average

SETTINGS = replace(
    gcmc_checks.SETTINGS["argon"], equilibration=1500, cycles=1000, replicas=1, density=True,
    trials=128, moves=(0.75, 0.0, 0.1, 0.15, 0.0),
)
TARGET = 0.95
CONTACT = 3.0  # Å; argon is seldom closer to an oxygen


def histogram(frac: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Numbers of positions in the voxels of the unit cell; (i, j, k) spans [i, i+1)/n1 and so on.

    >>> histogram(np.array([[0.1, 0, 0], [0.6, 1.2, -0.3], [-0.1, 0, 0]]), (2, 1, 1)).ravel()
    array([1., 2.])
    """
    shape = np.array(shape)
    index = np.floor(np.asarray(frac, float) % 1.0 * shape).astype(int) % shape
    flat = np.ravel_multi_index(index.T, shape)
    return np.bincount(flat, minlength=shape.prod()).reshape(shape).astype(float)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two maps over all voxels; NaN where one of them is constant."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def of_both(r: float) -> float:
    """From the correlation of two halves that of the whole with another such whole."""
    return 2 * r / (1 + r)


def load_positions(code: str) -> dict[str, np.ndarray]:
    """Published positions: frac in [0, 1), molecules per cell, frames."""
    path = paths.external() / "iza_ar87_positions" / f"{code}.npz"
    if not path.is_file():
        raise DataError(path, "there is no such file", "Choose another zeolite.")
    with np.load(path) as file:
        n_all, frames = int(file["n_positions_all"]), int(file["nframes"])
        return {
            "frac": file["frac"] / 65536.0, "frames": frames, "cells": file["ncell"],
            "molecules_per_cell": n_all / frames / np.prod(file["ncell"]),
        }  # fmt: skip


def choice(most_atoms: int, seed: int) -> list[str]:
    """Zeolites with positions and at most so many atoms in the cell, in a random order."""
    with np.load(paths.external() / "iza_ar87.npz") as file:
        atoms = dict(zip(file["id"].tolist(), np.diff(file["ptr"]).tolist(), strict=True))
    there = sorted(p.stem for p in (paths.external() / "iza_ar87_positions").glob("*.npz"))
    codes = [code for code in there if atoms[code] <= most_atoms]
    return np.random.default_rng(seed).permutation(codes).tolist()


def distances(framework: Framework, frac: np.ndarray) -> np.ndarray:
    """Å, of places in the unit cell from the nearest atom."""
    images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    atoms = (framework.frac_coords + images).reshape(-1, 3) @ framework.lattice
    return cKDTree(atoms).query(frac @ framework.lattice)[0]


def pores(framework: Framework, shape: Sequence[int]) -> np.ndarray:
    """1 in the voxels whose middle is at least CONTACT from any atom, 0 elsewhere."""
    middles = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij"), -1)
    far = distances(framework, middles.reshape(-1, 3)) >= CONTACT
    return far.reshape(shape).astype(float)


def check(framework: Framework, settings: GCMCSettings, folder: Path | None = None) -> dict:
    """Simulate one zeolite and compare it with the published positions; keep maps in `folder`."""
    reference, start = load_positions(framework.name), time.perf_counter()
    found = []
    for k, kind in enumerate(("empty", "full")):
        [result] = gcmc([framework], replace(settings, start=kind, seed=settings.seed + k))
        if isinstance(result, X3MatError):
            raise result
        found.append(result)
    seconds = time.perf_counter() - start
    ours = np.array([result.density["Ar"] for result in found])
    order = np.random.default_rng(settings.seed).permutation(len(reference["frac"]))
    halves = np.array([
        histogram(reference["frac"][part], ours.shape[1:]) for part in np.array_split(order, 2)])
    crystal = crystal_from_arrays(
        framework.lattice, framework.species, framework.frac_coords, name=framework.name)
    room = pores(framework, ours.shape[1:])
    raw = np.concatenate([[halves.sum(0), ours.mean(0)], halves, ours, [room]])
    maps = orbit_average(raw, crystal.rotations, crystal.translations)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"{framework.name}.npz", raw=raw, maps=maps)
    numbers = [r.loadings["Ar"].molecules_per_cell for r in found]
    return {
        "name": framework.name, "n_atoms": len(framework.species),
        "n_operations": len(crystal.rotations), "space_group": crystal.space_group,
        "grid": ours.shape[1:], "n_cells": found[0].n_cells,
        "reference_cells": int(np.prod(reference["cells"])), "positions": len(order),
        "frames": reference["frames"],
        "least_distance": distances(framework, reference["frac"]).min(),
        **compare(raw, maps),
        "molecules_per_cell": numbers,
        "reference_molecules_per_cell": reference["molecules_per_cell"],
        "deviation": np.mean(numbers) / reference["molecules_per_cell"] - 1,
        "gap": (numbers[1] - numbers[0]) / np.mean(numbers),
        "swaps": [int(r.swaps.sum()) for r in found], "moves": sum(r.moves for r in found),
        "seconds": seconds,
    }  # fmt: skip


def compare(raw: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    """Correlations of maps, before and after averaging over the space group.

    Each holds reference, ours, two halves of the reference, two chains of ours, and the pores.
    """
    out = {
        "correlation": pearson(maps[0], maps[1]), "halves": pearson(maps[2], maps[3]),
        "chains": pearson(maps[4], maps[5]),
        "chain_correlations": [pearson(maps[0], maps[k]) for k in (4, 5)],
        "baseline": pearson(maps[0], maps[6]), "correlation_unaveraged": pearson(raw[0], raw[1]),
        "reference_symmetry": pearson(raw[0], maps[0]), "symmetry": pearson(raw[1], maps[1]),
    }  # fmt: skip
    out["ceiling"] = float(np.sqrt(max(of_both(out["halves"]) * of_both(out["chains"]), 0.0)))
    return out


def summary(rows: list[dict]) -> dict:
    """Quartiles over zeolites, and which lie below the target."""
    keys = "correlation", "ceiling", "halves", "chains", "baseline", "correlation_unaveraged"
    out = {key: dict(zip(
        ("least", "lower_quartile", "median", "upper_quartile", "most"),
        np.quantile([row[key] for row in rows], [0, 0.25, 0.5, 0.75, 1]), strict=True,
    )) for key in keys}  # fmt: skip
    low = sorted((r for r in rows if r["correlation"] < TARGET), key=lambda r: r["correlation"])
    return {
        "n": len(rows), "n_at_target": len(rows) - len(low), **out,
        "below_target": [row["name"] for row in low],
        "median_abs_deviation": np.median([abs(row["deviation"]) for row in rows]),
        "median_abs_gap": np.median([abs(row["gap"]) for row in rows]),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, default=96, help="most in the cell (default 96)")
    parser.add_argument("--codes", nargs="+", help="these zeolites instead")
    parser.add_argument("--equilibration", type=int, default=SETTINGS.equilibration)
    parser.add_argument("--cycles", type=int, default=SETTINGS.cycles)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--seconds", type=float, default=np.inf,
                        help="after which no further zeolite begins")  # fmt: skip
    parser.add_argument("--maps", type=Path, help="folder to which the maps are written")
    parser.add_argument("--name", default="argon-density", help="of the result")
    args = parser.parse_args()
    begun, file = time.perf_counter(), f"gcmc/{args.name}.json"
    settings = replace(
        SETTINGS, equilibration=args.equilibration, cycles=args.cycles, seed=args.seed)
    kept = {"settings": results.plain(asdict(settings)), "most_atoms": args.atoms, "target": TARGET,
            "points": POINTS}  # fmt: skip
    try:
        codes = args.codes or choice(args.atoms, args.seed)
        rows, before = [], 0.0
        if paths.results(file).is_file():
            old = results.read(file)
            if all(old[key] == value for key, value in kept.items()):
                rows = [row for row in old["rows"] if row["name"] in codes]
                before = old["provenance"]["wall_s"]

        def save() -> None:
            results.write(
                file, {**kept, "summary": summary(rows), "left": left, "rows": rows},
                seed=args.seed, wall_s=before + time.perf_counter() - begun,
                command=" ".join(["python", "tools/density_check.py", *sys.argv[1:]]),
            )  # fmt: skip

        left = [code for code in codes if code not in {row["name"] for row in rows}]
        pack = gcmc_checks.load("argon", 0, left) if left else None
        for framework in gcmc_checks.frameworks_of(pack, 0) if left else ():
            if time.perf_counter() - begun > args.seconds:
                break
            row = check(framework, settings, args.maps)
            rows.append(row)
            left.remove(framework.name)
            print(row["name"], *(f"{k} {row[k]:.3f}" for k in (
                "correlation", "ceiling", "halves", "chains", "deviation", "gap", "seconds")),
                flush=True)  # fmt: skip
            save()
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = results.plain(results.read(file)["summary"])
    print(f"{found['n']} zeolites, {len(left)} left, median {found['correlation']['median']:.3f},"
          f" {found['n_at_target']} at {TARGET} or above")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
