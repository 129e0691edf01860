"""Density, void fraction and largest cavity against published values and elementary geometry."""

from __future__ import annotations

import math
from importlib import util

import numpy as np
import pytest

from x3mat.crystal import crystal_from_arrays, periodic_images
from x3mat.databases import core_mof_table, iza
from x3mat.descriptors import DEFAULT_RADIUS, describe

IZA_RADII = {8: 1.35, 14: 1.35}


@pytest.mark.parametrize(
    ("code", "diameter"),
    [("SOD", 6.32), ("LTA", 11.05), ("FAU", 11.24), ("MFI", 6.36), ("CHA", 7.37), ("RHO", 10.43)],
)
def test_largest_spheres_of_zeolites(code, diameter):
    """Included spheres of the IZA Database of Zeolite Structures, which gives atoms 1.35 Å."""
    assert describe(iza(code), IZA_RADII).largest_cavity == pytest.approx(diameter, abs=0.1)


@pytest.mark.parametrize("length", [6.0, 20.0])
def test_one_atom_in_a_cube(length):
    crystal = crystal_from_arrays(np.eye(3) * length, [26], [[0.3, 0.4, 0.5]])
    found = describe(crystal)
    sphere = 4 / 3 * math.pi * DEFAULT_RADIUS**3
    assert found.void_fraction == pytest.approx(1 - sphere / length**3, abs=0.01)
    assert found.largest_cavity == pytest.approx(
        math.sqrt(3) * length - 2 * DEFAULT_RADIUS, abs=0.01
    )
    assert found.density == pytest.approx(55.845 * 1.66054 / length**3, rel=1e-4)


def test_no_cavity_in_diamond():
    fcc = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    coords = np.concatenate([fcc, np.array(fcc) + 0.25])
    found = describe(crystal_from_arrays(np.eye(3) * 3.567, [6] * 8, coords), {6: 2.5})
    assert (found.void_fraction, found.largest_cavity) == (0, 0)


def test_no_point_is_farther_from_the_atoms_than_the_largest_cavity_says():
    crystal = iza("RTE")  # monoclinic
    radius = describe(crystal, {8: 1.0, 14: 1.0}).largest_cavity / 2 + 1.0
    _, images = periodic_images(crystal.lattice, crystal.frac_coords, 8.0)
    x = np.random.default_rng(0).random((20_000, 3)) @ crystal.lattice
    nearest = np.full(len(x), np.inf)
    for image in images:
        np.minimum(nearest, np.linalg.norm(x - image, axis=1), out=nearest)
    assert radius - 0.2 < nearest.max() < radius + 0.01


@pytest.mark.skipif(
    util.find_spec("CoRE_MOF") is None, reason="the optional package core-mof is not installed"
)
def test_core_mof_values():
    """LCD and AV_VF, which the makers of CoRE MOF 2019 computed with Zeo++."""
    import tarfile

    from x3mat.crystal import parse_cif
    from x3mat.databases import _core_mof_folder

    table, read = core_mof_table("ASR"), 0
    with tarfile.open(_core_mof_folder("ASR") / "2019-ASR.tar.xz", "r|xz") as archive:
        for member in archive:
            name = member.name[:-4]
            if table[name]["DISORDER"] == "DISORDER" or member.size > 20_000:
                continue
            text = archive.extractfile(member).read().decode()
            found = describe(crystal_from_arrays(*parse_cif(text, name), name=name))
            assert found.density == pytest.approx(float(table[name]["cm3_g"]), rel=0.01)
            assert found.void_fraction == pytest.approx(float(table[name]["AV_VF"]), abs=0.03)
            assert found.largest_cavity == pytest.approx(float(table[name]["LCD"]), abs=0.1)
            read += 1
            if read == 25:
                break
    assert read == 25
