"""Which parts of a framework's pores a nitrogen molecule can reach from outside.

The criterion is an energy, from the force field of the simulations themselves: the Lennard-Jones
energy of N2 at each point of a grid, in its best orientation, must stay below 15 k_B T (the
criterion of Kim, Martin, Rubel, Haranczyk and Smit, J. Chem. Theory Comput. 8, 1684 (2012), for
a spherical probe). A connected region is accessible if it percolates, that is if it meets a
periodic image of itself; every other region is a closed pocket.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numba
import numpy as np
from raspa import GCMCSettings, load_force_field, perpendicular_widths
from scipy import ndimage
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from x3mat.crystal import Crystal

_SYMBOLS = {8: "O", 14: "Si"}


@numba.njit(cache=True)
def _site_energy(lattice, frac_coords, epsilon, sigma, shape, reach, cutoff):  # pragma: no cover
    """Lennard-Jones energy (K) of one site at each grid point; images included."""
    energy = np.zeros((shape[0], shape[1], shape[2]))
    step = np.empty((3, 3))
    for axis in range(3):
        step[axis] = lattice[axis] / shape[axis]
    for atom in range(len(frac_coords)):
        scaled = frac_coords[atom] * shape
        base = np.floor(scaled).astype(np.int64)
        offset = base - scaled
        for i in range(-reach[0], reach[0] + 1):
            row = (i + offset[0]) * step[0]
            for j in range(-reach[1], reach[1] + 1):
                point = row + (j + offset[1]) * step[1]
                # range of k within the cutoff: |point + (k + offset) c| <= cutoff
                a = (step[2] ** 2).sum()
                b = (point * step[2]).sum()
                d = b * b - a * ((point**2).sum() - cutoff * cutoff)
                if d <= 0:
                    continue
                root = np.sqrt(d)
                low = int(np.ceil((-b - root) / a - offset[2]))
                high = int(np.floor((-b + root) / a - offset[2]))
                ii = (base[0] + i) % shape[0]
                jj = (base[1] + j) % shape[1]
                for k in range(low, high + 1):
                    t = k + offset[2]
                    r2 = (
                        (point[0] + t * step[2, 0]) ** 2
                        + (point[1] + t * step[2, 1]) ** 2
                        + (point[2] + t * step[2, 2]) ** 2
                    )
                    s6 = (sigma[atom] * sigma[atom] / max(r2, 0.25)) ** 3
                    kk = (base[2] + k) % shape[2]
                    energy[ii, jj, kk] += 4.0 * epsilon[atom] * (s6 * s6 - s6)
    return energy


def energy_grid(
    crystal: Crystal, settings: GCMCSettings | None = None, *, spacing: float = 0.25
) -> np.ndarray:
    """Lennard-Jones energy of N2 on a grid, minimised over 13 orientations.

    Parameters
    ----------
    crystal : Crystal
        Silica framework.
    settings : GCMCSettings, optional
        Force field and cutoff; charges are left out.
    spacing : float
        Greatest grid spacing, Å.

    Returns
    -------
    numpy.ndarray
        (n1, n2, n3) energy in K (divided by k_B) with the molecule's centre at the grid point
        (i/n1, j/n2, k/n3); values above 10^5 K are cut.
    """
    settings = settings or GCMCSettings()
    force_field = load_force_field(settings.force_field)
    framework, guest = force_field["framework"], force_field["guest"]
    site = guest["types"]["N"]
    bond = max(s["z"] for s in guest["sites"])
    atoms = [framework[_SYMBOLS[int(z)]] for z in crystal.species]
    epsilon = np.sqrt([a["epsilon"] * site["epsilon"] for a in atoms])
    sigma = np.array([(a["sigma"] + site["sigma"]) / 2 for a in atoms])
    lattice = np.ascontiguousarray(crystal.lattice)
    shape = np.ceil(np.linalg.norm(lattice, axis=1) / spacing - 1e-9).astype(np.int64)
    reach = np.ceil(settings.cutoff / perpendicular_widths(lattice) * shape).astype(np.int64) + 1
    one = _site_energy(
        lattice, np.array(crystal.frac_coords), epsilon, sigma, shape, reach, settings.cutoff
    )
    one = np.minimum(one, 1e5)
    half = [v for v in product((-1, 0, 1), repeat=3) if v > (0, 0, 0)]
    best = np.full(one.shape, np.inf)
    for direction in np.array(half, dtype=float):
        unit = direction / np.linalg.norm(direction)
        shift = bond * unit @ np.linalg.inv(lattice) * shape
        ends = [ndimage.shift(one, sign * shift, order=1, mode="grid-wrap") for sign in (1, -1)]
        np.minimum(best, ends[0] + ends[1], out=best)
    return np.minimum(best, 1e5)


def regions(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected regions of a periodic grid, and which of them percolate.

    Parameters
    ----------
    free : numpy.ndarray
        (n1, n2, n3) bool; six neighbours, periodic along all axes.

    Returns
    -------
    labels : numpy.ndarray
        (n1, n2, n3) int, 0 where not free, else 1, 2, ...
    percolates : numpy.ndarray
        (n_regions + 1,) bool: region k meets a periodic image of itself; entry 0 is False.

    Examples
    --------
    >>> free = np.zeros((4, 4, 4), dtype=bool)
    >>> free[:, 0, 0] = True  # a channel along the first axis
    >>> free[3, 2, 2] = free[0, 2, 2] = True  # a pocket across the boundary
    >>> labels, percolates = regions(free)
    >>> percolates.tolist(), bool(labels[3, 2, 2] == labels[0, 2, 2])
    ([False, True, False], True)
    """
    parts, n_parts = ndimage.label(free)
    edges: dict[int, set[tuple[int, tuple[int, ...]]]] = {k: set() for k in range(n_parts + 1)}
    for axis in range(3):
        last, first = parts.take(-1, axis), parts.take(0, axis)
        both = (last > 0) & (first > 0)
        shift = tuple(int(axis == k) for k in range(3))
        back = tuple(-s for s in shift)
        for u, v in {(int(a), int(b)) for a, b in zip(last[both], first[both], strict=True)}:
            edges[u].add((v, shift))
            edges[v].add((u, back))
    region = np.zeros(n_parts + 1, dtype=np.int64)
    percolates = [False]
    for seed in range(1, n_parts + 1):
        if region[seed]:
            continue
        percolates.append(False)
        region[seed] = len(percolates) - 1
        image, queue = {seed: (0, 0, 0)}, deque([seed])
        while queue:
            u = queue.popleft()
            for v, shift in edges[u]:
                there = tuple(a + b for a, b in zip(image[u], shift, strict=True))
                if v not in image:
                    image[v] = there
                    region[v] = region[seed]
                    queue.append(v)
                elif image[v] != there:
                    percolates[-1] = True
    return region[parts], np.array(percolates)


@dataclass(frozen=True, eq=False)
class PoreMap:
    """Accessible and closed parts of the pores.

    Attributes
    ----------
    accessible, closed : numpy.ndarray
        (n1, n2, n3) bool on grid points (i/n1, j/n2, k/n3).
    lattice : numpy.ndarray
        (3, 3) rows a, b, c in Å.
    labels : numpy.ndarray
        (n1, n2, n3) number of the region, 0 in the wall.
    """

    accessible: np.ndarray
    closed: np.ndarray
    lattice: np.ndarray
    labels: np.ndarray

    def contains(self, points: np.ndarray) -> np.ndarray:
        """(M,) bool: is each point (fractional) in an accessible region?

        A point inside the wall belongs to the region of the nearest grid point that is free.
        """
        shape = np.array(self.labels.shape)
        voxel = np.rint(np.asarray(points) % 1.0 * shape).astype(int) % shape
        if not self.closed.any() or not self.accessible.any():
            return np.full(len(voxel), bool(self.accessible.any()))
        pad = np.minimum(np.ceil(2.0 / np.linalg.norm(self.lattice, axis=1) * shape), shape)
        pad = pad.astype(int)
        wall = np.pad(self.labels == 0, [(p, p) for p in pad], mode="wrap")
        spacing = np.linalg.norm(self.lattice, axis=1) / shape
        nearest = ndimage.distance_transform_edt(
            wall, sampling=spacing, return_distances=False, return_indices=True
        )
        where = nearest[(slice(None), *(voxel + pad).T)].T
        return self.accessible[tuple(((where - pad) % shape).T)]

    def blocking_spheres(self, *, margin: float = 0.3) -> tuple[tuple[float, ...], ...]:
        """Spheres (x, y, z fractional, radius Å) that cover the closed regions and nothing else.

        Each closed region is covered greedily; a sphere reaches no closer than `margin` (Å) to
        an accessible grid point. For `GCMCSettings.blocking_pockets`.
        """
        shape = np.array(self.labels.shape)
        images = np.array(list(product((-1, 0, 1), repeat=3)))
        open_points = np.argwhere(self.accessible) / shape
        near = (open_points[None] + images[:, None]).reshape(-1, 3)
        near = near[((near > -0.6) & (near < 1.6)).all(1)]
        tree = cKDTree(near @ self.lattice) if len(near) else None
        spheres = []
        for region in np.unique(self.labels[self.closed]):
            left = np.argwhere(self.labels == region) / shape
            while len(left):
                candidates = left[:: max(1, len(left) // 400)]
                delta = left[None] - candidates[:, None]
                distance = np.linalg.norm((delta - np.rint(delta)) @ self.lattice, axis=-1)
                limit = np.full(len(candidates), np.inf)
                if tree is not None:
                    limit = tree.query(candidates @ self.lattice)[0] - margin
                limit = np.maximum(limit, margin)
                covered = distance <= limit[:, None]
                best = int(np.argmax(covered.sum(1) - 1e-3 * distance.max(1)))
                radius = min(limit[best], distance[best].max() + margin)
                spheres.append((*map(float, candidates[best]), float(radius)))
                left = left[distance[best] > radius]
        return tuple(spheres)


def pore_map(
    crystal: Crystal,
    settings: GCMCSettings | None = None,
    *,
    spacing: float = 0.25,
    threshold: float = 15.0,
    energy: np.ndarray | None = None,
) -> PoreMap:
    """Accessible and closed regions of a framework's pores for N2.

    Parameters
    ----------
    crystal : Crystal
    settings : GCMCSettings, optional
        Force field, cutoff and temperature.
    spacing : float
        Greatest grid spacing, Å.
    threshold : float
        Greatest energy of a free grid point, in k_B T above the gas.
    energy : numpy.ndarray, optional
        The crystal's `energy_grid`, if at hand.

    Returns
    -------
    PoreMap
    """
    settings = settings or GCMCSettings()
    if energy is None:
        energy = energy_grid(crystal, settings, spacing=spacing)
    labels, percolates = regions(energy < threshold * settings.temperature)
    accessible = percolates[labels]
    return PoreMap(accessible, (labels > 0) & ~accessible, np.array(crystal.lattice), labels)
