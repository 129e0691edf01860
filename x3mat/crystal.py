"""Crystals: reading, checking and symmetry.

Every crystal that enters the package passes through :func:`crystal_from_arrays`, which checks that
it is an ordered, physically sensible crystal, finds its space group with spglib and moves atoms
and cell onto that symmetry, so that the operations map the crystal onto itself to machine
precision."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import gemmi
import numpy as np
import spglib
from scipy.spatial import cKDTree

from x3mat.errors import CrystalError

if TYPE_CHECKING:
    from pymatgen.core import Structure

SYMPREC = 0.01  # Å; the IZA frameworks lose symmetry below it, for their coordinates are rounded
MIN_DISTANCE = 0.5  # Å; the shortest bond in nature, H-H, has 0.74 Å
MERGE_DISTANCE = 0.1  # Å; closer images of one CIF site are one atom on a special position
LENGTHS = (1.0, 500.0)  # Å
ANGLES = (10.0, 170.0)  # degrees
VOLUME_PER_ATOM = (1.0, 10_000.0)  # Å3
FULL_OCCUPANCY = 0.999
NO_DUMMIES = "Replace or remove dummy atoms and elements beyond fermium."

_AMU_PER_A3 = 1.66053906892  # g/cm3; CODATA 2022 atomic mass constant


@dataclass(frozen=True, eq=False)
class Crystal:
    """An ordered periodic crystal with its space group; all arrays are read-only."""

    lattice: np.ndarray  # (3, 3) float64; rows a, b, c in Å, right-handed
    species: np.ndarray  # (N,) int64; atomic numbers, 1 to 100
    frac_coords: np.ndarray  # (N, 3) float64; fractional, in [0, 1)
    rotations: np.ndarray  # (G, 3, 3) int64; space-group operations x' = R x + t of this cell,
    translations: np.ndarray  # (G, 3) float64; pure translations of a supercell included
    space_group: int  # international number, 1 to 230
    space_group_symbol: str  # international short symbol
    origin: np.ndarray  # (3,) float64; fractional, of the space group (spglib's setting)
    name: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                kind = np.int64 if field.name in ("species", "rotations") else np.float64
                value = np.array(value, dtype=kind, order="C")
                value.setflags(write=False)
                object.__setattr__(self, field.name, value)

    def __reduce__(self):
        return Crystal, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def n_atoms(self) -> int:
        """Number of atoms in the cell."""
        return len(self.species)

    @property
    def volume(self) -> float:
        """Volume of the cell, Å3."""
        return float(np.linalg.det(self.lattice))

    @property
    def density(self) -> float:
        """Mass density, g/cm3."""
        elements, counts = np.unique(self.species, return_counts=True)
        masses = counts * [gemmi.Element(z).weight for z in elements.tolist()]
        return sum(masses.tolist()) * _AMU_PER_A3 / self.volume

    @property
    def formula(self) -> str:
        """Reduced formula, for example ``SiO2``."""
        return self.structure.composition.reduced_formula

    @property
    def structure(self) -> Structure:
        """A new pymatgen Structure of the same cell."""
        from pymatgen.core import Structure
        return Structure(self.lattice, self.species.tolist(), self.frac_coords)


def symbol(z: int) -> str:
    """Of the element with atomic number `z`."""
    return gemmi.Element(int(z)).name


def read_crystal(source: str | Path | Structure, *, symprec: float = SYMPREC,
                 name: str | None = None) -> Crystal:
    """Read a crystal from a file or take it from a pymatgen Structure.

    Deuterium and tritium become hydrogen; charges and other site properties are dropped. A
    UserWarning says if the atoms of a CIF are not those of the formula it states.

    Parameters
    ----------
    source : path or pymatgen Structure
        ``.cif``; ``POSCAR*``, ``CONTCAR*``, ``.vasp`` or ``.poscar``; ``.extxyz`` or ``.xyz``. Of
        a CIF with several data blocks the first with atoms is read, of an extxyz file with several
        frames the first.
    symprec : float; tolerance in Å at which spglib looks for symmetry
    name : str, optional; default: the file's stem, or the structure's reduced formula

    Raises a CrystalError if the file is missing, empty, truncated, of an unknown kind, or does not
    hold an ordered, sensible crystal (see :func:`crystal_from_arrays`).

    >>> from pymatgen.core import Lattice, Structure
    >>> salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"],
    ...                                  [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> crystal = read_crystal(salt)
    >>> crystal.formula, crystal.n_atoms, crystal.space_group_symbol, len(crystal.rotations)
    ('NaCl', 8, 'Fm-3m', 192)
    """
    if not isinstance(source, (str, Path)):
        label = name or getattr(source, "reduced_formula", type(source).__name__)
        return crystal_from_arrays(*_from_structure(source, label), symprec=symprec, name=label)
    path = Path(source)
    reader = _reader_of(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CrystalError(path, "there is no such file", "Check the path.") from None
    except OSError as error:
        raise CrystalError(path, f"it cannot be read ({error.strerror})", "Check it.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if not text.strip("\0 \t\r\n"):
        raise CrystalError(path, "the file is empty", "Give a complete file.")
    name = path.stem if name is None else name
    return crystal_from_arrays(*reader(text, path), symprec=symprec, name=name, source=path)


def crystal_from_arrays(lattice: np.ndarray, species: np.ndarray, frac_coords: np.ndarray, *,
                        symprec: float = SYMPREC, name: str = "", source: object = None) -> Crystal:
    """Check a crystal and find its symmetry.

    Atoms and cell are moved, by about `symprec` at most, to where the operations found demand
    them: the metric tensor becomes the mean of Rᵀ G R and each atom the mean of g⁻¹ x_g(atom),
    over all operations (R, t) = g. Where spglib finds no group, the crystal is P1. A left-handed
    cell (a, b, c) is replaced by (-a, -b, -c), the same crystal in a right-handed one.

    Parameters
    ----------
    lattice : (3, 3) array; rows a, b, c in Å
    species, frac_coords : (N,), (N, 3) array; atomic numbers and fractional coordinates
    symprec : float; tolerance at which spglib looks for symmetry, Å; 0 for no search (P1)
    name, source : str, object; what error messages call the crystal is source, else name

    Raises a CrystalError for no atoms; shapes that do not fit; numbers that are not finite; lengths
    outside 1-500 Å, angles outside 10-170° or impossible together; less than 1 or more than 10,000
    Å3 per atom; elements outside 1-100; two atoms, or an atom and its image, closer than 0.5 Å."""
    source = source or name or "crystal"
    lattice = np.array(lattice, dtype=np.float64)
    frac_coords = np.array(frac_coords, dtype=np.float64).reshape(-1, 3)
    species = np.array(species)
    if len(species) == 0:
        raise CrystalError(source, "it has no atoms", "Give a file with atoms.")
    if lattice.shape != (3, 3) or species.shape != frac_coords.shape[:1]:
        shapes = f"{lattice.shape}, {species.shape} and {frac_coords.shape}"
        raise CrystalError(source, f"shapes {shapes} do not fit", "Give (3, 3), (N,) and (N, 3).")
    _check_cell(lattice, len(species), source)
    if not np.isfinite(frac_coords).all() or np.abs(frac_coords).max() > 1e6:
        bad = int(np.flatnonzero(~(np.abs(frac_coords) <= 1e6).all(axis=1))[0])
        raise CrystalError(source, f"atom {bad + 1} has no usable coordinates ({frac_coords[bad]})",
                           "Complete or remove that atom.")
    bad = [z for z in species.tolist() if not (isinstance(z, int) and 1 <= z <= 100)]
    if bad:
        raise CrystalError(source, f"{bad[0]!r} is not an atomic number from 1 to 100", NO_DUMMIES)
    if np.linalg.det(lattice) < 0:
        lattice, frac_coords = -lattice, -frac_coords
    frac_coords = _wrap(frac_coords)
    _check_distances(lattice, species, frac_coords, source)
    return _with_symmetry(lattice, species, frac_coords, symprec, str(name))


def _check_cell(lattice: np.ndarray, n_atoms: int, source: object) -> None:
    remedy = "Correct the cell; it must be periodic in three directions, in Å and degrees."
    lengths = np.linalg.norm(lattice, axis=1)
    if not (np.isfinite(lattice).all() and (lengths > 0).all()):
        raise CrystalError(source, "its cell is missing, zero or not finite", remedy)
    if lengths.min() < LENGTHS[0] or lengths.max() > LENGTHS[1]:
        shown = ", ".join(f"{x:.4g}" for x in lengths)
        raise CrystalError(source, f"cell lengths {shown} Å are outside 1-500 Å", remedy)
    unit = lattice / lengths[:, None]
    cosines = np.clip([unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]], -1, 1)
    angles = np.degrees(np.arccos(cosines))
    flat = abs(np.linalg.det(unit)) < 1e-3
    if angles.min() < ANGLES[0] or angles.max() > ANGLES[1] or flat:
        shown = ", ".join(f"{x:.4g}" for x in angles)
        raise CrystalError(source, f"cell angles {shown}° make no sensible cell", remedy)
    per_atom = abs(np.linalg.det(lattice)) / n_atoms
    if not VOLUME_PER_ATOM[0] <= per_atom <= VOLUME_PER_ATOM[1]:
        raise CrystalError(source, f"{per_atom:.4g} Å3 per atom is absurd", remedy)


def _check_distances(lattice: np.ndarray, species: np.ndarray, frac_coords: np.ndarray,
                     source: object) -> None:
    atoms, images = periodic_images(lattice, frac_coords, MIN_DISTANCE)
    distance, other = cKDTree(images).query(frac_coords @ lattice, k=2,
                                            distance_upper_bound=MIN_DISTANCE)
    close = np.flatnonzero(np.isfinite(distance[:, 1]))
    if len(close) == 0:
        return
    i = int(close[np.argmin(distance[close, 1])])
    j = int(atoms[other[i, 1] if atoms[other[i, 0]] == i else other[i, 0]])
    pair = [f"{symbol(species[k])} (atom {k + 1})" for k in (i, j)]
    raise CrystalError(source, f"{pair[0]} and {pair[1]} are {distance[i, 1]:.3f} Å apart;"
                       f" {len(close)} of {len(species)} atoms overlap (closer than {MIN_DISTANCE}"
                       " Å)", "Remove duplicate or disordered atoms.")


def periodic_images(lattice: np.ndarray, frac_coords: np.ndarray,
                    reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of the cell, (N, 3) in [0, 1), and their images within `reach` (Å) of its faces.

    Returns which atom each image belongs to, (M,) int64, and the positions, (M, 3) float64, in Å;
    the first N are the atoms themselves."""
    pad = reach * np.linalg.norm(np.linalg.inv(lattice), axis=0)
    atoms, images = images_in_box(frac_coords, -pad, 1 + pad)
    order = np.argsort((np.floor(images) != 0).any(axis=1), kind="stable")
    return atoms[order], images[order] @ lattice


def images_in_box(frac_coords: np.ndarray, low: np.ndarray,
                  high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Periodic images of atoms, (N, 3) in [0, 1), between two corners, (3,), all fractional.

    Returns which atom each image belongs to, (M,) int64, and its coordinates, (M, 3)."""
    cells = (range(math.floor(a), math.floor(b) + 1) for a, b in zip(low, high, strict=True))
    images = (np.array(list(product(*cells)))[:, None] + frac_coords).reshape(-1, 3)
    near = np.flatnonzero(((images >= low) & (images <= high)).all(axis=1))
    return near % len(frac_coords), images[near]


def _wrap(frac_coords: np.ndarray) -> np.ndarray:
    wrapped = frac_coords - np.floor(frac_coords)
    return np.where(wrapped >= 1.0, 0.0, wrapped)


# --------------------------------------------------------------------------------- symmetry

def _with_symmetry(lattice: np.ndarray, species: np.ndarray, frac_coords: np.ndarray,
                   symprec: float, name: str) -> Crystal:
    found = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # no group found; the type depends on the version
            if symprec > 0:
                found = spglib.get_symmetry_dataset((lattice, frac_coords, species), symprec)
    if found is not None and len(found.rotations) > 1:
        rotations = np.array(found.rotations, dtype=np.int64)
        translations = _wrap(np.array(found.translations))
        moved = _symmetrized(lattice, frac_coords, rotations, translations,
                             found.equivalent_atoms, symprec)
        if moved is not None:
            origin = -np.linalg.solve(found.transformation_matrix, found.origin_shift)
            return Crystal(moved[0], species, moved[1], rotations, translations, int(found.number),
                           str(found.international), _wrap(origin.round(12)), name)
    return Crystal(lattice, species, frac_coords, np.eye(3)[None], np.zeros((1, 3)), 1, "P1",
                   np.zeros(3), name)


def _symmetrized(lattice: np.ndarray, frac_coords: np.ndarray, rotations: np.ndarray,
                 translations: np.ndarray, equivalent_atoms: np.ndarray,
                 symprec: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Lattice and coordinates that obey the operations; None if an orbit does not close."""
    mean = np.einsum("gki,kl,glj->ij", rotations, lattice @ lattice.T, rotations) / len(rotations)
    inverse = np.linalg.inv(lattice)
    values, vectors = np.linalg.eigh(inverse @ mean @ inverse.T)
    new_lattice = lattice @ (vectors * np.sqrt(values)) @ vectors.T  # a symmetric stretch
    inverse_rotations = np.rint(np.linalg.inv(rotations)).astype(np.int64)
    new = np.empty_like(frac_coords)
    order = np.argsort(equivalent_atoms, kind="stable")
    starts = np.flatnonzero(np.diff(equivalent_atoms[order], prepend=-1))
    for orbit in np.split(order, starts[1:]):
        x = frac_coords[orbit[0]]
        images = rotations @ x + translations  # (G, 3)
        offset = frac_coords[orbit][None] - images[:, None]  # (G, M, 3)
        cells = np.rint(offset)
        distance = np.linalg.norm((offset - cells) @ new_lattice, axis=2)
        which = np.argmin(distance, axis=1)
        every, first = np.unique(which, return_index=True)
        if len(every) < len(orbit) or distance.min(axis=1).max() > 10 * symprec:
            return None
        g = np.arange(len(rotations))
        drift = (offset - cells)[g, which]  # x_g(atom) - g x, folded to the nearest image
        x = x + np.einsum("gij,gj->i", inverse_rotations, drift) / len(rotations)
        new[orbit[every]] = rotations[first] @ x + translations[first]
    return new_lattice, _wrap(new)


# ---------------------------------------------------------------------------------- readers

#: Names of files that are read; the group that matches is their kind.
READ = re.compile(r"(?P<cif>\.cif$)|(?P<vasp>\.vasp$|\.poscar$|^POSCAR|^CONTCAR)"
                  r"|(?P<extxyz>\.(ext)?xyz$)", re.IGNORECASE)


def _reader_of(path: Path):
    kind = READ.search(path.name)
    if not kind:
        raise CrystalError(path, f"files of kind {path.suffix or path.name!r} are not read",
                           "Give a .cif, POSCAR/CONTCAR/.vasp or .extxyz/.xyz file.")
    if kind["cif"]:
        return parse_cif
    return partial(_from_ase, kind="vasp" if kind["vasp"] else "extxyz")


@contextlib.contextmanager
def _refusing(kind: str, source: object, remedy: str = "Restore it; it may be truncated."):
    """Turns whatever a parser raises into a CrystalError."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CrystalError(source, f"it is not a valid {kind} ({reason})", remedy) from None


_UNQUOTED = re.compile(
    r"^(\s*_\S+)[ \t]+([^'\"\s_;#][^'\"#\r\n]*[ \t][^'\"#\r\n]*?)[ \t]*(\r?)$", re.MULTILINE)
_CELL_TAGS = [*(f"_cell_length_{x}" for x in "abc"),
              *(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma"))]


def parse_cif(text: str, source: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lattice, atomic numbers and fractional coordinates of all atoms in a CIF's cell.

    Symmetry is expanded. Only occupancies, elements and the formula are checked (a warning, if the
    atoms are not those of ``_chemical_formula_sum``); :func:`crystal_from_arrays` does the rest.
    Raises a CrystalError, whose message calls the file `source`."""
    with _refusing("CIF", source):
        try:
            document = gemmi.cif.read_string(text)
        except ValueError:  # many programs write P 1 without the quotes that CIF demands
            document = gemmi.cif.read_string(_UNQUOTED.sub(r"\1 '\2'\3", text))
        blocks = [(block, gemmi.make_small_structure_from_block(block)) for block in document]
    with_atoms = [(block, small) for block, small in blocks if len(small.sites)]
    if not with_atoms:
        raise CrystalError(source, "no data block has atoms with fractional coordinates",
                           "Give a CIF with _atom_site_fract_x, _y and _z; it may be truncated.")
    block, small = with_atoms[0]
    _check_sites([(s.label, s.occ, s.element.atomic_number) for s in small.sites], source)
    cell = [gemmi.cif.as_number(block.find_value(tag) or "?") for tag in _CELL_TAGS]
    a, b, c = np.cos(np.radians(cell[3:]))
    if not (np.isfinite(cell).all() and 1 + 2 * a * b * c > a * a + b * b + c * c):
        raise CrystalError(source, f"cell lengths and angles {cell} make no cell",
                           "Complete _cell_length_a ... _cell_angle_gamma.")
    lattice = np.array(gemmi.UnitCell(*cell).orth.mat.tolist()).T  # a along x, b in the xy plane
    listed = np.array([s.fract.tolist() for s in small.sites])
    numbers = np.array([s.element.atomic_number for s in small.sites])
    if not np.isfinite(listed).all():
        return lattice, numbers, listed
    rotations, translations = _cif_operations(small, source)
    if len(rotations) > 1:
        images = [_site_images(x, rotations, translations, lattice) for x in listed]
        listed = np.concatenate(images)
        numbers = np.repeat(numbers, [len(x) for x in images])
    formula = gemmi.cif.as_string(block.find_value("_chemical_formula_sum") or "?")
    _check_formula(formula, numbers, text, source)
    return lattice, numbers, listed


def _check_formula(formula: str, numbers: np.ndarray, text: str, source: object) -> None:
    """Warn if the atoms are not those of the stated formula; refuse if the last line is cut too."""
    stated = np.zeros(119)
    for symbol, count in re.findall(r"([A-Z][a-z]?)\s*(\d*\.?\d*)", formula):
        stated[gemmi.Element(symbol).atomic_number] += float(count) if count.strip(".") else 1.0
    found = np.bincount(numbers, minlength=119)
    if not stated.any() or np.abs(stated / stated.sum() - found / found.sum()).max() < 0.005:
        return
    cause = f"its atoms are not those of its formula, {formula}"
    if not text.endswith(("\n", "\r")):
        raise CrystalError(source, f"{cause}, and its last line is cut", "Give a complete file.")
    warnings.warn(f"{source}: {cause}; some may be missing", stacklevel=2)


def _check_sites(sites: list[tuple[str, float, int]], source: object) -> None:
    partial = [label for label, occupancy, _ in sites if occupancy < FULL_OCCUPANCY]
    if partial:
        raise CrystalError(source, f"{len(partial)} of {len(sites)} sites are disordered or"
                           f" partially occupied, first {partial[0]}",
                           "Give an ordered model, with every occupancy 1.")
    dummies = [label for label, _, number in sites if not 1 <= number <= 100]
    if dummies:
        raise CrystalError(source, f"site {dummies[0]!r} is no element from 1 to 100", NO_DUMMIES)


def _cif_operations(small: gemmi.SmallStructure, source: object) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (G, 3, 3) and translations (G, 3) that a CIF states; identity if it states none."""
    name = small.spacegroup_hm.strip("?. ")
    try:
        if small.symops:
            operations = [gemmi.Op(triplet) for triplet in small.symops]
        elif small.spacegroup_hall.strip("?. "):
            operations = list(gemmi.symops_from_hall(small.spacegroup_hall))
        elif name:
            group = gemmi.find_spacegroup_by_name(name, small.cell.alpha, small.cell.gamma)
            operations = list(group.operations())
        elif small.spacegroup_number:
            operations = list(gemmi.find_spacegroup_by_number(small.spacegroup_number).operations())
        else:
            operations = [gemmi.Op()]
    except (ValueError, RuntimeError, AttributeError):
        raise CrystalError(source, f"its symmetry ({name or 'not named'}) cannot be read",
                           "List its _space_group_symop_operation_xyz.") from None
    rotations, translations = [op.rot for op in operations], [op.tran for op in operations]
    return np.array(rotations) / gemmi.Op.DEN, np.array(translations) / gemmi.Op.DEN


def _site_images(x: np.ndarray, rotations: np.ndarray, translations: np.ndarray,
                 lattice: np.ndarray) -> np.ndarray:
    """Distinct images of one site, (M, 3); those on a special position are averaged."""
    images = _wrap(rotations @ x + translations)
    offset = images[None] - images[:, None]
    offset -= np.rint(offset)
    same = np.linalg.norm(offset @ lattice, axis=2) < MERGE_DISTANCE
    kept = np.unique(np.argmax(same, axis=1))
    weights = same[kept] / same[kept].sum(axis=1, keepdims=True)
    return images[kept] + np.einsum("kg,kgi->ki", weights, offset[kept])


def _from_structure(structure: object, source: object) -> tuple:
    from pymatgen.core import DummySpecies, Structure
    if not isinstance(structure, Structure):
        raise CrystalError(source, f"{type(structure).__name__} is no crystal",
                           "Give a path or a pymatgen Structure.")
    elements = [next(iter(site.species)) for site in structure]
    numbers = [0 if isinstance(e, DummySpecies) else e.Z for e in elements]
    _check_sites([(site.species_string, float(site.is_ordered), number)
                  for site, number in zip(structure, numbers, strict=True)], source)
    return structure.lattice.matrix, np.array(numbers), structure.frac_coords


def _from_ase(text: str, source: object, kind: str) -> tuple:
    from ase.io import read
    with _refusing("POSCAR with element symbols" if kind == "vasp" else "extxyz file", source):
        atoms = read(io.StringIO(text), index=0, format=kind)
        lattice, numbers, xyz = atoms.cell.array, atoms.numbers, atoms.positions
    if not atoms.pbc.all():
        raise CrystalError(source, "it is not periodic in three directions",
                           'Give Lattice="..." and pbc="T T T" in the comment line.')
    if len(atoms):
        _check_cell(lattice, len(atoms), source)
    return lattice, numbers, np.linalg.solve(lattice.T, xyz.T).T if len(atoms) else xyz
