"""Split the crystals of an application on MOFs; write its folds.json and split.json.

Fold 0 keeps duplicates and near-duplicates together, fold 1 is plainly random. Both train on seven
tenths of the QMOF crystals, or on four fifths of those of CoRE MOF; the rest is halved into
validation and test.

Near-duplicates are crystals of the same composition whose bonds form the same graph, as far as
colour refinement (Weisfeiler-Lehman) tells. Atoms are bonded if their distance is below the sum of
their covalent radii plus a tolerance. Every atom starts with its element as colour, and in each
round takes a new one from its own and those of its bonded neighbours, periodic images counted.
What is compared is how many atoms have which colour, divided by the greatest common divisor, so
that it does not depend on the choice of the cell. Some bonds hang on the tolerance; crystals that
agree at any of several are in one group, and so are those linked through a third.

Graphs that are alike around every atom count as the same: nets of the same linkers and nodes but
of another topology, such as polymorphs of ZIFs, are in one group.

The crystals of QMOF (qmof.npz) are read from the folder that X3MAT_DATA names, those of CoRE MOF
2019 from the package core-mof.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase.data import covalent_radii
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from x3mat import paths, results
from x3mat.applications import application
from x3mat.errors import CrystalError
from x3mat.sampling import neighbours

EXAMPLES = """examples:
  X3MAT_DATA=folder python tools/mof_split.py qmof-gap      # about a minute on one core
  X3MAT_DATA=folder python tools/mof_split.py mof-ch4n2
"""
TOLERANCES = (0.1, 0.2, 0.3, 0.4, 0.5)  # Å
ROUNDS = 16  # more than the graphs need: 12 and 24 give the same groups
#: Shares of the crystals in training and validation set.
SHARES = {"qmof-gap": (0.7, 0.15), "mof-n2": (0.8, 0.1), "mof-co2n2": (0.8, 0.1),
          "mof-co2o2n2": (0.8, 0.1), "mof-ch4n2": (0.8, 0.1)}
SAME_PLACE = 0.1  # Å; an atom is no neighbour of itself
PARTS = ("train", "validation", "test")
RULES = (
    "fold 0: groups of near-duplicates, numbered by their first id, in the order of numpy "
    "default_rng(seed).permutation, cut at the ends of groups nearest to {0} % and {1} % of the "
    "crystals; fold 1: default_rng(seed).permutation of sorted ids, cut at {0} % and {1} %; train, "
    "then halves: validation, test"
)

Bonds = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Atoms:
    """A crystal: rows a, b, c in Å, atomic numbers and fractional coordinates."""

    lattice: np.ndarray
    species: np.ndarray
    frac_coords: np.ndarray

    @property
    def n_atoms(self) -> int:
        return len(self.species)


def read(path: Path) -> dict[str, Atoms]:
    """The crystals of a packed file by id, in the order of ids."""
    with np.load(path) as file:
        packed = {key: file[key] for key in ("id", "ptr", "lattice", "Z", "frac")}
    found = {}
    for k in np.argsort(packed["id"]):
        part = slice(packed["ptr"][k], packed["ptr"][k + 1])
        found[str(packed["id"][k])] = Atoms(
            packed["lattice"][k].astype(float),
            packed["Z"][part].astype(np.int64),
            packed["frac"][part].astype(float),
        )
    return found


def crystals_of(name: str) -> dict[str, Atoms]:
    """The crystals of an application by name, in the order of names."""
    if name == "qmof-gap":
        return read(paths.external() / "qmof.npz")
    chosen, found = application(name), {}
    for crystal in tqdm(sorted(chosen.labels().index), "reading"):
        with suppress(CrystalError):  # refused ones are in no part
            c = chosen.crystal(crystal, symprec=0.0)
            found[crystal] = Atoms(c.lattice, c.species, c.frac_coords)
    return found


def near(atoms: Atoms, tolerance: float) -> Bonds:
    """Directed bonds i to j, and by how much each is longer than the sum of radii, Å.

    A bond occurs once for each periodic image of j.
    """
    radii = covalent_radii[atoms.species]
    inside = replace(atoms, frac_coords=atoms.frac_coords - np.floor(atoms.frac_coords))
    j, i, vector = neighbours(inside, 2 * radii.max() + tolerance)
    length = np.linalg.norm(vector, axis=1)
    excess = length - radii[i] - radii[j]
    bonded = (excess < tolerance) & (length > SAME_PLACE)
    return i[bonded], j[bonded], excess[bonded]


def mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit integers (the finaliser of splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def colours(species: np.ndarray, i: np.ndarray, j: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """Colours (64-bit) of atoms after some rounds of refinement over the bonds i to j."""
    colour = mix(species.astype(np.uint64))
    for _ in range(rounds):
        around = np.zeros_like(colour)
        np.add.at(around, i, mix(colour)[j])
        colour = mix(colour + mix(around))
    return colour


def digest(colour: np.ndarray) -> str:
    """Hash of the share of each colour."""
    values, counts = np.unique(colour, return_counts=True)
    table = np.stack([values, (counts // np.gcd.reduce(counts)).astype(np.uint64)])
    return hashlib.blake2b(table.astype("<u8").tobytes(), digest_size=8).hexdigest()


def composition(atoms: Atoms) -> str:
    """Hash of the reduced formula."""
    return digest(atoms.species.astype(np.uint64))


def graph_hashes(
    atoms: Atoms, tolerances: tuple[float, ...] = TOLERANCES, rounds: int = ROUNDS
) -> tuple[str, ...]:
    """Hashes of the bonded graph, one for each tolerance.

    Colours begin with the elements: the same hash means the same reduced formula.
    """
    i, j, excess = near(atoms, max(tolerances))
    found = []
    for tolerance in tolerances:
        bonded = excess < tolerance
        found.append(digest(colours(atoms.species, i[bonded], j[bonded], rounds)))
    return tuple(found)


def groups(hashes: list[tuple[str, ...]]) -> np.ndarray:
    """Number of each crystal's group, in the order in which groups first occur.

    Crystals that share a hash at any tolerance are linked.
    """
    n = len(hashes)
    keys: dict[tuple[int, str], int] = {}
    ends = [
        (k, n + keys.setdefault(key, len(keys)))
        for k, row in enumerate(hashes)
        for key in enumerate(row)
    ]
    rows, columns = np.array(ends).T
    size = n + len(keys)
    links = coo_matrix((np.ones(len(rows)), (rows, columns)), (size, size))
    label = connected_components(links, directed=False)[1][:n]
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def cut(group: np.ndarray, seed: int, shares: tuple[float, float]) -> list[np.ndarray]:
    """Indices of the training, validation and test parts; groups stay whole."""
    sizes = np.bincount(group)
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = np.concatenate([[0], np.cumsum(sizes[order])])
    place = np.empty(len(order), dtype=int)
    place[order] = np.arange(len(order))
    goals = len(group) * np.cumsum(shares)
    marks = np.abs(ends - goals[:, None]).argmin(1)
    part = np.searchsorted(marks, place[group], side="right")
    return [np.flatnonzero(part == k) for k in range(len(PARTS))]


def in_train(group: np.ndarray, parts: list[np.ndarray]) -> dict[str, int]:
    """Crystals of the validation and test parts that have a near-duplicate in the training part."""
    known = set(group[parts[0]].tolist())
    return {
        name: sum(g in known for g in group[part].tolist())
        for name, part in zip(PARTS[1:], parts[1:], strict=True)
    }


def size_of_groups(group: np.ndarray) -> dict[str, int]:
    """How many groups there are, and how many crystals are not alone in theirs."""
    sizes = np.bincount(group)
    return {
        "number": len(sizes),
        "of_several": int((sizes > 1).sum()),
        "crystals_in_groups_of_several": int(sizes[sizes > 1].sum()),
        "largest": int(sizes.max()),
    }


def write_folds(path: Path, about: dict[str, object], folds: list[list[list[str]]]) -> None:
    """Write the splits with one line for each list of ids."""
    blocks = []
    for fold in folds:
        train, validation, test = (json.dumps(part, separators=(",", ":")) for part in fold)
        blocks.append(
            f'  {{\n   "train": {train},\n   "halves": [\n    {validation},\n    {test}\n   ]\n  }}'
        )
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + head + ' "folds": [\n' + ",\n".join(blocks) + "\n ]\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", choices=list(SHARES))
    parser.add_argument("--seed", type=int, default=0, help="of both splits (default 0)")
    arguments = parser.parse_args()
    start, name, shares = time.perf_counter(), arguments.application, SHARES[arguments.application]
    crystals = crystals_of(name)
    ids = np.array(list(crystals))
    hashes = [graph_hashes(atoms) for atoms in tqdm(crystals.values(), desc="graphs")]
    group = groups(hashes)
    formula = groups([(composition(atoms),) for atoms in crystals.values()])
    if len(set(zip(group.tolist(), formula.tolist(), strict=True))) != group.max() + 1:
        raise ValueError("a group holds several compositions")
    splits = [cut(numbers, arguments.seed, shares) for numbers in (group, np.arange(len(ids)))]
    folds = [[ids[part].tolist() for part in parts] for parts in splits]
    path = paths.data() / name / "folds.json"
    rule = RULES.format(*(f"{100 * x:.0f}" for x in np.cumsum(shares)))
    write_folds(path, {"seed": arguments.seed, "rule": rule}, folds)
    described = {}
    for fold, (kind, parts) in enumerate(zip(("grouped", "random"), splits, strict=True)):
        duplicates = in_train(group, parts)
        described[kind] = {
            "fold": fold,
            **{part: len(members) for part, members in zip(PARTS, parts, strict=True)},
            "near_duplicate_in_train": {**duplicates, "rest": sum(duplicates.values())},
        }
        print(kind, described[kind])
    sizes = Counter(np.bincount(group).tolist())
    payload = {
        "crystals": len(ids),
        "labelled_but_refused": len(application(name).labels()) - len(ids),
        "ids_sha256": hashlib.sha256("\n".join(ids.tolist()).encode()).hexdigest(),
        "near_duplicates": "same reduced formula and same Weisfeiler-Lehman hash of the bonded "
        "periodic graph at one or more of the tolerances, or linked through such crystals",
        "bonds": "distance below the sum of the covalent radii of ase.data plus a tolerance",
        "tolerances_A": TOLERANCES,
        "rounds": ROUNDS,
        "groups": {
            **size_of_groups(group),
            "of_size": {str(size): sizes[size] for size in sorted(sizes)},
        },
        "groups_at_one_tolerance": {
            str(tolerance): size_of_groups(groups([(row[k],) for row in hashes]))
            for k, tolerance in enumerate(TOLERANCES)
        },
        "groups_of_equal_formula": size_of_groups(formula),
        "near_duplicate_in_train": "number of crystals of the part that have a near-duplicate in "
        "the training part; for rest, what grouping avoids",
        "splits": described,
    }
    results.write(
        f"{name}/split.json", payload, seed=arguments.seed,
        command=f"python tools/mof_split.py {name} --seed {arguments.seed}",
        wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(path.name, payload["groups"])


if __name__ == "__main__":
    main()
