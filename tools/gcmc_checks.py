"""Checks of tools/gcmc against what other programs computed.

checks:
  zeolite-n2   N2 in IZA frameworks, 298 K, 1 bar, against RASPA3 (data/zeolite-n2/raspa3.csv)
  co2-n2       CO2/N2 15:85 in 20 MOFs, 298 K, 1 bar, against published uptakes (gRASPA)
  argon        Ar in IZA frameworks, 87 K, 1 atm, against published uptakes (RASPA2)
  n2-77k       N2 in zeolites and MOFs, 77 K, 1 bar, against RASPA3, which runs first
  raspa-n2     N2 in zeolites and MOFs in turn, 298 K, 1 bar, against RASPA3, which runs first;
               UFF and predicted charges in both programs
  raspa-co2-n2 CO2/N2 15:85 in the same, likewise
  mof-n2       N2 in CoRE MOF 2019 crystals, 77 K, 1 bar: speed, and whether chains agree
  mfi-ch4      CH4 in MFI, 300 K, fugacity 1 bar, against the example of RASPA3's manual
  mfi-co2      CO2 in MFI, 353 K, fugacity 1 bar, likewise

The result is data/results/gcmc/CHECK.json. Crystals and reference values can be packed into one
file first, with which a check needs numpy, scipy, tqdm and numba only. Data that is not shipped is
read from the folder that X3MAT_DATA names. The references of n2-77k, raspa-n2 and raspa-co2-n2 are
made by RASPA3 when the check runs, one process for each crystal; the means of their quarters tell
whether they still drift.

Which files are of which engine: zeolite-n2-all and co2-n2-long were written with insertions of one
trial and chains that started empty and cold; co2-n2-predicted and zeolite-n2 before moves with
charges were judged twice; only argon-joz, argon-ladder and n2-77k-ladder since what insertions tell
is left out where the number of molecules contradicts it (`engine.APART`); all others before that.

examples:
  python tools/gcmc_checks.py zeolite-n2
  python tools/gcmc_checks.py co2-n2 --limit 0 --predicted-charges --name co2-n2-predicted
  python tools/gcmc_checks.py zeolite-n2 --limit 0 --pack zeolites.npz
  python tools/gcmc_checks.py n2-77k --limit 0 --raspa-seconds 840 --pack n2-raspa.npz
  python tools/gcmc_checks.py n2-77k --limit 0 --raspa-overfilled 100 --name n2-77k-above
  python tools/gcmc_checks.py n2-77k --names iza:LTA iza:MFI --limit 0 --raspa-overfilled 100
      --equilibration 24000 --raspa-seconds 480 --pack fuller.npz
  python tools/gcmc_checks.py argon --limit 0 --device cuda --checkpoint states
  python tools/gcmc_checks.py zeolite-n2 --packed zeolites.npz --limit 0 --device cuda
  python tools/gcmc_checks.py raspa-n2 --limit 300 --raspa-limit 8 --device cuda --name raspa-cuda
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

if importlib.util.find_spec("gemmi") is None:  # packed crystals need none of the readers
    package = types.ModuleType("x3mat")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "x3mat")]
    sys.modules["x3mat"] = package

from x3mat import paths, results
from x3mat.errors import X3MatError
from x3mat_gcmc import Framework, GCMCResult, GCMCSettings, gcmc
from x3mat_gcmc.forcefield import fugacity_coefficients
from x3mat_gcmc.framework import read_framework

NAMED = ["LTA", "ASV", "MFI", "CHA", "FAU", "MOR", "FER", "TON", "BEA", "RHO", "KFI", "MWW"]
SETTINGS = {
    "zeolite-n2": GCMCSettings(
        force_field="trappe-n2-zeolite", charges="forcefield", equilibration=200, cycles=1500
    ),
    "co2-n2": GCMCSettings(
        gases=("CO2", "N2"), fractions=(0.15, 0.85), charges="cif", equilibration=1000,
        cycles=2000, start="both",
    ),
    "argon": GCMCSettings(
        gases=("Ar",), temperature=87.0, pressure=101_325.0, equilibration=12_000, cycles=2000,
        replicas=2, start="both", trials=64, moves=(0.4, 0.0, 0.05, 0.55, 0.0),
    ),
    "mof-n2": GCMCSettings(
        temperature=77.0, equilibration=4000, cycles=2000, start="both", trials=64,
        moves=(0.25, 0.2, 0.02, 0.53, 0.0),
    ),
}  # fmt: skip
#: Packing relaxes by motion: fewer trials and swaps leave time for longer chains.
SETTINGS["n2-77k"] = replace(
    SETTINGS["mof-n2"], trials=16, moves=(0.4, 0.3, 0.02, 0.28, 0.0))
SETTINGS["raspa-n2"] = GCMCSettings(charges="cif", equilibration=300, cycles=3000, start="empty")
SETTINGS["raspa-co2-n2"] = replace(
    SETTINGS["raspa-n2"], gases=("CO2", "N2"), fractions=(0.15, 0.85))
WITH_RASPA = "n2-77k", "raspa-n2", "raspa-co2-n2"


def _at_one_bar(gas: str, temperature: float, charges: str) -> GCMCSettings:
    """RASPA's examples with MFI: the fugacity is 1 bar."""
    coefficient = float(fugacity_coefficients(temperature, 1e5, [gas], [1.0])[0])
    return GCMCSettings(
        gases=(gas,), temperature=temperature, pressure=1e5 / coefficient, cutoff=12.0,
        shifted=True, force_field="trappe-n2-zeolite", charges=charges, equilibration=500,
        cycles=8000,
    )  # fmt: skip


SETTINGS["mfi-ch4"] = _at_one_bar("CH4-Martin", 300.0, "none")
SETTINGS["mfi-co2"] = _at_one_bar("CO2-GarciaSanchez", 353.0, "cif")
#: Molecules in 2 x 2 x 2 cells and their standard error (the manual states that of 95 %): examples
#: 8 and 10 of RASPA3's manual. What it says in mol/kg counts every atom with the mass of silicon.
MANUAL = {"mfi-ch4": (23.14703, 0.02480976 / 1.96), "mfi-co2": (26.28680, 0.2653616 / 1.96)}
#: Zeolites, MOFs of co2_n2_reference, and MOF-5 with its large pores.
N2_77K = ["iza:LTA", "iza:ASV", "WOCGIG", "WOBHOL", "core-mof:ASR:EDUSIF_clean", "iza:MFI"]
LEAST_CAVITY, MOST_ATOMS = 3.7, 500  # Å; of the MOFs
#: A cycle of RASPA has as many moves as there are molecules when it begins, at least so many. One
#: state of each cycle is averaged, so that states with many molecules count for less. Results have
#: the mean that such cycles of our chains would give.
RASPA_CYCLE = 20


def load(check: str, limit: int, names: list[str] | None) -> dict[str, np.ndarray]:
    """Crystals and reference values (mol/kg, by gas) of a check, as flat arrays."""
    rows = {
        "zeolite-n2": _zeolites, "co2-n2": _co2_n2, "argon": _argon, "n2-77k": _n2_77k,
        "mof-n2": _mofs, "raspa-n2": partial(_in_turn, 1), "raspa-co2-n2": partial(_in_turn, 2),
        **{name: partial(_mfi, *value) for name, value in MANUAL.items()},
    }[check](limit, names)  # fmt: skip
    frameworks = [row[0] for row in rows]
    nan = [f.charges if f.charges is not None else np.full(len(f.species), np.nan)
           for f in frameworks]  # fmt: skip
    return {
        "name": np.array([f.name for f in frameworks]),
        "ptr": np.cumsum([0, *(len(f.species) for f in frameworks)]),
        "lattice": np.array([f.lattice for f in frameworks]),
        "species": np.concatenate([f.species for f in frameworks]).astype(np.uint8),
        "frac": np.concatenate([f.frac_coords for f in frameworks]),
        "charges": np.concatenate(nan),
        "reference": np.array([row[1] for row in rows], float),
        "error": np.array([row[2] for row in rows], float),
        "wall_s": np.array([row[3] for row in rows], float),
    }


def _zeolites(limit: int, names: list[str] | None) -> list[tuple]:
    from x3mat import databases

    with (paths.data() / "zeolite-n2" / "raspa3.csv").open(encoding="utf-8") as file:
        table = {row["code"]: row for row in csv.DictReader(file)}
    order = names or [*NAMED, *sorted(set(table) - set(NAMED))]
    rows = []
    for code in order[: limit or None]:
        row, crystal = table[code], databases.iza(code)
        ratio = float(row["mol_per_kg"]) / float(row["n2_g_L"]) if float(row["n2_g_L"]) else 0.0
        framework = Framework(crystal.lattice, crystal.species, crystal.frac_coords, None, code)
        rows.append((framework, [float(row["mol_per_kg"])], [float(row["error_g_L"]) * ratio],
                     float(row["wall_s"])))  # fmt: skip
    return rows


def _co2_n2(limit: int, names: list[str] | None) -> list[tuple]:
    folder, rows = paths.external() / "co2_n2_reference", []
    with (folder / "loadings.csv").open(encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if not names or row["structure"] in names]
    for row in table[: limit or None]:
        framework = read_framework(folder / "cif" / f"{row['structure']}.cif")
        value, error = (
            [float(row[f"loading_mol_kg_{gas}_{kind}"]) for gas in ("co2", "n2")]
            for kind in ("avg", "err")
        )
        rows.append((framework, value, error, np.nan))
    return rows


def _mfi(value: float, error: float, limit: int, names: list[str] | None) -> list[tuple]:
    framework = read_framework(paths.data() / "forcefields" / "mfi-1987.cif")
    unit = 1000 / 8 / (96 * 28.0855 + 192 * 15.9994)
    return [(framework, [value * unit], [error * unit], np.nan)]


def _argon(limit: int, names: list[str] | None) -> list[tuple]:
    with np.load(paths.external() / "iza_ar87.npz") as file:
        data = dict(file)
    codes = data["id"].tolist()
    order = names or [*NAMED, *sorted(set(codes) - set(NAMED))]
    rows = []
    for i in [codes.index(code) for code in order[: limit or None]]:
        part = slice(data["ptr"][i], data["ptr"][i + 1])
        framework = Framework(
            data["lattice"][i].astype(float), data["Z"][part].astype(int),
            data["frac"][part].astype(float) % 1.0, None, codes[i],
        )  # fmt: skip
        rows.append((framework, [data["ar_molkg"][i]], [data["ar_molkg_err"][i]], np.nan))
    return rows


def _n2_77k(limit: int, names: list[str] | None) -> list[tuple]:
    from x3mat import databases

    rows, folder = [], Path("co2_n2_reference", "cif")
    for name in (names or N2_77K)[: limit or None]:
        source = name if ":" in name else paths.external() / folder / f"{name}_clean_pacmof.cif"
        crystal = databases.crystal(str(source))
        framework = Framework(crystal.lattice, crystal.species, crystal.frac_coords, None, name)
        rows.append((framework, [np.nan], [np.nan], np.nan))
    return rows


def _in_turn(n_gases: int, limit: int, names: list[str] | None) -> list[tuple]:
    """Zeolites and MOFs in turn, with predicted charges: the named zeolites and those that follow
    in the alphabet; a random order (seed 0) of the crystals with labels of mof-co2n2."""
    from x3mat import databases
    from x3mat.applications import application

    table = sorted(application("mof-co2n2").labels().index)
    mofs = [f"core-mof:ASR:{n}" for n in np.random.default_rng(0).permutation(table).tolist()]
    codes = [*NAMED, *(code for code in databases.iza_codes() if code not in NAMED)]
    turns = [name for code, mof in zip(codes, mofs, strict=False) for name in (f"iza:{code}", mof)]
    rows = []
    for name in (names or turns)[: limit or None]:
        crystal, nan = databases.crystal(name), [np.nan] * n_gases
        bare = Framework(crystal.lattice, crystal.species, crystal.frac_coords, None, name)
        rows.append((predicted(bare), nan, nan, np.nan))
    return rows


def with_raspa(
    pack: dict[str, np.ndarray], settings: GCMCSettings, seconds: float, limit: int,
    processes: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A pack with references by RASPA3 of the first crystals, one process for each; and quarters.

    Quarters are mean uptakes of the quarters of a run (mol/kg, of the first gas): they tell whether
    it still drifts. RASPA3 begins with the molecules that `overfilled` put into the pack.
    """
    frameworks = frameworks_of(pack, limit)
    begin = [[pack[f"begin-{i}-{k}"] for k in range(len(settings.gases))]
             if f"begin-{i}-0" in pack else None for i in range(len(frameworks))]  # fmt: skip
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        found = list(tqdm(
            pool.map(lambda f, b: raspa_uptake(f, settings, seconds, b), frameworks, begin),
            "RASPA3", len(frameworks)))  # fmt: skip
    columns = (np.array(column, float) for column in zip(*found, strict=True))
    value, error, wall, quarters = (
        np.concatenate([x, np.full((len(pack["name"]) - len(x), *x.shape[1:]), np.nan)])
        for x in columns)
    return {**pack, "reference": value, "error": error, "wall_s": wall, "quarters": quarters,
            "hardware": np.array(results.hardware())}  # fmt: skip


def overfilled(
    frameworks: list[Framework], settings: GCMCSettings, factor: float
) -> dict[str, np.ndarray]:
    """Sites (sites, 3) of all molecules at `factor` times the pressure, from one chain: begin-I-K
    of gas K in framework I; Å, in a cell whose first vector is along x, its second in the plane of
    x and y."""
    from x3mat_gcmc.engine import Run
    from x3mat_gcmc.forcefield import guest
    from x3mat_gcmc.system import make_guests, make_system

    settings = replace(settings, pressure=factor * settings.pressure, replicas=1, cycles=10,
                       start="empty" if len(settings.gases) > 1 else "full")  # fmt: skip
    guests, out = make_guests(settings), {}
    systems = [make_system(f, settings, guests) for f in frameworks]
    run = Run(systems, guests, [(i, settings) for i in range(len(systems))], "cpu", None)
    with tqdm(total=run.cycles_left, desc="overfilled", unit="cycle") as bar:
        while run.cycles_left:
            bar.update(run.step())
    for i, system in enumerate(systems):
        upper = np.linalg.qr(system.cell.T)[1]
        cell = (upper * np.sign(np.diag(upper))[:, None]).T
        n = run.chains.n[i]
        pose, kind = run.chains.molecule[i, :, :n].T, run.chains.kind[i, :n]
        for k, gas in enumerate(settings.gases):
            z = np.array([site["z"] for site in guest(gas)["sites"]])
            one = pose[kind == k]
            sites = one[:, None, :3] + z[:, None] * one[:, None, 3:]
            out[f"begin-{i}-{k}"] = (sites @ cell).reshape(-1, 3)
    return out


def raspa_uptake(
    framework: Framework, settings: GCMCSettings, seconds: float,
    begin: list[np.ndarray] | None = None,
) -> tuple[list[float], list[float], float, list[float]]:  # fmt: skip
    """Uptakes of gases (mol/kg) by RASPA3: means, errors, wall time, quarters of the first.

    It begins with molecules of each gas with these sites, by default with none.
    """
    import json
    import subprocess
    import tempfile

    from x3mat_gcmc.engine import equilibrated, standard_error
    from x3mat_gcmc.forcefield import SYMBOLS, framework_parameters, guest
    from x3mat_gcmc.system import make_guests, make_system

    system = make_system(framework, replace(settings, spacing=0.0), make_guests(settings))
    parameters, gases = framework_parameters(settings.force_field), list(map(guest, settings.gases))
    numbers = sorted({int(z) for z in framework.species}, key=lambda z: SYMBOLS[z - 1])
    types = [
        {**parameters[SYMBOLS[z - 1]], "name": SYMBOLS[z - 1], "framework": True, "number": z,
         "charge": 0.0} for z in numbers
    ]  # fmt: skip
    components, charged = [], settings.charges != "none" and framework.charges is not None
    for k, (gas, fraction) in enumerate(zip(gases, settings.fractions, strict=True)):
        names, first = list(gas["types"]), len(types)
        types += [{"mass": 14.0, **site, "name": f"guest-{k}-{name}", "framework": False,
                   "number": 7, "charge": charged * site["charge"]}
                  for name, site in gas["types"].items()]  # fmt: skip
        components.append({
            "fraction": fraction,
            "critical": [gas[key] for key in ("critical_temperature", "critical_pressure",
                                              "acentric_factor")],
            "sites": [{"z": s["z"], "charge": charged * gas["types"][s["type"]]["charge"],
                       "type": first + names.index(s["type"])} for s in gas["sites"]],
        })  # fmt: skip
    charge = framework.charges if charged else np.zeros(len(framework.species))
    lengths = np.linalg.norm(system.cell, axis=1)
    unit = system.cell / lengths[:, None]
    job = {
        "types": types, "lengths": lengths.tolist(),
        "angles": np.degrees(np.arccos([unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]]))
        .tolist(),
        "positions": system.atoms.tolist(), "atom_types": system.atom_type.tolist(),
        "atom_charges": np.tile(charge - charge.mean(), len(system.atoms) // len(charge)).tolist(),
        "gases": components, "centre": 0,
        "moves": {"translation_probability": 1.0, "rotation_probability": 1.0,
                  # with charges RASPA3 ends with "all overlap" in such moves
                  "reinsertion_cbmc_probability": 0.0 if charged else 0.2,
                  "swap_cbmc_probability": 1.0, "widom_probability": 0.01},
        "temperature": settings.temperature, "pressure": settings.pressure,
        "cutoff": settings.cutoff, "charges": bool(charged), "seed": settings.seed,
        "init_cycles": 100, "min_cycles": 50, "max_cycles": 1_000_000, "check_every": 10,
        "target_relative": 0.0, "target_absolute": 0.0, "max_seconds": seconds,
        "blocking_pockets": [],
    }  # fmt: skip
    if begin:
        job["begin"] = [sites.tolist() for sites in begin]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("job.json", "out.npz")]
        Path(files[0]).write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).with_name("raspa_job.py")
        subprocess.run([sys.executable, str(script), *files], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with np.load(files[1]) as out:
            counts, wall = out["molecules"].astype(float), float(out["seconds"])
    counts *= 1000 / system.mass / np.prod(system.replicas)
    kept = counts[equilibrated(counts.sum(1)) :]
    quarters = [float(q.mean()) for q in np.array_split(counts[:, 0], 4)]
    errors = [standard_error(gas[None]) for gas in kept.T]
    return kept.mean(0).tolist(), errors, wall, quarters


def mof_candidates() -> tuple[list[str], dict[str, int]]:
    """CoRE MOF 2019 ASR in a random order (seed 0), by rule; and how many are left out, and why.

    The rule: not DISORDER, largest cavity above LEAST_CAVITY, at most MOST_ATOMS atoms.
    """
    from x3mat import databases

    table = databases.core_mof_table("ASR")
    left_out = dict.fromkeys(("DISORDER", "cavity too narrow", "refused", "too many atoms"), 0)
    usable, out = [], []
    for name, row in sorted(table.items()):
        if row["DISORDER"] == "DISORDER":
            left_out["DISORDER"] += 1
        elif float(row["LCD"]) <= LEAST_CAVITY:
            left_out["cavity too narrow"] += 1
        else:
            usable.append(name)
    for name in np.random.default_rng(0).permutation(usable).tolist():
        try:
            n_atoms = databases.core_mof(name).n_atoms
        except X3MatError:
            left_out["refused"] += 1
            continue
        if n_atoms > MOST_ATOMS:
            left_out["too many atoms"] += 1
        else:
            out.append(name)
    return out, left_out


def _mofs(limit: int, names: list[str] | None) -> list[tuple]:
    from x3mat import databases

    rows = []
    for name in (names or mof_candidates()[0])[: limit or None]:
        crystal = databases.core_mof(name)
        framework = Framework(crystal.lattice, crystal.species, crystal.frac_coords, None, name)
        rows.append((framework, [np.nan], [np.nan], np.nan))
    return rows


def frameworks_of(pack: dict[str, np.ndarray], limit: int) -> list[Framework]:
    """The first `limit` frameworks of a pack, 0 for all."""
    out = []
    for i, name in enumerate(pack["name"][: limit or None].tolist()):
        part = slice(pack["ptr"][i], pack["ptr"][i + 1])
        charges = pack["charges"][part]
        out.append(Framework(
            pack["lattice"][i], pack["species"][part].astype(int), pack["frac"][part],
            None if np.isnan(charges).any() else charges, name,
        ))  # fmt: skip
    return out


def predicted(framework: Framework) -> Framework:
    """A framework with predicted charges; with none, so that it fails, where there are none."""
    from x3mat_gcmc.charges import with_predicted_charges

    try:
        return with_predicted_charges(framework)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return replace(framework, charges=None)


def compare(
    pack: dict[str, np.ndarray], found: list[GCMCResult | X3MatError], timed: bool = True
) -> dict:
    """Rows and a summary of how results compare with the reference, their times if `timed`."""
    rows, failed, gaps, here = [], {}, {}, results.hardware()
    deviation: dict[str, list[tuple[float, float, float, bool]]] = {}
    for i, result in enumerate(found):
        name = str(pack["name"][i])
        if isinstance(result, X3MatError):
            failed[name] = str(result)
            continue
        row = {
            "name": name, **result.as_dict(), "moves": result.moves, "n_cells": result.n_cells,
            "discarded_cycles": result.discarded, "acceptance": result.acceptance,
            "equilibrated": result.is_equilibrated, "seconds": result.seconds if timed else None,
        }  # fmt: skip
        for k, (gas, x) in enumerate(result.loadings.items()):
            unit = x.mol_per_kg / (x.molecules_per_cell * result.n_cells or 1)
            counts = result.counts[:, result.discarded :]
            chains = counts[..., k].mean(1) * unit
            row["loadings"][gas].update(
                heat_kJ_per_mol=x.heat_kJ_per_mol, error_heat=x.error_heat_kJ_per_mol,
                chains_mol_per_kg=chains, by_raspa_cycles_mol_per_kg=unit * np.average(
                    counts[..., k], weights=1 / np.maximum(counts.sum(-1), RASPA_CYCLE)),
            )  # fmt: skip
            if result.settings.start == "both" and len(chains) > 1 and chains.any():
                gap = (chains[1::2].mean() - chains[::2].mean()) / chains.mean()
                gaps.setdefault(gas, []).append(gap)
        for gas, value, error in zip(
            result.loadings, pack["reference"][i], pack["error"][i], strict=True
        ):
            x = result.loadings[gas]
            difference = x.mol_per_kg - value
            z = difference / np.hypot(x.error_mol_per_kg, error)
            relative = difference / value if value else np.nan
            row["loadings"][gas].update(
                reference_mol_per_kg=value, reference_error=error, relative_deviation=relative, z=z)
            if np.isfinite(value):
                deviation.setdefault(gas, []).append((
                    relative, z, x.error_mol_per_kg / max(x.mol_per_kg, 1e-12),
                    result.is_equilibrated,
                ))  # fmt: skip
        wall = pack["wall_s"][i]
        if "quarters" in pack and np.isfinite(wall):
            row["reference_quarters_mol_per_kg"] = pack["quarters"][i]
            row["reference_wall_s"], row["reference_hardware"] = wall, str(pack["hardware"])
        if timed and np.isfinite(wall) and str(pack.get("hardware", here)) == here:
            gas = next(iter(result.loadings))
            row["reference_wall_s"] = wall
            row["speedup_to_equal_error"] = float(
                pack["error"][i][0] ** 2 * wall
                / (result.loadings[gas].error_mol_per_kg ** 2 * result.seconds))
        rows.append(row)
    summary = {}
    for gas, values in deviation.items():
        every = np.array(values, float)
        summary[gas] = {
            "all": statistics(every), "equilibrated": statistics(every[every[:, 3] > 0])
        }
    for gas, values in gaps.items():  # (from full - from empty) / mean
        summary.setdefault(gas, {})["start"] = {
            "n": len(values), "median_gap": np.median(values),
            "median_abs_gap": np.median(np.abs(values)), "max_abs_gap": np.abs(values).max(),
            "n_within_2_percent": sum(abs(v) <= 0.02 for v in values),
        }  # fmt: skip
    speed = [row["speedup_to_equal_error"] for row in rows if "speedup_to_equal_error" in row]
    return {
        "summary": summary, "rows": rows, "failed": failed,
        "median_speedup_to_equal_error": np.median(speed) if speed else None,
    }  # fmt: skip


def statistics(values: np.ndarray) -> dict[str, float]:
    """Of rows relative deviation, deviation in standard errors, relative error."""
    if len(values) == 0:
        return {"n": 0}
    relative, z, error = values.T[:3]
    return {
        "n": len(z),
        "median_abs_deviation": np.nanmedian(np.abs(relative)),
        "median_deviation": np.nanmedian(relative),
        "mean_deviation": np.nanmean(relative),
        "max_abs_deviation": np.nanmax(np.abs(relative)),
        "median_relative_error": np.median(error),
        "n_within_2_sigma": int((np.abs(z) <= 2).sum()),
        "rms_z": float(np.sqrt(np.mean(z**2))),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=list(SETTINGS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit", type=int, default=12, help="number of crystals, 0: all")
    parser.add_argument("--names", nargs="+", help="these crystals only")
    parser.add_argument("--cycles", type=int, help="sampled cycles")
    parser.add_argument("--equilibration", type=int, help="cycles before sampling")
    parser.add_argument("--replicas", type=int, help="chains per crystal")
    parser.add_argument("--ladder", type=int, help="temperatures of each chain")
    parser.add_argument("--spacing", type=float, help="Å, of the energy grids")
    parser.add_argument("--seed", type=int, help="of the random numbers")
    parser.add_argument("--pack", type=Path, help="only write crystals and reference to this file")
    parser.add_argument("--packed", type=Path, help="read them from such a file")
    parser.add_argument("--checkpoint", type=Path,
                        help="folder for resumable states; what goes on is not timed")  # fmt: skip
    parser.add_argument("--raspa-seconds", type=float,
                        help="of RASPA3 for each crystal (default 480; for --pack 0)")  # fmt: skip
    parser.add_argument("--raspa-limit", type=int, default=0, metavar="N",
                        help="RASPA3 simulates only the first N of the crystals")  # fmt: skip
    parser.add_argument("--raspa-overfilled", type=float, default=0.0, metavar="F",
                        help="RASPA3 begins with what a chain of this program holds at F times the"
                             " pressure, so that it comes from above; default: empty")  # fmt: skip
    parser.add_argument("--raspa-processes", type=int, metavar="N",
                        help="of RASPA3 at a time (default: one for each core)")  # fmt: skip
    parser.add_argument("--predicted-charges", action="store_true",
                        help="instead of those that come with the crystals")  # fmt: skip
    parser.add_argument("--name", help="of the result; default that of the check")
    args = parser.parse_args()
    if args.raspa_overfilled and args.check not in WITH_RASPA:
        parser.error(f"--raspa-overfilled is of {', '.join(WITH_RASPA)} only")
    start = time.perf_counter()
    try:
        if args.packed:
            with np.load(args.packed) as file:
                pack = dict(file)
        else:
            pack = load(args.check, args.limit, args.names)
        changes = {k: getattr(args, k) for k in (
            "cycles", "equilibration", "replicas", "ladder", "spacing", "seed")}  # fmt: skip
        settings = replace(
            SETTINGS[args.check], **{k: v for k, v in changes.items() if v is not None})
        each = args.raspa_seconds or 480.0 * (not args.pack)
        if args.raspa_overfilled:
            first = frameworks_of(pack, args.raspa_limit)
            pack |= overfilled(first, settings, args.raspa_overfilled)
        if args.check in WITH_RASPA and "quarters" not in pack and each:
            pack = with_raspa(pack, settings, each, args.raspa_limit, args.raspa_processes)
        if args.pack:
            np.savez_compressed(args.pack, **pack)
            print(f"{args.pack}: {len(pack['name'])} crystals")
            return 0
        frameworks = frameworks_of(pack, args.limit)
        if args.predicted_charges:
            frameworks = [predicted(f) for f in frameworks]
        compiled = time.perf_counter()
        if args.device == "cuda":
            short = replace(settings, equilibration=1, cycles=10, replicas=1)
            gcmc(frameworks[:1], short, device=args.device)
        goes_on = args.checkpoint is not None and any(args.checkpoint.glob("*.npz"))
        begun = time.perf_counter()
        found = gcmc(frameworks, settings, device=args.device, progress=True,
                     checkpoint=args.checkpoint)  # fmt: skip
        seconds = time.perf_counter() - begun
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    payload = compare(pack, found, timed=not goes_on)
    moves = sum(r.moves for r in found if isinstance(r, GCMCResult))
    payload = {
        "check": args.check, "settings": asdict(settings), "device": device_name(args.device),
        "seconds": None if goes_on else seconds, "compiled_s": begun - compiled, "moves": moves,
        "moves_per_second": None if goes_on else moves / seconds, **payload,
    }  # fmt: skip
    path = results.write(
        f"gcmc/{args.name or args.check}.json", payload, seed=settings.seed,
        command=" ".join(["python", "tools/gcmc_checks.py", *(Path(x).name for x in sys.argv[1:])]),
        wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(f"{path.name}: {len(payload['rows'])} crystals, {len(payload['failed'])} refused,"
          f" {seconds:.1f} s, {moves / seconds:.3g} moves/s")  # fmt: skip
    for gas, parts in results.plain(payload["summary"]).items():
        for part, values in parts.items():
            print(gas, part, {k: round(v, 4) for k, v in values.items() if v is not None})
    return 0


def device_name(device: str) -> str:
    """The CUDA device's name, or "cpu"."""
    if device == "cpu":
        return "cpu"
    from x3mat_gcmc.kernel import cuda_target

    name = cuda_target().get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


if __name__ == "__main__":
    sys.exit(main())
