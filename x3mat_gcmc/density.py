"""Densities on the voxels of a unit cell, averaged over its space group."""

from __future__ import annotations

import numpy as np
from numba import njit

from x3mat.sampling import STRIDE

POINTS = 27  # in each voxel, at which a density is averaged


def orbit_average(
    maps: np.ndarray, rotations: np.ndarray, translations: np.ndarray, points: int = POINTS
) -> np.ndarray:
    """Mean over the operations x' = R x + t of maps (..., n1, n2, n3) that are constant in voxels.

    The image of a voxel is a voxel only on some grids. So the mean over a voxel is that over
    `points` places in it, spread evenly, of the values at their images.

    Examples
    --------
    >>> line = np.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    >>> inversion = np.array([np.eye(3), -np.eye(3)])
    >>> orbit_average(line, inversion, np.zeros((2, 3))).ravel()
    array([2.5, 2.5, 2.5, 2.5])
    """
    shape = maps.shape[-3:]
    flat = np.ascontiguousarray(maps.reshape(-1, int(np.prod(shape))).T, dtype=float)
    offsets = (0.5 + np.arange(1, points + 1)[:, None] * STRIDE) % 1.0
    mean = np.zeros_like(flat)
    _add_images(
        flat, shape, offsets, np.array(rotations, float), np.array(translations, float), mean)
    return (mean.T / (points * len(rotations))).reshape(maps.shape)


@njit(cache=True, nogil=True, error_model="numpy")
def _add_images(flat, shape, offsets, rotations, translations, out):
    """Add to each voxel of `out`, (voxels, maps), the values of `flat` at the images of places."""
    n1, n2, n3 = shape
    for v in range(len(flat)):
        i, j, k = v // (n2 * n3), v // n3 % n2, v % n3
        for o in range(len(offsets)):
            x, y, z = (i + offsets[o, 0]) / n1, (j + offsets[o, 1]) / n2, (k + offsets[o, 2]) / n3
            for m in range(len(rotations)):
                r, t = rotations[m], translations[m]
                a = r[0, 0] * x + r[0, 1] * y + r[0, 2] * z + t[0]
                b = r[1, 0] * x + r[1, 1] * y + r[1, 2] * z + t[1]
                c = r[2, 0] * x + r[2, 1] * y + r[2, 2] * z + t[2]
                a, b, c = a - np.floor(a), b - np.floor(b), c - np.floor(c)
                image = int(a * n1) % n1 * n2 + int(b * n2) % n2  # a - floor(a) may round to 1
                image = image * n3 + int(c * n3) % n3
                for w in range(flat.shape[1]):
                    out[v, w] += flat[image, w]
