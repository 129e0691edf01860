"""Crystals without labels for a pupil of three networks, and what the chapter says of it."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import distillation
import mof_split
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from x3mat import databases, results, training
from x3mat.applications import application

NAME = distillation.NAME


@pytest.fixture(scope="module")
def mof5():
    sites = {"Zn": [(0.2935, 0.2065, 0.2065)],
             "O": [(0.25, 0.25, 0.25), (0.2819, 0.2181, 0.1340)],
             "C": [(0.25, 0.25, 0.1113), (0.25, 0.25, 0.0538), (0.2829, 0.2171, 0.0266)],
             "H": [(0.3049, 0.1951, 0.0444)]}  # fmt: skip
    elements = [element for element, places in sites.items() for _ in places]
    places = [x for each in sites.values() for x in each]
    found = Structure.from_spacegroup("Fm-3m", Lattice.cubic(25.832), elements, places)
    found = found.get_primitive_structure()
    return mof_split.Atoms(found.lattice.matrix, np.array(found.atomic_numbers),
                           found.frac_coords % 1.0)  # fmt: skip


def counts(atoms):
    return dict(Counter(atoms.species.tolist()))


def lengths(atoms):
    return np.linalg.norm(distillation.hydrogen_bonds(atoms)[2], axis=1)


def test_hydrogens_get_their_usual_lengths(mof5):
    usual = distillation.usual_lengths([mof5])
    assert list(usual) == [6]
    assert usual[6] == pytest.approx(np.median(lengths(mof5)))
    short = distillation.lengthened(mof5, {6: 0.93})
    assert lengths(short) == pytest.approx(0.93)
    again = distillation.lengthened(short, usual)
    apart = again.frac_coords - mof5.frac_coords
    assert np.abs(apart - np.round(apart)).max() < 1e-3  # they stay in their directions
    assert lengths(distillation.lengthened(mof5, {7: 1.0})) == pytest.approx(lengths(mof5))


def test_a_metal_is_replaced_by_one_of_its_row(mof5):
    seen = set()
    for seed in range(30):
        made = distillation.other_metal(mof5, np.random.default_rng(seed))
        [new] = set(made.species.tolist()) - {6, 1, 8}
        assert (made.species == new).sum() == counts(mof5)[30]
        seen.add(new)
    row = next(row for row in distillation.METALS if 30 in row)
    assert 30 not in seen
    assert seen <= set(row)
    assert len(seen) > 3


def test_hydrogens_become_halogens_where_there_is_room(mof5):
    seen = set()
    for seed in range(12):
        made = distillation.halogenated(mof5, np.random.default_rng(seed))
        if made is None:
            continue
        [new] = set(made.species.tolist()) - set(mof5.species.tolist())
        assert counts(made) == {**{k: v for k, v in counts(mof5).items() if k != 1}, new: 24}
        assert distillation.sensible(made)
        seen.add(new)
    assert seen
    assert seen <= set(distillation.HALOGENS)
    crowded = replace(mof5, lattice=0.8 * mof5.lattice)
    assert distillation.halogenated(crowded, np.random.default_rng(0)) is None


def test_ch_of_a_ring_becomes_n(mof5):
    made = distillation.with_nitrogen(mof5, np.random.default_rng(0))
    assert counts(made) == {30: 8, 8: 26, 6: 24, 7: 24}
    assert distillation.sensible(made)
    assert distillation.with_nitrogen(made, np.random.default_rng(0)) is None  # no CH is left


def test_changes_follow_the_name_and_make_sensible_crystals(mof5):
    first, again, other = (distillation._altered((name, mof5)) for name in ("a", "a", "bc"))
    assert counts(first) == counts(again)
    assert counts(first) != counts(other)
    for made in (first, other):
        assert distillation.sensible(made)
        assert counts(made) != counts(mof5)
    twice = mof_split.Atoms(
        mof5.lattice, *(np.concatenate([x, x[:1]]) for x in (mof5.species, mof5.frac_coords)))
    assert not distillation.sensible(twice)
    assert not distillation.sensible(None)
    gas = mof_split.Atoms(8 * np.eye(3), np.array([10]), np.zeros((1, 3)))  # nothing to change
    assert distillation._altered(("a", gas)) is None


@pytest.mark.skipif(
    not (Path(os.environ.get("X3MAT_DATA", "/none")) / "qmof.npz").is_file(),
    reason="X3MAT_DATA names no folder with qmof.npz, so that crystals and labels are unknown")
def test_a_tiny_lesson(tmp_path, monkeypatch):
    some = databases.core_mof_names("ASR")[:12]
    monkeypatch.setattr(databases, "core_mof_names", {"ASR": some, "FSR": ()}.get)
    write = results.write
    monkeypatch.setattr(results, "write", lambda name, record, **about: write(
        tmp_path / name, record, **about))  # fmt: skip
    monkeypatch.setitem(training.CHECKED_WINDOWS, "crystal", 1)
    monkeypatch.setattr(distillation, "side_by_side", lambda function, plan, jobs: [
        function(*each) for each in plan])  # fmt: skip
    args = argparse.Namespace(
        sets=["all"], seeds=[0], seen=8, limit=3, crystals=tmp_path / "lesson" / "crystals.npz",
        set=["model.channels=8", "model.l_max=1", "model.m_max=1", "model.layers=1",
             "model.step=6", "crystals_per_step=4"],
        device="cpu", jobs=1, name="distillation", runs=tmp_path)  # fmt: skip
    shipped = results.read(f"{NAME}/distillation.json")
    distillation.gather(argparse.Namespace(**{**vars(args), "limit": 100}))
    qmof = mof_split.crystals_of(NAME)
    crystals = distillation.read(args.crystals, ["core", "altered"])
    known = set(map(mof_split.composition, qmof.values()))
    new = [crystal for crystal in crystals if not crystal.name.endswith("*")]
    assert 1 < len(new) <= 12
    assert not known & set(map(mof_split.composition, new))
    assert max(crystal.n_atoms for crystal in new) <= distillation.MOST
    assert len(crystals) > 60
    distillation.ask(args)
    with np.load(tmp_path / "lesson" / "said.npz") as said:
        assert said["said"].shape == (3, 3)
        assert said["name"].tolist() == [c.name for c in crystals][:3]
    distillation.table(args)
    record = results.read_json(tmp_path / NAME / "distillation.json")
    assert record.keys() == shipped.keys()
    [row] = record["rows"]
    assert row.keys() == shipped["rows"][0].keys()
    assert row["test"].keys() == shipped["rows"][0]["test"].keys()
    assert row["crystals"] == [3, 3]
    assert row["epochs"] == 1


def test_what_is_said_of_the_pupil():
    """ "One seed", "hardly nearer to the labels", "its error still fell" """
    record, summary = (results.read(f"{NAME}/{what}.json") for what in ("distillation", "summary"))
    core, every = record["rows"]
    fold = application(NAME).folds()[0]
    assert record["seeds"] == [0]
    assert record["n"] == {"validation": len(fold.halves[0]), "test": len(fold.halves[1])}
    for row in (core, every):
        assert row["crystals"][0] == len(fold.train)
        seen = row["epochs"] * sum(row["crystals"])
        assert seen == pytest.approx(record["seen"], rel=0.01)
        assert row["validation"]["mae_of_one"] == pytest.approx(summary["validation_mae"], abs=1e-4)
        assert row["test"]["mae_of_teacher"] == pytest.approx(
            summary["mae_of_mean_over_seeds"], abs=1e-4)  # fmt: skip
        for half in ("validation", "test"):
            low, high = row[half]["gain_interval"]
            assert low < 0 < high
            assert row[half]["gain"] == pytest.approx(
                row[half]["mae_of_one"] - row[half]["mae"], abs=2e-5)  # fmt: skip
    for half in ("validation", "test"):
        assert every[half]["from_teacher"] < 0.8 * every[half]["of_one_from_the_others"]
    assert every["epochs"] == 12
    [[_, before, last]] = every["val_mae"]  # "in the last four epochs"
    assert last < before - 0.005
