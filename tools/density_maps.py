"""Densities of N2 in zeolites, 298 K and 1 bar: those that the first fold of zeolite-n2 holds out.

The two halves of the rest of fold 0 are simulated with the force field and the settings of
`gcmc_checks.py zeolite-n2`, which agrees with RASPA3. Centres of molecules are counted after
each cycle, in voxels of at most 0.5 Å of the unit cell, and averaged over the space group. Two
halves of the chains have different seeds and share nothing:

  halves    Pearson's correlation r of their maps over all voxels
  expected  2 r / (1 + r), how well the mean of both correlates with another such mean
  samples   cycles of all chains, each of n_cells unit cells; n_centres molecules were counted,
            which are correlated along a chain
  z         deviation of the uptake from that by RASPA3 (raspa3.csv; "label" in the record), over
            its standard error

Every zeolite has a file CODE.npz in data/zeolite-n2/density-fold-0, of the layout of
data/zeolite-n2/density (12 named zeolites, by RASPA3, some thousand molecules each; made by
zeolite_labels.py --steps density), so that `zeolite_maps.py --densities` reads both:

  density    (n1, n2, n3) float16, molecules per Å3; voxel (i, j, k) spans [i, i+1)/n1 and so on
  lattice    Å by rows
  cycles     sampled, of all chains; n_centres molecules were counted in them
  seeds      of the two halves
  settings   their hash; about: what the record says of the zeolite, as JSON

The record is data/results/zeolite-n2/densities.json. A zeolite whose file has the same settings is
not simulated again. On CUDA all run together, on cores one after another. Crystals can be packed
into one file first, with which the package zeose is not needed.

examples:
  python tools/density_maps.py --jobs 8
  python tools/gcmc_checks.py zeolite-n2 --limit 0 --pack zeolites.npz
  python tools/density_maps.py --device cuda --packed zeolites.npz
  python tools/density_maps.py --codes ABW --cycles 100 --replicas 2 --folder try --record x.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import density_check
import gcmc_checks
import numpy as np

from x3mat import paths, results
from x3mat.applications import application
from x3mat.crystal import crystal_from_arrays
from x3mat.errors import DataError, X3MatError
from x3mat_gcmc import Framework, GCMCResult, GCMCSettings, gcmc, kernel
from x3mat_gcmc.density import orbit_average
from x3mat_gcmc.system import settings_hash

NAME, FOLD = "zeolite-n2", 0
SETTINGS = replace(
    gcmc_checks.SETTINGS[NAME], equilibration=300, cycles=2500, replicas=16, density=True
)  # replicas of a half
POINTS = 8  # in each voxel, at which a density is averaged over the space group
TARGET = 0.95


def simulated(
    framework: Framework, halves: Sequence[GCMCResult], label: float, error: float
) -> tuple[np.ndarray, dict]:
    """Density of a zeolite, molecules per Å3, and what is said of it; label: by RASPA3, mol/kg."""
    crystal = crystal_from_arrays(
        framework.lattice, framework.species, framework.frac_coords, name=framework.name)
    raw = np.array([half.density["N2"] for half in halves])
    maps = orbit_average(raw, crystal.rotations, crystal.translations, POINTS)
    loadings = [half.loadings["N2"] for half in halves]
    uptake = np.mean([x.mol_per_kg for x in loadings])
    own = np.hypot(*(x.error_mol_per_kg for x in loadings)) / 2
    r = density_check.pearson(*maps)
    chains = sum(half.settings.replicas for half in halves)
    return maps.mean(0), {
        "code": framework.name, "n_atoms": len(framework.species),
        "space_group": crystal.space_group, "n_operations": len(crystal.rotations),
        "grid": maps.shape[1:], "n_cells": halves[0].n_cells, "chains": chains,
        "samples": chains * halves[0].settings.cycles,
        "n_centres": sum(int(half.counts.sum()) for half in halves),
        "halves": r, "expected": density_check.of_both(r),
        "symmetry": density_check.pearson(raw.mean(0), maps.mean(0)),
        "molecules_per_cell": raw.mean() * crystal.volume, "mol_per_kg": uptake,
        "error_mol_per_kg": own, "label_mol_per_kg": label,
        "z": (uptake - label) / np.hypot(own, error),
        "warnings": [warning for half in halves for warning in half.warnings],
        "moves": sum(half.moves for half in halves),
        "seconds": sum(half.seconds for half in halves),
    }  # fmt: skip


def save(
    folder: Path, density: np.ndarray, about: dict, settings: GCMCSettings, lattice: np.ndarray
) -> None:
    """Write a zeolite's file."""
    with results.replacing(folder / f"{about['code']}.npz") as file:
        np.savez_compressed(
            file, density=density.astype(np.float16), lattice=lattice, cycles=about["samples"],
            n_centres=about["n_centres"], seeds=[settings.seed, settings.seed + 1],
            settings=settings_hash(settings), about=json.dumps(results.plain(about)),
        )  # fmt: skip


def load(folder: Path, code: str, settings: GCMCSettings) -> dict | None:
    """What is said of a zeolite whose file is there, None if it is not, or of other settings."""
    path = folder / f"{code}.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        if str(file["settings"]) != settings_hash(settings):
            return None
        density, about = file["density"].astype(float), json.loads(str(file["about"]))
    known = paths.data() / NAME / "density" / path.name
    if known.is_file():
        with np.load(known) as file:
            if file["density"].shape == density.shape:
                about["correlation_raspa"] = density_check.pearson(file["density"], density)
                about["n_centres_raspa"] = int(file["n_centres"])
    return {**about, "bytes": path.stat().st_size}


def summary(rows: list[dict]) -> dict:
    """Quartiles over the zeolites that take up something."""
    full = [row for row in rows if row["halves"] is not None]
    keys = "halves", "expected", "n_centres", "symmetry"
    z = np.array([row["z"] for row in full])
    return {
        "n": len(rows), "empty": [row["code"] for row in rows if row["halves"] is None],
        **{key: dict(zip(
            ("least", "lower_quartile", "median", "upper_quartile", "most"),
            np.quantile([row[key] for row in full], [0, 0.25, 0.5, 0.75, 1]), strict=True,
        )) for key in keys if full},
        "below_target": sorted(row["code"] for row in full if row["expected"] < TARGET),
        "rms_z": np.sqrt((z**2).mean()) if full else None,
        "samples": sum(row["samples"] for row in rows),
        "moves": sum(row["moves"] for row in rows), "bytes": sum(row["bytes"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="threads on cores")
    parser.add_argument("--codes", nargs="+", help="these zeolites instead")
    parser.add_argument("--packed", type=Path, help="crystals from such a file")
    parser.add_argument("--equilibration", type=int, default=SETTINGS.equilibration)
    parser.add_argument("--cycles", type=int, default=SETTINGS.cycles,
                        help=f"sampled by each chain (default {SETTINGS.cycles})")  # fmt: skip
    parser.add_argument("--replicas", type=int, default=SETTINGS.replicas,
                        help=f"chains of each half (default {SETTINGS.replicas})")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=paths.data() / NAME / f"density-fold-{FOLD}",
                        help="of the files (default data/zeolite-n2/density-fold-0)")  # fmt: skip
    parser.add_argument("--record", type=Path, default=paths.results(f"{NAME}/densities.json"))
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    settings = replace(SETTINGS, equilibration=args.equilibration, cycles=args.cycles,
                       replicas=args.replicas)  # fmt: skip
    codes = sorted(args.codes or application(NAME).folds()[FOLD].rest)
    kernel.config.NUMBA_NUM_THREADS = args.jobs
    try:
        todo = [code for code in codes if load(args.folder, code, settings) is None]
        print(f"{len(todo)} zeolites to simulate, {len(codes) - len(todo)} are there", flush=True)
        known = crystals(todo, args.packed) if todo else {}
        together = 1 if args.device == "cpu" else max(1, len(todo))
        for k in range(0, len(todo), together):
            part = [known[code] for code in todo[k : k + together]]
            found = gcmc([framework for framework, *_ in part],
                         [settings, replace(settings, seed=settings.seed + 1)],
                         device=args.device, progress=sys.stderr.isatty())  # fmt: skip
            for (framework, *label), *halves in zip(part, found[::2], found[1::2], strict=True):
                for half in halves:
                    if isinstance(half, X3MatError):
                        raise half
                density, about = simulated(framework, halves, *label)
                about["device"] = gcmc_checks.device_name(args.device)
                save(args.folder, density, about, settings, framework.lattice)
                print(framework.name, *(f"{key} {about[key]:.4g}" for key in (
                    "halves", "n_centres", "z", "seconds")), flush=True)  # fmt: skip
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = results.plain([load(args.folder, code, settings) for code in codes])
    payload = {
        "application": NAME, "fold": FOLD, "settings": asdict(settings), "seeds":
        [settings.seed, settings.seed + 1], "points": POINTS, "target": TARGET,
        "summary": summary(rows), "zeolites": {row.pop("code"): row for row in rows},
    }  # fmt: skip
    results.write(args.record.absolute(), payload, seed=payload["seeds"],
                  command=shlex.join(["python", "tools/density_maps.py", *argv]),
                  wall_s=time.perf_counter() - begun)  # fmt: skip
    found = payload["summary"]
    print(f"{found['n']} zeolites, {found['bytes'] / 1e6:.2f} MB, {args.record}")
    return 0


def crystals(codes: list[str], packed: Path | None) -> dict[str, tuple[Framework, float, float]]:
    """Zeolites by code, each with its uptake by RASPA3 and the error of that, mol/kg."""
    if packed is None:
        pack = gcmc_checks.load(NAME, 0, codes)
    else:
        with np.load(packed) as file:
            pack = dict(file)
    every = zip(gcmc_checks.frameworks_of(pack, 0), pack["reference"][:, 0], pack["error"][:, 0],
                strict=True)  # fmt: skip
    found = {framework.name: (framework, *label) for framework, *label in every}
    if missing := sorted(set(codes) - set(found)):
        raise DataError(packed, f"it lacks {', '.join(missing)}", "Pack with --limit 0.")
    return found


if __name__ == "__main__":
    sys.exit(main())
