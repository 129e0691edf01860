"""Reading and checking crystals: real zeolites, round trips, symmetry, bad input, fuzz."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from ase import Atoms
from ase.io import write as ase_write
from pymatgen.core import DummySpecies, Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar
from scipy.spatial import cKDTree

from x3mat.crystal import CrystalError, crystal_from_arrays, periodic_images, read_crystal
from x3mat.databases import iza, iza_codes

CELL = """data_x
_cell_length_a {a}
_cell_length_b {b}
_cell_length_c {c}
_cell_angle_alpha {alpha}
_cell_angle_beta {beta}
_cell_angle_gamma {gamma}
{symmetry}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_occupancy
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
{atoms}
"""
CUBE = {"a": 5.64, "b": 5.64, "c": 5.64, "alpha": 90, "beta": 90, "gamma": 90}
SALT = {
    **CUBE,
    "symmetry": "_space_group_name_H-M_alt 'F m -3 m'",
    "atoms": "Na1 Na 1 0 0 0\nCl1 Cl 1 0.5 0.5 0.5",
}


def cif(tmp_path, **changes):
    path = tmp_path / "salt.cif"
    path.write_text(CELL.format(**{**SALT, **changes}))
    return path


def assert_same_crystal(x, y, tolerance):
    """Same metric, same atoms, whatever the order of the atoms."""
    assert x.n_atoms == y.n_atoms
    np.testing.assert_allclose(
        x.lattice @ x.lattice.T, y.lattice @ y.lattice.T, atol=20 * tolerance
    )
    atoms, images = periodic_images(y.lattice, y.frac_coords, 0.1)
    distance, which = cKDTree(images).query(x.frac_coords @ y.lattice)
    assert distance.max() < tolerance
    assert (y.species[atoms[which]] == x.species).all()
    assert len(set(atoms[which].tolist())) == x.n_atoms
    assert x.space_group == y.space_group
    assert len(x.rotations) == len(y.rotations)


def write(crystal, kind, folder):
    if kind == "cif":
        path = folder / "x.cif"
        CifWriter(crystal.structure, significant_figures=8).write_file(path)
    elif kind == "symmetric cif":
        path = folder / "x.cif"
        CifWriter(crystal.structure, symprec=0.01, significant_figures=8).write_file(path)
    elif kind == "poscar":
        path = folder / "POSCAR_x"
        Poscar(crystal.structure).write_file(path, significant_figures=10)
    else:
        path = folder / f"x.{kind}"
        atoms = Atoms(
            crystal.species, scaled_positions=crystal.frac_coords, cell=crystal.lattice, pbc=True
        )
        ase_write(path, atoms, format="extxyz")
    return path


@pytest.mark.parametrize("kind", ["cif", "symmetric cif", "poscar", "extxyz", "xyz"])
@pytest.mark.parametrize("code", ["SOD", "MFI", "RHO", "CAN", "RTE"])
def test_round_trip(code, kind, tmp_path):
    crystal = iza(code)
    assert_same_crystal(crystal, read_crystal(write(crystal, kind, tmp_path)), 1e-5)


def test_structure_round_trip_and_properties():
    crystal = iza("LTA")
    again = read_crystal(crystal.structure)
    assert_same_crystal(crystal, again, 1e-10)
    assert again.name == "SiO2"
    assert again.formula == "SiO2"
    assert crystal.name == "LTA"
    assert crystal.volume == pytest.approx(crystal.structure.volume)
    assert crystal.density == pytest.approx(crystal.structure.density, rel=1e-4)


def test_operations_map_the_crystal_onto_itself():
    codes = np.random.default_rng(0).choice(iza_codes(), 20, replace=False)
    for code in codes:
        crystal = iza(str(code))
        metric = crystal.lattice @ crystal.lattice.T
        tree = cKDTree(crystal.frac_coords, boxsize=1.0)
        for rotation, translation in zip(crystal.rotations, crystal.translations, strict=True):
            np.testing.assert_allclose(rotation.T @ metric @ rotation, metric, atol=1e-9)
            image = crystal.frac_coords @ rotation.T + translation
            image -= np.floor(image)
            distance, which = tree.query(np.where(image >= 1, 0.0, image))
            assert distance.max() < 1e-12
            assert (crystal.species[which] == crystal.species).all()


def test_symmetrizing_moves_atoms_by_less_than_the_tolerance():
    exact = iza("MFI")
    noise = np.random.default_rng(0).uniform(-1, 1, (exact.n_atoms, 3)) * 1e-3
    noisy = exact.frac_coords + noise @ np.linalg.inv(exact.lattice)
    crystal = crystal_from_arrays(exact.lattice, exact.species, noisy)
    assert crystal.space_group == exact.space_group == 62
    moved = (crystal.frac_coords - noisy + 0.5) % 1 - 0.5
    assert 0 < np.linalg.norm(moved @ exact.lattice, axis=1).max() < 3e-3
    rough = crystal_from_arrays(exact.lattice, exact.species, noisy, symprec=1e-5)
    assert rough.space_group == 1
    assert len(rough.rotations) == 1
    np.testing.assert_array_equal(rough.frac_coords, noisy % 1)


def test_origin_is_a_symmetry_centre_wherever_the_cell_starts():
    exact = iza("SOD")  # Im-3m: its origin has all 48 rotations of the point group
    shift = np.array([0.123, 0.456, 0.789])
    for crystal in (
        exact,
        crystal_from_arrays(exact.lattice, exact.species, exact.frac_coords + shift),
    ):
        image = crystal.rotations @ crystal.origin + crystal.translations - crystal.origin
        fixed = np.abs(image - np.rint(image)).max(axis=1) < 1e-9
        assert fixed.sum() == 48


def test_supercell_keeps_the_space_group():
    crystal = iza("SOD")
    double = read_crystal(crystal.structure * (2, 1, 1))
    assert double.space_group == crystal.space_group == 229
    assert 2 * len(crystal.rotations) / 3 == len(double.rotations)  # the cubic axes are lost
    assert double.density == pytest.approx(crystal.density)


def test_left_handed_cell_is_the_same_crystal():
    exact = iza("RTE")
    order = [1, 0, 2]
    crystal = crystal_from_arrays(exact.lattice[order], exact.species, exact.frac_coords[:, order])
    assert crystal.volume > 0
    np.testing.assert_allclose(crystal.volume, exact.volume)
    cell = np.linalg.inv(exact.lattice)
    folded = (crystal.frac_coords @ crystal.lattice - exact.frac_coords @ exact.lattice) @ cell
    np.testing.assert_allclose(folded, np.rint(folded), atol=1e-9)


def test_immutable():
    crystal = iza("SOD")
    arrays = [getattr(crystal, f.name) for f in fields(crystal)]
    arrays = [a for a in arrays if isinstance(a, np.ndarray)]
    assert len(arrays) == 6
    for copy in (crystal, pickle.loads(pickle.dumps(crystal))):
        for field in fields(copy):
            value = getattr(copy, field.name)
            if isinstance(value, np.ndarray):
                with pytest.raises(ValueError, match="read-only"):
                    value[...] = 0
    with pytest.raises(FrozenInstanceError):
        crystal.name = "other"
    mine = np.array(crystal.frac_coords)
    other = crystal_from_arrays(crystal.lattice, crystal.species, mine)
    mine[:] = 0.5
    np.testing.assert_allclose(other.frac_coords, crystal.frac_coords, atol=1e-12)


# ------------------------------------------------------------------------------ CIF dialects


@pytest.mark.parametrize(
    "symmetry",
    [
        "_symmetry_space_group_name_H-M F m -3 m",  # unquoted, as many programs write it
        "_symmetry_space_group_name_H-M 'F m -3 m'",
        "_space_group_name_Hall '-F 4 2 3'",
        "_symmetry_Int_Tables_number 225",
        "_space_group_IT_number 225",
    ],
)
def test_symmetry_of_a_cif_is_expanded(symmetry, tmp_path):
    crystal = read_crystal(cif(tmp_path, symmetry=symmetry))
    assert (crystal.formula, crystal.n_atoms, crystal.space_group) == ("NaCl", 8, 225)


def test_first_block_with_atoms_and_line_ends_and_byte_order_mark(tmp_path):
    path = cif(tmp_path)
    text = "\ufeffdata_global\r\n_journal_year 1913\r\n" + path.read_text().replace("\n", "\r\n")
    path.write_bytes(text.encode())
    assert read_crystal(str(path)).n_atoms == 8


def test_rounded_special_position_is_one_atom(tmp_path):
    hexagonal = {"a": 20, "b": 20, "c": 8, "gamma": 120}
    path = cif(
        tmp_path, **hexagonal, symmetry="_space_group_name_H-M_alt 'P 6/m m m'",
        atoms="Si1 Si 1 0.3333 0.6667 0",
    )  # fmt: skip
    crystal = read_crystal(path)
    assert crystal.n_atoms == 2
    np.testing.assert_allclose(
        crystal.frac_coords % 1 * 3, np.rint(crystal.frac_coords * 3), atol=1e-9
    )


def test_deuterium_is_hydrogen_and_charges_are_dropped(tmp_path):
    atoms = "D1 D 1 0 0 0\nCl1 Cl1- 1 0.5 0.5 0.5"
    assert read_crystal(cif(tmp_path, atoms=atoms)).formula == "HCl"
    heavy = Structure(Lattice.cubic(4), ["D", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert sorted(read_crystal(heavy).species.tolist()) == [1, 17]


def test_unknown_occupancy_and_uncertainties_are_read(tmp_path):
    crystal = read_crystal(
        cif(tmp_path, a="5.640(2)", atoms="Na1 Na ? 0 0 0\nCl1 Cl . .5 0.5(1) .5")
    )
    assert crystal.n_atoms == 8


def test_atoms_missing_from_a_cif_are_noticed(tmp_path):
    path = write(iza("CAN"), "cif", tmp_path)
    lines = path.read_text().rstrip().split("\n")
    path.write_text("\n".join(lines[:-5]) + "\n")
    with pytest.warns(UserWarning, match=r"x\.cif: its atoms are not those of its formula"):
        assert read_crystal(path).n_atoms == iza("CAN").n_atoms - 5
    path.write_text("\n".join(lines[:-5]))
    with pytest.raises(CrystalError, match="last line is cut"):
        read_crystal(path)
    path.write_text("\n".join(lines))
    assert read_crystal(path).n_atoms == iza("CAN").n_atoms


# --------------------------------------------------------------------------------- bad input

BAD_CIF = {
    "partial": ({"atoms": "Na1 Na 0.5 0 0 0"}, "partially occupied"),
    "overlap": ({"atoms": "Na1 Na 1 0 0 0\nCl1 Cl 1 0.02 0 0"}, "overlap"),
    "own image": ({"symmetry": "", "a": 1.5, "b": 1.5, "c": 20, "gamma": 12}, "overlap"),
    "duplicate": ({"symmetry": "", "atoms": "Na Na 1 0 0 0\nNa Na 1 1 0 0"}, "overlap"),
    "dummy": ({"atoms": "X1 X 1 0 0 0"}, "no element"),
    "heavy": ({"atoms": "Rf1 Rf 1 0 0 0"}, "no element"),
    "unknown coordinate": ({"atoms": "Na1 Na 1 ? 0 0"}, "coordinates"),
    "infinite coordinate": ({"symmetry": "", "atoms": "Na1 Na 1 1e300 0 0"}, "coordinates"),
    "zero cell": ({"a": 0, "symmetry": ""}, "cell"),
    "missing length": ({"a": "?"}, "make no cell"),
    "long": ({"a": 501, "symmetry": ""}, "outside 1-500"),
    "short": ({"a": 0.9, "symmetry": ""}, "outside 1-500"),
    "impossible angles": ({"alpha": 120, "beta": 50, "gamma": 60, "symmetry": ""}, "make no cell"),
    "flat": ({"gamma": 5, "symmetry": ""}, "sensible cell"),
    "dense": ({"a": 1.1, "b": 1.1, "c": 1.1, "symmetry": ""}, "absurd"),
    "thin": ({"a": 400, "b": 400, "c": 400, "symmetry": ""}, "absurd"),
    "no atoms": ({"atoms": ""}, "atom"),
    "unknown group": ({"symmetry": "_space_group_name_H-M_alt 'F m 7 m'"}, "symmetry"),
    "bad operation": ({"symmetry": "_symmetry_equiv_pos_as_xyz 'x,y,q'"}, "symmetry"),
}


def assert_tells(error, source, cause):
    assert str(source) in str(error)
    assert cause in error.cause
    assert len(error.remedy) > 8
    assert str(error) == f"{error.source}: {error.cause}. {error.remedy}"


@pytest.mark.parametrize("case", BAD_CIF)
def test_bad_cif(case, tmp_path):
    changes, cause = BAD_CIF[case]
    path = cif(tmp_path, **changes)
    with pytest.raises(CrystalError) as caught:
        read_crystal(path)
    assert_tells(caught.value, path, cause)


BAD_FILES = {
    "missing.cif": (None, "no such file"),
    "folder.cif": ("folder", "cannot be read"),
    "empty.cif": ("", "empty"),
    "blank.cif": (" \n\n\0", "empty"),
    "garbage.cif": ("\x89PNG\r\n\x1a\n\0\0\0", "not a valid CIF"),
    "words.cif": ("the cat sat on the mat", "not a valid CIF"),
    "header.cif": ("data_x\n_cell_length_a 5\n", "no data block has atoms"),
    "x.pdb": ("ATOM", "not read"),
    "README": ("text", "not read"),
    "POSCAR": ("x\n1.0\n5 0 0\n0 5 0\n", "POSCAR"),
    "POSCAR_vasp4": ("x\n1\n5 0 0\n0 5 0\n0 0 5\n1\nDirect\n0 0 0\n", "element symbols"),
    "CONTCAR.vasp": ("x\n1\n5 0 0\n0 5 0\n0 0 5\nSi\n1\nDirect\nnan 0 0\n", "coordinates"),
    "plain.xyz": ("1\n\nSi 0 0 0\n", "periodic"),
    "slab.extxyz": (
        '1\nLattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3 pbc="T T F"\nSi 0 0 0\n',
        "periodic",
    ),
    "nan.extxyz": (
        '1\nLattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3\nSi nan 0 0\n',
        "coordinates",
    ),
    "zero.extxyz": (
        '1\nLattice="5 0 0 0 5 0 0 0 0" Properties=species:S:1:pos:R:3\nSi 0 0 0\n',
        "cell",
    ),
    "cut.extxyz": ('2\nLattice="5 0 0 0 5 0 0 0 5"\nSi 0 0 0\n', "extxyz"),
    "none.xyz": ('0\nLattice="5 0 0 0 5 0 0 0 5" pbc="T T T"\n', "no atoms"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tmp_path):
    text, cause = BAD_FILES[name]
    path = tmp_path / name
    if text == "folder":
        path.mkdir()
    elif text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CrystalError) as caught:
        read_crystal(path)
    assert_tells(caught.value, path, cause)


@pytest.mark.parametrize(
    ("species", "coords", "cause"),
    [
        ([{"Si": 0.5}, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]], "partially occupied"),
        ([{"Si": 0.5, "Al": 0.5}, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]], "partially occupied"),
        ([DummySpecies("X"), "O"], [[0, 0, 0], [0.5, 0.5, 0.5]], "no element"),
        (["Lr", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]], "no element"),
        (["Si", "O"], [[0, 0, 0], [0.999, 0, 0]], "overlap"),
        (["Si", "O"], [[0, 0, 0], [float("nan"), 0, 0]], "coordinates"),
        ([], [], "no atoms"),
    ],
)
def test_bad_structure(species, coords, cause):
    with pytest.raises(CrystalError) as caught:
        read_crystal(Structure(Lattice.cubic(5), species, coords), name="mine")
    assert_tells(caught.value, "mine", cause)


def test_what_is_no_crystal():
    with pytest.raises(CrystalError, match="dict is no crystal"):
        read_crystal({})
    with pytest.raises(CrystalError, match="do not fit"):
        crystal_from_arrays(np.eye(3) * 5, [14, 8], [[0, 0, 0]])
    with pytest.raises(CrystalError, match="atomic number"):
        crystal_from_arrays(np.eye(3) * 5, [14.5], [[0, 0, 0]])


def test_overlaps_in_ten_thousand_atoms_are_found():
    points = (np.stack(np.meshgrid(*[np.arange(22)] * 3), -1).reshape(-1, 3) + 0.5) / 22
    points[-1] = points[0] + [-0.5 / 22, 0, 0] + np.array([-1e-3, 0, 0])  # across the cell's face
    points[0, 0] = 0.0
    with pytest.raises(CrystalError, match="2 of 10648 atoms overlap"):
        crystal_from_arrays(np.eye(3) * 50, np.full(len(points), 6), points)


# -------------------------------------------------------------------------------------- fuzz


def survives(path, content):
    """Read a damaged file; True if it was read, False if refused with file, cause and remedy."""
    path.write_bytes(content)
    try:
        read_crystal(path)
    except CrystalError as error:
        refusal = error
    else:
        return True
    assert str(path) == refusal.source
    assert refusal.cause
    assert refusal.remedy
    return False


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*its atoms are not those")
@pytest.mark.parametrize("kind", ["cif", "symmetric cif", "poscar", "extxyz"])
def test_damaged_files_raise_nothing_else(kind, tmp_path):
    rng = np.random.default_rng(0)
    path = write(iza("CAN"), kind, tmp_path)
    whole = path.read_bytes()
    cuts = np.unique(np.linspace(0, len(whole) - 1, 60).astype(int))
    read = [survives(path, whole[:cut]) for cut in cuts]
    assert not all(read[:30])
    flipped = []
    for _ in range(150):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        where = rng.choice(len(damaged), rng.integers(1, 6), replace=False)
        damaged[where] = rng.integers(0, 256, len(where))
        flipped.append(survives(path, damaged.tobytes()))
    assert any(flipped)
    assert not all(flipped)
