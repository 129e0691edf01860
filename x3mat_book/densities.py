"""Units of uptake, and comparison of site maps with simulated densities."""

from __future__ import annotations

import numpy as np

from x3mat.maps import interpolate
from x3mat.sampling import Windows


def window_average(density: np.ndarray, lattice: np.ndarray, points: np.ndarray, radius: float,
                   origin: float | np.ndarray = 0.5) -> np.ndarray:
    """Mean, (...), of a periodic density over a ball around each point.

    ρ̄(r) = ∫ ρ(r') w(r − r') dr' with w uniform in the ball, as a product of Fourier series:
    ŵ(k) = 3 (sin x − x cos x) / x³, x = \\|k\\| radius. Its mean over the cell is that of ρ, the
    uptake: the same identity that contributions obey.

    Parameters
    ----------
    density : (N1, N2, N3) array; on an even grid over the cell
    lattice : (3, 3) array; rows a, b, c in Å
    points : (..., 3) array; fractional coordinates
    radius : float; in Å; 0 interpolates the density itself
    origin : float or (3,)
        Where ``density[0, 0, 0]`` is, in voxels; 0.5 for a histogram, whose values belong to the
        middles of its voxels.

    >>> rho = np.zeros((20, 20, 20))
    >>> rho[:10] = 1.0  # half of the cell
    >>> point = [[0.25, 0.5, 0.5], [0.5, 0.5, 0.5]]
    >>> window_average(rho, 20 * np.eye(3), point, 4.0).round(2).tolist()
    [1.0, 0.5]
    """
    shape = np.array(density.shape)
    frequencies = [np.fft.fftfreq(n, 1 / n) for n in shape[:2]]
    frequencies.append(np.fft.rfftfreq(shape[2], 1 / shape[2]))
    reciprocal = 2 * np.pi * np.linalg.inv(lattice).T  # rows a*, b*, c*
    k = sum(f.reshape([-1 if i == axis else 1 for i in range(3)] + [1]) * reciprocal[axis]
            for axis, f in enumerate(frequencies))
    x = np.maximum(np.linalg.norm(k, axis=-1) * radius, 1e-4)
    ball = np.where(x > 1e-2, 3 * (np.sin(x) - x * np.cos(x)) / x**3, 1 - x**2 / 10)
    smooth = np.fft.irfftn(np.fft.rfftn(density) * ball, s=density.shape, axes=(0, 1, 2))
    return interpolate(smooth, np.asarray(points) * shape - origin, 3 if radius else 1)


def grid_points(windows: Windows) -> np.ndarray:
    """Fractional coordinates of all grid points, (P, 3), in the order of ``windows.orbit``."""
    index = np.unravel_index(np.arange(windows.n_windows), windows.grid)
    return np.stack(index, axis=1) / np.array(windows.grid) + windows.origin


def orbit_mean(windows: Windows, values: np.ndarray) -> np.ndarray:
    """Mean over each orbit, (W,), of values at all grid points, (P,).

    A simulated density obeys the space group only up to noise; this removes that part of it.
    """
    return np.bincount(windows.orbit, values, minlength=windows.n_orbits) / windows.weights


def correlations(windows: Windows, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Spearman and Pearson correlation of two maps, (W,) each, over all grid points.

    Every orbit counts with its multiplicity. 0 where one of the maps is constant.
    """
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(a) < 1e-9 or np.ptp(b) < 1e-9:
        return {"spearman": 0.0, "pearson": 0.0}
    x, y = a[windows.orbit], b[windows.orbit]
    return {"spearman": float(spearmanr(x, y).statistic), "pearson": float(pearsonr(x, y)[0])}


def grams_per_litre(molar_mass: float, volume: float) -> float:
    """g per litre of one molecule (g/mol) in a volume (Å3).

    >>> round(grams_per_litre(28.0134, 1000.0), 2)
    46.52
    """
    return molar_mass / 6.02214076e23 / (volume * 1e-27)
