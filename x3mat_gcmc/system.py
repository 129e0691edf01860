"""What a Monte Carlo simulation needs to know: settings, guests, frameworks, tables.

From a framework's unit cell come the simulated cell, the Ewald terms, and for each kind of guest
site an energy grid over the unit cell; the tables of many frameworks and state points together are
what `kernel` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import fft
from scipy.spatial import cKDTree
from scipy.special import erf

from x3mat.errors import DataError
from x3mat_gcmc.forcefield import (
    COULOMB,
    SYMBOLS,
    bond_charges,
    framework_parameters,
    fugacity_coefficients,
    guest,
)

if TYPE_CHECKING:
    from x3mat_gcmc.framework import Framework
    from x3mat_gcmc.kernel import Chains, Tables

K_B = 1.380649e-23  # J/K
HOST_CUTOFF = 9.0  # Å; real-space Ewald cutoff of the framework's potential
HOST_ALPHA = 4.1 / HOST_CUTOFF  # 1/Å; what is cut off is 1e-8,
HOST_END = 4.55  # and of the waves, which end at k = 2 alpha HOST_END, 1e-9
EWALD = 3.46  # of guests: alpha r at the cutoff, erfc 1e-6, and k / 2 alpha at the last wave
SITES = 3  # of a guest at most
WARP = 32  # lines of waves whose coefficients lie side by side
VOXEL = 0.5  # Å; greatest size of the voxels for insertions and densities
INNER = 6.0  # Å; up to this distance of the centres, trials of insertions feel the guests
CONTACT = 0.8  # of the least sigma: no insertion puts centres nearer than this
HEAT, FILL = 2.0, 1e5  # factors on temperature and fugacity when annealing starts
MOLECULE_VOLUME = 45.0  # Å3; of a guest where it is dense; only shapes the insertions
CYCLES_PER_LAUNCH, CYCLES_PER_EXCHANGE = 50, 5
HOTTEST = 3.0  # factor on temperature at the top of a ladder
SHORTEST, LONGEST = 20, 400  # moves of a cycle
MAX_REPLICAS = 2000  # unit cells in the simulated cell
MAX_NET_CHARGE = 0.1  # e per atom that is taken off all atoms to make a framework neutral


@dataclass(frozen=True)
class GCMCSettings:
    """What is simulated, and for how long.

    Attributes
    ----------
    gases : tuple of str
        Names of guests in ``data/forcefields``: N2, CO2, Ar, CH4.
    fractions : tuple of float
        Their mole fractions in the gas; they must add up to 1.
    temperature, pressure : float
        K, Pa.
    force_field : str
        Framework parameters: a file in ``data/forcefields``.
    charges : {"none", "forcefield", "cif"}
        No electrostatics; the force field's charges; or those that come with the framework.
    cutoff : float
        Å, of the Lennard-Jones and real-space electrostatic interactions.
    shifted, tail_correction : bool
        Whether the Lennard-Jones energy is shifted to 0 at the cutoff; whether the mean energy
        beyond it is added. At most one of them.
    spacing : float
        Å, greatest spacing of the framework's energy grids; 0 sums over all atoms instead.
    equilibration, cycles : int
        Cycles before and during sampling; a cycle has as many moves as there are molecules on
        average, at least 20 and at most 400.
    replicas : int
        Independent chains of each framework.
    ladder : int
        Temperatures of each of them (parallel tempering): as many chains, the hottest at
        three times the temperature, exchange their states, and the coldest counts. For filled
        pores, whose packing hardly changes by itself: some 20, and more for many molecules.
    moves : tuple of 5 float
        Relative frequencies of translation, rotation, reinsertion, swap (insertion or deletion)
        and change of species; those that cannot apply are left out.
    trials : int
        Places tried in each insertion; more where pores are full.
    start : {"empty", "full", "both"}
        Chains are annealed from a higher temperature during the first half of equilibration, all
        from an empty framework. With "full" a much higher fugacity fills it first; with "both"
        that holds for every other chain, and a difference is warned of.
    density : bool
        Whether densities of the centres are collected.
    seed : int
    """

    gases: tuple[str, ...] = ("N2",)
    fractions: tuple[float, ...] = (1.0,)
    temperature: float = 298.0
    pressure: float = 1.0e5
    force_field: str = "uff"
    charges: Literal["none", "forcefield", "cif"] = "none"
    cutoff: float = 12.8
    shifted: bool = False
    tail_correction: bool = False
    spacing: float = 0.25
    equilibration: int = 200
    cycles: int = 1000
    replicas: int = 4
    ladder: int = 1
    moves: tuple[float, float, float, float, float] = (0.2, 0.15, 0.1, 0.45, 0.1)
    trials: int = 16
    start: Literal["empty", "full", "both"] = "empty"
    density: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        y = np.array(self.fractions, dtype=float)
        sensible = [
            ("gases and fractions", len(self.gases) == len(y) == len(set(self.gases)) > 0),
            ("fractions", (y > 0).all() and abs(y.sum() - 1) < 1e-6),
            ("temperature", 1 <= self.temperature < 1e4),
            ("pressure", 0 < self.pressure < 1e10),
            ("charges", self.charges in ("none", "forcefield", "cif")),
            ("cutoff", 5 <= self.cutoff <= 50),
            ("shifted and tail_correction", not (self.shifted and self.tail_correction)),
            ("spacing", self.spacing == 0 or 0.05 <= self.spacing <= 0.6),
            ("cycles", self.equilibration >= 1 and self.cycles >= 10 and self.replicas >= 1),
            ("ladder", self.ladder >= 1),
            ("trials", 1 <= self.trials <= 1024),
            ("start", self.start in ("both", "empty", "full")),
            ("moves", len(self.moves) == 5 and min(self.moves) >= 0 and self.moves[3] > 0),
        ]
        for name, good in sensible:
            if not good:
                raise DataError("settings", f"{name} cannot be used", f"Correct {name} in {self}.")


def settings_hash(settings: GCMCSettings, *more: str) -> str:
    """16 hexadecimal digits that stand for the settings, the parameters they name, and `more`."""
    guests = [guest(gas) for gas in settings.gases]
    chosen = {k: v for k, v in asdict(settings).items() if (k, v) != ("ladder", 1)}
    content = [chosen, *guests, framework_parameters(settings.force_field), *more]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------ one framework


@dataclass(frozen=True, eq=False)
class Guests:
    """Arrays over species K and site types T; the fields of `Tables` of the same names."""

    types: tuple[tuple[float, float, float], ...]  # epsilon, sigma, charge of each site type
    n_sites: np.ndarray
    site_type: np.ndarray
    site_z: np.ndarray
    site_charge: np.ndarray
    lj: np.ndarray

    @property
    def stretch(self) -> np.ndarray:
        """K; the grid of a site type holds asinh(U / stretch).

        Found by trial: the bend must lie above the Coulomb energies that vary fast near atoms.
        """
        return np.array([max(4e3, 4e4 * abs(q)) if e > 0 else 1e6 for e, _, q in self.types])


def _lj_table(one: np.ndarray, two: np.ndarray, settings: GCMCSettings) -> np.ndarray:
    """(…, 3) 4 epsilon, sigma², energy at the cutoff where shifted; rows epsilon, sigma."""
    epsilon = np.sqrt(np.outer(one[:, 0], two[:, 0]))
    sigma = (one[:, None, 1] + two[None, :, 1]) / 2
    w = (sigma / settings.cutoff) ** 6
    at_cutoff = 4 * epsilon * (w * w - w) * settings.shifted
    return np.stack([4 * epsilon, sigma**2, at_cutoff], -1)


def make_guests(settings: GCMCSettings) -> Guests:
    """Sites of the gases; raises `DataError` for an unknown gas."""
    charged = settings.charges != "none"
    types, rows = [], []
    for name in settings.gases:
        molecule = guest(name)
        rows.append([])
        for site in molecule["sites"]:
            kind = molecule["types"][site["type"]]
            key = (kind["epsilon"], kind["sigma"], kind["charge"] * charged)
            if key[0] == key[2] == 0:  # it feels nothing
                continue
            if key not in types:
                types.append(key)
            rows[-1].append((types.index(key), site["z"], key[2]))
    shape = len(rows), SITES
    index, z, charge = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    for k, row in enumerate(rows):
        index[k, : len(row)], z[k, : len(row)], charge[k, : len(row)] = zip(*row, strict=True)
    table = np.array(types)[:, :2]
    lj = _lj_table(table, table, settings)
    return Guests(tuple(types), np.array([*map(len, rows)]), index, z, charge, lj)


def _tail(lj: np.ndarray, cutoff: float) -> np.ndarray:
    """4 pi times the integral of u r² from the cutoff on, K Å3."""
    sigma3 = lj[..., 1] ** 1.5
    return 4 * np.pi * lj[..., 0] * (sigma3**4 / (9 * cutoff**9) - sigma3**2 / (3 * cutoff**3))


@dataclass(frozen=True, eq=False)
class System:
    """A framework made ready: simulated cell, atoms in it, tables; see `Tables`."""

    framework: Framework
    replicas: np.ndarray  # (3,) int
    cell: np.ndarray  # (3, 3) Å
    atoms: np.ndarray
    atom_type: np.ndarray
    atom_charge: np.ndarray
    host_lj: np.ndarray
    waves: np.ndarray
    shape: np.ndarray  # (3,) nodes of the energy grids
    voxels: np.ndarray
    coulomb_cutoff: float  # Å, between guests
    line_axis: int
    lines: np.ndarray
    coefficients: np.ndarray
    constant: np.ndarray
    own: np.ndarray
    tail: np.ndarray
    mass: float  # g/mol, of the unit cell
    grids: dict[int, np.ndarray] = field(default_factory=dict)  # padded, by site type

    @property
    def volume(self) -> float:
        """Å3, of the simulated cell."""
        return abs(float(np.linalg.det(self.cell)))


def _waves(lattice: np.ndarray, alpha: float, end: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Waves of an Ewald sum, up to k = 2 alpha `end`, which leaves out what exp(-end²) weighs.

    Their indices, l ≥ 0, and 4 pi exp(-k²/4 alpha²) / (V k²), 1/Å.
    """
    largest = 2 * alpha * end
    reciprocal = 2 * np.pi * np.linalg.inv(lattice)  # columns a*, b*, c*
    limit = np.floor(largest * np.linalg.norm(lattice, axis=1) / (2 * np.pi)).astype(int)
    h = [np.arange(-limit[0], limit[0] + 1), np.arange(-limit[1], limit[1] + 1),
         np.arange(limit[2] + 1)]  # fmt: skip
    k = np.stack(np.meshgrid(*h, indexing="ij"), -1) @ reciprocal.T
    k2 = (k**2).sum(-1)
    with np.errstate(divide="ignore"):
        factor = 4 * np.pi / abs(np.linalg.det(lattice)) * np.exp(-k2 / (4 * alpha**2)) / k2
    factor[(k2 > largest**2) | (k2 == 0)] = 0.0
    return h, factor


def _lines(cell: np.ndarray, alpha: float) -> tuple[int, np.ndarray, np.ndarray]:
    """`line_axis`, `lines` and `coefficients` of `Tables` for one system.

    Of the waves k and -k one is taken and counts twice. The real and the reciprocal sum leave out
    alike, what exp(-EWALD²) weighs: some 0.01 K of a molecule's energy.
    """
    h, factor = _waves(cell, alpha, EWALD)
    kept = factor > 0
    index, factor = np.stack(np.meshgrid(*h, indexing="ij"), -1)[kept], factor[kept]
    above = index[:, 2] > 0  # these come without their opposites
    index, factor = np.r_[index, -index[above]], np.r_[factor, factor[above]]
    lines = [len(np.unique(np.delete(index, axis, 1), axis=0)) for axis in range(3)]
    axis = int(np.argmin(lines))
    a, b, c = index[:, (axis + 1) % 3], index[:, (axis + 2) % 3], index[:, axis]
    half = (a > 0) | (a == 0) & ((b > 0) | (b == 0) & (c > 0))
    order = np.lexsort((c[half], b[half], a[half]))
    index, factor = index[half][order], factor[half][order]
    others = np.delete(index, axis, 1)
    start = np.flatnonzero(np.r_[True, (np.diff(others, axis=0) != 0).any(1)])
    count = np.diff(np.r_[start, len(index)])
    longest = np.argsort(-count, kind="stable")  # lanes of a warp take lines of one length
    rows, blocks = [], []
    for part in np.split(longest, range(WARP, len(longest), WARP)):
        block = np.zeros((count[part[0]], WARP))
        for i, line in enumerate(part):
            block[: count[line], i] = factor[start[line] :][: count[line]]
            rows.append([*index[start[line]], count[line], sum(map(np.size, blocks)) + i])
        blocks.append(block)
    return axis, np.array(rows), COULOMB * np.concatenate([b.ravel() for b in blocks])


def _least(h: list[np.ndarray]) -> np.ndarray:
    """Least numbers of grid nodes that hold the waves h of `_waves`."""
    return 2 * np.array([x.max() for x in h]) + 2


def _spline_coefficients(values: np.ndarray) -> np.ndarray:
    """Padded float32 coefficients of the cubic B-spline through periodic values."""
    spectrum = fft.rfftn(values)
    for axis, n in enumerate(values.shape):
        wave = np.arange(spectrum.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        spectrum *= 3 / (2 + np.cos(2 * np.pi * wave / n))
    spline = fft.irfftn(spectrum, s=values.shape).astype(np.float32)
    return np.pad(spline, [(1, 2)] * 3, mode="wrap")


def _nodes(lengths: np.ndarray, spacing: float, least: np.ndarray) -> np.ndarray:
    """Numbers of grid nodes along axes of these lengths, good for fast Fourier transforms."""
    wanted = np.maximum(np.ceil(lengths / spacing - 1e-9), least).astype(int)
    return np.array([fft.next_fast_len(int(n), real=True) for n in wanted])


def make_system(framework: Framework, settings: GCMCSettings, guests: Guests) -> System:
    """Check a framework and make all but its energy grids.

    Raises
    ------
    DataError
        Coordinates or charges that are not finite or do not fit; an element without parameters; no
        charges where they are wanted; a framework that is not neutral; a cell that is too small.
    """
    name = framework.name or "framework"
    lattice = np.array(framework.lattice, dtype=float)
    frac = np.array(framework.frac_coords, dtype=float) % 1.0
    if not (len(frac) == len(framework.species) > 0 and np.isfinite(frac).all()
            and np.isfinite(lattice).all() and abs(np.linalg.det(lattice)) > 1e-3):  # fmt: skip
        raise DataError(name, "its cell or atoms cannot be used", "Give a complete crystal.")
    parameters = framework_parameters(settings.force_field)
    symbols = [SYMBOLS[int(z) - 1] if 1 <= z <= 100 else str(z) for z in framework.species]
    unknown = sorted({s for s in symbols if s not in parameters})
    if unknown:
        raise DataError(
            name, f"{settings.force_field} has no parameters for {', '.join(unknown)}",
            "Choose another force field, or leave this crystal out.",
        )  # fmt: skip
    charged = settings.charges != "none"
    charge = np.zeros(len(symbols))
    if settings.charges == "cif":
        if getattr(framework, "charges", None) is None:
            raise DataError(
                name, "it has no atomic charges",
                "Give a CIF with _atom_site_charge, predict them (x3mat_gcmc.charges), or choose"
                ' charges "none" or "forcefield".',
            )  # fmt: skip
        charge = np.array(framework.charges, dtype=float)
        if charge.shape != frac.shape[:1] or not np.isfinite(charge).all():
            raise DataError(name, "its charges do not fit its atoms", "Give one for each atom.")
    elif charged:
        charge = bond_charges(lattice, frac, symbols, settings.force_field)
    if charged and not abs(charge.mean()) <= MAX_NET_CHARGE:
        raise DataError(
            name, f"its net charge is {charge.sum():.3g} e", "Give charges of a neutral framework."
        )
    charge = charge - charge.mean()
    widths = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    replicas = np.ceil(2 * settings.cutoff / widths - 1e-9).astype(np.int64)
    if np.prod(replicas) > MAX_REPLICAS:
        raise DataError(
            name, f"its cell is too small: {np.prod(replicas)} copies make a simulated cell",
            "Give a larger cell or shorten the cutoff.",
        )  # fmt: skip
    shifts = np.stack(np.meshgrid(*map(np.arange, replicas), indexing="ij"), -1).reshape(-1, 3)
    cell = replicas[:, None] * lattice
    names = sorted(set(symbols))
    table = np.array([[parameters[s]["epsilon"], parameters[s]["sigma"]] for s in names])
    sites = np.array(guests.types)[:, :2]
    host_lj = _lj_table(table, sites, settings)
    index = np.array([names.index(s) for s in symbols])
    lengths = np.linalg.norm(lattice, axis=1)
    shape, waves = np.zeros(3, np.int64), np.zeros((0, 5))
    line_axis, lines, coefficients = 0, np.zeros((0, 5), np.int64), np.zeros(0)
    least = np.full(3, 4)
    coulomb_cutoff = float((replicas * widths).min() / 2)
    alpha = EWALD / coulomb_cutoff
    volume = abs(np.linalg.det(cell))
    constant, own = np.zeros((2, len(settings.gases)))
    tail = np.zeros((len(constant), len(constant)))
    if charged:
        h, factor = _waves(lattice, HOST_ALPHA, HOST_END)
        phase = [np.exp(2j * np.pi * np.outer(frac[:, i], h[i])) for i in range(3)]
        structure = np.stack([
            (phase[1] * (phase[0][:, i] * charge)[:, None]).T @ phase[2] for i in range(len(h[0]))
        ])  # sum of q exp(i k x)
        spectrum = COULOMB * factor * structure.conj()
        kept = factor > 0
        both = np.where(np.meshgrid(*h, indexing="ij")[2] > 0, 2.0, 1.0) * spectrum
        waves = np.column_stack([
            2 * np.pi * np.stack(np.meshgrid(*h, indexing="ij"), -1)[kept],
            both[kept].real, -both[kept].imag,
        ])  # fmt: skip
        least = _least(h)
        line_axis, lines, coefficients = _lines(cell, alpha)
        for k, n in enumerate(guests.n_sites):
            q, z = guests.site_charge[k, :n], guests.site_z[k, :n]
            own[k] = -COULOMB * alpha / math.sqrt(math.pi) * (q**2).sum()
            for i in range(n):
                for j in range(i):
                    r = abs(z[i] - z[j])
                    own[k] -= COULOMB * q[i] * q[j] * erf(alpha * r) / r
    if settings.tail_correction:
        per_type = np.bincount(index, minlength=len(names)) * np.prod(replicas) / volume
        host_tail = per_type @ _tail(host_lj, settings.cutoff)
        guest_tail = _tail(guests.lj, settings.cutoff) / volume
        for k, n in enumerate(guests.n_sites):
            constant[k] += host_tail[guests.site_type[k, :n]].sum()
            for m, o in enumerate(guests.n_sites):
                rows = guests.site_type[k, :n], guests.site_type[m, :o]
                tail[k, m] = guest_tail[np.ix_(*rows)].sum()
    if settings.spacing:
        shape = _nodes(lengths, settings.spacing, least)
    return System(
        framework=framework, replicas=replicas, cell=cell,
        atoms=((frac[None] + shifts[:, None]) / replicas).reshape(-1, 3),
        atom_type=np.tile(index, len(shifts)), atom_charge=np.tile(charge, len(shifts)),
        host_lj=host_lj, waves=waves, shape=shape,
        voxels=np.maximum(np.ceil(lengths / VOXEL), 1).astype(np.int64),
        coulomb_cutoff=coulomb_cutoff, line_axis=line_axis, lines=lines,
        coefficients=coefficients, constant=constant, own=own, tail=tail,
        mass=sum(parameters[s]["mass"] for s in symbols),
    )  # fmt: skip


# ------------------------------------------------------------------------------ many at once


def make_tables(
    systems: Sequence[System],
    guests: Guests,
    states: Sequence[tuple[int, GCMCSettings]],
    cdfs: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    direct: bool,
) -> Tables:
    """Tables of several systems and state points (index of the system, settings)."""
    from x3mat_gcmc.kernel import Tables

    def joined(arrays: Iterable[np.ndarray], dtype: type, *rest: int) -> np.ndarray:
        parts = list(arrays)  # CUDA has no empty arrays: at least one row
        whole = np.concatenate(parts) if parts else np.zeros((0, *rest))
        return np.ascontiguousarray(whole if whole.size else np.zeros((1, *rest)), dtype=dtype)

    settings, n_types, n_species = states[0][1], len(guests.types), len(guests.n_sites)
    ends = lambda sizes: np.concatenate([[0], np.cumsum(list(sizes))]).astype(np.int64)  # noqa: E731
    grids = [s.grids[t].ravel() for s in systems for t in sorted(s.grids)]
    starts, at = np.full((len(systems), n_types), -1, np.int64), 0
    for i, s in enumerate(systems):
        for t in sorted(s.grids):
            starts[i, t], at = at, at + s.grids[t].size
    lj_start = ends(len(s.host_lj) for s in systems)
    y = np.array([s.fractions for _, s in states])
    fugacity = np.array([
        fugacity_coefficients(s.temperature, s.pressure, s.gases, s.fractions) for _, s in states
    ]) * y * np.array([[s.pressure] for _, s in states])  # fmt: skip
    volume = np.array([systems[i].volume for i, _ in states])
    temperature = np.array([s.temperature for _, s in states])
    density = fugacity / (K_B * temperature[:, None]) * 1e-30
    flat = [c for row in cdfs or () for c in row]
    cdf_start = ends(map(len, flat))[:-1] if flat else np.zeros(n_species, np.int64)
    moves = np.array(settings.moves) * [
        1, guests.n_sites.max() > 1, 1, 1, n_species > 1
    ]  # fmt: skip
    return Tables(
        cell=np.array([s.cell for s in systems]),
        inverse=np.array([np.linalg.inv(s.cell) for s in systems]),
        replicas=np.array([s.replicas for s in systems]),
        grid=joined(grids, np.float32), grid_shape=np.array([s.shape for s in systems]),
        grid_start=starts, stretch=guests.stretch,
        direct=int(direct),
        atom_start=ends(len(s.atoms) for s in systems),
        atoms=joined((s.atoms for s in systems), np.float64, 3),
        atom_type=joined(
            (s.atom_type + lj_start[i] for i, s in enumerate(systems)), np.int64),
        atom_charge=joined((s.atom_charge for s in systems), np.float64),
        host_lj=joined((s.host_lj for s in systems), np.float64, n_types, 3),
        host_alpha=HOST_ALPHA, host_cutoff=HOST_CUTOFF,
        wave_start=ends(len(s.waves) for s in systems),
        waves=joined((s.waves for s in systems), np.float64, 5),
        cutoff=float(settings.cutoff), charged=int(settings.charges != "none"),
        lj=guests.lj, inner=INNER,
        contact=CONTACT * min(s for e, s, _ in guests.types if e > 0),
        n_sites=guests.n_sites, site_type=guests.site_type, site_z=guests.site_z,
        site_charge=guests.site_charge, reach=np.abs(guests.site_z).max(1),
        coulomb_cutoff=np.array([s.coulomb_cutoff for s in systems]),
        alpha=np.array([EWALD / s.coulomb_cutoff for s in systems]),
        line_start=ends(len(s.lines) for s in systems),
        line_axis=np.array([s.line_axis for s in systems]),
        lines=joined((s.lines for s in systems), np.int64, 5),
        coefficient_start=ends(len(s.coefficients) for s in systems)[:-1],
        coefficients=joined((s.coefficients for s in systems), np.float64),
        constant=np.array([s.constant for s in systems]),
        own=np.array([s.own for s in systems]),
        tail=np.array([s.tail for s in systems]),
        system=np.array([i for i, _ in states]), beta=1 / temperature, trials=settings.trials,
        log_activity=np.log(density * volume[:, None]), moves=np.cumsum(moves) / moves.sum(),
        voxels=np.array([s.voxels for s in systems]),
        cdf=joined(flat, np.float64), cdf_start=cdf_start.reshape(-1, n_species),
    )  # fmt: skip


def empty_chains(
    state: np.ndarray, keys: np.ndarray, species: int, rows: int, slots: int, trials: int = 1,
    density: Sequence[int] = (), waves: Sequence[int] = (),
) -> Chains:  # fmt: skip
    """Empty chains; with the numbers of histogram cells and of `coefficients` of each chain."""
    from x3mat_gcmc.kernel import LANES, Chains

    n = len(state)
    start = np.concatenate([[0], np.cumsum(density)])[:-1] if len(density) else np.full(n, -1)
    waves = waves if len(waves) else [0] * n
    return Chains(
        order=np.arange(n), state=np.array(state, np.int64), key=np.array(keys, np.uint64),
        moves=np.zeros(n, np.int64), step=np.zeros(n, np.int64), length=np.full(n, 20, np.int64),
        beta=np.zeros(n), boost=np.zeros(n), count=np.zeros((n, species), np.int64),
        n=np.zeros(n, np.int64), energy=np.zeros(n),
        kind=np.zeros((n, slots), np.int64), molecule=np.zeros((n, 6, slots)),
        size=np.ones((n, 2)), tally=np.zeros((n, 2, 5), np.int64),
        scratch=np.zeros((n, max(trials, LANES))), near=np.zeros((n, LANES), np.uint64),
        places=np.zeros((n, trials, 8)), partial=np.zeros((n, trials, LANES)),
        counts=np.zeros((n, rows, species), np.int64), energies=np.zeros((n, rows)),
        weights=np.zeros((n, rows, species, 2)), density_start=start.astype(np.int64),
        density=np.zeros(max(1, int(np.sum(density))), np.uint32),
        structure_start=np.concatenate([[0], np.cumsum(waves)])[:-1].astype(np.int64),
        structure=np.zeros((2, 2, max(1, int(np.sum(waves))))), side=np.zeros(n, np.int64),
    )  # fmt: skip


def key_of(*parts: object) -> int:
    """64 bits that depend on nothing but `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def make_grids(system: System, guests: Guests, settings: GCMCSettings, device: str) -> None:
    """Fill in the framework's energy grids."""
    from x3mat_gcmc import kernel

    lattice, shape = system.cell / system.replicas[:, None], system.shape
    n_atoms = len(system.atoms) // int(np.prod(system.replicas))
    frac = system.atoms[:n_atoms] * system.replicas
    block = max(1, int(3.0 / np.linalg.norm(lattice / shape[:, None], axis=1).max()))
    corners = np.stack(np.meshgrid(*[np.arange(0, n, block) for n in shape], indexing="ij"), -1)
    centres = ((corners.reshape(-1, 3) + (block - 1) / 2) / shape) @ lattice
    steps = np.array(list(np.ndindex(2, 2, 2))) - 0.5
    reach = settings.cutoff + np.linalg.norm((steps * (block - 1) / shape) @ lattice, axis=1).max()
    margin = reach * np.linalg.norm(np.linalg.inv(lattice), axis=0)
    shifts = [np.arange(-math.ceil(m) - 1, math.ceil(m) + 2) for m in margin]
    images = frac + np.stack(np.meshgrid(*shifts, indexing="ij"), -1).reshape(-1, 1, 3)
    near = (images > -margin).all(-1) & (images < 1 + margin).all(-1)
    row = np.broadcast_to(np.arange(n_atoms), near.shape)[near]
    images = images[near] @ lattice
    lists = cKDTree(images).query_ball_point(centres, reach)
    starts = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    values = np.zeros((len(guests.types) + 1, int(np.prod(shape))))
    kernel.fill(
        device, kernel.nodes, values, make_tables([system], guests, [(0, settings)], direct=True),
        lattice, shape, block, starts, np.concatenate(lists).astype(np.int32),
        np.column_stack([images, system.atom_type[row], system.atom_charge[row]]),
    )  # fmt: skip
    values = values.reshape(-1, *system.shape)
    if settings.charges != "none":
        index = np.rint(system.waves[:, :3] / (2 * np.pi)).astype(int)
        half = np.zeros((*system.shape[:2], system.shape[2] // 2 + 1), complex)
        coefficient = system.waves[:, 3] - 1j * system.waves[:, 4]
        half[tuple((index % system.shape).T)] = coefficient * np.where(index[:, 2] > 0, 0.5, 1)
        values[-1] += fft.irfftn(half, s=system.shape) * np.prod(system.shape)
    for t, (epsilon, _, charge) in enumerate(guests.types):
        if epsilon > 0 or charge != 0:
            energy = values[t] + charge * values[-1]
            system.grids[t] = _spline_coefficients(np.arcsinh(energy / guests.stretch[t]))


def dilute_densities(
    systems: Sequence[System], guests: Guests, states: Sequence[tuple[int, GCMCSettings]],
    device: str,
) -> Iterator[list[np.ndarray]]:  # fmt: skip
    """Number densities z_k B_k of each species in the voxels, (n1, n2, n3), 1/Å3, by state.

    z is the activity and B the mean Boltzmann factor of a molecule in the voxel, at random places
    and in random directions: what there would be if molecules did not feel each other.
    """
    from x3mat_gcmc import kernel

    tables = make_tables(systems, guests, states, direct=not states[0][1].spacing)
    on_device = kernel.to_device(tables, device)
    for p, (i, _) in enumerate(states):
        m = systems[i].voxels
        factors = [np.zeros(int(np.prod(m))) for _ in guests.n_sites]
        for k, out_k in enumerate(factors):
            kernel.fill(device, kernel.boltzmann, out_k, on_device, p, k)
        z = np.exp(tables.log_activity[p]) / systems[i].volume
        yield [a * b.reshape(m) for a, b in zip(z, factors, strict=True)]


def insertion_cdfs(
    systems: Sequence[System], guests: Guests, states: Sequence[tuple[int, GCMCSettings]],
    device: str,
) -> list[list[np.ndarray]]:  # fmt: skip
    """Cumulative probabilities of the voxels for insertions, by state and species.

    Probabilities follow the occupancy of a Langmuir lattice gas, z_k B_k / (1 + v Σ z_m B_m) with
    :func:`dilute_densities` z B, blurred over the neighbours of a voxel; one per cent is uniform.
    They need not be exact: acceptance and weights account for them.
    """
    out = []
    for dilute in dilute_densities(systems, guests, states, device):
        total = 1 + MOLECULE_VOLUME * sum(dilute)
        out.append([])
        for density in dilute:
            weight = density / total
            for axis in range(3):
                weight = (weight + 0.25 * (np.roll(weight, 1, axis) + np.roll(weight, -1, axis)))
            weight, n = weight.ravel(), weight.size
            share = weight / weight.sum() if weight.sum() > 0 else np.full(n, 1 / n)
            cdf = np.cumsum(0.99 * share + 0.01 / n)
            out[-1].append(cdf / cdf[-1])
    return out


def bytes_needed(framework: Framework, settings: Sequence[GCMCSettings], guests: Guests) -> float:
    """Bytes of tables and chains of one framework, without those that grow with the loading."""
    lattice, first, gases = np.array(framework.lattice, float), settings[0], len(guests.n_sites)
    if not np.isfinite(lattice).all() or abs(np.linalg.det(lattice)) < 1e-3:
        return 0.0  # `make_system` refuses it
    lengths = np.linalg.norm(lattice, axis=1)
    widths = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    replicas = np.ceil(2 * first.cutoff / widths)
    volume = np.prod(replicas) * abs(np.linalg.det(lattice))
    last = 4 * EWALD**2 / (replicas * widths).min()  # k of the last wave, 1/Å
    waves = volume * last**3 / (12 * np.pi**2) * (first.charges != "none")
    grids = np.prod(lengths / first.spacing) * len(guests.types) if first.spacing else 0.0
    voxels = np.prod(lengths / VOXEL) * gases
    chains = len(settings) * first.replicas * first.ladder
    return float(
        10 * waves * (1 + 4 * chains) + 4 * grids + 8 * voxels * len(settings)
        + 60 * np.prod(replicas) * len(framework.species)
        + chains * (4 * voxels * first.density + 120 * 128 + 24 * CYCLES_PER_LAUNCH * gases)
    )  # fmt: skip
