"""Force fields from ``data/forcefields``, and fugacities of gases.

A file of ``data/forcefields`` describes a "framework", a "guest", or both, and names its sources.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from x3mat import paths
from x3mat.errors import DataError

COULOMB = 167_100.947  # e^2 / (4 pi epsilon_0 k_B) in K Å; CODATA 2018
BOND = 2.0  # Å, longest bond of silicon and oxygen
#: Element symbols by atomic number - 1.
SYMBOLS = (
    "H", "He", "Li", "Be", "B", "C", "N", "O", "F", "Ne", "Na", "Mg", "Al", "Si", "P", "S",
    "Cl", "Ar", "K", "Ca", "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga",
    "Ge", "As", "Se", "Br", "Kr", "Rb", "Sr", "Y", "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd",
    "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe", "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm",
    "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu", "Hf", "Ta", "W", "Re", "Os",
    "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn", "Fr", "Ra", "Ac", "Th", "Pa",
    "U", "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm",
)  # fmt: skip


@lru_cache
def load_force_fields() -> dict[str, dict[str, Any]]:
    """All files of ``data/forcefields`` by name; each has a "framework", a "guest", or both."""
    folder = paths.data() / "forcefields"
    return {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))}


def guest(name: str) -> dict[str, Any]:
    """Parameters of a guest molecule, for example ``guest("CO2")["sites"]``.

    Raises
    ------
    DataError
        No file describes it.
    """
    known = {f["guest"]["name"]: f["guest"] for f in load_force_fields().values() if "guest" in f}
    if name not in known:
        raise DataError(name, "it is no known gas", f"Choose from {', '.join(sorted(known))}.")
    return known[name]


def framework_parameters(name: str) -> dict[str, dict[str, float]]:
    """Lennard-Jones parameters (and charges) of framework atoms, by element symbol.

    Raises
    ------
    DataError
        The force field is unknown.
    """
    known = {k: f["framework"] for k, f in load_force_fields().items() if "framework" in f}
    if name not in known:
        remedy = f"Choose from {', '.join(known)}."
        raise DataError(name, "it is no force field for frameworks", remedy)
    return known[name]


def bond_charges(
    lattice: np.ndarray, frac_coords: np.ndarray, symbols: Sequence[str], name: str
) -> np.ndarray:
    """(N,) charges of framework atoms, e, in proportion to their bonds.

    An atom has the charge that the force field states for its full coordination, times bonds /
    coordination; bonds are contacts below 2 Å between charges of opposite sign. So each Si-O bond
    moves 0.375 e, silicon with its four oxygens has 1.5 e and bridging oxygen -0.75 e as in
    TraPPE-zeo, and the open ends of an interrupted framework, whose hydrogen is not among the
    atoms, leave it neutral: a terminal oxygen (in truth an O-H of one bond to silicon) has
    -0.375 e.

    Raises
    ------
    DataError
        The force field has no charges.
    """
    parameters = framework_parameters(name)
    if any("coordination" not in parameters[s] for s in symbols):
        raise DataError(
            name, "it has no charges",
            'Choose charges "cif" or "none", or a force field with charges.',
        )  # fmt: skip
    full = np.array([parameters[s]["charge"] for s in symbols])
    frac = np.asarray(frac_coords) % 1.0
    images = (frac + np.array(list(np.ndindex(3, 3, 3)))[:, None] - 1).reshape(-1, 3) @ lattice
    pairs = cKDTree(frac @ lattice).query_ball_tree(cKDTree(images), BOND)
    bonds = [np.sum(full[np.array(near) % len(full)] * q < 0)
             for near, q in zip(pairs, full, strict=True)]  # fmt: skip
    return full * np.array(bonds) / [parameters[s]["coordination"] for s in symbols]


def fugacity_coefficients(
    temperature: float, pressure: float, gases: Sequence[str], fractions: Sequence[float]
) -> np.ndarray:
    """Fugacity coefficients of a gas mixture by the Peng-Robinson equation of state.

    Cubic in Z with A = a P / (R T)², B = b P / (R T), van der Waals mixing and no binary
    interaction; of several roots that of the lowest Gibbs energy (D.-Y. Peng and D. B. Robinson,
    Ind. Eng. Chem. Fundam. 15, 59 (1976), doi:10.1021/i160057a011).

    Examples
    --------
    >>> fugacity_coefficients(298.0, 1e5, ["CO2", "N2"], [0.15, 0.85]).round(4).tolist()
    [0.9959, 0.9996]
    """
    data = [guest(g) for g in gases]
    y = np.array(fractions, dtype=float)
    t = temperature / np.array([d["critical_temperature"] for d in data])
    p = pressure / np.array([d["critical_pressure"] for d in data])
    w = np.array([d["acentric_factor"] for d in data])
    kappa = 0.37464 + 1.54226 * w - 0.26992 * w**2
    a = 0.45723553 * (1 + kappa * (1 - np.sqrt(t))) ** 2 * p / t**2
    b = 0.07779607 * p / t
    pairs = np.sqrt(np.outer(a, a))
    big_a, big_b = y @ pairs @ y, y @ b
    roots = np.roots([
        1, big_b - 1, big_a - 3 * big_b**2 - 2 * big_b, big_b**3 + big_b**2 - big_a * big_b
    ])
    roots = roots[np.abs(roots.imag) < 1e-10].real
    s = math.sqrt(2)
    best = None
    for z in roots[roots > big_b]:
        log = b / big_b * (z - 1) - math.log(z - big_b) - big_a / (2 * s * big_b) * (
            2 * pairs @ y / big_a - b / big_b
        ) * math.log((z + (1 + s) * big_b) / (z + (1 - s) * big_b))
        if best is None or y @ log < y @ best:
            best = log
    return np.exp(best)
