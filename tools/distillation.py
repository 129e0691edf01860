"""Can one network of qmof-gap be as good as the mean of three? Knowledge distillation.

The mean of the application's networks errs less than each of them, at three times the work. A
pupil learns the labels of the training crystals, as they did, and beside them what the three say in
the mean of crystals that have no label:

CoRE MOF    crystals of CoRE MOF 2019 (ASR and FSR), one of each formula that no crystal of QMOF
            has, labelled or not. They were not relaxed; X-rays see hydrogen too close to its
            neighbour, so that it is moved to the median distance in QMOF's training crystals.
altered     training crystals and those, each with one or two changes: a metal replaced by another
            that often has the same charge, H at C by F, Cl or Br, CH in a ring by N. A change is
            made to all atoms of an element, or to all that are alike by their bonds.

All are of elements that the training crystals have; those of CoRE MOF are primitive cells of at
most 300 atoms. What the three say is the mean of 32 windows drawn evenly. No crystal of validation
or test half is used, with or without its label. Of two sets, with and without those altered, pupils
see as many crystals in all.

Steps; training resumes after a kill
    gather  the crystals without labels, into a folder; needs the package core-mof
    ask     what the three networks say of them
    train   pupils, and their predictions of the rest
    table   the record data/results/qmof-gap/distillation.json (or --name)

Needs X3MAT_DATA.

examples:
  python tools/distillation.py gather
  python tools/distillation.py ask --device cuda
  python tools/distillation.py train --seeds 0 --device cuda --jobs 2
  python tools/distillation.py table --seeds 0 --device cuda --jobs 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import convergence
import gcmc_checks
import mof_split
import numpy as np
import spglib
import torch
from ase.data import covalent_radii
from intervals import of_mean
from torch.utils.data import DataLoader
from tqdm import tqdm

from x3mat import databases, results, training
from x3mat.applications import application
from x3mat.crystal import Crystal, crystal_from_arrays
from x3mat.errors import CrystalError, X3MatError
from x3mat.model import X3MatConfig
from x3mat.predict import load_model
from x3mat.sampling import neighbours
from x3mat.screening import for_each, processes, side_by_side

NAME = "qmof-gap"
MOST = 300  # atoms
FINE = 2**16  # parts of an edge of the cell, to which coordinates are kept
TOLERANCE = 0.3  # Å, of bonds beyond the sum of covalent radii
CLASH = 0.2  # Å, by which atoms that are not bonded must be further apart than a bond
HYDROGEN, CARBON, NITROGEN = 1, 6, 7
HALOGENS = 9, 17, 35
METALS = (  # that often have the same charge
    (3, 11, 19, 37, 55), (12, 20, 25, 26, 27, 28, 29, 30, 48), (38, 56, 82),
    (13, 21, 24, 26, 31, 49), tuple(range(57, 72)), (40, 72), (46, 78), (47, 29),
)  # fmt: skip
SETS = {"core": ("core",), "all": ("core", "altered")}


class Found(NamedTuple):
    """A crystal and where it comes from."""

    source: str  # "core" or "altered"
    name: str
    lattice: np.ndarray
    species: np.ndarray
    frac_coords: np.ndarray


# ------------------------------------------------------------------------------------ crystals


def kept(frac_coords: np.ndarray) -> np.ndarray:
    """Fractional coordinates as they are kept, in 1 / FINE."""
    return (np.round(frac_coords * FINE) % FINE).astype(np.uint16)


def hydrogen_bonds(atoms: mof_split.Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each hydrogen with a neighbour: it, the nearest one, and the vector from that to it."""
    inside = replace(atoms, frac_coords=atoms.frac_coords % 1.0)
    src, dst, vector = neighbours(inside, 1.5)
    length = np.where(atoms.species[src] == HYDROGEN, np.inf, np.linalg.norm(vector, axis=1))
    of_h = (atoms.species[dst] == HYDROGEN) & np.isfinite(length)
    src, dst, vector, length = src[of_h], dst[of_h], vector[of_h], length[of_h]
    order = np.lexsort((length, dst))
    _, first = np.unique(dst[order], return_index=True)
    nearest = order[first]
    return dst[nearest], src[nearest], vector[nearest]


def usual_lengths(crystals: Sequence[mof_split.Atoms]) -> dict[int, float]:
    """Median distance of hydrogen from each element, Å."""
    seen: dict[int, list[float]] = {}
    for atoms in crystals:
        _, others, vector = hydrogen_bonds(atoms)
        lengths = np.linalg.norm(vector, axis=1)
        for z, length in zip(atoms.species[others].tolist(), lengths.tolist(), strict=True):
            seen.setdefault(z, []).append(length)
    return {z: float(np.median(x)) for z, x in seen.items() if len(x) >= 20}


def lengthened(atoms: mof_split.Atoms, lengths: dict[int, float]) -> mof_split.Atoms:
    """With hydrogens at these distances from their nearest neighbours."""
    at, others, vector = hydrogen_bonds(atoms)
    now = np.linalg.norm(vector, axis=1)
    wanted = np.array([lengths.get(z, d) for z, d in zip(
        atoms.species[others].tolist(), now.tolist(), strict=True)]).reshape(now.shape)  # fmt: skip
    frac = atoms.frac_coords.copy()
    frac[at] += (vector * (wanted / now - 1)[:, None]) @ np.linalg.inv(atoms.lattice)
    return replace(atoms, frac_coords=frac)


def altered(atoms: mof_split.Atoms, rng: np.random.Generator) -> mof_split.Atoms | None:
    """With one or two changes at random, or None where those drawn cannot be made."""
    kinds = rng.choice(list(CHANGES), rng.integers(1, 3), replace=False, p=(0.4, 0.3, 0.3))
    for kind in kinds.tolist():
        atoms = atoms and CHANGES[kind](atoms, rng)
    return atoms


def other_metal(atoms: mof_split.Atoms, rng: np.random.Generator) -> mof_split.Atoms | None:
    """One metal replaced by another of METALS."""
    able = [(z, row) for row in METALS for z in row if z in atoms.species]
    if not able:
        return None
    z, row = able[rng.integers(len(able))]
    new = rng.choice([other for other in row if other != z])
    return replace(atoms, species=np.where(atoms.species == z, new, atoms.species))


def _alike(atoms: mof_split.Atoms, able: np.ndarray, i: np.ndarray, j: np.ndarray,
           rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Of the able atoms one and all that are like it by their bonds i to j; a mask."""
    colour = mof_split.colours(atoms.species, i, j, 8)
    return able & (colour == rng.choice(np.unique(colour[able])))


def _bonds(atoms: mof_split.Atoms) -> tuple[np.ndarray, np.ndarray]:
    i, j, excess = mof_split.near(atoms, TOLERANCE)
    return i[excess < TOLERANCE], j[excess < TOLERANCE]


def halogenated(atoms: mof_split.Atoms, rng: np.random.Generator) -> mof_split.Atoms | None:
    """Hydrogens of carbons replaced by a halogen, where there is room for it."""
    at, others, vector = hydrogen_bonds(atoms)
    at, others, vector = (x[atoms.species[others] == CARBON] for x in (at, others, vector))
    able = np.zeros(atoms.n_atoms, bool)
    able[at] = True
    if not able.any():
        return None
    chosen, new = _alike(atoms, able, *_bonds(atoms), rng), int(rng.choice(HALOGENS))
    long = covalent_radii[new] + covalent_radii[CARBON]
    moved, here = atoms.frac_coords.copy(), chosen[at]
    stretched = vector[here] * (long / np.linalg.norm(vector[here], axis=1) - 1)[:, None]
    moved[at[here]] += stretched @ np.linalg.inv(atoms.lattice)
    made = replace(atoms, species=np.where(chosen, new, atoms.species), frac_coords=moved)
    i, _, excess = mof_split.near(made, TOLERANCE + CLASH)
    return made if (np.bincount(i[excess < TOLERANCE + CLASH], minlength=made.n_atoms)[chosen]
                    == 1).all() else None  # fmt: skip


def with_nitrogen(atoms: mof_split.Atoms, rng: np.random.Generator) -> mof_split.Atoms | None:
    """CH between two C or N, of a ring as a rule, replaced by N."""
    i, j = _bonds(atoms)
    of_carbon = atoms.species[i] == CARBON
    count = {name: np.bincount(i[of_carbon & np.isin(atoms.species[j], z)],
                               minlength=atoms.n_atoms)
             for name, z in (("H", [HYDROGEN]), ("CN", [CARBON, NITROGEN]), ("all", range(1, 101)))}
    able = (count["H"] == 1) & (count["CN"] == 2) & (count["all"] == 3)
    if not able.any():
        return None
    chosen = _alike(atoms, able, i, j, rng)
    lost = np.zeros(atoms.n_atoms, bool)
    lost[j[chosen[i] & (atoms.species[j] == HYDROGEN)]] = True
    return mof_split.Atoms(atoms.lattice, np.where(chosen, NITROGEN, atoms.species)[~lost],
                           atoms.frac_coords[~lost])  # fmt: skip


CHANGES = {"metal": other_metal, "halogen": halogenated, "nitrogen": with_nitrogen}


def primitive(job: tuple[str, str]) -> mof_split.Atoms | None:
    """A crystal of CoRE MOF (subset, name) in its primitive cell, or None if it is refused."""
    try:
        crystal = databases.core_mof(job[1], job[0], symprec=0.0)
    except X3MatError:
        return None
    cell = crystal.lattice, crystal.frac_coords, crystal.species
    lattice, frac, species = spglib.find_primitive(cell, symprec=0.01) or cell
    return mof_split.Atoms(lattice, np.asarray(species, np.int64), frac)


def sensible(atoms: mof_split.Atoms | None) -> bool:
    """Is there a crystal, and are its atoms apart, with coordinates as they are kept?"""
    try:
        return bool(atoms and crystal_from_arrays(
            atoms.lattice, atoms.species, kept(atoms.frac_coords) / FINE, symprec=0.0))  # fmt: skip
    except CrystalError:
        return False


def _altered(job: tuple[str, mof_split.Atoms]) -> mof_split.Atoms | None:
    rng = np.random.default_rng(list(job[0].encode()))
    tried = (altered(job[1], rng) for _ in range(4))
    return next(filter(sensible, tried), None)


def gather(args: argparse.Namespace) -> None:
    """The step `gather`."""
    qmof, fold = mof_split.crystals_of(NAME), application(NAME).folds()[0]
    learn = [qmof[name] for name in fold.train[: args.limit]]
    known = set(map(mof_split.composition, qmof.values()))
    elements = set(np.concatenate([atoms.species for atoms in learn]).tolist())
    lengths = usual_lengths(learn[:2000])
    found: list[Found] = []
    for subset in ("ASR", "FSR"):
        names = databases.core_mof_names(subset)[: args.limit]
        each = tqdm(for_each(primitive, [(subset, name) for name in names]), subset, len(names))
        for name, atoms in zip(names, each, strict=True):
            if not (atoms and atoms.n_atoms <= MOST and set(atoms.species.tolist()) <= elements
                    and (key := mof_split.composition(atoms)) not in known):  # fmt: skip
                continue
            if sensible(atoms := lengthened(atoms, lengths)):
                known.add(key)
                found.append(Found("core", f"{subset}:{name}", *vars(atoms).values()))
    start = [(name, qmof[name]) for name in fold.train[: args.limit]]
    start += [(x.name, mof_split.Atoms(*x[2:])) for x in found]
    each = tqdm(for_each(_altered, start), "altered", len(start))
    for (name, _), made in zip(start, each, strict=True):
        if made and set(made.species.tolist()) <= elements:
            found.append(Found("altered", f"{name}*", *vars(made).values()))
    args.crystals.parent.mkdir(parents=True, exist_ok=True)
    with results.replacing(args.crystals) as out:
        np.savez_compressed(
            out, source=[x.source for x in found], name=[x.name for x in found],
            ptr=np.cumsum([0, *(len(x.species) for x in found)]),
            lattice=np.array([x.lattice for x in found]),
            species=np.concatenate([x.species for x in found]).astype(np.uint8),
            frac_coords=np.concatenate([kept(x.frac_coords) for x in found]),
        )  # fmt: skip
    print(dict(Counter(x.source for x in found)))


def read(file: Path, sources: Sequence[str]) -> list[Crystal]:
    """The crystals of these sources."""
    with np.load(file) as packed:
        source, name, ptr, lattice, species, frac = (packed[key] for key in (
            "source", "name", "ptr", "lattice", "species", "frac_coords"))  # fmt: skip
    chosen = np.flatnonzero(np.isin(source, sources)).tolist()
    return [crystal_from_arrays(lattice[k], species[ptr[k] : ptr[k + 1]].astype(np.int64),
                                frac[ptr[k] : ptr[k + 1]] / FINE, symprec=0.0, name=str(name[k]))
            for k in chosen]  # fmt: skip


# ---------------------------------------------------------------------------------- training


def windows(crystals: Sequence[Crystal], targets: np.ndarray, config: X3MatConfig,
            number: int) -> training.DrawnWindows:  # fmt: skip
    """So many windows of each crystal."""
    named = {crystal.name: crystal for crystal in crystals}
    return training.DrawnWindows(list(named), named.__getitem__, targets, config, number)


@torch.no_grad()
def ask(args: argparse.Namespace) -> None:
    """The step `ask`."""
    teachers, began = load_model(NAME, args.device), time.perf_counter()
    crystals = read(args.crystals, SETS["all"])[: args.limit]
    data = windows(crystals, np.zeros((len(crystals), 1)), teachers.members[0].config,
                   training.CHECKED_WINDOWS["crystal"])  # fmt: skip
    loader = DataLoader(data, 32, collate_fn=training.collate, **processes(len(data)))
    said = [torch.cat([training.predict_mean(m, batch, 10**6) for m in teachers.members], 1).cpu()
            for batch in (b.to(args.device) for b in tqdm(loader, "asked"))]  # fmt: skip
    with results.replacing(args.crystals.with_name("said.npz")) as out:
        np.savez_compressed(out, name=data.names, said=torch.cat(said).numpy())
    print(f"{len(data)} crystals in {time.perf_counter() - began:.0f} s")


def one(which: str, seed: int, args: argparse.Namespace) -> dict:
    """Train a pupil on a set, predict the rest, keep the weights and what it took; or read it."""
    chosen, fold = application(NAME), application(NAME).folds()[0]
    names = [part[: args.limit] for part in (fold.train, *fold.halves)]
    with np.load(args.crystals.with_name("said.npz")) as file:
        said = dict(zip(file["name"].tolist(), file["said"].mean(1), strict=True))
    more = [c for c in read(args.crystals, SETS[which]) if c.name in said][: args.limit]
    epochs = max(round(args.seen / (len(names[0]) + len(more))), 1)
    config = training.train_config(chosen, [*args.set, f"seed={seed}", f"epochs={epochs}"])
    plan = [which, args.limit, asdict(config)]
    tag = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    folder = args.runs / "distillation" / tag
    if (folder / "found.json").exists():
        return json.loads((folder / "found.json").read_text())
    own = training.crystals_of(chosen, names[0], config, True)
    other = windows(more, np.array([[said[c.name]] for c in more]), config.model,
                    config.windows_per_crystal)  # fmt: skip
    learn = replace(
        own, names=[*own.names, *other.names], known=[*own.known, *other.known],
        targets=np.concatenate([own.targets, other.targets]))  # fmt: skip
    check = training.crystals_of(chosen, names[1], config, False)
    result = training.train(config, learn, check, folder, device=args.device, jobs=args.jobs,
                            progress=args.jobs == 1, check_every=4)  # fmt: skip
    rest = [*names[1], *names[2]]
    y = convergence.predicted([result.model], NAME, rest, config.model.step)[0][0, :, 0]
    torch.save({k: v.cpu() for k, v in result.model.state_dict().items()}, folder / "model.pt")
    about = {"plan": plan, "history": result.history, "seconds": result.wall_s,
             "crystals": [len(own), len(more)], "device": gcmc_checks.device_name(args.device),
             "predicted": dict(zip(rest, y.tolist(), strict=True))}  # fmt: skip
    (folder / "found.json").write_text(json.dumps(about))
    return about


def train_all(args: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """The step `train`: what :func:`one` found for each set and seed."""
    jobs = [(which, seed) for which in args.sets for seed in args.seeds]
    found = dict(zip(jobs, side_by_side(one, [(*job, args) for job in jobs], args.jobs),
                     strict=True))  # fmt: skip
    check = application(NAME).folds()[0].halves[0][: args.limit]
    for (which, seed), run in found.items():
        error = np.abs(predictions([run["predicted"]], check) - labels(check)).mean()
        print(f"{which}, seed {seed}: {error:.4f} eV (validation) after {run['seconds']:.0f} s")
    return found


# ----------------------------------------------------------------------------------- results


def labels(names: Sequence[str]) -> np.ndarray:
    """Gaps, eV."""
    chosen = application(NAME)
    return chosen.labels().loc[list(names), chosen.columns[0]].to_numpy(float)


def predictions(each: Sequence[dict[str, float]], names: Sequence[str]) -> np.ndarray:
    """(networks, n)."""
    return np.array([[found[name] for name in names] for found in each])


def scores(y: np.ndarray, label: np.ndarray, before: np.ndarray) -> dict:
    """Of pupils (seeds, n), beside the three before them, (3, n)."""
    teacher, gain = before.mean(0), (np.abs(before - label).mean(0) - np.abs(y - label).mean(0))
    others = (3 * teacher - before) / 2
    found = {
        "mae": np.abs(y - label).mean(), "mae_of_each_seed": np.abs(y - label).mean(1),
        "gain": gain.mean(), "gain_interval": of_mean(gain),  # over one of the three
        "mae_of_mean_with_the_three": np.abs(np.vstack([before, y]).mean(0) - label).mean(),
        "from_teacher": np.abs(y - teacher).mean(),
        "of_one_from_the_others": np.abs(before - others).mean(),
        "mae_of_one": np.abs(before - label).mean(),
        "mae_of_teacher": np.abs(teacher - label).mean(),
    }  # fmt: skip
    return {key: np.round(value, 5).tolist() for key, value in found.items()}


def table(args: argparse.Namespace) -> None:
    """The step `table`."""
    began, fold, made = time.perf_counter(), application(NAME).folds()[0], train_all(args)
    runs = [results.read(f"{NAME}/runs/fold0-seed{seed}.json") for seed in range(3)]
    before = [{p["name"]: p["predicted"][0] for p in run["predictions"]} for run in runs]
    rows = []
    for which in args.sets:
        each = [made[which, seed] for seed in args.seeds]
        row = {"set": which, "crystals": each[0]["crystals"],
               "epochs": each[0]["plan"][2]["epochs"],
               "seconds": [round(run["seconds"], 1) for run in each],
               "val_mae": [[round(epoch["val_mae"], 4) for epoch in run["history"]
                            if np.isfinite(epoch.get("val_mae", np.nan))] for run in each],
               "train_mae": [round(run["history"][-1]["train_mae"], 4)
                             for run in each]}  # fmt: skip
        for half, part in zip(("validation", "test"), fold.halves, strict=True):
            names = part[: args.limit]
            row[half] = scores(predictions([run["predicted"] for run in each], names),
                               labels(names), predictions(before, names))  # fmt: skip
        rows.append(row)
    results.write(
        f"{NAME}/{args.name}.json",
        {"application": NAME, "unit": "eV", "seeds": args.seeds, "jobs": args.jobs,
         "most_atoms": MOST, "seen": args.seen, "device": each[0]["device"], "rows": rows,
         "n": {half: len(part[: args.limit]) for half, part in
               zip(("validation", "test"), fold.halves, strict=True)}},
        seed=args.seeds, command=shlex.join(["python", "tools/distillation.py", *sys.argv[1:]]),
        wall_s=time.perf_counter() - began,
    )  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"gather": gather, "ask": ask, "train": train_all, "table": table}
    parser.add_argument("step", choices=steps)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS,
                        help="crystals without labels")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seen", type=int, default=445_000,
                        help="crystals seen in a training, as often as they are")  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="hyper-parameters, as of x3mat train")  # fmt: skip
    parser.add_argument("--limit", type=int, help="of crystals in each part (tries)")
    parser.add_argument("--crystals", type=Path, default=Path("runs/distillation/crystals.npz"),
                        help="file of the crystals without labels")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--name", default="distillation", help="of the record")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of states")
    args = parser.parse_args()
    try:
        steps[args.step](args)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
