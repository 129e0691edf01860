"""The committed splits of the QMOF crystals, and the graphs that keep near-duplicates together."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import replace

import mof_split as qs
import numpy as np
import pytest

from x3mat import paths, results
from x3mat.errors import DataError

N = 18_872


@pytest.fixture(scope="module")
def splits():
    """The three lists of each committed split."""
    written = json.loads((paths.data() / "qmof-gap" / "folds.json").read_text())
    assert set(written) == {"seed", "rule", "folds"}
    assert written["seed"] == 0
    return [[fold["train"], *fold["halves"]] for fold in written["folds"]]


@pytest.fixture(scope="module")
def record():
    return results.read("qmof-gap/split.json")


@pytest.fixture(scope="module")
def crystals():
    try:
        path = paths.external() / "qmof.npz"
    except DataError as error:
        pytest.skip(f"the QMOF crystals are not shipped: {error}")
    if not path.is_file():
        pytest.skip("the folder that X3MAT_DATA names has no qmof.npz")
    return qs.read(path)


def supercell(atoms, matrix):
    """The crystal in the cell whose rows are those of an integer matrix times a, b, c."""
    matrix = np.asarray(matrix)
    steps = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    lattice = matrix @ atoms.lattice
    frac = ((atoms.frac_coords % 1.0)[:, None] + steps) @ np.linalg.inv(matrix)
    inside = ((frac > -1e-9) & (frac < 1 - 1e-9)).all(-1)
    assert inside.sum() == len(atoms.species) * round(abs(np.linalg.det(matrix)))
    return qs.Atoms(lattice, atoms.species[np.nonzero(inside)[0]], frac[inside])


def moved(atoms, rng):
    """A rotated and shifted copy with its atoms in another order and in other cells."""
    order = rng.permutation(len(atoms.species))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    frac = atoms.frac_coords[order] + rng.random(3) + rng.integers(-2, 3, (len(order), 3))
    return qs.Atoms(atoms.lattice @ rotation, atoms.species[order], frac)


def substituted(atoms, k, element):
    species = atoms.species.copy()
    species[k] = element
    return replace(atoms, species=species)


def molecule(elements, positions):
    """Atoms at Cartesian positions (Å) in a box of 15 Å."""
    return qs.Atoms(15 * np.eye(3), np.array(elements), np.array(positions, dtype=float) / 15)


def ring(n, z=0.0):
    angle = 2 * np.pi * np.arange(n) / n
    radius = 0.75 / np.sin(np.pi / n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(n, z)], 1)


SALT = qs.Atoms(
    2.82 * (np.ones((3, 3)) - np.eye(3)), np.array([11, 17]), np.array([[0.0] * 3, [0.5] * 3])
)
SILICON = qs.Atoms(
    2.715 * (np.ones((3, 3)) - np.eye(3)), np.array([14, 14]), np.array([[0.0] * 3, [0.25] * 3])
)
CUBIC = [[-1, 1, 1], [1, -1, 1], [1, 1, -1]]  # conventional cell of the two above


def test_committed_splits_are_disjoint_complete_and_of_their_sizes(splits, record):
    assert record["crystals"] == N
    assert len(splits) == 2
    largest = record["groups"]["largest"]
    for name, parts in zip(("grouped", "random"), splits, strict=True):
        together = sorted(name for part in parts for name in part)
        assert len(together) == len(set(together)) == N
        digest = hashlib.sha256("\n".join(together).encode()).hexdigest()
        assert digest == record["ids_sha256"]
        described = record["splits"][name]
        assert [described[part] for part in qs.PARTS] == [len(part) for part in parts]
        slack = largest if name == "grouped" else 1
        for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
            assert part == sorted(part)
            assert abs(len(part) - share * N) <= slack
    assert splits[0] != splits[1]


def test_counts_of_the_record_agree_with_each_other(record):
    groups = record["groups"]
    sizes = {int(size): n for size, n in groups["of_size"].items()}
    assert sum(sizes.values()) == groups["number"]
    assert sum(size * n for size, n in sizes.items()) == N
    assert groups["crystals_in_groups_of_several"] == N - sizes[1]
    assert groups["of_several"] == groups["number"] - sizes[1]
    assert groups["largest"] == max(sizes)
    assert record["tolerances_A"] == list(qs.TOLERANCES)
    assert record["rounds"] == qs.ROUNDS
    for single in record["groups_at_one_tolerance"].values():
        assert groups["number"] <= single["number"]
    assert record["groups_of_equal_formula"]["number"] < groups["number"]
    for name, fold in record["splits"].items():
        found = fold["near_duplicate_in_train"]
        assert found["rest"] == found["validation"] + found["test"]
        assert (found["rest"] == 0) == (name == "grouped")


def test_random_split_is_the_permutation_that_its_rule_states(splits):
    ids = np.array(sorted(name for part in splits[1] for name in part))
    order = np.random.default_rng(0).permutation(N)
    ends = np.rint([0.7 * N, 0.85 * N]).astype(int)
    for part, rows in zip(splits[1], np.split(order, ends), strict=True):
        assert part == sorted(ids[rows].tolist())


def test_no_near_duplicates_straddle_the_grouped_split(crystals, splits, record):
    alike = defaultdict(list)
    for name, atoms in crystals.items():
        alike[qs.composition(atoms)].append(name)
    assert len(alike) == record["groups_of_equal_formula"]["number"]
    names = [name for same in alike.values() if len(same) > 1 for name in same]
    group = qs.groups([qs.graph_hashes(crystals[name]) for name in names])
    expected = ("number", "of_several", "crystals_in_groups_of_several", "largest")
    found = qs.size_of_groups(group)
    found["number"] += N - len(names)
    assert found == {key: record["groups"][key] for key in expected}
    for name, parts in zip(("grouped", "random"), splits, strict=True):
        indices = [np.flatnonzero(np.isin(names, part)) for part in parts]
        counts = record["splits"][name]["near_duplicate_in_train"]
        in_train = qs.in_train(group, indices)
        assert {**in_train, "rest": sum(in_train.values())} == counts
        if name == "grouped":
            homes = {(g, k) for k, part in enumerate(indices) for g in group[part].tolist()}
            assert len(homes) == group.max() + 1


def test_hashes_of_qmof_crystals_do_not_depend_on_the_description(crystals):
    rng = np.random.default_rng(1)
    names = np.array(sorted(crystals, key=lambda name: len(crystals[name].species)))
    for name in [*names[:3], *rng.choice(names, 12, replace=False)]:
        atoms = crystals[name]
        expected = qs.graph_hashes(atoms)
        assert qs.graph_hashes(supercell(atoms, np.diag([2, 1, 1]))) == expected
        assert qs.graph_hashes(moved(atoms, rng)) == expected
        assert qs.graph_hashes(supercell(atoms, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])) == expected
        k = rng.integers(len(atoms.species))
        changed = qs.graph_hashes(substituted(atoms, k, atoms.species[k] + 1))
        assert not set(changed) & set(expected)


@pytest.mark.parametrize(("atoms", "bonds"), [(SALT, 6), (SILICON, 4)])
def test_hashes_of_small_crystals_do_not_depend_on_the_cell(atoms, bonds):
    i, j, excess = qs.near(atoms, 0.3)
    assert np.bincount(i).tolist() == np.bincount(j).tolist() == [bonds] * 2
    assert (excess < 0.3).all()
    expected = qs.graph_hashes(atoms)
    rng = np.random.default_rng(2)
    for matrix in (
        CUBIC,
        np.diag([2, 1, 1]),
        np.diag([1, 3, 2]),
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]],
    ):
        cell = supercell(atoms, matrix)
        assert qs.graph_hashes(cell) == expected
        assert qs.graph_hashes(moved(cell, rng)) == expected
        assert qs.composition(cell) == qs.composition(atoms)
    cell = supercell(atoms, CUBIC)
    assert not set(qs.graph_hashes(substituted(cell, 0, 32))) & set(expected)
    assert qs.composition(substituted(cell, 0, 32)) != qs.composition(atoms)


def test_bonds_to_an_own_image_count():
    """A chain of carbon along c with one atom in the cell, next to one with two."""
    one = qs.Atoms(np.diag([10.0, 10.0, 1.4]), np.array([6]), np.array([[0.0, 0.0, 1.0]]))
    assert len(qs.near(one, 0.3)[0]) == 2
    assert qs.graph_hashes(supercell(one, np.diag([1, 1, 2]))) == qs.graph_hashes(one)
    broken = replace(one, lattice=np.diag([10.0, 10.0, 2.4]))
    assert not set(qs.graph_hashes(broken)) & set(qs.graph_hashes(one))


def test_isomers_differ_but_the_same_surroundings_do_not():
    chain = molecule([6] * 4, [[1.5 * k, 0, 0] for k in range(4)])
    star = molecule([6] * 4, [[0, 0, 0], [1.5, 0, 0], [-0.75, 1.3, 0], [-0.75, -1.3, 0]])
    assert qs.composition(chain) == qs.composition(star)
    assert not set(qs.graph_hashes(chain)) & set(qs.graph_hashes(star))
    six = molecule([6] * 6, ring(6))
    twice_five = molecule([6] * 10, np.concatenate([ring(5), ring(5, 6.0)]))
    assert qs.graph_hashes(six) == qs.graph_hashes(twice_five)


def test_far_atoms_are_seen_with_enough_rounds():
    """Nitrogen at two places of a long chain whose ends are alike."""
    places = [[1.2 * k, 0, 0] for k in range(11)]
    ends = [molecule([9, *[6] * 9, 9], places)]
    ends += [molecule(np.where(np.arange(11) == k, 7, [9, *[6] * 9, 9]), places) for k in (4, 5, 6)]
    hashes = [qs.graph_hashes(atoms, (0.1,)) for atoms in ends]
    assert hashes[1] == hashes[3]
    assert len(set(hashes)) == 3


def test_groups_link_at_any_tolerance_and_through_a_third():
    assert qs.groups([("b", "x"), ("a", "z"), ("b", "y"), ("c", "y")]).tolist() == [0, 1, 0, 0]
    assert qs.groups([("a", "b"), ("b", "a")]).tolist() == [0, 1]


def test_cut_keeps_groups_whole():
    rng = np.random.default_rng(3)
    group = np.unique(rng.integers(0, 400, 1000), return_inverse=True)[1]
    largest = np.bincount(group).max()
    for seed in range(3):
        parts = qs.cut(group, seed, (0.7, 0.15))
        assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
        assert sum(len(set(group[part].tolist())) for part in parts) == group.max() + 1
        for part, share in zip(parts, (700, 150, 150), strict=True):
            assert abs(len(part) - share) <= largest
        assert qs.in_train(group, parts) == {"validation": 0, "test": 0}
    twins = np.repeat(np.arange(500), 2)
    parts = [np.arange(0, 1000, 2), np.arange(1, 999, 2), np.array([999])]
    assert qs.in_train(twins, parts) == {"validation": 499, "test": 1}


def test_written_folds_are_json_with_a_line_for_each_list(tmp_path):
    path = tmp_path / "new" / "folds.json"
    qs.write_folds(path, {"seed": 4, "rule": "some"}, [[["a", "b"], ["c"], []], [["c"], [], ["a"]]])
    assert json.loads(path.read_text()) == {
        "seed": 4,
        "rule": "some",
        "folds": [
            {"train": ["a", "b"], "halves": [["c"], []]},
            {"train": ["c"], "halves": [[], ["a"]]},
        ],
    }
    assert '"train": ["a","b"],\n' in path.read_text()
