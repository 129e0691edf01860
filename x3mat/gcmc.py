"""Grand-canonical Monte Carlo (GCMC) of rigid molecules in rigid frameworks.

Data flow: frameworks and settings → force field and fugacities → for each framework a simulated
cell, Ewald terms and energy grids → Markov chains of all frameworks × state points × replicas at
once (`gcmc_kernel`) → loadings with errors, heats of adsorption, densities.

Model: Lennard-Jones with Lorentz-Berthelot rules, truncated at the cutoff; point charges with
Ewald summation. The framework's energy of a guest site depends on its place in the unit cell alone
and is interpolated on a grid with cubic B-splines; guests interact directly,
with the smooth reciprocal part of the Ewald pair potential from a table over the simulated cell.
A run is reproducible: a chain depends on seed, framework and state only, not on what runs beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import fft
from scipy.spatial import cKDTree
from scipy.special import erf

from x3mat import paths
from x3mat.errors import DataError, X3MatError

if TYPE_CHECKING:
    from x3mat.gcmc_kernel import Chains, Tables

_K_B = 1.380649e-23  # J/K
_N_A = 6.02214076e23
_R = 8.31446261815324e-3  # kJ/(mol K)
HOST_CUTOFF = 9.0  # Å; real-space Ewald cutoff of the framework's potential
PAIR_SPACING = 0.1  # greatest spacing of the table of the Ewald pair potential, times alpha
VOXEL = 0.5  # Å; greatest size of the voxels for insertions and densities
MOLECULE_VOLUME = 45.0  # Å3; of a guest where it is dense; only shapes the insertions
CYCLES_PER_LAUNCH = 50
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
        Cycles before and during sampling; a cycle is max(20, mean number of molecules) moves.
    replicas : int
        Independent chains of each framework.
    moves : tuple of 5 float
        Relative frequencies of translation, rotation, reinsertion, swap (insertion or deletion)
        and change of species; those that cannot apply are left out.
    start : {"empty", "full"}
        "full" raises the pressure ten-thousandfold during the first half of the equilibration.
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
    moves: tuple[float, float, float, float, float] = (0.2, 0.15, 0.1, 0.45, 0.1)
    start: Literal["empty", "full"] = "empty"
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
            ("moves", len(self.moves) == 5 and min(self.moves) >= 0 and self.moves[3] > 0),
            ("start", self.start in ("empty", "full")),
        ]
        for name, good in sensible:
            if not good:
                raise DataError("settings", f"{name} cannot be used", f"Correct {name} in {self}.")


@dataclass(frozen=True, eq=False)
class Framework:
    """What a simulation needs of a crystal; a `Crystal` does as well, if no charges are needed.

    Attributes
    ----------
    lattice : (3, 3) array
        Rows a, b, c in Å.
    species : (N,) array
        Atomic numbers.
    frac_coords : (N, 3) array
    charges : (N,) array or None
        e.
    name : str
    """

    lattice: np.ndarray
    species: np.ndarray
    frac_coords: np.ndarray
    charges: np.ndarray | None = None
    name: str = ""


@dataclass(frozen=True)
class Loading:
    """Uptake of one gas with standard errors; heat of adsorption NaN where it is not defined."""

    mol_per_kg: float
    error_mol_per_kg: float
    g_per_L: float
    error_g_per_L: float
    molecules_per_cell: float
    error_molecules_per_cell: float
    heat_kJ_per_mol: float
    error_heat_kJ_per_mol: float
    counting: tuple[float, float]  # molecules per cell and error, from their number alone
    insertion: tuple[float, float]  # and from the insertions alone


@dataclass(frozen=True, eq=False)
class GCMCResult:
    """What came out for one framework at one state point.

    Attributes
    ----------
    name : str
    settings : GCMCSettings
    loadings : dict of str to Loading
    counts : (replicas, cycles, gases) int array
        Molecules in the simulated cell at the end of each sampled cycle.
    energies : (replicas, cycles) array
        Total energy, K.
    discarded : int
        Cycles at the start of sampling that the averages leave out.
    n_cells : int
        Unit cells in the simulated cell.
    fugacities : tuple of float
        Pa.
    acceptance : dict of str to float
        Share of accepted moves.
    density : dict of str to (n1, n2, n3) array, or None
        Centres of the molecules of each gas on the unit cell, per Å3; voxel (i, j, k) spans
        [i, i+1)/n1 and so on.
    moves : int
        Moves of all chains.
    seconds : float
        Wall time, shared out equally among what ran together.
    device : str
    """

    name: str
    settings: GCMCSettings
    loadings: dict[str, Loading]
    counts: np.ndarray
    energies: np.ndarray
    discarded: int
    n_cells: int
    fugacities: tuple[float, ...]
    acceptance: dict[str, float]
    density: dict[str, np.ndarray] | None
    moves: int
    seconds: float
    device: str

    @property
    def selectivity(self) -> float | None:
        """(x1 / x2) / (y1 / y2) of the first gas over the second; None for one gas."""
        if len(self.loadings) < 2:
            return None
        first, second = (x.molecules_per_cell for x in list(self.loadings.values())[:2])
        y = self.settings.fractions
        return first / second * y[1] / y[0] if second > 0 else math.nan

    def save_density(self, folder: str | Path) -> Path:
        """Write the densities to ``<name>-density.npz``, one array per gas; returns the path."""
        path = Path(folder) / f"{self.name.replace(':', '-')}-density.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **(self.density or {}))
        return path

    def as_dict(self) -> dict[str, Any]:
        """What the command line prints as JSON."""
        keys = "mol_per_kg", "error_mol_per_kg", "g_per_L", "molecules_per_cell"
        return {
            "temperature_K": self.settings.temperature, "pressure_Pa": self.settings.pressure,
            "loadings": {g: {k: getattr(x, k) for k in keys} for g, x in self.loadings.items()},
            "selectivity": self.selectivity, "seconds": round(self.seconds, 3),
            "device": self.device,
        }  # fmt: skip


# ------------------------------------------------------------------------------ force field


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
        raise DataError(name, "it is no force field for frameworks", f"Choose from {', '.join(known)}.")
    return known[name]


_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br"
    " Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho"
    " Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es"
    " Fm"
).split()


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


# ------------------------------------------------------------------------------ one framework


@dataclass(frozen=True, eq=False)
class _Guests:
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


def _guests(settings: GCMCSettings) -> _Guests:
    charged = settings.charges != "none"
    types, rows = [], []
    for name in settings.gases:
        molecule = guest(name)
        rows.append([])
        for site in molecule["sites"]:
            kind = molecule["types"][site["type"]]
            key = (kind["epsilon"], kind["sigma"], kind["charge"] * charged)
            if key not in types:
                types.append(key)
            rows[-1].append((types.index(key), site["z"], key[2]))
    shape = len(rows), max(map(len, rows))
    index, z, charge = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    for k, row in enumerate(rows):
        index[k, : len(row)], z[k, : len(row)], charge[k, : len(row)] = zip(*row, strict=True)
    table = np.array(types)[:, :2]
    lj = _lj_table(table, table, settings)
    return _Guests(tuple(types), np.array([*map(len, rows)]), index, z, charge, lj)


def _tail(lj: np.ndarray, cutoff: float) -> np.ndarray:
    """4 pi times the integral of u r² from the cutoff on, K Å3."""
    sigma3 = lj[..., 1] ** 1.5
    return 4 * np.pi * lj[..., 0] * (sigma3**4 / (9 * cutoff**9) - sigma3**2 / (3 * cutoff**3))


@dataclass(frozen=True, eq=False)
class _System:
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
    pair: np.ndarray
    constant: np.ndarray
    tail: np.ndarray
    mass: float  # g/mol, of the unit cell
    grids: dict[int, np.ndarray] = field(default_factory=dict)  # padded, by site type

    @property
    def volume(self) -> float:
        """Å3, of the simulated cell."""
        return abs(float(np.linalg.det(self.cell)))


def _ewald_alpha(cutoff: float) -> float:
    """1/Å; erfc(alpha r) is 1e-6 at the cutoff."""
    return 3.46 / cutoff


def _waves(lattice: np.ndarray, alpha: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Indices h, k ≥ …, l ≥ 0 of the Ewald sum and the factor (K Å/e² …) of each wave."""
    largest = 2 * alpha * math.sqrt(-math.log(1e-9))
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


def _on_grid(h: list[np.ndarray], spectrum: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Real function on a grid from its Fourier coefficients at the indices h (l ≥ 0)."""
    full = np.zeros((shape[0], shape[1], shape[2] // 2 + 1), complex)
    full[np.ix_(h[0] % shape[0], h[1] % shape[1], h[2])] = spectrum * np.prod(shape)
    return fft.irfftn(full, s=shape, workers=-1)


def _spline_coefficients(values: np.ndarray) -> np.ndarray:
    """Padded float32 coefficients of the cubic B-spline through periodic values."""
    spectrum = fft.rfftn(values, workers=-1)
    for axis, n in enumerate(values.shape):
        wave = np.arange(spectrum.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        spectrum *= 3 / (2 + np.cos(2 * np.pi * wave / n))
    spline = fft.irfftn(spectrum, s=values.shape, workers=-1).astype(np.float32)
    return np.pad(spline, [(1, 2)] * 3, mode="wrap")


def _nodes(lengths: np.ndarray, spacing: float, least: int) -> np.ndarray:
    """Numbers of grid nodes along axes of these lengths, good for fast Fourier transforms."""
    wanted = np.maximum(np.ceil(lengths / spacing - 1e-9), least).astype(int)
    return np.array([fft.next_fast_len(int(n), real=True) for n in wanted])


def _system(framework: Framework, settings: GCMCSettings, guests: _Guests) -> _System:
    """Check a framework and make all but its energy grids."""
    from x3mat.gcmc_kernel import COULOMB

    name = framework.name or "framework"
    lattice = np.array(framework.lattice, dtype=float)
    parameters = framework_parameters(settings.force_field)
    symbols = [_SYMBOLS[int(z) - 1] if 1 <= z <= 100 else str(z) for z in framework.species]
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
                'Give a CIF with _atom_site_charge, or choose charges "none" or "forcefield".',
            )  # fmt: skip
        charge = np.array(framework.charges, dtype=float)
    elif charged:
        if any("charge" not in parameters[s] for s in symbols):
            raise DataError(
                name, f"{settings.force_field} has no charges",
                'Choose charges "cif" or "none", or a force field with charges.',
            )  # fmt: skip
        charge = np.array([parameters[s]["charge"] for s in symbols])
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
    frac = np.array(framework.frac_coords, dtype=float) % 1.0
    cell = replicas[:, None] * lattice
    names = sorted(set(symbols))
    table = np.array([[parameters[s]["epsilon"], parameters[s]["sigma"]] for s in names])
    sites = np.array(guests.types)[:, :2]
    host_lj = _lj_table(table, sites, settings)
    index = np.array([names.index(s) for s in symbols])
    lengths = np.linalg.norm(lattice, axis=1)
    shape, waves, pair = np.zeros(3, np.int64), np.zeros((0, 5)), np.zeros((0, 0, 0), np.float32)
    coulomb_cutoff = float((replicas * widths).min() / 2)
    alpha = _ewald_alpha(coulomb_cutoff)
    volume = abs(np.linalg.det(cell))
    constant = np.zeros(len(settings.gases))
    tail = np.zeros((len(constant), len(constant)))
    least = 4
    if charged:
        h, factor = _waves(lattice, _ewald_alpha(HOST_CUTOFF))
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
        least = 2 * np.array([len(h[0]) // 2, len(h[1]) // 2, len(h[2])]) + 2
        h, factor = _waves(cell, alpha)
        nodes = _nodes(np.linalg.norm(cell, axis=1), PAIR_SPACING / alpha,
                       2 * np.array([len(h[0]) // 2, len(h[1]) // 2, len(h[2])]) + 2)
        potential = COULOMB * _on_grid(h, factor, nodes)
        pair = _spline_coefficients(potential)
        for k, n in enumerate(guests.n_sites):
            q, z = guests.site_charge[k, :n], guests.site_z[k, :n]
            constant[k] += (q**2).sum() * (
                potential[0, 0, 0] / 2 - COULOMB * alpha / math.sqrt(math.pi))
            for i in range(n):
                for j in range(i):
                    r = abs(z[i] - z[j])
                    constant[k] -= COULOMB * q[i] * q[j] * erf(alpha * r) / r
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
    return _System(
        framework=framework, replicas=replicas, cell=cell,
        atoms=((frac[None] + shifts[:, None]) / replicas).reshape(-1, 3),
        atom_type=np.tile(index, len(shifts)), atom_charge=np.tile(charge, len(shifts)),
        host_lj=host_lj, waves=waves, shape=shape,
        voxels=np.maximum(np.ceil(lengths / VOXEL), 1).astype(np.int64),
        coulomb_cutoff=coulomb_cutoff, pair=pair, constant=constant, tail=tail,
        mass=sum(parameters[s]["mass"] for s in symbols),
    )  # fmt: skip


# ------------------------------------------------------------------------------ many at once


def _tables(
    systems: Sequence[_System],
    guests: _Guests,
    states: Sequence[tuple[int, GCMCSettings]],
    cdfs: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    direct: bool,
) -> Tables:
    """Tables of several systems and state points (index of the system, settings)."""
    from x3mat.gcmc_kernel import Tables

    def joined(arrays: Iterable[np.ndarray], dtype: type, empty: tuple[int, ...]) -> np.ndarray:
        parts = [np.zeros(empty, dtype), *arrays]
        return np.ascontiguousarray(np.concatenate(parts), dtype=dtype)

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
    density = fugacity / (_K_B * temperature[:, None]) * 1e-30
    flat = [c for row in cdfs or () for c in row]
    cdf_start = ends(map(len, flat))[:-1].reshape(-1, n_species)
    moves = np.array(settings.moves) * [
        1, guests.n_sites.max() > 1, 1, 1, n_species > 1
    ]  # fmt: skip
    return Tables(
        cell=np.array([s.cell for s in systems]),
        inverse=np.array([np.linalg.inv(s.cell) for s in systems]),
        replicas=np.array([s.replicas for s in systems]),
        grid=joined(grids, np.float32, (1,)), grid_shape=np.array([s.shape for s in systems]),
        grid_start=np.where(starts < 0, -1, starts + 1), stretch=guests.stretch,
        direct=int(direct),
        atom_start=ends(len(s.atoms) for s in systems),
        atoms=joined((s.atoms for s in systems), np.float64, (0, 3)),
        atom_type=joined(
            (s.atom_type + lj_start[i] for i, s in enumerate(systems)), np.int64, (0,)),
        atom_charge=joined((s.atom_charge for s in systems), np.float64, (0,)),
        host_lj=joined((s.host_lj for s in systems), np.float64, (0, n_types, 3)),
        host_alpha=_ewald_alpha(HOST_CUTOFF), host_cutoff=HOST_CUTOFF,
        wave_start=ends(len(s.waves) for s in systems),
        waves=joined((s.waves for s in systems), np.float64, (0, 5)),
        cutoff=float(settings.cutoff), charged=int(settings.charges != "none"),
        lj=guests.lj, n_sites=guests.n_sites, site_type=guests.site_type, site_z=guests.site_z,
        site_charge=guests.site_charge, reach=np.abs(guests.site_z).max(1),
        coulomb_cutoff=np.array([s.coulomb_cutoff for s in systems]),
        alpha=np.array([_ewald_alpha(s.coulomb_cutoff) for s in systems]),
        pair=joined((s.pair.ravel() for s in systems), np.float32, (1,)),
        pair_shape=np.array([np.array(s.pair.shape) - 3 for s in systems]),
        pair_start=ends(s.pair.size for s in systems)[:-1] + 1,
        constant=np.array([s.constant for s in systems]),
        tail=np.array([s.tail for s in systems]),
        system=np.array([i for i, _ in states]), beta=1 / temperature,
        log_activity=np.log(density * volume[:, None]), moves=np.cumsum(moves) / moves.sum(),
        voxels=np.array([s.voxels for s in systems]),
        cdf=joined(flat, np.float64, (0,)), cdf_start=cdf_start,
    )  # fmt: skip


def _chains(
    state: np.ndarray, keys: np.ndarray, species: int, rows: int, slots: int,
    density: Sequence[int] = (),
) -> Chains:  # fmt: skip
    """Empty chains; `density` gives the number of histogram cells of each chain."""
    from x3mat.gcmc_kernel import Chains

    n = len(state)
    size = np.tile([1.0, 1.0], (n, 1))
    molecule = np.zeros((n, slots + 1, 15))
    molecule[..., 5] = 1.0
    start = np.concatenate([[0], np.cumsum(density)])[:-1] if len(density) else np.full(n, -1)
    return Chains(
        state=np.array(state, np.int64), key=np.array(keys, np.uint64),
        step=np.zeros(n, np.int64), length=np.full(n, 20, np.int64), n=np.zeros(n, np.int64),
        count=np.zeros((n, species), np.int64), energy=np.zeros(n),
        kind=np.zeros((n, slots + 1), np.int64), molecule=molecule, size=size,
        tried=np.zeros((n, 5), np.int64), accepted=np.zeros((n, 5), np.int64),
        counts=np.zeros((n, rows, species), np.int64), energies=np.zeros((n, rows)),
        weights=np.zeros((n, rows, species)), inserts=np.zeros((n, rows, species), np.int64),
        density_start=start.astype(np.int64),
        density=np.zeros(max(1, int(np.sum(density))), np.uint32),
    )  # fmt: skip


def _key(*parts: object) -> int:
    """64 bits that depend on nothing but `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def _make_grids(system: _System, guests: _Guests, settings: GCMCSettings, device: str) -> None:
    """Fill in the framework's energy grids."""
    from x3mat import gcmc_kernel as kernel

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
    kernel.framework_values(
        device, _tables([system], guests, [(0, settings)], direct=True), lattice, shape, block,
        starts, np.concatenate(lists).astype(np.int32),
        np.column_stack([images, system.atom_type[row], system.atom_charge[row]]), values,
    )  # fmt: skip
    values = values.reshape(-1, *system.shape)
    if settings.charges != "none":
        index = np.rint(system.waves[:, :3] / (2 * np.pi)).astype(int)
        half = np.zeros((*system.shape[:2], system.shape[2] // 2 + 1), complex)
        coefficient = system.waves[:, 3] - 1j * system.waves[:, 4]
        half[tuple((index % system.shape).T)] = coefficient * np.where(index[:, 2] > 0, 0.5, 1)
        values[-1] += fft.irfftn(half, s=system.shape, workers=-1) * np.prod(system.shape)
    for t, (epsilon, _, charge) in enumerate(guests.types):
        if epsilon > 0 or charge != 0:
            energy = values[t] + charge * values[-1]
            system.grids[t] = _spline_coefficients(np.arcsinh(energy / guests.stretch[t]))


def _voxel_distributions(
    systems: Sequence[_System], guests: _Guests, states: Sequence[tuple[int, GCMCSettings]],
    device: str,
) -> list[list[np.ndarray]]:  # fmt: skip
    """Cumulative probabilities of the voxels for insertions, by state and species.

    Probabilities follow the occupancy of a Langmuir lattice gas, z_k B_k / (1 + v Σ z_m B_m) with
    the mean Boltzmann factor B of a voxel, blurred over its neighbours; one per cent is uniform.
    They need not be exact: acceptance and weights account for them.
    """
    from x3mat import gcmc_kernel as kernel

    tables = _tables(systems, guests, states, direct=not states[0][1].spacing)
    on_device = kernel.to_device(tables, device)
    out = []
    for p, (i, settings) in enumerate(states):
        m = systems[i].voxels
        keys = [_key("voxels", j) for j in range(1024)]
        factors = []
        for k in range(len(guests.n_sites)):
            scratch = _chains(np.full(1024, p), keys, len(guests.n_sites), 1, 1)
            n = int(np.prod(m))
            factors.append(kernel.boltzmann_factors(on_device, scratch, k, n, device))
        z = np.exp(tables.log_activity[p]) / systems[i].volume
        total = 1 + MOLECULE_VOLUME * sum(a * b for a, b in zip(z, factors, strict=True))
        out.append([])
        for b in factors:
            weight = (b / total).reshape(m)
            for axis in range(3):
                weight = (weight + 0.25 * (np.roll(weight, 1, axis) + np.roll(weight, -1, axis)))
            weight = weight.ravel()
            share = weight / weight.sum() if weight.sum() > 0 else np.full(len(b), 1 / len(b))
            cdf = np.cumsum(0.99 * share + 0.01 / len(b))
            out[-1].append(cdf / cdf[-1])
    return out


class _Run:
    """Chains of a group of systems that run together, from the start to the end."""

    def __init__(
        self, systems: Sequence[_System], guests: _Guests,
        states: Sequence[tuple[int, GCMCSettings]], device: str, checkpoint: Path | None,
    ) -> None:  # fmt: skip
        from x3mat import gcmc_kernel as kernel

        self.kernel, self.systems, self.states, self.device = kernel, systems, states, device
        self.settings = settings = states[0][1]
        if settings.spacing:
            for system in systems:
                _make_grids(system, guests, settings, device)
        cdfs = _voxel_distributions(systems, guests, states, device)
        self.tables = _tables(systems, guests, states, cdfs, direct=not settings.spacing)
        self.on_device = kernel.to_device(self.tables, device)
        state = np.repeat(np.arange(len(states)), settings.replicas)
        keys = [
            _key(s.seed, systems[i].framework.name, s.temperature, s.pressure, s.gases,
                 s.fractions, r)
            for i, s in states for r in range(settings.replicas)
        ]  # fmt: skip
        species = len(settings.gases)
        cells = [int(np.prod(systems[states[p][0]].voxels)) * species for p in state]
        self.chains = _chains(
            state, keys, species, CYCLES_PER_LAUNCH, 64, cells if settings.density else ()
        )
        self.phases = [("equilibration", settings.equilibration), ("sampling", settings.cycles)]
        self.phase, self.done = 0, 0
        self.records: dict[str, list[np.ndarray]] = {
            k: [] for k in ("counts", "energies", "weights", "inserts")
        }
        self.moves = np.zeros(len(state))
        self.checkpoint, self.saved = checkpoint, time.monotonic()
        if checkpoint is not None and checkpoint.is_file():
            self._load()

    @property
    def cycles_left(self) -> int:
        """Cycles still to run."""
        return sum(n for _, n in self.phases[self.phase :]) - self.done

    def step(self) -> int:
        """Advance all chains by one launch; returns the number of cycles."""
        name, total = self.phases[self.phase]
        last = min(self.done + CYCLES_PER_LAUNCH, total)
        tables = self.on_device
        if name == "equilibration" and self.settings.start == "full" and 2 * self.done < total:
            tables = self.kernel.to_device(
                self.tables._replace(log_activity=self.tables.log_activity + math.log(1e4)),
                self.device)
        before = self.chains.step.copy()
        self._advance(tables, last, name == "equilibration")
        self.moves += self.chains.step - before
        cycles, self.done = last - self.done, last
        if name == "sampling":
            for key, parts in self.records.items():
                parts.append(getattr(self.chains, key)[:, :cycles].copy())
        mean = self.chains.counts[:, :cycles].sum(-1).mean(1)
        self.chains.weights[:], self.chains.inserts[:] = 0, 0
        if name == "equilibration":
            # A cycle is max(20, N) moves, and its length stays the same while sampling: lengths
            # that followed N would sample states with many molecules less often.
            self.chains.length[:] = np.maximum(20, np.rint(mean))
            self.chains.step[:] = self.done * self.chains.length
        if self.done == total:
            self.phase, self.done = self.phase + 1, 0
            self.chains.step[:] = 0
            if name == "equilibration":
                self.chains.tried[:], self.chains.accepted[:], self.chains.density[:] = 0, 0, 0
        if self.checkpoint is not None and (
            self.cycles_left == 0 or time.monotonic() > self.saved + CHECKPOINT_SECONDS
        ):
            self._save()
        return cycles

    def _advance(self, tables: Tables, last: int, adapting: bool) -> None:
        kernel = self.kernel
        while True:
            chains = kernel.to_device(self.chains, self.device)
            kernel.launch(
                self.device, kernel.advance, len(chains.n), tables, chains, self.done, last,
                int(adapting),
            )  # fmt: skip
            self.chains = chains = kernel.to_host(chains, self.device)
            if (chains.step >= last * chains.length).all():
                return
            slots = chains.kind.shape[1] - 1  # some chains are full: double the slots
            kind, molecule = (
                np.pad(a, [(0, 0), (0, slots)] + [(0, 0)] * (a.ndim - 2))
                for a in (chains.kind, chains.molecule)
            )
            molecule[..., 5][~molecule[..., 3:6].any(-1)] = 1.0
            self.chains = chains._replace(kind=kind, molecule=molecule)

    def _save(self) -> None:
        arrays = {f"chains_{k}": v for k, v in self.chains._asdict().items()}
        for key, parts in self.records.items():
            arrays[f"records_{key}"] = np.concatenate(parts, 1) if parts else np.zeros(0)
        handle, temporary = tempfile.mkstemp(dir=self.checkpoint.parent, suffix=".npz")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, at=[self.phase, self.done], moves=self.moves, **arrays)
        os.replace(temporary, self.checkpoint)
        self.saved = time.monotonic()

    def _load(self) -> None:
        try:
            with np.load(self.checkpoint) as file:
                self.phase, self.done = file["at"].tolist()
                self.moves = file["moves"]
                self.chains = type(self.chains)(
                    *(file[f"chains_{k}"] for k in self.chains._fields))
                for key in self.records:
                    part = file[f"records_{key}"]
                    self.records[key] = [part] if part.size else []
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(
                self.checkpoint, f"it cannot be read ({error})", "Delete it to start again."
            ) from None

    def results(self, seconds: float) -> list[GCMCResult]:
        """One result for each state."""
        arrays = {k: np.concatenate(parts, 1) for k, parts in self.records.items()}
        out = []
        for p, (i, settings) in enumerate(self.states):
            rows = np.flatnonzero(self.chains.state == p)
            out.append(self._result(
                self.systems[i], settings, p, rows, {k: v[rows] for k, v in arrays.items()},
                seconds / len(self.states),
            ))  # fmt: skip
        return out

    def _result(self, system, settings, p, rows, records, seconds) -> GCMCResult:
        n_cells, gases = int(np.prod(system.replicas)), settings.gases
        skip = equilibrated(records["counts"].sum(-1).mean(0))
        part = {k: v[:, skip:] for k, v in records.items()}
        activity = np.exp(self.tables.log_activity[p])
        heats = heats_of_adsorption(part["counts"], part["energies"], settings.temperature)
        loadings = {}
        for k, gas in enumerate(gases):
            mass = guest(gas)["molar_mass"]
            mean, error, counting, insertion = combined(
                part["counts"][..., k], part["weights"][..., k], part["inserts"][..., k],
                activity[k],
            )  # fmt: skip
            unit = 1 / n_cells
            molar, gram = 1000 / system.mass, mass / _N_A * 1e27 * n_cells / system.volume
            loadings[gas] = Loading(
                mean * unit * molar, error * unit * molar, mean * unit * gram, error * unit * gram,
                mean * unit, error * unit, *heats[k],
                (counting[0] * unit, counting[1] * unit),
                (insertion[0] * unit, insertion[1] * unit),
            )  # fmt: skip
        density = None
        if settings.density:
            n, shape = int(np.prod(system.voxels)), tuple(system.voxels.tolist())
            counts = sum(
                self.chains.density[start : start + n * len(gases)].astype(float)
                for start in self.chains.density_start[rows]
            ).reshape(len(gases), *shape)
            per_voxel = system.volume / n * settings.cycles * len(rows)
            density = {g: counts[k] / per_voxel for k, g in enumerate(gases)}
        tried = self.chains.tried[rows].sum(0)
        kinds = ("translation", "rotation", "reinsertion", "swap", "identity")
        return GCMCResult(
            name=system.framework.name, settings=settings, loadings=loadings,
            counts=records["counts"], energies=records["energies"], discarded=skip,
            n_cells=n_cells,
            fugacities=tuple((activity / system.volume * 1e30 * _K_B * settings.temperature)
                             .tolist()),
            acceptance={
                name: float(self.chains.accepted[rows, j].sum() / tried[j])
                for j, name in enumerate(kinds) if tried[j]
            },
            density=density, moves=int(self.moves[rows].sum()), seconds=seconds,
            device=self.device,
        )  # fmt: skip


# ------------------------------------------------------------------------------ estimates


def equilibrated(series: np.ndarray) -> int:
    """Index up to which a series is discarded as not equilibrated.

    The cut that makes the marginal standard error, var / n of what remains, smallest, in steps of
    5 and up to half of the series (K. P. White, Simulation 69, 323 (1997)).

    Examples
    --------
    >>> equilibrated(np.r_[np.zeros(20), np.tile([9.0, 11.0], 40)])
    20
    """
    x = np.asarray(series, dtype=float)
    cuts = np.arange(0, len(x) // 2 + 1, 5)
    return int(cuts[np.argmin([x[c:].var() / (len(x) - c) for c in cuts])])


def statistical_inefficiency(series: np.ndarray) -> float:
    """g = 1 + 2 Σ autocorrelation, up to the first non-positive pair of lags; at least 1.

    C. J. Geyer, Stat. Sci. 7, 473 (1992), doi:10.1214/ss/1177011137; `series` is (chains, n), with
    one mean for all.
    """
    x = np.atleast_2d(np.asarray(series, dtype=float))
    x = x - x.mean()
    n = x.shape[1]
    if n < 4 or not x.any():
        return 1.0
    spectrum = np.fft.rfft(x, 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj()).sum(0)[:n] / x.size
    pairs = (covariance[: n - n % 2] / covariance[0]).reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs <= 0)
    return max(1.0, 2.0 * pairs[: negative[0] if len(negative) else len(pairs)].sum() - 1.0)


def standard_error(series: np.ndarray) -> float:
    """Standard error of the mean of (chains, n) correlated values.

    The larger of the autocorrelation-corrected error and, for four chains and more, that from the
    spread of the chains' means.
    """
    x = np.asarray(series, dtype=float)
    within = x.var() * statistical_inefficiency(x) / x.size
    between = x.mean(1).var(ddof=1) / len(x) if len(x) >= 4 else 0.0
    return math.sqrt(max(within, between))


def combined(
    counts: np.ndarray, weights: np.ndarray, inserts: np.ndarray, activity: float
) -> tuple[float, float, tuple[float, float], tuple[float, float]]:
    """Mean number of molecules from their number and from insertions, <N> = z V <W>.

    Both are averages over the same chains and without bias. A half of each chain is averaged with
    the inverse variances that the other half shows, so that the weights know nothing of what they
    weigh; the error is that of the combined series.

    Parameters
    ----------
    counts, weights, inserts : (chains, cycles) array
        Molecules; sum of the insertion weights W and number of insertions in each cycle.
    activity : float
        z V.

    Returns
    -------
    mean, error, (counting, error), (insertion, error)
    """
    n = counts.astype(float)
    w = weights.sum() / max(inserts.sum(), 1)
    tested = activity * (w + (weights - w * inserts) / max(inserts.mean(), 1e-300))

    def variances(part: slice) -> tuple[float, float]:
        g = statistical_inefficiency(n[:, part])
        # an empty framework must not look exact: at least one molecule seen once
        least = g / n[:, part].size
        return (max(standard_error(n[:, part]), least) ** 2,
                max(standard_error(tested[:, part]), 1e-12) ** 2)  # fmt: skip

    half = n.shape[1] // 2
    halves = slice(0, half), slice(half, None)
    series = np.empty_like(n)
    for part, other in (halves, halves[::-1]):
        a, b = variances(other)
        share = b / (a + b)
        series[:, part] = share * n[:, part] + (1 - share) * tested[:, part]
    a, b = variances(slice(None))
    return (
        float(series.mean()), standard_error(series), (float(n.mean()), math.sqrt(a)),
        (float(activity * w), math.sqrt(b)),
    )  # fmt: skip


def heats_of_adsorption(
    counts: np.ndarray, energies: np.ndarray, temperature: float
) -> list[tuple[float, float]]:
    """Isosteric heat and its error (kJ/mol) of each gas, from fluctuations.

    q_k = R T - Σ_m cov(U, N_m) [cov(N, N)⁻¹]_mk (S. Karavias and A. L. Myers, Langmuir 7, 3118
    (1991), doi:10.1021/la00060a035); the error by the jackknife over ten blocks of the chains.
    NaN where numbers do not fluctuate.
    """

    def heat(n: np.ndarray, u: np.ndarray) -> np.ndarray:
        n, u = n - n.mean((0, 1)), u - u.mean()
        matrix = np.einsum("rck,rcm->km", n, n)
        if np.linalg.matrix_rank(matrix) < len(matrix):
            return np.full(len(matrix), np.nan)
        q = np.linalg.solve(matrix, np.einsum("rc,rck->k", u, n))
        return _R * (temperature - q)

    mean = heat(counts, energies)
    blocks = np.array_split(np.arange(counts.shape[1]), 10)
    left = [np.concatenate(blocks[:b] + blocks[b + 1 :]) for b in range(10)]
    parts = np.array([heat(counts[:, i], energies[:, i]) for i in left])
    error = np.sqrt(9 * parts.var(0))
    return [(float(q), float(e)) for q, e in zip(mean, error, strict=True)]


# ------------------------------------------------------------------------------ entry


def gcmc(
    frameworks: Sequence[Framework | Crystal],
    settings: GCMCSettings | Sequence[GCMCSettings] = GCMCSettings(),  # noqa: B008
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    memory: float | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> list[GCMCResult | X3MatError]:
    """Simulate the uptake of gases in rigid frameworks.

    Parameters
    ----------
    frameworks : sequence of Framework or Crystal
    settings : GCMCSettings, or several that differ in temperature, pressure or fractions only
    device : {"cpu", "cuda"}
        Threads on cores (numba's NUMBA_NUM_THREADS), or the CUDA device in use.
    memory : float, optional
        Bytes for tables and chains; as many frameworks as fit run together. Default 2 GB, on CUDA
        two thirds of what is free.
    checkpoint : path, optional
        Folder for the states of unfinished and the results of finished groups. A call with the
        same arguments goes on from there, and gives what an uninterrupted one would have given.
    progress : bool
        Whether a bar is shown.

    Returns
    -------
    list
        For each framework, for each of the settings: the result, or the error that stopped it.

    Raises
    ------
    DataError
        numba is not installed, there is no CUDA device, a gas or force field is unknown, or the
        settings differ in more than the state.

    Examples
    --------
    An empty box takes up an ideal gas:

    >>> import numpy as np
    >>> box = Framework(30 * np.eye(3), np.array([2]), np.zeros((1, 3)), name="helium")
    >>> short = GCMCSettings(gases=("Ar",), cycles=200, replicas=1)
    >>> [result] = gcmc([box], short)  # doctest: +SKIP
    >>> 0.6 < result.loadings["Ar"].molecules_per_cell < 0.8  # doctest: +SKIP
    True
    """
    several = [settings] if isinstance(settings, GCMCSettings) else list(settings)
    common = [replace(s, temperature=1.0, pressure=1.0, fractions=several[0].fractions)
              for s in several]  # fmt: skip
    if not several or any(c != common[0] for c in common):
        raise DataError("settings", "they differ in more than the state", "Make several calls.")
    free = _memory(device)
    framework_parameters(several[0].force_field)
    guests = _guests(several[0])
    out: list[GCMCResult | X3MatError | None] = [None] * len(frameworks) * len(several)
    groups: list[list[tuple[int, _System]]] = [[]]
    limit, used = memory or free, 0.0
    for i, framework in enumerate(frameworks):
        try:
            need = _bytes(framework, several, guests)
            if need > limit:
                raise DataError(
                    framework.name, f"its cell is too large: it needs {need / 1e9:.1f} GB",
                    "Give more memory, a smaller cell or a coarser grid.",
                )  # fmt: skip
            system = _system(framework, several[0], guests)
        except X3MatError as error:
            for j in range(len(several)):
                out[i * len(several) + j] = error
            continue
        if used + need > limit and groups[-1]:
            groups.append([])
            used = 0.0
        groups[-1].append((i, system))
        used += need
    total = (several[0].equilibration + several[0].cycles) * sum(len(g) for g in groups)
    with _bar(total, progress) as bar:
        for group in filter(None, groups):
            started = time.perf_counter()
            systems = [system for _, system in group]
            states = [(i, s) for i in range(len(systems)) for s in several]
            file = None
            if checkpoint is not None:
                Path(checkpoint).mkdir(parents=True, exist_ok=True)
                file = Path(checkpoint) / f"gcmc-{_digest(systems, several)}.npz"
            run = _Run(systems, guests, states, device, file)
            bar.update((total // max(sum(map(len, groups)), 1) - run.cycles_left) * len(group))
            while run.cycles_left:
                bar.update(run.step() * len(group))
            done = run.results(time.perf_counter() - started)
            for n, (i, system) in enumerate(group):
                system.grids.clear()
                for j in range(len(several)):
                    out[i * len(several) + j] = done[n * len(several) + j]
    return out


CHECKPOINT_SECONDS = 20.0  # between two writes of a checkpoint


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="cycle", disable=not progress, smoothing=0.05)


def _digest(systems: Sequence[_System], settings: Sequence[GCMCSettings]) -> str:
    digest = hashlib.sha256(repr([asdict(s) for s in settings]).encode())
    for s in systems:
        digest.update(s.framework.name.encode())
        for array in (s.cell, s.atoms, s.atom_charge, s.host_lj):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _bytes(framework: Framework, settings: Sequence[GCMCSettings], guests: _Guests) -> float:
    """Bytes of tables and chains of one framework, without those that grow with the loading."""
    lattice, first, gases = np.array(framework.lattice, float), settings[0], len(guests.n_sites)
    lengths = np.linalg.norm(lattice, axis=1)
    widths = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    replicas = np.ceil(2 * first.cutoff / widths)
    alpha = _ewald_alpha((replicas * widths).min() / 2)
    pair = np.prod(replicas * lengths * alpha / PAIR_SPACING) * (first.charges != "none")
    grids = np.prod(lengths / first.spacing) * len(guests.types) if first.spacing else 0.0
    voxels = np.prod(lengths / VOXEL) * gases
    chains = len(settings) * first.replicas
    return float(
        4 * pair + 4 * grids + 8 * voxels * len(settings)
        + 60 * np.prod(replicas) * len(framework.species)
        + chains * (4 * voxels * first.density + 120 * 128 + 24 * CYCLES_PER_LAUNCH * gases)
    )  # fmt: skip


def _memory(device: str) -> float:
    """Bytes to use by default; checks that the device is there."""
    try:
        from numba import cuda
    except ImportError:
        raise DataError(
            "numba", "this optional package is not installed",
            "Type: pip install x3mat[simulation]",
        ) from None  # fmt: skip
    if device == "cpu":
        return 2e9
    if device != "cuda":
        raise DataError(device, "it is no device", 'Choose "cpu" or "cuda".')
    try:
        free = cuda.current_context().get_memory_info()[0]
    except Exception as error:  # the type depends on numba's version
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DataError(
            "cuda", f"no CUDA device can be used ({reason})",
            "Install a driver and numba-cuda, or choose the device cpu.",
        ) from None  # fmt: skip
    return free * 2 / 3
