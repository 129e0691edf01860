"""One grand-canonical Markov chain as scalar functions, compiled for processor cores and for CUDA.

Every function below works on single numbers and on the flat arrays of `Tables` (read only) and
`Chains` (the state). numba compiles the same source twice: for cores, where threads share the
chains, and for CUDA, with one warp per chain. The lanes of a warp share the trials of an insertion
and the molecules and waves of an energy; all of them come to the same decisions, and the first one
writes, except that each writes its own waves. On a core there is one lane. Draws are numbered, by
chain, move and purpose, so that any lane can make any of them.

Insertions, deletions, reinsertions and changes of species are biased by configuration (Rosenbluth
weights of several trials, places drawn where the framework leaves room), see `move`.

Units: Å, K (energies are E/k_B), elementary charges. Positions are fractions of the simulated
cell. A pose is (x, y, z, a, b, c): a molecule's centre and its axis, a vector of 1 Å, in fractions.
Indices: c chain, p state point, s system (framework), k species, t guest site type.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import current_process
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import config, njit

from x3mat.errors import DataError
from x3mat_gcmc.forcefield import COULOMB
from x3mat_gcmc.system import WARP

if TYPE_CHECKING:
    from numba import cuda  # at run time `_cuda_kernel` puts it in, as some versions do not import

SIMULATED = bool(config.ENABLE_CUDASIM)  # numba's CUDA simulator interprets plain Python
CLOSEST = 0.7  # Å; nearer to an atom, the Lennard-Jones energy is that at this distance
CORE = 1.3  # Å; so near to an atom a molecule overlaps, and 1/r is continued smoothly
OVERLAP = 150.0  # in k_B T; a molecule that has so much energy from some of the rest overlaps
BIG = 1e30  # K; the energy of an overlap
ROUND = 1.5 * 2.0**52  # added and taken off again, it rounds a number to an integer
THREADS = 64  # of a block, one for each node or voxel
LANES = 4 if SIMULATED else WARP  # threads that share a chain on CUDA
REGISTERS = 0  # of a thread at most; 0: as many as the compiler likes
SMALLEST_STEP, LARGEST_TURN = 0.02, 4.0  # Å; size of the vector added to a molecule's axis
SELDOM = 8  # one insertion in so many tells how far its rough weight is off
ORIENTATIONS = 16  # random placements per voxel when the insertion weights are made
TRANSLATION, ROTATION, REINSERTION, SWAP, IDENTITY = range(5)

_F4_ONE, _F4_SIXTH = np.float32(1), np.float32(1 / 6)
_F4_THREE, _F4_FOUR, _F4_SIX = np.float32(3), np.float32(4), np.float32(6)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_NONE, _BIT, _TWO, _THREE = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3)
_POSE = 6  # numbers that a pose takes
_FIRST = 16  # number of the first draw of the trials
_SCALARS: list[str] = []


class Tables(NamedTuple):
    """What does not change during a run; S systems, P state points, K species, T site types."""

    cell: np.ndarray  # (S, 3, 3) rows of the simulated cell, Å
    inverse: np.ndarray  # (S, 3, 3)
    replicas: np.ndarray  # (S, 3) unit cells along each axis
    # framework: grids over the unit cell (cubic B-splines, padded by one node below, two above)
    grid: np.ndarray  # float32, all grids one after another
    grid_shape: np.ndarray  # (S, 3) nodes without padding
    grid_start: np.ndarray  # (S, T); -1 where the site does not feel the framework
    stretch: np.ndarray  # (T,) K; grids hold asinh(U / stretch): the wall becomes a logarithm
    # framework: atoms of the simulated cell for direct sums, which also make the grids
    direct: int  # 1: no grids
    atom_start: np.ndarray  # (S + 1,)
    atoms: np.ndarray  # (A, 3)
    atom_type: np.ndarray  # (A,)
    atom_charge: np.ndarray  # (A,)
    host_lj: np.ndarray  # (F, T, 3) 4 epsilon, sigma^2, energy at the cutoff if shifted
    host_alpha: float  # 1/Å, Ewald parameter of the framework's potential
    host_cutoff: float  # Å, of its real-space part
    wave_start: np.ndarray  # (S + 1,)
    waves: np.ndarray  # (W, 5) 2 pi (h, k, l) of the unit cell, cosine and sine coefficient, K
    # guests
    cutoff: float
    charged: int
    lj: np.ndarray  # (T, T, 3)
    inner: float  # Å; trials feel molecules whose centres are as near as this,
    contact: float  # Å; and none may be nearer than this
    n_sites: np.ndarray  # (K,)
    site_type: np.ndarray  # (K, 3)
    site_z: np.ndarray  # (K, 3) Å along the axis
    site_charge: np.ndarray  # (K, 3)
    reach: np.ndarray  # (K,) greatest |z|, Å
    coulomb_cutoff: np.ndarray  # (S,) Å, half of the simulated cell's least width
    alpha: np.ndarray  # (S,) 1/Å
    # and the waves of their Ewald sum, one of k and -k, in lines along an axis, the longest first
    line_start: np.ndarray  # (S + 1,)
    line_axis: np.ndarray  # (S,)
    lines: np.ndarray  # (L, 5) h, k, l of the first wave, number of waves, place of the first one
    coefficient_start: np.ndarray  # (S,)
    coefficients: np.ndarray  # K; of |structure factor|², those of WARP lines side by side
    constant: np.ndarray  # (S, K) K; tail with the framework
    own: np.ndarray  # (S, K) K; Ewald self and exclusion terms
    tail: np.ndarray  # (S, K, K) K; tail correction of a pair
    # states
    system: np.ndarray  # (P,)
    beta: np.ndarray  # (P,) 1/K
    log_activity: np.ndarray  # (P, K) ln(z V), with z = f / k_B T
    trials: int  # of an insertion
    moves: np.ndarray  # (5,) cumulative probabilities of the kinds of move
    voxels: np.ndarray  # (S, 3) voxels of the unit cell from which insertions are drawn
    cdf: np.ndarray  # cumulative probabilities of the voxels
    cdf_start: np.ndarray  # (P, K)


class Chains(NamedTuple):
    """State of C chains and what the cycles of one launch record; M molecules at most."""

    order: np.ndarray  # (C,) in which the chains are taken, the longest first
    state: np.ndarray  # (C,) state point p
    key: np.ndarray  # (C,) uint64, start of the chain's random numbers
    moves: np.ndarray  # (C,) moves done in all,
    step: np.ndarray  # (C,) and in this phase
    length: np.ndarray  # (C,) moves per cycle
    beta: np.ndarray  # (C,) 1/K, lower while annealing, and
    boost: np.ndarray  # (C,) what is added to ln(z V)
    count: np.ndarray  # (C, K) molecules of each species
    n: np.ndarray  # (C,) molecules
    energy: np.ndarray  # (C,) K
    kind: np.ndarray  # (C, M) species
    molecule: np.ndarray  # (C, 6, M) poses
    size: np.ndarray  # (C, 2) largest displacement (Å) and turn
    tally: np.ndarray  # (C, 2, 5) attempted and accepted moves
    scratch: np.ndarray  # (C, max(trials, LANES)) what lanes tell one another,
    near: np.ndarray  # (C, LANES) uint64, trials near a molecule,
    places: np.ndarray  # (C, trials, 8) poses of trials, their bias and energy,
    partial: np.ndarray  # (C, trials, LANES) and shares of their energies
    counts: np.ndarray  # (C, R, K) molecules at the end of each cycle
    energies: np.ndarray  # (C, R) K
    weights: np.ndarray  # (C, R, K, 2) sum of the weights of insertions, and their number
    density_start: np.ndarray  # (C,) -1: none
    density: np.ndarray  # uint32, histograms of centres on voxels, by species
    structure_start: np.ndarray  # (C,)
    structure: np.ndarray  # (2, 2, ) structure factors of the guests, real and imaginary parts:
    side: np.ndarray  # (C,) of `structure` now; on the other what the latest trial would bring


def scalar(function):
    """Compile a function for cores and note it for CUDA."""
    _SCALARS.append(function.__name__)
    if SIMULATED:
        return function
    # Without _nrt=False every call would count references to some fifty arrays, which costs more
    # than an energy; nothing is allocated here.
    return njit(
        cache=True, nogil=True, forceinline=True, error_model="numpy", _nrt=False,
        fastmath={"contract", "arcp", "nsz"},
    )(function)  # fmt: skip


# ------------------------------------------------------------------------------ random numbers


@scalar
def mixed(z):
    """Scrambled 64 bits: the output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@scalar
def uniform(base, i):
    """Number `i` in (0, 1) of the stream `base`."""
    z = mixed(base + np.uint64(i + 1) * _GAMMA)
    return (np.float64(z >> _11) + 0.5) * 1.1102230246251565e-16


@scalar
def barrier():
    """Wait for the other lanes; on a core there are none."""


@scalar
def is_direct(tables):
    """Whether energies of the framework are sums over its atoms; a constant on CUDA."""
    return tables.direct == 1


@scalar
def is_charged(tables):
    """Whether there are charges; a constant on CUDA."""
    return tables.charged == 1


# ------------------------------------------------------------------------------ energies


@scalar
def lesser(x, y):
    """The lesser number; not every version of numba compiles Python's for CUDA."""
    return x if x < y else y


@scalar
def greater(x, y):
    """The greater number."""
    return x if x > y else y


@scalar
def _line(table, i, w0, w1, w2, w3):
    # i is unsigned: whether an index counts from the end takes CUDA longer to find out than to load
    return w0 * table[i] + w1 * table[i + _BIT] + w2 * table[i + _TWO] + w3 * table[i + _THREE]


@scalar
def _plane(table, i, step, v0, v1, v2, v3, w0, w1, w2, w3):
    return (
        v0 * _line(table, i, w0, w1, w2, w3)
        + v1 * _line(table, i + step, w0, w1, w2, w3)
        + v2 * _line(table, i + _TWO * step, w0, w1, w2, w3)
        + v3 * _line(table, i + _THREE * step, w0, w1, w2, w3)
    )


@scalar
def _weight_0(u):
    v = _F4_ONE - u
    return v * v * v * _F4_SIXTH


@scalar
def _weight_1(u):
    return (_F4_THREE * u * u * u - _F4_SIX * u * u + _F4_FOUR) * _F4_SIXTH


@scalar
def spline(table, start, shape, s, x, y, z):
    """Periodic tricubic B-spline at (x, y, z) in units of the period; table padded by 1 and 2."""
    x = (x - math.floor(x)) * shape[s, 0]
    y = (y - math.floor(y)) * shape[s, 1]
    z = (z - math.floor(z)) * shape[s, 2]
    i = lesser(int(x), shape[s, 0] - 1)
    j = lesser(int(y), shape[s, 1] - 1)
    k = lesser(int(z), shape[s, 2] - 1)
    line = np.uint64(shape[s, 2] + 3)
    plane = np.uint64(shape[s, 1] + 3) * line
    at = np.uint64(start + k) + np.uint64(i) * plane + np.uint64(j) * line
    a, b, c = np.float32(x - i), np.float32(y - j), np.float32(z - k)
    d, e, f = _F4_ONE - a, _F4_ONE - b, _F4_ONE - c
    v0, v1, v2, v3 = _weight_0(b), _weight_1(b), _weight_1(e), _weight_0(e)
    w0, w1, w2, w3 = _weight_0(c), _weight_1(c), _weight_1(f), _weight_0(f)
    return np.float64(
        _weight_0(a) * _plane(table, at, line, v0, v1, v2, v3, w0, w1, w2, w3)
        + _weight_1(a) * _plane(table, at + plane, line, v0, v1, v2, v3, w0, w1, w2, w3)
        + _weight_1(d) * _plane(table, at + _TWO * plane, line, v0, v1, v2, v3, w0, w1, w2, w3)
        + _weight_0(d) * _plane(table, at + _THREE * plane, line, v0, v1, v2, v3, w0, w1, w2, w3)
    )


@scalar
def distance2(cell, s, a, b, c):
    """Squared distance (Å2) of the nearest images, from the difference of positions."""
    a, b, c = a - (a + ROUND - ROUND), b - (b + ROUND - ROUND), c - (c + ROUND - ROUND)
    x = a * cell[s, 0, 0] + b * cell[s, 1, 0] + c * cell[s, 2, 0]
    y = a * cell[s, 0, 1] + b * cell[s, 1, 1] + c * cell[s, 2, 1]
    z = a * cell[s, 0, 2] + b * cell[s, 1, 2] + c * cell[s, 2, 2]
    return x * x + y * y + z * z


@scalar
def lennard_jones(table, t, u, r2):
    """4 epsilon ((sigma/r)^12 - (sigma/r)^6), K, less its value at the cutoff where shifted."""
    w = table[t, u, 1] / greater(r2, CLOSEST * CLOSEST)
    w = w * w * w
    return table[t, u, 0] * (w * w - w) - table[t, u, 2]


@scalar
def screened(alpha, r2):
    """erfc(alpha r) / r, with 1/r continued inside CORE by the even quartic that fits in C2."""
    if r2 >= CORE * CORE:
        r = math.sqrt(r2)
        return math.erfc(alpha * r) / r
    w = r2 / (CORE * CORE)
    return math.erfc(alpha * math.sqrt(r2)) * (1.875 - 1.25 * w + 0.375 * w * w) / CORE


@scalar
def system_of(tables, chains, c):
    """System of a chain, unsigned as all that many arrays are indexed with: whether an index counts
    from the end takes CUDA longer to find out than to load a number."""
    return np.uint64(tables.system[chains.state[c]])


@scalar
def host_lj(tables, s, t, x, y, z):
    """Lennard-Jones energy (K) of a site of type t with all framework atoms within the cutoff."""
    atoms, total = tables.atoms, 0.0
    for i in range(tables.atom_start[s], tables.atom_start[s + _BIT]):
        r2 = distance2(tables.cell, s, x - atoms[i, 0], y - atoms[i, 1], z - atoms[i, 2])
        if r2 < tables.cutoff * tables.cutoff:
            total += lennard_jones(tables.host_lj, tables.atom_type[i], t, r2)
    return total


@scalar
def host_coulomb(tables, s, x, y, z):
    """Real-space part of the framework's Ewald potential, K per elementary charge."""
    atoms, total = tables.atoms, 0.0
    for i in range(tables.atom_start[s], tables.atom_start[s + _BIT]):
        r2 = distance2(tables.cell, s, x - atoms[i, 0], y - atoms[i, 1], z - atoms[i, 2])
        if r2 < tables.host_cutoff * tables.host_cutoff:
            total += tables.atom_charge[i] * screened(tables.host_alpha, r2)
    return COULOMB * total


@scalar
def host_waves(tables, s, x, y, z):
    """Reciprocal part of the framework's Ewald potential, K per elementary charge."""
    x, y, z = x * tables.replicas[s, 0], y * tables.replicas[s, 1], z * tables.replicas[s, 2]
    total = 0.0
    for w in range(tables.wave_start[s], tables.wave_start[s + _BIT]):
        phase = tables.waves[w, 0] * x + tables.waves[w, 1] * y + tables.waves[w, 2] * z
        total += tables.waves[w, 3] * math.cos(phase) + tables.waves[w, 4] * math.sin(phase)
    return total


@scalar
def host(tables, s, t, q, x, y, z):
    """Energy (K) of a site of type t and charge q in the framework."""
    if is_direct(tables):
        energy = host_lj(tables, s, t, x, y, z)
        if is_charged(tables) and q != 0.0:
            energy += q * (host_coulomb(tables, s, x, y, z) + host_waves(tables, s, x, y, z))
        return energy
    start = tables.grid_start[s, t]
    if start < 0:
        return 0.0
    g = spline(
        tables.grid, start, tables.grid_shape, s,
        x * tables.replicas[s, 0], y * tables.replicas[s, 1], z * tables.replicas[s, 2],
    )  # fmt: skip
    return tables.stretch[t] * math.sinh(g)


@scalar
def host_energy(tables, s, k, pose):
    """Energy (K) of a molecule with the framework, and with nothing else."""
    total = 0.0
    for i in range(tables.n_sites[k]):
        z = tables.site_z[k, i]
        total += host(
            tables, s, tables.site_type[k, i], tables.site_charge[k, i],
            pose[0] + z * pose[3], pose[1] + z * pose[4], pose[2] + z * pose[5],
        )  # fmt: skip
    return total


@scalar
def pair_energy(tables, s, k, one, m, two, r2, roughly):
    """Energy (K) of two molecules at the squared distance r2: nearest images within the cutoffs.

    Of Ewald's sum the part in real space; `roughly` takes Coulomb's law for all of it, while all
    sites are each other's nearest images.
    """
    limit, reach = tables.cutoff, tables.reach[k] + tables.reach[m]
    if is_charged(tables):
        limit = tables.coulomb_cutoff[s]
    far, close, total = limit + reach, limit - reach, 0.0
    if r2 >= far * far:
        return 0.0
    close = r2 < close * close
    for i in range(tables.n_sites[k]):
        for j in range(tables.n_sites[m]):
            if far > limit:  # sites lie beside the centres
                v, w = tables.site_z[k, i], tables.site_z[m, j]
                r2 = distance2(
                    tables.cell, s, one[0] - two[0] + v * one[3] - w * two[3],
                    one[1] - two[1] + v * one[4] - w * two[4],
                    one[2] - two[2] + v * one[5] - w * two[5],
                )  # fmt: skip
            if r2 < tables.cutoff * tables.cutoff:
                t, u = tables.site_type[k, i], tables.site_type[m, j]
                total += lennard_jones(tables.lj, t, u, r2)
            q = tables.site_charge[k, i] * tables.site_charge[m, j]
            if is_charged(tables) and q != 0.0:
                if roughly:
                    if close:
                        total += COULOMB * q / math.sqrt(greater(r2, CORE * CORE))
                elif r2 < limit * limit:
                    total += COULOMB * q * screened(tables.alpha[s], r2)
    return total


@scalar
def tail_energy(tables, chains, s, c, k, skip):
    """Energy (K) of a molecule by tails, with the framework and with all but molecule `skip`."""
    total = tables.constant[s, k] + 0.5 * tables.tail[s, k, k]
    for m in range(tables.n_sites.size):
        total += tables.tail[s, k, m] * chains.count[c, m]
    if skip >= 0:
        total -= tables.tail[s, k, chains.kind[c, skip]]
    return total


@scalar
def phase(x):
    """exp(2 pi i x), real and imaginary part, to 1e-11: Taylor series over a quarter of a turn."""
    x -= x + ROUND - ROUND
    near = abs(x) <= 0.25
    x = 2.0 * math.pi * (x if near else math.copysign(0.5, x) - x)
    y = -x * x
    c = 1.0 + y * (1 / 2 + y * (1 / 24 + y * (1 / 720 + y * (1 / 40320 + y * (
        1 / 3628800 + y * (1 / 479001600 + y * (1 / 87178291200 + y * (1 / 20922789888000))))))))
    s = 1.0 + y * (1 / 6 + y * (1 / 120 + y * (1 / 5040 + y * (1 / 362880 + y * (
        1 / 39916800 + y * (1 / 6227020800 + y * (1 / 1307674368000)))))))
    return c if near else -c, x * s


@scalar
def phases(tables, k, pose, a, b, c):
    """exp(2 pi i (a, b, c) x) of three sites at x, real and imaginary parts."""
    x = a * pose[0] + b * pose[1] + c * pose[2]
    y = a * pose[3] + b * pose[4] + c * pose[5]
    p, q = phase(x + tables.site_z[k, 0] * y)
    r, s = phase(x + tables.site_z[k, 1] * y)
    u, v = phase(x + tables.site_z[k, 2] * y)
    return p, q, r, s, u, v


@scalar
def before(w, step):
    """Three complex numbers w divided by those of `step`, whose modulus is 1."""
    return (
        w[0] * step[0] + w[1] * step[1], w[1] * step[0] - w[0] * step[1],
        w[2] * step[2] + w[3] * step[3], w[3] * step[2] - w[2] * step[3],
        w[4] * step[4] + w[5] * step[5], w[5] * step[4] - w[4] * step[5],
    )  # fmt: skip


@scalar
def following(w, last, a, b, c):
    """w z of three complex numbers z = exp(i t): 2 cos(t) w - w / z, with a, b, c = 2 cos(t)."""
    return (
        a * w[0] - last[0], a * w[1] - last[1], b * w[2] - last[2], b * w[3] - last[3],
        c * w[4] - last[4], c * w[5] - last[5],
    )  # fmt: skip


@scalar
def waves_change(tables, chains, c, k, pose, sign, side, lane, lanes):
    """A lane's share of the change of the reciprocal energy (K) as a molecule comes (sign 1) or
    goes (-1).

    U = sum c |S|² over the waves, S = sum q exp(i k x) over all sites of the guests, so that a
    molecule meets its own images, too. With D, what the molecule adds to S, the change is
    sum c D (2 S + D). S is that on the given side of `Chains.structure`; S + D is kept on the side
    that is not the present one. A lane has the same waves always.
    """
    s, lines, structure, total = system_of(tables, chains, c), tables.lines, chains.structure, 0.0
    here, there = chains.structure_start[c], tables.coefficient_start[s]
    other, axis = 1 - chains.side[c], tables.line_axis[s]
    p, q, r = tables.site_charge[k, 0], tables.site_charge[k, 1], tables.site_charge[k, 2]
    p, q, r = sign * p, sign * q, sign * r
    step = phases(tables, k, pose, 1.0 * (axis == 0), 1.0 * (axis == 1), 1.0 * (axis == 2))
    for line in range(tables.line_start[s] + lane, tables.line_start[s + _BIT], lanes):
        wave = phases(tables, k, pose, lines[line, 0], lines[line, 1], lines[line, 2])
        wave = p * wave[0], p * wave[1], q * wave[2], q * wave[3], r * wave[4], r * wave[5]
        last, place = before(wave, step), lines[line, 4]
        for i in range(place, place + WARP * lines[line, 3], WARP):
            x, y = wave[0] + wave[2] + wave[4], wave[1] + wave[3] + wave[5]
            u, v = structure[side, 0, here + i], structure[side, 1, here + i]
            structure[other, 0, here + i] = u + x
            structure[other, 1, here + i] = v + y
            total += tables.coefficients[there + i] * (x * (2.0 * u + x) + y * (2.0 * v + y))
            wave, last = following(wave, last, 2.0 * step[0], 2.0 * step[2], 2.0 * step[4]), wave
    return total


@scalar
def pose_of(chains, c, j):
    """Pose of molecule j."""
    return (
        chains.molecule[c, 0, j], chains.molecule[c, 1, j], chains.molecule[c, 2, j],
        chains.molecule[c, 3, j], chains.molecule[c, 4, j], chains.molecule[c, 5, j],
    )  # fmt: skip


@scalar
def guests_energy(tables, chains, c, k, pose, skip, first, stride, limit, roughly):
    """Energy (K) of a molecule with each `stride`-th other one whose centre is within `limit`.

    BIG if it overlaps with one. For `roughly` see `pair_energy`.
    """
    s, most, total = system_of(tables, chains, c), OVERLAP / chains.beta[c], 0.0
    for j in range(first, chains.n[c], stride):
        r2 = distance2(
            tables.cell, s, pose[0] - chains.molecule[c, 0, j],
            pose[1] - chains.molecule[c, 1, j], pose[2] - chains.molecule[c, 2, j],
        )  # fmt: skip
        if r2 < limit * limit and j != skip:
            energy = pair_energy(
                tables, s, k, pose, chains.kind[c, j], pose_of(chains, c, j), r2, roughly)
            if energy > most:
                return BIG
            total += energy
    return total


@scalar
def place_of(chains, c, i):
    """Pose of trial i."""
    return (
        chains.places[c, i, 0], chains.places[c, i, 1], chains.places[c, i, 2],
        chains.places[c, i, 3], chains.places[c, i, 4], chains.places[c, i, 5],
    )  # fmt: skip


@scalar
def is_free(tables, chains, c, s, i, skip):
    """Whether no centre is nearer than `contact` to that of trial i."""
    limit, near = tables.contact * tables.contact, 0
    x, y, z = chains.places[c, i, 0], chains.places[c, i, 1], chains.places[c, i, 2]
    for j in range(chains.n[c]):  # without branches, so that cores take several at once
        r2 = distance2(
            tables.cell, s, x - chains.molecule[c, 0, j], y - chains.molecule[c, 1, j],
            z - chains.molecule[c, 2, j],
        )  # fmt: skip
        near += (r2 < limit) & (j != skip)
    return near == 0


@scalar
def find_free(tables, chains, c, s, skip, lane, lanes):
    """Energy 0 for the trials that `is_free` says are free, BIG for the others.

    Lanes share the molecules, and note in the bits of a word which trials theirs are near to.
    """
    if lanes == 1:
        for i in range(tables.trials):
            chains.places[c, i, 7] = 0.0 if is_free(tables, chains, c, s, i, skip) else BIG
        return
    limit = tables.contact * tables.contact
    for first in range(0, tables.trials, 64):
        word, number = _NONE, lesser(64, tables.trials - first)
        for j in range(lane, chains.n[c], lanes):
            if j != skip:
                x, y, z = (
                    chains.molecule[c, 0, j], chains.molecule[c, 1, j], chains.molecule[c, 2, j])
                for i in range(number):
                    r2 = distance2(
                        tables.cell, s, chains.places[c, first + i, 0] - x,
                        chains.places[c, first + i, 1] - y, chains.places[c, first + i, 2] - z,
                    )  # fmt: skip
                    word |= np.uint64(r2 < limit) << np.uint64(i)
        chains.near[c, lane] = word
        barrier()
        word = _NONE
        for j in range(lanes):
            word |= chains.near[c, j]
        for i in range(lane, number, lanes):
            is_near = (word >> np.uint64(i)) & _BIT
            chains.places[c, first + i, 7] = BIG if is_near == _BIT else 0.0
        barrier()


@scalar
def shared(chains, c, share, lane, lanes):
    """Sum of the lanes' shares."""
    chains.scratch[c, lane] = share
    barrier()
    total = 0.0
    for i in range(lanes):
        total += chains.scratch[c, i]
    barrier()
    return total


@scalar
def molecule_energy(tables, chains, c, k, pose, host, skip, lane, lanes):
    """Energy (K) of a molecule with the framework, which is given, and all but molecule `skip`; and
    of it the guests' part, which is rough (see `pair_energy`); without charges it is not.

    BIG if it overlaps.
    """
    if host >= BIG:
        return BIG, 0.0
    guests = shared(chains, c, guests_energy(
        tables, chains, c, k, pose, skip, lane, lanes, math.sqrt(BIG), True), lane, lanes)
    if (host + guests) * chains.beta[c] > OVERLAP:
        return BIG, 0.0
    tail = tail_energy(tables, chains, system_of(tables, chains, c), c, k, skip)
    return host + guests + tail, guests


@scalar
def guests_change(tables, chains, c, arrives, m, new, skip, k, old, lane, lanes):
    """Change of the guests' part of the energy (K), with Ewald's sum, when a molecule of species m
    comes, if one `arrives`, and molecule `skip`, if that is not -1, of species k with the pose
    `old` goes; BIG or more where one overlaps."""
    s, side, total, share = system_of(tables, chains, c), chains.side[c], 0.0, 0.0
    for leaves in range(2):
        if skip >= 0 if leaves else arrives:
            species, pose, sign = (k, old, -1.0) if leaves else (m, new, 1.0)
            total += sign * tables.own[s, species]
            share += sign * guests_energy(
                tables, chains, c, species, pose, skip, lane, lanes, math.sqrt(BIG), False)
            share += waves_change(tables, chains, c, species, pose, sign, side, lane, lanes)
            side = 1 - chains.side[c]
    return total + shared(chains, c, share, lane, lanes)


# ------------------------------------------------------------------------------ proposals


@scalar
def fractional(tables, s, x, y, z):
    """A vector in Å in fractions of the cell."""
    inverse = tables.inverse
    return (
        x * inverse[s, 0, 0] + y * inverse[s, 1, 0] + z * inverse[s, 2, 0],
        x * inverse[s, 0, 1] + y * inverse[s, 1, 1] + z * inverse[s, 2, 1],
        x * inverse[s, 0, 2] + y * inverse[s, 1, 2] + z * inverse[s, 2, 2],
    )


@scalar
def turned(tables, s, pose, size, u, v):
    """Pose with the vector of length `size` and random direction added to its axis.

    Isotropic and hence symmetric. A negative size stands for a new random axis.
    """
    z, cell = 2.0 * u - 1.0, tables.cell
    r = math.sqrt(1.0 - z * z)
    x, y = phase(v)
    x, y = r * x, r * y
    if size > 0.0:
        a, b, c = pose[3], pose[4], pose[5]
        x = size * x + a * cell[s, 0, 0] + b * cell[s, 1, 0] + c * cell[s, 2, 0]
        y = size * y + a * cell[s, 0, 1] + b * cell[s, 1, 1] + c * cell[s, 2, 1]
        z = size * z + a * cell[s, 0, 2] + b * cell[s, 1, 2] + c * cell[s, 2, 2]
        norm = math.sqrt(x * x + y * y + z * z)
        x, y, z = x / norm, y / norm, z / norm
    a, b, c = fractional(tables, s, x, y, z)
    return pose[0], pose[1], pose[2], a, b, c


@scalar
def shifted(tables, s, pose, x, y, z):
    """Pose displaced by (x, y, z) Å and folded into the cell."""
    x, y, z = fractional(tables, s, x, y, z)
    x, y, z = pose[0] + x, pose[1] + y, pose[2] + z
    return x - math.floor(x), y - math.floor(y), z - math.floor(z), pose[3], pose[4], pose[5]


@scalar
def voxel(tables, s, pose):
    """Index of the unit cell's voxel that holds a molecule's centre."""
    index = 0
    for i in range(3):
        x = pose[i] * tables.replicas[s, i]
        m = tables.voxels[s, i]
        index = index * m + lesser(int((x - math.floor(x)) * m), m - 1)
    return index


@scalar
def bias(tables, s, start, v):
    """Density with which places are proposed in voxel v, divided by the uniform density."""
    before = tables.cdf[start + v - 1] if v > 0 else 0.0
    n = tables.voxels[s, 0] * tables.voxels[s, 1] * tables.voxels[s, 2]
    return (tables.cdf[start + v] - before) * n


@scalar
def inside(index, m, n, u):
    """Coordinate, in one of n unit cells and there in voxel `index` of m, at random."""
    u *= n
    return (int(u) + (index + u - int(u)) / m) / n


@scalar
def trial(tables, s, start, k, pose, kind, kept, base, i):
    """Pose of trial i and its `bias`; `pose` itself comes first if `kept`, and alone where a
    molecule is only displaced or turned. A change of species keeps the centre.
    """
    if kind < REINSERTION:
        return pose, 1.0
    if kept and i == 0:
        return pose, 1.0 if kind == IDENTITY else bias(tables, s, start, voxel(tables, s, pose))
    at = _FIRST + _POSE * i
    if tables.reach[k] > 0.0:
        pose = turned(tables, s, pose, -1.0, uniform(base, at), uniform(base, at + 1))
    if kind == IDENTITY:
        return pose, 1.0
    u, m, n = uniform(base, at + 2), tables.voxels, tables.replicas
    low, high = 0, m[s, 0] * m[s, 1] * m[s, 2] - 1
    while low < high:
        middle = (low + high) // 2
        if tables.cdf[start + middle] > u:
            high = middle
        else:
            low = middle + 1
    x = inside(low // (m[s, 1] * m[s, 2]), m[s, 0], n[s, 0], uniform(base, at + 3))
    y = inside(low // m[s, 2] % m[s, 1], m[s, 1], n[s, 1], uniform(base, at + 4))
    z = inside(low % m[s, 2], m[s, 2], n[s, 2], uniform(base, at + 5))
    return (x, y, z, pose[3], pose[4], pose[5]), bias(tables, s, start, low)


@scalar
def propose(tables, chains, c, k, pose, kind, skip, kept, base, lane, lanes):
    """Fill `Chains.places` with trials for a molecule of species k, and their energies with the
    framework; BIG for those that overlap with it or, where a place is sought, have a molecule other
    than `skip` nearer than `contact`."""
    p = chains.state[c]
    s, beta, start = system_of(tables, chains, c), chains.beta[c], tables.cdf_start[p, k]
    places, trials = chains.places, tables.trials if kind >= REINSERTION else 1
    for i in range(lane, trials, lanes):
        place, b = trial(tables, s, start, k, pose, kind, kept, base, i)
        for j in range(_POSE):
            places[c, i, j] = place[j]
        places[c, i, 6], places[c, i, 7] = b, 0.0
    barrier()
    if kind >= REINSERTION:
        find_free(tables, chains, c, s, skip, lane, lanes)
    for i in range(lane, trials, lanes):
        if places[c, i, 7] < BIG:
            energy = host_energy(tables, s, k, place_of(chains, c, i))
            places[c, i, 7] = energy if energy * beta < OVERLAP and places[c, i, 6] > 0.0 else BIG
    barrier()


@scalar
def selected(tables, chains, c, k, skip, kept, base, lane, lanes):
    """One of the trials for a molecule of species k, and ln(W / w b).

    Trial i has the weight w = exp(-V / k_B T) / b, with V its rough energy with the framework and
    with molecules near by, b its `bias`; W is the mean weight, and one trial is chosen in
    proportion to w. If `kept`, the first is. The second value is -BIG where all trials overlap.
    """
    beta, places, trials = chains.beta[c], chains.places, tables.trials
    for i in range(trials):
        if places[c, i, 7] < BIG:
            chains.partial[c, i, lane] = guests_energy(
                tables, chains, c, k, place_of(chains, c, i), skip, lane, lanes, tables.inner,
                True,
            )  # fmt: skip
    barrier()
    for i in range(lane, trials, lanes):
        energy, weight = places[c, i, 7], 0.0
        if energy < BIG:
            for j in range(lanes):
                energy += chains.partial[c, i, j]
            if energy * beta < OVERLAP:
                weight = math.exp(lesser(-beta * energy, 600.0)) / places[c, i, 6]
        chains.scratch[c, i] = weight
    barrier()
    total = 0.0
    for i in range(trials):
        total += chains.scratch[c, i]
    i, rest = 0, total * uniform(base, 0)
    while not kept and i < trials - 1 and rest >= chains.scratch[c, i]:
        rest -= chains.scratch[c, i]
        i += 1
    weight, b = chains.scratch[c, i], places[c, i, 6]
    barrier()
    return i, math.log(total / (trials * weight * b)) if weight > 0.0 else -BIG


@scalar
def pick(chains, c, k, u):
    """A random molecule of species k, which must exist."""
    left = lesser(int(u * chains.count[c, k]), chains.count[c, k] - 1)
    if chains.count[c, k] == chains.n[c]:
        return left
    for j in range(chains.n[c]):
        if chains.kind[c, j] == k:
            if left == 0:
                return j
            left -= 1
    return -1


@scalar
def put(chains, c, j, k, pose):
    """Make molecule j one of species k."""
    chains.kind[c, j] = k
    for i in range(_POSE):
        chains.molecule[c, i, j] = pose[i]


# ------------------------------------------------------------------------------ the chain


@scalar
def move(tables, chains, c, row, lane, lanes):
    """Attempt one move and accept it with probability min(1, exp(log_ratio)).

    Translations and rotations: log_ratio = -(U_new - U_old) / k_B T. For the others each molecule
    that comes (species m) or goes (species k) has R = W exp(-U / k_B T) / (w b), with W / (w b)
    from `selected` and U from `molecule_energy`; the one that goes is the first of its trials. The
    ratio is
      insertion        R_new z V / (N + 1)
      deletion         N / (z V R_old)
      reinsertion      R_new / R_old
      change k to m    R_new z_m N_k / (R_old z_k (N_m + 1)).
    R of insertions, accepted or not, averages to <N> / (z V).

    Detailed balance holds for every set of trials: a state s, a trial set with the chosen pose i
    and the reverse set with the old pose j have the probability density
    exp(-U_s) g(i) prod g(others) w_i / (n W), with g = b / V; its ratio to that of the reverse is
    what the formulas above cancel. The weights w may therefore leave out distant molecules.

    With charges a move is judged twice (delayed acceptance; J. A. Christen and C. Fox, J. Comput.
    Graph. Stat. 14, 795 (2005), doi:10.1198/106186005X76983), since Ewald sums take long and most
    moves are rejected: first with the rough energies of `pair_energy` in the place of U, and what
    is accepted then with min(1, exp(-(change of U - rough change of U) / k_B T)). The ratio of the
    probabilities of a move and its reverse is the product of both, that is, the one above. R is
    averaged from rough energies, too, plus the mean difference in one of SELDOM insertions.
    """
    p = chains.state[c]
    s, beta, species = system_of(tables, chains, c), chains.beta[c], tables.n_sites.size
    n = chains.n[c]
    base = mixed(chains.key[c] + np.uint64(chains.moves[c]) * _GAMMA)
    u, kind = uniform(base, 0), TRANSLATION
    while kind < IDENTITY and u >= tables.moves[kind]:
        kind += 1
    if lane == 0:
        chains.tally[c, 0, kind] += 1
    # which molecule goes (old), whether one comes (new), their species k and m
    u, v, old, new = uniform(base, 1), uniform(base, 2), -1, True
    if kind < SWAP:
        if n == 0:
            return
        old = lesser(int(u * n), n - 1)
        k = chains.kind[c, old]
        m = k
    else:
        k = lesser(int(u * species), species - 1)
        m = k
        if kind == IDENTITY:
            m = (k + 1 + lesser(int(v * (species - 1)), species - 2)) % species
        else:
            new = v < 0.5
        if kind == IDENTITY or not new:
            if chains.count[c, k] == 0:
                return
            old = pick(chains, c, k, uniform(base, 3))
    pose = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if old >= 0:
        pose = pose_of(chains, c, old)
    place, log_ratio, change, roughly, weight = pose, 0.0, 0.0, 0.0, 0.0
    if kind < REINSERTION:
        size = chains.size[c, kind]
        if kind == TRANSLATION:
            place = shifted(
                tables, s, pose, (2.0 * uniform(base, 4) - 1.0) * size,
                (2.0 * uniform(base, 5) - 1.0) * size, (2.0 * uniform(base, 6) - 1.0) * size,
            )  # fmt: skip
        else:
            place = turned(tables, s, pose, size, uniform(base, 4), uniform(base, 5))
    for leaves in range(2):  # the molecule that comes and the one that goes, if there are such
        if (old < 0) if leaves else not new:
            continue
        species_here, sign = (k, -1.0) if leaves else (m, 1.0)
        stream, kept = mixed(base + _GAMMA) if leaves else mixed(base), leaves == 1
        propose(
            tables, chains, c, species_here, pose if leaves else place, kind, old, kept, stream,
            lane, lanes,
        )  # fmt: skip
        i, log_weight, energy, guests = 0, 0.0, BIG, 0.0
        if kind >= REINSERTION:
            i, log_weight = selected(
                tables, chains, c, species_here, old, kept, stream, lane, lanes)
        chosen = place_of(chains, c, i)
        if log_weight > -BIG:
            energy, guests = molecule_energy(
                tables, chains, c, species_here, chosen, chains.places[c, i, 7], old, lane, lanes)
        if kind == SWAP and not leaves:
            if energy < BIG:
                weight = math.exp(log_weight - beta * energy)
            if lane == 0:
                chains.weights[c, row, m, 0] += weight
                chains.weights[c, row, m, 1] += 1
        if energy >= BIG:
            return
        if kind >= SWAP:
            log_weight += tables.log_activity[p, species_here] + chains.boost[c]
            log_weight -= math.log(chains.count[c, species_here] + (0.0 if leaves else 1.0))
        log_ratio += sign * (log_weight - beta * energy)
        change += sign * energy
        roughly += sign * guests
        if not leaves:
            place = chosen
    barrier()
    accepted = math.log(uniform(base, 7)) < log_ratio
    if is_charged(tables):
        checked = weight > 0.0 and uniform(base, 9) * SELDOM < 1.0  # of an insertion
        if accepted or checked:
            error = guests_change(
                tables, chains, c, new, m, place, old, k, pose, lane, lanes) - roughly
            if checked and lane == 0:
                chains.weights[c, row, m, 0] += SELDOM * weight * (math.exp(-beta * error) - 1.0)
            change += error
            if change >= BIG or math.log(uniform(base, 8)) >= -beta * error:
                return
    if not accepted:
        return
    if lane > 0:
        return
    chains.tally[c, 1, kind] += 1
    chains.energy[c] += change
    if is_charged(tables):
        chains.side[c] = 1 - chains.side[c]
    if new:
        put(chains, c, n if old < 0 else old, m, place)
        chains.count[c, m] += 1
        chains.n[c] += 1
    else:
        put(chains, c, old, chains.kind[c, n - 1], pose_of(chains, c, n - 1))
    if old >= 0:
        chains.count[c, k] -= 1
        chains.n[c] -= 1


@scalar
def sample(tables, chains, c, row):
    """Record the state at the end of a cycle."""
    s = system_of(tables, chains, c)
    for k in range(tables.n_sites.size):
        chains.counts[c, row, k] = chains.count[c, k]
    chains.energies[c, row] = chains.energy[c]
    start = chains.density_start[c]
    if start >= 0:
        n = tables.voxels[s, 0] * tables.voxels[s, 1] * tables.voxels[s, 2]
        for j in range(chains.n[c]):
            v = voxel(tables, s, pose_of(chains, c, j))
            chains.density[start + chains.kind[c, j] * n + v] += 1


@scalar
def adapt(chains, c):
    """Move the step sizes towards 45 % acceptance and forget the counts."""
    for kind in range(2):
        if chains.tally[c, 0, kind] >= 10:
            share = chains.tally[c, 1, kind] / chains.tally[c, 0, kind]
            size = chains.size[c, kind] * lesser(greater(share / 0.45, 0.7), 1.4)
            largest = LARGEST_TURN if kind == ROTATION else 10.0
            chains.size[c, kind] = lesser(greater(size, SMALLEST_STEP), largest)
            chains.tally[c, 0, kind], chains.tally[c, 1, kind] = 0, 0


@scalar
def advance(first_chain, stride, lane, lanes, tables, chains, first, last, adapting):
    """Advance chains from cycle `first` up to `last`, or until their slots are full.

    `first` is the cycle of row 0 of the records. A chain whose slots are full stops between two
    moves; with more slots it goes on as if it had not stopped.
    """
    for i in range(first_chain, chains.n.size, stride):
        c = np.uint64(chains.order[i])
        while chains.step[c] < last * chains.length[c] and chains.n[c] < chains.kind.shape[1]:
            row = chains.step[c] // chains.length[c] - first
            move(tables, chains, c, row, lane, lanes)
            barrier()
            if lane == 0:
                chains.moves[c] += 1
                chains.step[c] += 1
                if chains.step[c] % chains.length[c] == 0:
                    sample(tables, chains, c, row)
                    if adapting == 1:
                        adapt(chains, c)
            barrier()


@scalar
def nodes(first_node, stride, tables, lattice, shape, block, starts, lists, images, values):
    """Framework energies at the nodes of a grid of `shape` over the unit cell `lattice` (Å).

    Nodes are taken in blocks of `block`³; ``lists[starts[m]:starts[m + 1]]`` are the rows of
    `images` (x, y, z in Å, type, charge) that block m may feel. ``values[t, i]`` is the
    Lennard-Jones energy of site type t (K); the last row is the real-space part of the
    electrostatic potential (K/e).
    """
    last, n1, n2 = values.shape[0] - 1, shape[1], shape[2]
    m1, m2 = (n1 + block - 1) // block, (n2 + block - 1) // block
    for i in range(first_node, values.shape[1], stride):
        a, b, c = i // (n1 * n2), i // n2 % n1, i % n2
        m = (a // block * m1 + b // block) * m2 + c // block
        u, v, w = a / shape[0], b / n1, c / n2
        x = u * lattice[0, 0] + v * lattice[1, 0] + w * lattice[2, 0]
        y = u * lattice[0, 1] + v * lattice[1, 1] + w * lattice[2, 1]
        z = u * lattice[0, 2] + v * lattice[1, 2] + w * lattice[2, 2]
        for l in range(starts[m], starts[m + 1]):
            j = lists[l]
            dx, dy, dz = images[j, 0] - x, images[j, 1] - y, images[j, 2] - z
            r2 = dx * dx + dy * dy + dz * dz
            if r2 < tables.cutoff * tables.cutoff:
                for t in range(last):
                    values[t, i] += lennard_jones(tables.host_lj, int(images[j, 3]), t, r2)
                if is_charged(tables) and r2 < tables.host_cutoff * tables.host_cutoff:
                    values[last, i] += COULOMB * images[j, 4] * screened(tables.host_alpha, r2)


@scalar
def boltzmann(first_voxel, stride, tables, p, k, out):
    """Mean Boltzmann factor of species k in each voxel at state point p, at random places."""
    s, m, n = np.uint64(tables.system[p]), tables.voxels, tables.replicas
    for v in range(first_voxel, out.size, stride):
        base, total = mixed(np.uint64(v + 1) * _GAMMA), 0.0
        for i in range(ORIENTATIONS):
            at = 5 * i
            pose = (
                inside(v // (m[s, 1] * m[s, 2]), m[s, 0], n[s, 0], uniform(base, at)),
                inside(v // m[s, 2] % m[s, 1], m[s, 1], n[s, 1], uniform(base, at + 1)),
                inside(v % m[s, 2], m[s, 2], n[s, 2], uniform(base, at + 2)),
                0.0, 0.0, 0.0,
            )  # fmt: skip
            pose = turned(tables, s, pose, -1.0, uniform(base, at + 3), uniform(base, at + 4))
            total += math.exp(-tables.beta[p] * lesser(host_energy(tables, s, k, pose), BIG))
        out[v] = total / ORIENTATIONS


# ------------------------------------------------------------------------------ launching


def advance_kernel(tables, chains, first, last, adapting):
    """`advance` with one block of LANES threads per chain."""
    advance(
        cuda.blockIdx.x, cuda.gridDim.x, cuda.threadIdx.x, cuda.blockDim.x, tables, chains, first,
        last, adapting,
    )  # fmt: skip


def nodes_kernel(tables, lattice, shape, block, starts, lists, images, values):
    """`nodes` with one thread per node."""
    nodes(
        cuda.grid(1), cuda.gridsize(1), tables, lattice, shape, block, starts, lists, images, values
    )


def boltzmann_kernel(tables, p, k, out):
    """`boltzmann` with one thread per voxel."""
    boltzmann(cuda.grid(1), cuda.gridsize(1), tables, p, k, out)


def barrier_of_block():
    """`barrier` on CUDA."""
    cuda.syncthreads()


_KERNELS = {advance: advance_kernel, nodes: nodes_kernel, boltzmann: boltzmann_kernel}


def yes(tables):
    """For `is_direct` and `is_charged` on CUDA."""
    return True


def no(tables):
    """For `is_direct` and `is_charged` on CUDA."""
    return False


def launch(device, function, count, *arguments):
    """Apply `advance`, `nodes` or `boltzmann` to all indices below `count`.

    On cores the indices are dealt to threads (numba's NUMBA_NUM_THREADS, but one in a process of
    a loader, which has others beside it); on CUDA the arguments must lie on the device.
    """
    if device == "cuda":
        grid = (count, LANES) if function is advance else (-(-count // THREADS), THREADS)
        with _fitting():
            tables = arguments[0]
            kernel = _cuda_kernel(function, tables.direct == 1, tables.charged == 1, REGISTERS)
            kernel[grid](*arguments)
        cuda_target().synchronize()
        return
    workers = 1 if current_process().daemon else config.NUMBA_NUM_THREADS
    stride = min(count, 8 * workers)  # a thread that ends early takes a further share
    if function is advance:
        arguments = (0, 1, *arguments)
    with ThreadPoolExecutor(workers) as pool, np.errstate(over="ignore"):
        list(pool.map(lambda i: function(i, stride, *arguments), range(stride)))


@contextlib.contextmanager
def _fitting():
    """Name the remedy where numba-cuda asks NumPy for functions that are gone."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        if isinstance(error, AttributeError) and "numpy" not in str(error):
            raise
        raise DataError(
            "numba-cuda", f"it cannot be used with NumPy {np.__version__} ({error})",
            "Type: pip install 'numpy<2.5', for its np.row_stack; or choose the device cpu.",
        ) from None  # fmt: skip


def cuda_target():
    """The module numba.cuda; raises `DataError` where it cannot be imported."""
    if not hasattr(np, "row_stack"):  # gone in NumPy 2.5; numba-cuda 0.30 imports it
        np.row_stack = np.vstack  # noqa: NPY201
    with _fitting():
        from numba import cuda
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # of few chains, or of a small grid
    return cuda


@functools.cache
def _cuda_kernel(function, direct, charged, registers):
    """A kernel that leaves out what its tables do not need, more than half of its code."""
    cuda = cuda_target()
    space = {**globals(), "cuda": cuda}
    here = {"barrier": barrier_of_block, "is_direct": yes if direct else no,
            "is_charged": yes if charged else no}  # fmt: skip
    for name in _SCALARS:
        source = here.get(name, space[name])
        plain = types.FunctionType(getattr(source, "py_func", source).__code__, space, name)
        space[name] = plain if SIMULATED else cuda.jit(device=True)(plain)
    kernel = _KERNELS[function]
    options = {"max_registers": registers} if registers and not SIMULATED else {}
    return cuda.jit(**options)(types.FunctionType(kernel.__code__, space, kernel.__name__))


def to_device(value, device):
    """An array on the device; `Tables` or `Chains` with all its arrays there."""
    if device == "cpu":
        return value
    if isinstance(value, tuple):
        return type(value)(*(to_device(a, device) for a in value))
    return cuda_target().to_device(value) if isinstance(value, np.ndarray) else value


def fill(device, function, out, *arguments):
    """Fill `out`, the last argument of `nodes` or `boltzmann`, on either device."""
    arrays = [to_device(a, device) for a in (*arguments, out)]
    launch(device, function, out.shape[-1], *arrays)
    if device == "cuda":
        arrays[-1].copy_to_host(out)
