"""Detection windows: spheres of atoms on a uniform grid over the unit cell (paper, Fig. 1a-d).

A property Y of a crystal is read as the mean of site contributions y over a grid of P points,

    Y = (1/P) Σ_p y(window around grid point p),

and since y is invariant under rotation and reflection, points that a space-group operation maps
onto each other have equal contributions. One window per orbit, weighted by the orbit's size,
gives the same mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from x3mat.crystal import Crystal, images_in_box
from x3mat.errors import DataError

EDGE = 1e-6  # Å; an atom this far outside the sphere still belongs to it
MAX_DENOMINATOR = 48  # of the translations of space-group operations, supercells included
MAX_GROWTH = 2.0  # an aligned grid may have this many times the points of the plain one
MAX_POINTS = 2_000_000
#: Multiples of it fill a cube evenly: inverse powers of the root g of g⁴ = g + 1 (M. Roberts, "The
#: unreasonable effectiveness of quasirandom sequences", 2018).
STRIDE = 1.2207440846057596 ** -np.arange(1.0, 4.0)

GridKind = Literal["auto", "aligned", "plain"]


class Pairs(NamedTuple):
    """Pairs of atoms within the cutoff, for all windows of a crystal."""

    ptr: np.ndarray  # (W + 1,) offsets of the windows; [0, E] where they share atoms
    src: np.ndarray  # (E,) int32, counted from the first atom of the window, or in the crystal
    dst: np.ndarray  # (E,)
    vector: np.ndarray | None  # (E, 3) from src to dst, Å, where windows share atoms


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one crystal in one compact ragged (CSR) layout.

    Window w holds the atoms ``ptr[w]:ptr[w + 1]`` of ``positions`` and ``species``."""

    centers: np.ndarray  # (W, 3) float64; fractional coordinates
    weights: np.ndarray  # (W,) int64; multiplicities: grid points of each; sum to n_windows
    ptr: np.ndarray  # (W + 1,) int64; offsets of the windows in the two arrays of atoms
    positions: np.ndarray  # (A, 3) float64; relative to the window's centre, Å
    species: np.ndarray  # (A,) int64; atomic numbers
    grid: tuple[int, int, int]  # grid points along a, b and c
    orbit: np.ndarray  # (n1 n2 n3,) int64; window that stands for each grid point (C order)
    origin: np.ndarray  # (3,) float64; fractional coordinates of grid point (0, 0, 0)
    radius: float  # of the sphere, Å
    step: float  # largest allowed grid spacing, Å
    atom: np.ndarray  # (A,) int64; which atom of the crystal each atom is an image of
    crystal: Crystal
    pairs: Pairs | None = None  # of the crystal, if they were found; farther ones have no weight
    told: np.ndarray | None = None  # (W, ...) of them; see x3mat_gcmc.lattice_gas.told

    @property
    def n_windows(self) -> int:
        """Number of grid points."""
        return math.prod(self.grid)

    @property
    def n_orbits(self) -> int:
        """Number of windows kept, one for each orbit of grid points."""
        return len(self.centers)

    @property
    def atoms_per_window(self) -> np.ndarray:
        """Number of atoms in each window, (W,)."""
        return np.diff(self.ptr)

    def expand(self, values: np.ndarray) -> np.ndarray:
        """Values of the windows, (W, ...), on the whole grid, (n1, n2, n3, ...)."""
        return values[self.orbit].reshape(*self.grid, *values.shape[1:])


def sample_windows(crystal: Crystal, radius: float = 6.0, step: float = 2.0, symmetry: bool = True,
                   grid: GridKind = "auto") -> Windows:
    """Cut a crystal into windows (paper, Fig. 1a-d and section "Equivariant graph ...").

    Parameters
    ----------
    crystal : Crystal
    radius : float
        Radius of the sphere, Å (paper: 6 Å for adsorption, 8 Å for band gaps). Periodic images
        are included, also where the sphere is larger than the cell.
    step : float; largest grid spacing along each cell axis, Å (paper: 2 Å)
    symmetry : bool
        Keep one window per orbit of grid points, with its multiplicity as weight. Only operations
        that map the grid onto itself count, so the result is exact for any O(3)-invariant model.
    grid : {"auto", "aligned", "plain"}
        "plain" has ⌈length / step⌉ points along each axis. "aligned" raises these numbers until
        every operation of the space group maps the grid onto itself. "auto" is the aligned grid
        unless that has more than twice the points of the plain one.

    Raises a DataError if radius or step is not positive, the grid unknown or too large (2 million).

    >>> from x3mat import databases
    >>> windows = sample_windows(databases.iza("LTA"))
    >>> windows.grid, windows.n_windows, windows.n_orbits
    ((6, 6, 6), 216, 20)
    """
    if not (0 < radius < 100 and step > 0):
        raise DataError(crystal.name, f"radius {radius} and step {step} are not usable",
                        "give a radius between 0 and 100 Å and a positive step")
    if grid not in get_args(GridKind):
        raise DataError(crystal.name, f"there is no grid {grid!r}",
                        f"choose from {', '.join(get_args(GridKind))}")
    points = choose_grid(crystal, step, grid)
    if math.prod(points) > MAX_POINTS:
        raise DataError(crystal.name, f"a step of {step} Å makes {math.prod(points):,} grid points",
                        f"take a larger step (at most {MAX_POINTS:,} points are allowed)")
    orbit = grid_orbits(crystal, points) if symmetry else np.arange(math.prod(points))
    kept, weights = np.unique(orbit, return_counts=True)
    centers = np.stack(np.unravel_index(kept, points), axis=1) / np.array(points) + crystal.origin
    ptr, positions, atom = cut_spheres(crystal, centers, radius)
    return Windows(
        centers % 1.0 % 1.0,  # twice: −1e-17 % 1.0 is 1.0
        weights.astype(np.int64), ptr, positions, crystal.species[atom], points,
        np.searchsorted(kept, orbit), crystal.origin, float(radius), float(step), atom, crystal)


def windows_at(crystal: Crystal, centers: np.ndarray, radius: float, step: float = 2.0) -> Windows:
    """Windows around given places, (W, 3) fractional, that count equally; ``radius`` as above.

    >>> from x3mat import databases
    >>> crystal = databases.iza("SOD")
    >>> windows_at(crystal, crystal.frac_coords[:2], 1.7).atoms_per_window.tolist()  # O with two Si
    [3, 3]
    """
    ptr, positions, atom = cut_spheres(crystal, centers, radius)
    n = len(centers)
    return Windows(centers, np.ones(n, np.int64), ptr, positions, crystal.species[atom], (n, 1, 1),
                   np.arange(n), centers[0], radius, step, atom, crystal)


def choose_grid(crystal: Crystal, step: float, kind: GridKind = "auto") -> tuple[int, int, int]:
    """Numbers of grid points along a, b, c with spacing ≤ step (see :func:`sample_windows`).

    On a grid x_i = k_i / n_i, the operation x' = R x + t maps points onto points if n_i t_i and
    R_ij n_i / n_j are integers. So n_i is a multiple of the denominators of t_i, and axes that an
    operation mixes (R_ij ≠ 0) share one n."""
    lengths = np.linalg.norm(crystal.lattice, axis=1)
    plain = np.maximum(np.ceil(lengths / step - 1e-9), 1).astype(int)
    if kind == "plain":
        return tuple(plain.tolist())
    denominators = [math.lcm(*(Fraction(t).limit_denominator(MAX_DENOMINATOR).denominator
                               for t in np.unique(column.round(9)).tolist()))
                    for column in _translations_about_origin(crystal).T]
    mixed = coo_array(np.abs(crystal.rotations).sum(axis=0))
    _, group = connected_components(mixed, directed=False)
    aligned = plain.copy()
    for g in np.unique(group):
        axes = np.flatnonzero(group == g)
        d = math.lcm(*(denominators[i] for i in axes))
        aligned[axes] = -(-plain[axes].max() // d) * d
    if kind == "auto" and math.prod(aligned.tolist()) > MAX_GROWTH * math.prod(plain.tolist()):
        return tuple(plain.tolist())
    return tuple(aligned.tolist())


def grid_orbits(crystal: Crystal, points: tuple[int, int, int]) -> np.ndarray:
    """For each grid point (C order) the first point of its orbit, (n1 n2 n3,) int64.

    Operations that do not map the grid onto itself are left out; the others are a subgroup."""
    n = np.array(points)
    k = np.stack(np.unravel_index(np.arange(n.prod()), points))  # (3, P)
    first = np.arange(n.prod())
    shifts = _translations_about_origin(crystal) * n
    for rotation, shift in zip(crystal.rotations, shifts, strict=True):
        matrix = rotation * n[:, None] / n[None, :]
        matrix_int, shift_int = np.rint(matrix).astype(int), np.rint(shift).astype(int)
        if np.abs(matrix - matrix_int).max() > 1e-9 or np.abs(shift - shift_int).max() > 1e-4:
            continue
        image = (matrix_int @ k + shift_int[:, None]) % n[:, None]
        np.minimum(first, np.ravel_multi_index(tuple(image), points), out=first)
    return first


def cut_spheres(crystal: Crystal, centers: np.ndarray,
                radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms within ``radius`` + 1e-6 Å of each centre, every periodic image once.

    ``centers``, (W, 3), are fractional; ``radius`` is in Å. Returns ``ptr``, (W + 1,) int64,
    ``positions``, (A, 3) float64, relative to the centre in Å, and ``atom``, (A,) int64: which
    atom of the crystal it is an image of."""
    reach = (radius + EDGE) * np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)
    wrapped = centers % 1.0
    source, images = images_in_box(crystal.frac_coords, wrapped.min(axis=0) - reach,
                                   wrapped.max(axis=0) + reach)
    atoms, centers_xyz = images @ crystal.lattice, wrapped @ crystal.lattice
    found = cKDTree(atoms).query_ball_point(centers_xyz, radius + EDGE, return_sorted=True)
    counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
    index = np.fromiter(chain.from_iterable(found), dtype=np.int64, count=int(counts.sum()))
    ptr = np.concatenate([[0], np.cumsum(counts)])
    positions = atoms[index] - np.repeat(centers_xyz, counts, axis=0)
    return ptr, positions, source[index]


def neighbours(crystal: Crystal, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of atoms of a crystal closer than ``cutoff`` (Å), periodic images included.

    Returns ``src`` and ``dst``, (E,) int64, sorted by dst, and the vectors from one to the other,
    (E, 3) float64, in Å. A pair occurs as often as there are images within the cutoff.

    >>> from x3mat import databases
    >>> src, dst, vector = neighbours(databases.iza("SOD"), 1.7)  # two Si at each O, first
    >>> len(src), np.bincount(dst).tolist()[:2]
    (96, [2, 2])
    """
    ptr, positions, src = cut_spheres(crystal, crystal.frac_coords, cutoff)
    dst = np.repeat(np.arange(crystal.n_atoms), np.diff(ptr))
    other = (positions**2).sum(axis=1) > EDGE  # not the atom itself
    return src[other], dst[other], -positions[other]


def crystal_pairs(crystal: Crystal, cutoff: float) -> Pairs:
    """The pairs of :func:`neighbours`, in half of the memory."""
    src, dst, vector = neighbours(crystal, cutoff)
    return Pairs(np.array([0, len(src)]), src.astype(np.int32), dst.astype(np.int32),
                 vector.astype(np.float32))


def _translations_about_origin(crystal: Crystal) -> np.ndarray:
    """Translations of the operations, (G, 3), for coordinates counted from the grid's origin.

    With x = y + o, x' = R x + t becomes y' = R y + (t + R o − o). About the standard origin of
    the space group these are fractions with small denominators."""
    shift = crystal.translations + crystal.rotations @ crystal.origin - crystal.origin
    shift -= np.floor(shift + 1e-6)
    return np.where(np.abs(shift) < 1e-6, 0.0, shift)
