"""One grand-canonical Markov chain as scalar functions, compiled for processor cores and for CUDA.

Every function below works on single numbers and on the flat arrays of `Tables` (read only) and
`Chains` (the state). numba compiles the same source twice: for cores, where threads share the
chains, and for CUDA, with one thread per chain. With interpolated framework energies a move costs
a few hundred reads and some thousand operations, too little to split over a block; thousands of
chains fill a card instead. All chains draw the *kind* of the move from one common sequence, so
that threads of a warp stay together; everything else is drawn from the chain's own stream.

Units: Å, K (energies are E/k_B), elementary charges. Positions are fractions of the simulated
cell. Indices: c chain, p state point, s system (framework), k species, t guest site type.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import config, njit

from gcmc.forcefield import COULOMB
from x3mat.errors import DataError

if TYPE_CHECKING:
    from numba import cuda  # at run time `_cuda_kernel` puts it in, as some versions do not import

SIMULATED = bool(config.ENABLE_CUDASIM)  # numba's CUDA simulator interprets plain Python
CLOSEST = 0.7  # Å; nearer to an atom, the Lennard-Jones energy is that at this distance
CORE = 1.3  # Å; so near to an atom a molecule overlaps, and 1/r is continued smoothly
OVERLAP = 150.0  # in k_B T; a molecule that has so much energy from some of the rest overlaps
BIG = 1e30  # K; the energy of an overlap
THREADS = 64  # per block
SMALLEST_STEP, LARGEST_TURN = 0.02, 4.0  # Å; size of the vector added to a molecule's axis
ORIENTATIONS = 16  # random placements per voxel when the insertion weights are made
TRANSLATION, ROTATION, REINSERTION, SWAP, IDENTITY = range(5)

_F4_ONE, _F4_SIXTH = np.float32(1), np.float32(1 / 6)
_F4_THREE, _F4_FOUR, _F4_SIX = np.float32(3), np.float32(4), np.float32(6)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
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
    n_sites: np.ndarray  # (K,)
    site_type: np.ndarray  # (K, 3)
    site_z: np.ndarray  # (K, 3) Å along the axis
    site_charge: np.ndarray  # (K, 3)
    reach: np.ndarray  # (K,) greatest |z|, Å
    coulomb_cutoff: np.ndarray  # (S,) Å, half of the simulated cell's least width
    alpha: np.ndarray  # (S,) 1/Å
    pair: np.ndarray  # float32; reciprocal part of the Ewald pair potential over the cell, K
    pair_shape: np.ndarray  # (S, 3)
    pair_start: np.ndarray  # (S,)
    constant: np.ndarray  # (S, K) K; tail with the framework, Ewald self and exclusion terms
    tail: np.ndarray  # (S, K, K) K; tail correction of a pair
    # states
    system: np.ndarray  # (P,)
    beta: np.ndarray  # (P,) 1/K
    log_activity: np.ndarray  # (P, K) ln(z V), with z = f / k_B T
    moves: np.ndarray  # (5,) cumulative probabilities of the kinds of move
    voxels: np.ndarray  # (S, 3) voxels of the unit cell from which insertions are drawn
    cdf: np.ndarray  # cumulative probabilities of the voxels
    cdf_start: np.ndarray  # (P, K)


class Chains(NamedTuple):
    """State of C chains and what the cycles of one launch record; M molecules at most."""

    state: np.ndarray  # (C,) state point p
    key: np.ndarray  # (C,) uint64, position in the chain's random stream
    step: np.ndarray  # (C,) moves done
    length: np.ndarray  # (C,) moves per cycle
    n: np.ndarray  # (C,) molecules
    count: np.ndarray  # (C, K) molecules of each species
    energy: np.ndarray  # (C,) K
    kind: np.ndarray  # (C, M + 1) species; the last slot is that of the trial molecule
    molecule: np.ndarray  # (C, M + 1, 15) centre, axis, sites
    size: np.ndarray  # (C, 2) largest displacement (Å) and turn
    tried: np.ndarray  # (C, 5) attempted and
    accepted: np.ndarray  # (C, 5) accepted moves
    counts: np.ndarray  # (C, R, K) molecules at the end of each cycle
    energies: np.ndarray  # (C, R) K
    weights: np.ndarray  # (C, R, K) sum of the weights of insertions during the cycle
    inserts: np.ndarray  # (C, R, K) their number
    density_start: np.ndarray  # (C,) -1: none
    density: np.ndarray  # uint32, histograms of centres on voxels, by species


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
def uniform(key, c):
    """Next number of stream `c` in (0, 1): draw n of a chain is ``mixed(key + n gamma)``."""
    key[c] = key[c] + _GAMMA
    return (np.float64(mixed(key[c]) >> _11) + 0.5) * 1.1102230246251565e-16


# ------------------------------------------------------------------------------ energies


@scalar
def _line(table, i, w0, w1, w2, w3):
    return w0 * table[i] + w1 * table[i + 1] + w2 * table[i + 2] + w3 * table[i + 3]


@scalar
def _plane(table, i, step, v0, v1, v2, v3, w0, w1, w2, w3):
    return (
        v0 * _line(table, i, w0, w1, w2, w3)
        + v1 * _line(table, i + step, w0, w1, w2, w3)
        + v2 * _line(table, i + 2 * step, w0, w1, w2, w3)
        + v3 * _line(table, i + 3 * step, w0, w1, w2, w3)
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
    i = min(int(x), shape[s, 0] - 1)
    j = min(int(y), shape[s, 1] - 1)
    k = min(int(z), shape[s, 2] - 1)
    line = shape[s, 2] + 3
    plane = (shape[s, 1] + 3) * line
    at = start + i * plane + j * line + k
    a, b, c = np.float32(x - i), np.float32(y - j), np.float32(z - k)
    d, e, f = _F4_ONE - a, _F4_ONE - b, _F4_ONE - c
    v0, v1, v2, v3 = _weight_0(b), _weight_1(b), _weight_1(e), _weight_0(e)
    w0, w1, w2, w3 = _weight_0(c), _weight_1(c), _weight_1(f), _weight_0(f)
    return np.float64(
        _weight_0(a) * _plane(table, at, line, v0, v1, v2, v3, w0, w1, w2, w3)
        + _weight_1(a) * _plane(table, at + plane, line, v0, v1, v2, v3, w0, w1, w2, w3)
        + _weight_1(d) * _plane(table, at + 2 * plane, line, v0, v1, v2, v3, w0, w1, w2, w3)
        + _weight_0(d) * _plane(table, at + 3 * plane, line, v0, v1, v2, v3, w0, w1, w2, w3)
    )


@scalar
def distance2(cell, s, a, b, c):
    """Squared distance (Å2) of the nearest images, from the difference of positions."""
    a, b, c = a - math.floor(a + 0.5), b - math.floor(b + 0.5), c - math.floor(c + 0.5)
    x = a * cell[s, 0, 0] + b * cell[s, 1, 0] + c * cell[s, 2, 0]
    y = a * cell[s, 0, 1] + b * cell[s, 1, 1] + c * cell[s, 2, 1]
    z = a * cell[s, 0, 2] + b * cell[s, 1, 2] + c * cell[s, 2, 2]
    return x * x + y * y + z * z


@scalar
def lennard_jones(table, t, u, r2):
    """4 epsilon ((sigma/r)^12 - (sigma/r)^6), K, less its value at the cutoff where shifted."""
    w = table[t, u, 1] / max(r2, CLOSEST * CLOSEST)
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
def host_lj(tables, s, t, x, y, z):
    """Lennard-Jones energy (K) of a site of type t with all framework atoms within the cutoff."""
    atoms, total = tables.atoms, 0.0
    for i in range(tables.atom_start[s], tables.atom_start[s + 1]):
        r2 = distance2(tables.cell, s, x - atoms[i, 0], y - atoms[i, 1], z - atoms[i, 2])
        if r2 < tables.cutoff * tables.cutoff:
            total += lennard_jones(tables.host_lj, tables.atom_type[i], t, r2)
    return total


@scalar
def host_coulomb(tables, s, x, y, z):
    """Real-space part of the framework's Ewald potential, K per elementary charge."""
    atoms, total = tables.atoms, 0.0
    for i in range(tables.atom_start[s], tables.atom_start[s + 1]):
        r2 = distance2(tables.cell, s, x - atoms[i, 0], y - atoms[i, 1], z - atoms[i, 2])
        if r2 < tables.host_cutoff * tables.host_cutoff:
            total += tables.atom_charge[i] * screened(tables.host_alpha, r2)
    return COULOMB * total


@scalar
def host_waves(tables, s, x, y, z):
    """Reciprocal part of the framework's Ewald potential, K per elementary charge."""
    x, y, z = x * tables.replicas[s, 0], y * tables.replicas[s, 1], z * tables.replicas[s, 2]
    total = 0.0
    for w in range(tables.wave_start[s], tables.wave_start[s + 1]):
        phase = tables.waves[w, 0] * x + tables.waves[w, 1] * y + tables.waves[w, 2] * z
        total += tables.waves[w, 3] * math.cos(phase) + tables.waves[w, 4] * math.sin(phase)
    return total


@scalar
def host(tables, s, t, q, x, y, z):
    """Energy (K) of a site of type t and charge q in the framework."""
    if tables.direct == 1:
        energy = host_lj(tables, s, t, x, y, z)
        if tables.charged == 1 and q != 0.0:
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
def host_energy(tables, chains, s, c, slot):
    """Energy (K) of the molecule in a slot with the framework, and with nothing else."""
    k, total = chains.kind[c, slot], 0.0
    for a in range(tables.n_sites[k]):
        i = 6 + 3 * a
        total += host(
            tables, s, tables.site_type[k, a], tables.site_charge[k, a],
            chains.molecule[c, slot, i], chains.molecule[c, slot, i + 1],
            chains.molecule[c, slot, i + 2],
        )  # fmt: skip
    return total


@scalar
def pair_energy(tables, chains, s, c, one, two):
    """Energy (K) of two different molecules: nearest images, and Ewald over all of them."""
    molecule = chains.molecule
    k, m = chains.kind[c, one], chains.kind[c, two]
    r2 = distance2(
        tables.cell, s, molecule[c, one, 0] - molecule[c, two, 0],
        molecule[c, one, 1] - molecule[c, two, 1], molecule[c, one, 2] - molecule[c, two, 2],
    )  # fmt: skip
    limit = tables.coulomb_cutoff[s] if tables.charged == 1 else tables.cutoff
    far = limit + tables.reach[k] + tables.reach[m]
    near, total = r2 < far * far, 0.0
    if not near and tables.charged == 0:
        return 0.0
    for i in range(tables.n_sites[k]):
        for j in range(tables.n_sites[m]):
            x = molecule[c, one, 6 + 3 * i] - molecule[c, two, 6 + 3 * j]
            y = molecule[c, one, 7 + 3 * i] - molecule[c, two, 7 + 3 * j]
            z = molecule[c, one, 8 + 3 * i] - molecule[c, two, 8 + 3 * j]
            r2 = distance2(tables.cell, s, x, y, z) if near else BIG
            if r2 < tables.cutoff * tables.cutoff:
                t, u = tables.site_type[k, i], tables.site_type[m, j]
                total += lennard_jones(tables.lj, t, u, r2)
            q = tables.site_charge[k, i] * tables.site_charge[m, j]
            if q != 0.0:
                total += q * spline(
                    tables.pair, tables.pair_start[s], tables.pair_shape, s, x, y, z)
                if r2 < limit * limit:
                    total += COULOMB * q * screened(tables.alpha[s], r2)
    return total


@scalar
def own_energy(tables, chains, s, c, slot):
    """Energy (K) of a molecule with its own images (Ewald) and by its constants."""
    k = chains.kind[c, slot]
    total = tables.constant[s, k] + 0.5 * tables.tail[s, k, k]
    if tables.charged == 1:
        for i in range(tables.n_sites[k]):
            for j in range(i):
                q = tables.site_charge[k, i] * tables.site_charge[k, j]
                if q != 0.0:
                    total += q * spline(
                        tables.pair, tables.pair_start[s], tables.pair_shape, s,
                        chains.molecule[c, slot, 6 + 3 * i] - chains.molecule[c, slot, 6 + 3 * j],
                        chains.molecule[c, slot, 7 + 3 * i] - chains.molecule[c, slot, 7 + 3 * j],
                        chains.molecule[c, slot, 8 + 3 * i] - chains.molecule[c, slot, 8 + 3 * j],
                    )  # fmt: skip
    return total


@scalar
def molecule_energy(tables, chains, c, slot, skip):
    """Energy (K) of the molecule in `slot` with all but the one in `skip`; BIG if it overlaps."""
    p = chains.state[c]
    s, k = tables.system[p], chains.kind[c, slot]
    total = host_energy(tables, chains, s, c, slot)
    if total * tables.beta[p] > OVERLAP:
        return BIG
    total += own_energy(tables, chains, s, c, slot)
    for j in range(chains.n[c]):
        if j != skip:
            total += pair_energy(tables, chains, s, c, slot, j) + tables.tail[
                s, k, chains.kind[c, j]]
            if total * tables.beta[p] > OVERLAP:
                return BIG
    return total


# ------------------------------------------------------------------------------ proposals


@scalar
def place(tables, chains, s, c, slot):
    """Sites of a molecule from its centre and axis; the centre is folded into the cell."""
    molecule, k = chains.molecule, chains.kind[c, slot]
    for i in range(3):
        molecule[c, slot, i] -= math.floor(molecule[c, slot, i])
        along = 0.0
        for j in range(3):
            along += molecule[c, slot, 3 + j] * tables.inverse[s, j, i]
        for a in range(tables.n_sites[k]):
            molecule[c, slot, 6 + 3 * a + i] = molecule[c, slot, i] + tables.site_z[k, a] * along


@scalar
def turn(chains, c, slot, size):
    """Add a random vector of length `size` to the axis; isotropic and hence symmetric.

    A negative size stands for a new random axis.
    """
    molecule = chains.molecule
    z = 2.0 * uniform(chains.key, c) - 1.0
    angle = 2.0 * math.pi * uniform(chains.key, c)
    r = math.sqrt(1.0 - z * z)
    old, new = (1.0, size) if size > 0.0 else (0.0, 1.0)
    x = old * molecule[c, slot, 3] + new * r * math.cos(angle)
    y = old * molecule[c, slot, 4] + new * r * math.sin(angle)
    z = old * molecule[c, slot, 5] + new * z
    norm = math.sqrt(x * x + y * y + z * z)
    molecule[c, slot, 3], molecule[c, slot, 4], molecule[c, slot, 5] = x / norm, y / norm, z / norm


@scalar
def voxel(tables, chains, s, c, slot):
    """Index of the unit cell's voxel that holds a molecule's centre."""
    index = 0
    for i in range(3):
        x = chains.molecule[c, slot, i] * tables.replicas[s, i]
        m = tables.voxels[s, i]
        index = index * m + min(int((x - math.floor(x)) * m), m - 1)
    return index


@scalar
def bias(tables, s, start, v):
    """Density with which insertions are proposed in voxel v, divided by the uniform density."""
    before = tables.cdf[start + v - 1] if v > 0 else 0.0
    n = tables.voxels[s, 0] * tables.voxels[s, 1] * tables.voxels[s, 2]
    return (tables.cdf[start + v] - before) * n


@scalar
def draw_centre(tables, chains, s, c, slot, start):
    """Centre of a molecule drawn from the voxels' distribution; returns its bias."""
    u = uniform(chains.key, c)
    low, high = 0, tables.voxels[s, 0] * tables.voxels[s, 1] * tables.voxels[s, 2] - 1
    while low < high:
        middle = (low + high) // 2
        if tables.cdf[start + middle] > u:
            high = middle
        else:
            low = middle + 1
    rest = low
    for j in range(3):
        i = 2 - j
        m, n = tables.voxels[s, i], tables.replicas[s, i]
        inside = (rest % m + uniform(chains.key, c)) / m
        rest //= m
        chains.molecule[c, slot, i] = (inside + int(uniform(chains.key, c) * n)) / n
    return bias(tables, s, start, low)


@scalar
def pick(chains, c, k):
    """Slot of a random molecule of species k, which must exist."""
    left = int(uniform(chains.key, c) * chains.count[c, k])
    for j in range(chains.n[c]):
        if chains.kind[c, j] == k:
            if left == 0:
                return j
            left -= 1
    return -1


@scalar
def copy(chains, c, source, target):
    """Copy a molecule from one slot to another."""
    chains.kind[c, target] = chains.kind[c, source]
    for i in range(15):
        chains.molecule[c, target, i] = chains.molecule[c, source, i]


# ------------------------------------------------------------------------------ the chain


@scalar
def move(tables, chains, c, row):
    """Attempt one move and accept it with min(1, exp(log_ratio - beta dU)).

    `log_ratio` holds the ratio of the proposals and the activities, with b the bias of a voxel:
    insertion z V / ((N + 1) b), deletion N b / (z V), reinsertion b_old / b_new, change of species
    k into m N_k z_m / ((N_m + 1) z_k). An insertion's weight exp(-beta dU) / b, accepted or not,
    averages to <N> / (z V).
    """
    p = chains.state[c]
    s, key = tables.system[p], chains.key
    trial, species = chains.kind.shape[1] - 1, tables.n_sites.size
    u = np.float64(mixed(np.uint64(chains.step[c] + 1) * _GAMMA) >> _11) * 1.1102230246251565e-16
    kind = TRANSLATION
    while kind < IDENTITY and u >= tables.moves[kind]:
        kind += 1
    chains.tried[c, kind] += 1
    # which molecule goes (old), which comes (k becomes m)
    old, new, log_ratio, weight = -1, True, 0.0, 1.0
    if kind < SWAP:
        if chains.n[c] == 0:
            return
        old = min(int(uniform(key, c) * chains.n[c]), chains.n[c] - 1)
        k = chains.kind[c, old]
        m = k
    else:
        k = min(int(uniform(key, c) * species), species - 1)
        m = k
        if kind == IDENTITY:
            m = min(int(uniform(key, c) * (species - 1)), species - 2)
            m = m + 1 if m >= k else m
        else:
            new = uniform(key, c) < 0.5
        if kind == IDENTITY or not new:
            if chains.count[c, k] == 0:
                return
            old = pick(chains, c, k)
    start = tables.cdf_start[p, k]
    if old >= 0:
        copy(chains, c, old, trial)
        if REINSERTION <= kind <= SWAP:
            weight = bias(tables, s, start, voxel(tables, chains, s, c, old))
            if weight <= 0.0:
                return
    if new:
        chains.kind[c, trial] = m
        size = -1.0
        if kind == TRANSLATION:
            size = 0.0
            for j in range(3):
                shift = (2.0 * uniform(key, c) - 1.0) * chains.size[c, 0]
                for i in range(3):
                    chains.molecule[c, trial, i] += shift * tables.inverse[s, j, i]
        elif kind == ROTATION:
            size = chains.size[c, 1]
        elif kind != IDENTITY:
            weight /= draw_centre(tables, chains, s, c, trial, start)
        if size != 0.0:
            turn(chains, c, trial, size)
        place(tables, chains, s, c, trial)
    if kind == REINSERTION:
        log_ratio = math.log(weight)
    elif kind == IDENTITY:
        log_ratio = tables.log_activity[p, m] - tables.log_activity[p, k] + math.log(
            chains.count[c, k] / (chains.count[c, m] + 1.0))
    elif kind == SWAP and new:
        log_ratio = tables.log_activity[p, k] + math.log(weight / (chains.count[c, k] + 1))
    elif kind == SWAP:
        log_ratio = math.log(chains.count[c, k] * weight) - tables.log_activity[p, k]
    change = 0.0
    for which in range(2):  # the molecule that comes, then the one that goes
        slot = trial if which == 0 else old
        if (which == 0 and new) or (which == 1 and old >= 0):
            energy = molecule_energy(tables, chains, c, slot, old)
            change += energy if which == 0 else -energy
        if which == 0 and new and kind == SWAP:
            chains.inserts[c, row, k] += 1
            chains.weights[c, row, k] += weight * math.exp(-tables.beta[p] * change)
        if change >= BIG:
            return
    if math.log(uniform(key, c)) >= log_ratio - tables.beta[p] * change:
        return
    chains.accepted[c, kind] += 1
    chains.energy[c] += change
    if not new:
        chains.n[c] -= 1
        copy(chains, c, chains.n[c], old)
        chains.count[c, k] -= 1
    elif old < 0:
        copy(chains, c, trial, chains.n[c])
        chains.n[c] += 1
        chains.count[c, k] += 1
    else:
        copy(chains, c, trial, old)
        chains.count[c, k] -= 1
        chains.count[c, m] += 1


@scalar
def sample(tables, chains, c, row):
    """Record the state at the end of a cycle."""
    s = tables.system[chains.state[c]]
    for k in range(tables.n_sites.size):
        chains.counts[c, row, k] = chains.count[c, k]
    chains.energies[c, row] = chains.energy[c]
    start = chains.density_start[c]
    if start >= 0:
        n = tables.voxels[s, 0] * tables.voxels[s, 1] * tables.voxels[s, 2]
        for j in range(chains.n[c]):
            chains.density[start + chains.kind[c, j] * n + voxel(tables, chains, s, c, j)] += 1


@scalar
def adapt(chains, c):
    """Move the step sizes towards 45 % acceptance and forget the counts."""
    for kind in range(2):
        if chains.tried[c, kind] >= 10:
            share = chains.accepted[c, kind] / chains.tried[c, kind]
            factor = min(max(share / 0.45, 0.7), 1.4)
            largest = LARGEST_TURN if kind == ROTATION else 10.0
            chains.size[c, kind] = min(max(chains.size[c, kind] * factor, SMALLEST_STEP), largest)
            chains.tried[c, kind], chains.accepted[c, kind] = 0, 0


@scalar
def advance(first_chain, stride, tables, chains, first, last, adapting):
    """Advance chains from cycle `first` up to `last`, or until their slots are full.

    `first` is the cycle of row 0 of the records. A chain whose slots are full stops between two
    moves; with more slots it goes on as if it had not stopped.
    """
    for c in range(first_chain, chains.n.size, stride):
        while (
            chains.step[c] < last * chains.length[c] and chains.n[c] < chains.kind.shape[1] - 1
        ):
            row = chains.step[c] // chains.length[c] - first
            move(tables, chains, c, row)
            chains.step[c] += 1
            if chains.step[c] % chains.length[c] == 0:
                sample(tables, chains, c, row)
                if adapting == 1:
                    adapt(chains, c)


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
                if tables.charged == 1 and r2 < tables.host_cutoff * tables.host_cutoff:
                    values[last, i] += COULOMB * images[j, 4] * screened(tables.host_alpha, r2)


@scalar
def boltzmann(first_chain, stride, tables, chains, k, out):
    """Mean Boltzmann factor of species k in each voxel, at random places.

    ``out`` is flat over the voxels. Each chain, here a mere scratch with a random stream of its
    own, takes the voxels whose index is its own modulo the number of chains.
    """
    p = chains.state[0]
    s, m, n = tables.system[p], tables.voxels, tables.replicas
    for c in range(first_chain, chains.n.size, stride):
        chains.kind[c, 0] = k
        for v in range(c, out.size, chains.n.size):
            total = 0.0
            for _ in range(ORIENTATIONS):
                rest = v
                for j in range(3):
                    i = 2 - j
                    x = (rest % m[s, i] + uniform(chains.key, c)) / (m[s, i] * n[s, i])
                    chains.molecule[c, 0, i] = x
                    rest //= m[s, i]
                turn(chains, c, 0, -1.0)
                place(tables, chains, s, c, 0)
                energy = host_energy(tables, chains, s, c, 0)
                total += math.exp(-tables.beta[p] * min(energy, BIG))
            out[v] = total / ORIENTATIONS


# ------------------------------------------------------------------------------ launching


def advance_kernel(tables, chains, first, last, adapting):
    """`advance` with one thread per chain."""
    advance(cuda.grid(1), cuda.gridsize(1), tables, chains, first, last, adapting)


def nodes_kernel(tables, lattice, shape, block, starts, lists, images, values):
    """`nodes` with one thread per node."""
    nodes(
        cuda.grid(1), cuda.gridsize(1), tables, lattice, shape, block, starts, lists, images, values
    )


def boltzmann_kernel(tables, chains, k, out):
    """`boltzmann` with one thread per chain."""
    boltzmann(cuda.grid(1), cuda.gridsize(1), tables, chains, k, out)


_KERNELS = {advance: advance_kernel, nodes: nodes_kernel, boltzmann: boltzmann_kernel}


def launch(device, function, count, *arguments):
    """Apply `advance`, `nodes` or `boltzmann` to all indices below `count`.

    On cores the indices are dealt to threads (numba's NUMBA_NUM_THREADS); on CUDA the arguments
    must lie on the device.
    """
    if device == "cuda":
        with _fitting():
            _cuda_kernel(function)[-(-count // THREADS), THREADS](*arguments)
        cuda_target().synchronize()
        return
    workers = config.NUMBA_NUM_THREADS
    stride = min(count, 8 * workers)  # a thread that ends early takes a further share
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
    with _fitting():
        from numba import cuda
    return cuda


@functools.cache
def _cuda_kernel(function):
    cuda = cuda_target()
    space = {**globals(), "cuda": cuda}
    for name in () if SIMULATED else _SCALARS:
        plain = types.FunctionType(space[name].py_func.__code__, space, name)
        space[name] = cuda.jit(device=True)(plain)
    kernel = _KERNELS[function]
    return cuda.jit(types.FunctionType(kernel.__code__, space, kernel.__name__))


def to_device(value, device):
    """An array on the device; `Tables` or `Chains` with all its arrays there."""
    if device == "cpu":
        return value
    if isinstance(value, tuple):
        return type(value)(*(to_device(a, device) for a in value))
    return cuda_target().to_device(value) if isinstance(value, np.ndarray) else value


def framework_values(device, tables, lattice, shape, block, starts, lists, images, values):
    """Fill `values` as `nodes` says, on either device."""
    arrays = [
        to_device(a, device) for a in (tables, lattice, shape, block, starts, lists, images, values)
    ]
    launch(device, nodes, values.shape[1], *arrays)
    if device == "cuda":
        arrays[-1].copy_to_host(values)


def boltzmann_factors(device, tables, chains, k, out):
    """Fill `out` as `boltzmann` says, on either device; `tables` lie there already."""
    on_device = to_device(out, device)
    launch(device, boltzmann, chains.n.size, tables, to_device(chains, device), k, on_device)
    if device == "cuda":
        on_device.copy_to_host(out)
