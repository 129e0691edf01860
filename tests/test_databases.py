"""The databases of crystals: the IZA frameworks (zeose) and CoRE MOF 2019 (core-mof)."""

from __future__ import annotations

import tarfile
from importlib import util

import numpy as np
import pytest

from x3mat import databases
from x3mat.applications import application
from x3mat.errors import CrystalError, DataError

needs_core_mof = pytest.mark.skipif(
    util.find_spec("CoRE_MOF") is None, reason="the optional package core-mof is not installed"
)


def test_all_iza_frameworks_are_read():
    codes = databases.iza_codes()
    assert len(codes) == 253
    assert list(codes) == sorted(set(codes))
    crystals = [databases.iza(code) for code in codes if code not in ("MWF", "SFV")]
    assert all(set(c.species.tolist()) == {8, 14} for c in crystals)
    assert min(len(c.rotations) for c in crystals) >= 2
    full = [c for c in crystals if c.formula == "SiO2"]
    assert len(crystals) - len(full) == 16  # the interrupted frameworks


@pytest.mark.parametrize(
    ("code", "space_group", "n_atoms", "framework_density"),
    [
        ("LTA", 221, 72, 14.2),
        ("MFI", 62, 288, 18.4),
        ("FAU", 227, 576, 13.3),
        ("CHA", 166, 108, 15.1),
    ],
)
def test_known_frameworks(code, space_group, n_atoms, framework_density):
    """Space group and T atoms per 1000 Å3 of the IZA Database of Zeolite Structures."""
    crystal = databases.iza(code)
    assert (crystal.space_group, crystal.n_atoms) == (space_group, n_atoms)
    density = 1000 * (crystal.species == 14).sum() / crystal.volume
    assert density == pytest.approx(framework_density, abs=0.3)


def test_codes_are_forgiving_and_unknown_ones_name_near_matches():
    assert databases.iza("-clo").name == "CLO"
    with pytest.raises(DataError, match="LTA") as caught:
        databases.iza("LTQ")
    assert "IZA framework" in caught.value.cause


def test_strained_copies():
    crystal, copy = databases.iza("SOD", symprec=0.0), databases.iza("sod~1")
    assert (copy.name, copy.n_atoms, copy.space_group_symbol) == ("SOD~1", 36, "P1")
    np.testing.assert_array_equal(copy.lattice, databases.strained(crystal, 1).lattice)
    np.testing.assert_array_equal(copy.species, crystal.species)
    np.testing.assert_array_equal(copy.frac_coords, crystal.frac_coords)
    strain = np.linalg.solve(crystal.lattice, copy.lattice) - np.eye(3)
    np.testing.assert_allclose(strain, strain.T, atol=1e-12)
    drawn = np.random.default_rng([1, *b"SOD"]).normal(0, 0.02, 6)
    np.testing.assert_allclose(strain[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], drawn, atol=1e-12)
    again = databases.strained(crystal, 1, sd=0.01)
    np.testing.assert_allclose(copy.lattice - crystal.lattice,
                               2 * (again.lattice - crystal.lattice), atol=1e-12)
    for other in (databases.iza("SOD~2"), databases.iza("CAN~1")):
        plain = databases.iza(other.name.split("~")[0], symprec=0.0)
        another = np.linalg.solve(plain.lattice, other.lattice) - np.eye(3)
        assert np.abs(another - strain).max() > 0.001
    for wrong in ("SOD~x", "SOD~-1", "XXX~1"):
        with pytest.raises(DataError, match="IZA framework"):
            databases.iza(wrong)


def test_labels_of_strained_copies():
    zeolites = application("zeolite-n2")
    copies = zeolites.copies(["SOD", "LTA"], 2)
    assert list(copies.index) == ["SOD~1", "LTA~1", "SOD~2", "LTA~2"]
    assert {"n2_g_L", "error_g_L"} <= set(copies.columns)
    ratio = copies.n2_g_L["LTA~1"] / zeolites.labels().n2_g_L["LTA"]
    assert 0.5 < ratio < 2
    assert zeolites.crystal("LTA~2").name == "LTA~2"
    assert len(zeolites.copies(databases.iza_codes(), 6)) == 6 * 253
    for missing, number in ((["LTA"], 7), (["LTA", "XXX"], 1)):
        with pytest.raises(DataError, match="zeolite-n2: not every crystal has"):
            zeolites.copies(missing, number)
    with pytest.raises(DataError, match="qmof-gap: not every crystal has 1 strained copies"):
        application("qmof-gap").copies(["qmof-a2d95c3"], 1)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(databases.util, "find_spec", lambda name: None)
    databases._iza_rows.cache_clear()
    databases.core_mof_table.cache_clear()
    try:
        with pytest.raises(DataError, match="pip install zeose"):
            databases.iza_codes()
        with pytest.raises(DataError, match="pip install core-mof"):
            databases.core_mof_table("FSR")
    finally:
        databases._iza_rows.cache_clear()


@needs_core_mof
def test_names_and_table():
    assert len(databases.core_mof_names("ASR")) == 12_020
    assert len(databases.core_mof_names("FSR")) == 7_061
    with pytest.raises(DataError, match="ASR"):
        databases.core_mof_names("2014")
    assert float(databases.core_mof_table("ASR")["KAXQIL_clean"]["LCD"]) > 0


@needs_core_mof
def test_crystals_come_from_a_cache_that_heals(tmp_path, monkeypatch):
    """A small archive stands in for the whole, which takes half a minute to read."""
    source = databases._core_mof_folder("ASR")
    small = tmp_path / "package"
    small.mkdir()
    (small / "2019-ASR.csv").write_bytes((source / "2019-ASR.csv").read_bytes())
    names = []
    with (
        tarfile.open(source / "2019-ASR.tar.xz", "r|xz") as whole,
        tarfile.open(small / "2019-ASR.tar.xz", "w:xz") as part,
    ):
        for member, _ in zip(whole, range(40), strict=False):
            part.addfile(member, whole.extractfile(member))
            names.append(member.name[:-4])
    monkeypatch.setenv("X3MAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(databases, "_core_mof_folder", lambda subset: small)
    databases._core_mof_arrays.cache_clear()
    table = databases.core_mof_table("ASR")
    read = []
    for name in names:
        try:
            crystal = databases.core_mof(name)
        except CrystalError:
            continue
        read.append(crystal)
        assert crystal.name == name
        assert crystal.density == pytest.approx(float(table[name]["cm3_g"]), rel=0.01)
    assert len(read) >= 35
    cached = list((tmp_path / "cache").glob("*.npz"))
    assert len(cached) == 1
    whole_file = cached[0].read_bytes()
    cached[0].write_bytes(whole_file[:1000])
    databases._core_mof_arrays.cache_clear()
    again = databases.core_mof(read[0].name)
    assert cached[0].stat().st_size == len(whole_file)
    np.testing.assert_array_equal(again.frac_coords, read[0].frac_coords)
    with pytest.raises(DataError, match="Did you mean"):
        databases.core_mof(names[0] + "x")
    databases._core_mof_arrays.cache_clear()


def test_frameworks_are_those_that_ase_reads():
    from ase.db import connect

    path = databases._package_folder("zse", "zeose") / "collections" / "frameworks.db"
    rows = databases._iza_rows()
    found = {row.fw: row for row in connect(str(path)).select()}
    assert set(found) == set(rows)
    for code, (lattice, numbers, frac_coords) in rows.items():
        np.testing.assert_array_equal(lattice, found[code].cell)
        np.testing.assert_array_equal(numbers, found[code].numbers)
        np.testing.assert_allclose(frac_coords @ lattice, found[code].positions, atol=1e-9)
