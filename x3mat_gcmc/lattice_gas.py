"""Where molecules are, by a Langmuir lattice gas: what some networks are told of each window.

Energies of a molecule in a rigid framework with given charges are cheap. A lattice gas turns them
into densities of each gas k, with the mean Boltzmann factor B of a molecule at r,

    ρ_k(r) = z_k B_k(r) / (1 + v G_s Σ_m z_m B_m(r)),      v = 60 Å3, s = 1.5 Å,

where G_s blurs by a Gaussian: molecules exclude each other from their surroundings, and do not
attract each other. A window sees the density around its centre, blurred by a Gaussian of 1 Å. Why
these constants, and what it helps: tools/places.py, data/results/mof-co2n2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import constants, fft, ndimage
from torch import Tensor, nn

from x3mat.errors import ModelError
from x3mat.model import X3Mat, X3MatConfig
from x3mat.sampling import STRIDE, Windows
from x3mat_gcmc.charges import with_predicted_charges
from x3mat_gcmc.engine import free_memory
from x3mat_gcmc.forcefield import guest
from x3mat_gcmc.framework import Framework
from x3mat_gcmc.system import (
    GCMCSettings,
    dilute_densities,
    make_grids,
    make_guests,
    make_system,
)

EXCLUDED, RANGE = 60.0, 1.5  # v in Å3, s in Å
SEEN = 1.0  # Å
PLACES = STRIDE * np.arange(384)[:, None] % 1.0  # spread evenly; fractions of the cell
QUANTILES = 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0  # of what is seen there
SMALL = 1e-3  # g/L, added before a logarithm is taken
MOST = 1e6  # 1/Å3; such places are full long before
STEEPEST = 3.0  # logarithm of the largest factor by which a network corrects a density
#: Settings of GCMC on which densities depend.
CONDITIONS = ("gases", "fractions", "temperature", "pressure", "force_field", "charges", "cutoff",
              "spacing")  # fmt: skip


def blurred(lattice: np.ndarray, density: np.ndarray, sd: float) -> np.ndarray:
    """A periodic density, (n1, n2, n3), convolved with a Gaussian of ``sd`` Å.

    Examples
    --------
    >>> spread = blurred(6.0 * np.eye(3), np.eye(12)[:, :, None] * np.eye(12)[5], 1.0)
    >>> bool(np.isclose(spread.sum(), 12.0))
    True
    """
    n = density.shape
    waves = [fft.fftfreq(n[0], 1 / n[0]), fft.fftfreq(n[1], 1 / n[1]), fft.rfftfreq(n[2], 1 / n[2])]
    k = 2 * np.pi * np.stack(np.meshgrid(*waves, indexing="ij"), -1) @ np.linalg.inv(lattice).T
    out = fft.irfftn(fft.rfftn(density) * np.exp(-0.5 * sd**2 * (k**2).sum(-1)), s=n)
    return out.clip(0)


def dilute(framework: Framework, settings: GCMCSettings, device: str = "cpu") -> list[np.ndarray]:
    """z B of each gas in the voxels, (n1, n2, n3), 1/Å3: densities of molecules without others."""
    guests = make_guests(settings)
    system = make_system(framework, settings, guests)
    make_grids(system, guests, settings, device)
    found = next(dilute_densities([system], guests, [(0, settings)], device))
    return [np.minimum(x, MOST) for x in found]


def densities(
    lattice: np.ndarray, zb: Sequence[np.ndarray], gases: Sequence[str],
    excluded: float = EXCLUDED, reach: float = RANGE,
) -> list[np.ndarray]:  # fmt: skip
    """ρ of each gas in the voxels, g/L, from :func:`dilute`; v in Å3, s in Å."""
    around = 1 + excluded * blurred(lattice, sum(zb), reach)
    units = [1e27 / constants.N_A * guest(gas)["molar_mass"] for gas in gases]  # at 1/Å3
    return [unit * x / around for unit, x in zip(units, zb, strict=True)]


def seen_at(lattice: np.ndarray, density: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What windows around places, (W, 3) fractional, see of a density, (W,)."""
    voxels = places.T * np.array(density.shape)[:, None] - 0.5  # of which values are at the middle
    return ndimage.map_coordinates(blurred(lattice, density, SEEN), voxels, order=1,
                                   mode="grid-wrap")  # fmt: skip


def distribution(mean: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Logarithms of mean densities, (gases,), and of quantiles of those seen, (gases, places)."""
    quantiles = np.quantile(seen.astype(float), QUANTILES, axis=1).ravel()
    return np.log(np.concatenate([mean, quantiles]) + SMALL)


def told_of(spread: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What is told of windows beside the densities that they see, (gases, W): logarithms of these,
    and the :func:`distribution` in the crystal; (W, gases (2 + quantiles))."""
    return np.column_stack([np.log(seen.T + SMALL), np.tile(spread, (seen.shape[1], 1))])


def told(windows: Windows, conditions: Mapping) -> np.ndarray:
    """What :class:`ToldX3Mat` is told of the windows of a crystal.

    Parameters
    ----------
    windows : Windows
    conditions : mapping
        Of the gas and its simulation, as `GCMCSettings` has them: those in :data:`CONDITIONS`.

    Returns
    -------
    (W, gases (3 + quantiles)) array
        Densities, g/L, scaled such that their mean over the cell is exact; then :func:`told_of`.

    Raises
    ------
    CrystalError
        An element of the crystal has no charges or parameters.
    DataError
        numba is not installed.
    """
    free_memory("cpu")  # raises the error
    settings = GCMCSettings(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in conditions.items()})  # fmt: skip
    framework = with_predicted_charges(windows.crystal)
    found = densities(framework.lattice, dilute(framework, settings), settings.gases)
    mean, places = np.array([x.mean() for x in found]), np.vstack([PLACES, windows.centers])
    seen = np.array([seen_at(framework.lattice, x, places) for x in found])
    everywhere, here = np.split(seen, [len(PLACES)], axis=1)
    exact = mean / np.maximum(here @ windows.weights / windows.n_windows, SMALL**2)
    return np.column_stack(
        [(here * exact[:, None]).T, told_of(distribution(mean, everywhere), here)])  # fmt: skip


class ToldX3Mat(X3Mat):
    """Contributions y = ρ exp(a) + scale · b; what is :func:`told` begins with the densities ρ, and
    the probes' scalars and the rest of it give a and b, which are zero at first.

    Its configuration has an output for each gas and ``encoding = "crystal"``.

    Attributes
    ----------
    standard : (2, T) buffer
        Mean and standard deviation, over the training set, of what is told beside densities.
    """

    def __init__(self, config: X3MatConfig):
        super().__init__(config)
        c, n = config.channels, config.outputs
        t = n * (2 + len(QUANTILES))
        self.head = nn.Sequential(nn.Linear(c + t, c), nn.SiLU(), nn.Linear(c, 2 * n))
        for p in self.head[-1].parameters():
            nn.init.zeros_(p)
        self.register_buffer("standard", torch.stack([torch.zeros(t), torch.ones(t)]))

    def readout(self, scalars: Tensor, told: Tensor | None) -> Tensor:
        if told is None:
            raise ModelError("windows", "this network has to be told densities",
                             "Cut them by Ensemble.windows, share the atoms of a crystal.")
        density, more = told.tensor_split([self.config.outputs], dim=1)
        more = (more - self.standard[0]) / self.standard[1]
        a, b = self.head(torch.cat([self.norm(scalars), more], 1)).chunk(2, 1)
        return density * torch.exp(a.clamp(-STEEPEST, STEEPEST)) + self.scale * b
