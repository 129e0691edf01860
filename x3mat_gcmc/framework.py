"""What a simulation needs of a crystal, and how it is read with its charges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from x3mat.errors import CrystalError, DataError


@dataclass(frozen=True, eq=False)
class Framework:
    """A crystal with charges; where none are needed, a `Crystal` does as well.

    Attributes
    ----------
    lattice, species, frac_coords
        As those of `x3mat.Crystal`: Å by rows, atomic numbers, fractions of the cell.
    charges : (N,) array or None
        e.
    name : str
    """

    lattice: np.ndarray
    species: np.ndarray
    frac_coords: np.ndarray
    charges: np.ndarray | None = None
    name: str = ""


def read_framework(file: str | Path) -> Framework:
    """A framework from a crystal's file, with the charges of a CIF, or from ``iza:CODE``.

    Raises
    ------
    CrystalError
        As `read_crystal` and `cif_charges`; or there is no such IZA framework.
    """
    from x3mat.crystal import read_crystal
    from x3mat.databases import iza

    name = str(file)
    if name.lower().startswith("iza:"):
        try:
            crystal, charges = iza(name[4:]), None
        except DataError as error:
            raise CrystalError(name, error.cause, error.remedy) from None
    else:
        crystal = read_crystal(file)
        charges = cif_charges(file) if name.lower().endswith(".cif") else None
    return Framework(
        crystal.lattice, crystal.species, crystal.frac_coords, charges, crystal.name or name
    )


def cif_charges(path: str | Path) -> np.ndarray | None:
    """Atomic charges that a CIF states under ``_atom_site_charge``.

    Returns
    -------
    (N,) array or None
        e, in the order of the atoms that `read_crystal` gives; None if none are stated.

    Raises
    ------
    CrystalError
        The file is missing or no valid CIF, or charges are stated for some of the atoms only.
    """
    import gemmi

    from x3mat import crystal as reader

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CrystalError(path, f"it cannot be read ({error.strerror})", "Check it.") from None
    lattice, _, expanded = reader.parse_cif(text, path)
    try:
        document = gemmi.cif.read_string(text)
    except ValueError:  # as `parse_cif` does
        document = gemmi.cif.read_string(reader._UNQUOTED.sub(r"\1 '\2'\3", text))
    blocks = ((block, gemmi.make_small_structure_from_block(block)) for block in document)
    block, small = next((b, s) for b, s in blocks if len(s.sites))
    column = block.find_values("_atom_site_charge")
    if not column:
        return None
    charges = np.array([gemmi.cif.as_number(value) for value in column])
    operations = reader._cif_operations(small, path)
    images = [  # of each listed site, in the order in which `parse_cif` expands them
        len(reader._site_images(np.array(s.fract.tolist()), *operations, lattice))
        for s in small.sites
    ]
    if len(charges) != len(images) or sum(images) != len(expanded) or np.isnan(charges).any():
        raise CrystalError(
            path, "some atoms have no usable charge", "Complete _atom_site_charge for every atom."
        )
    return np.repeat(charges, images)
