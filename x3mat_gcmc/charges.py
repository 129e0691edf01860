"""Partial charges of a framework's atoms, as X(3)mat learned them from DDEC6 charges of QMOF.

The charge of an atom is what a window around it contributes. The same network that reads a
property from windows on a grid so gives a number to every atom, and equal atoms have equal charges.
How well, and how it was trained: tools/charges.py, data/results/mof-charge.

DDEC6 charges (T. A. Manz and N. Gabaldon Limas, RSC Adv. 6, 47771 (2016),
doi:10.1039/C6RA04656H) reproduce the electrostatic potential around the atoms; QMOF has them of
relaxed crystals (PBE).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from x3mat import paths
from x3mat.crystal import Crystal, crystal_from_arrays, symbol
from x3mat.errors import CrystalError
from x3mat.model import X3Mat, load_checkpoint
from x3mat.sampling import Windows, windows_at
from x3mat_gcmc.framework import Framework

MAX_ATOMS = 20_000  # of windows in memory at a time


def atom_windows(crystal: Crystal, radius: float) -> Windows:
    """A window around each atom."""
    return windows_at(crystal, crystal.frac_coords, radius)


def predicted_charges(crystal: Crystal) -> np.ndarray:
    """Charges of the atoms, (N,), in e, of sum zero: the mean is taken off the network's values.

    Raises
    ------
    CrystalError
        An element of the crystal was not among those that the network saw.
    ModelError
        The network's file is missing or damaged.

    Examples
    --------
    >>> from x3mat import databases
    >>> crystal = databases.iza("SOD")
    >>> charges = predicted_charges(crystal)
    >>> bool(charges[crystal.species == 14].min() > 1 > 0 > charges[crystal.species == 8].max())
    True
    """
    model, known = _model()
    unseen = sorted({int(z) for z in crystal.species} - known)
    if unseen:
        raise CrystalError(
            crystal.name, f"charges of {', '.join(map(symbol, unseen))} were never learned",
            "Give charges in a CIF, under _atom_site_charge, or simulate without charges.",
        )  # fmt: skip
    windows = atom_windows(crystal, model.config.radius)
    charges = model.contributions(windows, MAX_ATOMS)[:, 0].double().numpy()
    return charges - charges.mean()


def with_predicted_charges(framework: Framework | Crystal) -> Framework:
    """A framework with :func:`predicted_charges`, not its own; raises their errors."""
    crystal = crystal_from_arrays(framework.lattice, framework.species, framework.frac_coords,
                                  symprec=0.0, name=framework.name)  # fmt: skip
    return Framework(framework.lattice, framework.species, framework.frac_coords,
                     predicted_charges(crystal), framework.name)  # fmt: skip


@cache
def _model() -> tuple[X3Mat, set[int]]:
    model, about = load_checkpoint(paths.data() / "forcefields" / "ddec6-charges.pt")
    return model, set(about["species"])
