"""Grand-canonical Monte Carlo (GCMC) of a gas in a rigid zeolite with RASPA3.

The engine is RASPA3 (Ran et al., J. Chem. Phys. 161, 114106 (2024)) through its Python package
`raspalib`, which is optional: ``pip install x3mat[labels]``. Every simulation runs in a process of
its own, because an error inside the C++ library aborts the process.

Force field: rigid three-site TraPPE N2 (Potoff and Siepmann, AIChE J. 47, 1676 (2001)) in rigid
TraPPE-zeo silica (Bai, Tsapatsis and Siepmann, J. Phys. Chem. C 117, 24375 (2013));
``data/forcefields/trappe-n2-zeolite.json`` holds the numbers with their sources. Lennard-Jones
interactions use Lorentz-Berthelot rules and are truncated at the cutoff, neither shifted nor
corrected for the tail; electrostatics is an Ewald sum; the chemical potential follows from the
Peng-Robinson fugacity.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from raspa_job import loading

from x3mat import paths
from x3mat.errors import DataError
from x3mat_book.densities import grams_per_litre
from x3mat_gcmc.forcefield import bond_charges

if TYPE_CHECKING:
    from x3mat.crystal import Crystal

_SYMBOLS = {8: "O", 14: "Si"}
_CENTRE_SITE = 1  # index of the centre of mass among the sites of N2


@dataclass(frozen=True)
class GCMCSettings:
    """What is simulated and when it stops.

    A run samples every cycle (``max(20, N)`` attempted moves) and stops at the first check at
    which the standard error of the loading is at most ``max(target_relative * loading,
    target_absolute)``, or at `max_seconds` of processor time, or at `max_cycles`. With the same
    seed and the same number of cycles a run repeats exactly.

    Attributes
    ----------
    force_field : str
        Name of a file in ``data/forcefields``.
    temperature : float
        K.
    pressure : float
        Pa.
    cutoff : float
        Å; perpendicular widths of the simulated cell are at least twice as large.
    charges : bool
        Whether electrostatics (Ewald) is included.
    seed : int
        Seed of RASPA3's random numbers.
    init_cycles, min_cycles, max_cycles : int
        Cycles before sampling; least and greatest number of sampled cycles.
    check_every : int
        Cycles between two checks of the error.
    target_relative : float
        Relative standard error at which a run stops; 0 runs all of `max_cycles`.
    target_absolute : float
        Standard error (g per litre) at which a run stops, for frameworks that take up little.
    max_seconds : float
        Limit of processor time, in seconds.
    blocking_pockets : tuple of (x, y, z, radius)
        Spheres closed to the gas: fractional coordinates of the crystal's cell, radius in Å.
    """

    force_field: str = "trappe-n2-zeolite"
    temperature: float = 298.0
    pressure: float = 1.0e5
    cutoff: float = 12.8
    charges: bool = True
    seed: int = 1
    init_cycles: int = 60
    min_cycles: int = 150
    max_cycles: int = 100_000
    check_every: int = 50
    target_relative: float = 0.03
    target_absolute: float = 0.02
    max_seconds: float = 600.0
    blocking_pockets: tuple[tuple[float, float, float, float], ...] = ()

    def fixed(self, cycles: int) -> GCMCSettings:
        """The same settings with exactly `cycles` sampled cycles, as for repeating a label."""
        return replace(
            self, max_cycles=cycles, target_relative=0.0, target_absolute=0.0, max_seconds=1e6
        )


@dataclass(frozen=True, eq=False)
class GCMCResult:
    """Uptake of one run.

    Attributes
    ----------
    name : str
        Name of the crystal.
    settings : GCMCSettings
        What was simulated.
    g_per_litre, g_per_litre_error : float
        Uptake per litre of framework and its standard error, corrected for autocorrelation:
        counting and test insertion combined by inverse variance.
    counting, insertion : (float, float)
        Uptake and error (g per litre) from the number of molecules alone and from test
        insertions alone, ``<N> = z V <W>``.
    molecules_per_cell : float
        Molecules per unit cell, the crystal's cell as given.
    mol_per_kg : float
        Uptake per kg of framework.
    counts : numpy.ndarray
        (cycles,) molecules in the simulated cell at each sampled cycle.
    centres : numpy.ndarray
        (counts.sum(), 3) centres of mass in fractional coordinates of the crystal's cell, [0, 1).
    n_cells : float
        Unit cells in the simulated cell.
    fugacity_coefficient : float
        Of the gas at this state (Peng-Robinson).
    seconds : float
        Wall time of the run.
    """

    name: str
    settings: GCMCSettings
    g_per_litre: float
    g_per_litre_error: float
    counting: tuple[float, float]
    insertion: tuple[float, float]
    molecules_per_cell: float
    mol_per_kg: float
    counts: np.ndarray
    centres: np.ndarray
    n_cells: float
    fugacity_coefficient: float
    seconds: float

    @property
    def cycles(self) -> int:
        """Number of sampled cycles."""
        return len(self.counts)

    @property
    def relative_error(self) -> float:
        """Standard error divided by the uptake; infinite where nothing was taken up."""
        if self.g_per_litre == 0:
            return math.inf
        return self.g_per_litre_error / self.g_per_litre

    def summary(self) -> dict[str, Any]:
        """What a table or JSON output needs; uptakes in g per litre with standard errors."""
        return {
            "code": self.name,
            "seed": self.settings.seed,
            "n2_g_L": self.g_per_litre,
            "error_g_L": self.g_per_litre_error,
            "counting_g_L": list(self.counting),
            "insertion_g_L": list(self.insertion),
            "molecules_per_cell": self.molecules_per_cell,
            "mol_per_kg": self.mol_per_kg,
            "cycles": self.cycles,
            "n_cells": round(self.n_cells, 4),
            "fugacity_coefficient": self.fugacity_coefficient,
            "wall_s": self.seconds,
            "settings": asdict(self.settings),
        }

    def density(self, crystal: Crystal, spacing: float = 0.5) -> np.ndarray:
        """Density of centres of mass on the unit cell (molecules per Å3), see `density_grid`."""
        return density_grid(self.centres, crystal, spacing, self.cycles * self.n_cells)


@lru_cache(maxsize=8)
def load_force_field(name: str) -> dict[str, Any]:
    """The force field ``data/forcefields/<name>.json``.

    Raises
    ------
    DataError
        There is no such file.
    """
    path = paths.data() / "forcefields" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise DataError(name, "unknown force field", f"Use one of {', '.join(known)}.")
    return json.loads(path.read_text(encoding="utf-8"))


def perpendicular_widths(lattice: np.ndarray) -> np.ndarray:
    """Distances (Å) between opposite faces of the cell; (..., 3, 3) rows a, b, c to (..., 3)."""
    return 1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=-2)


def simulation_cell(lattice: np.ndarray, centring: np.ndarray, width: float) -> np.ndarray:
    """Smallest supercell found whose perpendicular widths are at least `width`.

    To a given relative error a GCMC run costs time proportional to the volume, so a compact cell
    such as (2,1,0), (-1,2,0) is preferred to 3 x 3 replicas. All triples of short lattice vectors
    are compared with the plain replication.

    Parameters
    ----------
    lattice : numpy.ndarray
        (3, 3) rows a, b, c in Å.
    centring : numpy.ndarray
        (C, 3) pure translations of the space group in fractional coordinates, zero included.
    width : float
        Å, twice the cutoff.

    Returns
    -------
    numpy.ndarray
        (3, 3) rows are the supercell's vectors in fractional coordinates of `lattice`
        (multiples of the centring translations), positively oriented.

    Examples
    --------
    >>> cell = simulation_cell(12.0 * np.eye(3), np.zeros((1, 3)), 25.6)
    >>> bool(np.all(perpendicular_widths(cell @ (12.0 * np.eye(3))) >= 25.6))
    True
    >>> float(round(np.linalg.det(cell), 6)) < 27
    True
    """
    replicas = np.diag(np.ceil(width / perpendicular_widths(lattice) - 1e-9))
    longest = max(np.linalg.norm(replicas @ lattice, axis=1))
    reach = np.ceil(longest / perpendicular_widths(lattice)).astype(int)
    steps = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), -1)
    vectors = (steps.reshape(-1, 1, 3) + centring).reshape(-1, 3)
    # of each pair +-v the first half; vectors shorter than the width cannot span the cell
    sign = np.sign(np.where(np.abs(vectors) > 1e-6, vectors, 0))
    vectors = vectors[sign @ [9, 3, 1] > 0]
    length = np.linalg.norm(vectors @ lattice, axis=1)
    order = np.lexsort([*np.round(vectors.T, 6), np.round(length, 4)])
    order = order[(length[order] >= width - 1e-6) & (length[order] <= longest + 1e-6)][:110]
    vectors = vectors[order]
    triples = np.array(list(combinations(range(len(vectors)), 3)), dtype=int).reshape(-1, 3)
    cells = np.concatenate([vectors[triples], replicas[None]])
    volume = np.abs(np.linalg.det(cells))
    useful = (volume > 1e-3) & (volume <= volume[-1] + 1e-6)
    cells, volume = cells[useful], volume[useful]
    wide = (perpendicular_widths(cells @ lattice) >= width - 1e-6).all(1)
    best = cells[wide][np.argmin(np.round(volume[wide], 4))]
    oriented = np.linalg.det(best @ lattice) > 0
    return best if oriented else best[[1, 0, 2]]


def _standard_box(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths (Å), angles (degrees), and the matrix with a along x and b in the xy plane."""
    lengths = np.linalg.norm(vectors, axis=1)
    unit = vectors / lengths[:, None]
    cosines = np.array([unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]])
    standard = np.linalg.cholesky(vectors @ vectors.T)  # lower triangular, rows a, b, c
    return lengths, np.degrees(np.arccos(np.clip(cosines, -1, 1))), standard


def _centring(crystal: Crystal) -> np.ndarray:
    """(C, 3) pure translations of the crystal's operations, zero first."""
    identity = (crystal.rotations == np.eye(3, dtype=int)).all((1, 2))
    shifts = np.round(crystal.translations[identity], 8) % 1.0
    others = shifts[np.abs(shifts - np.round(shifts)).max(1) > 1e-4] if len(shifts) else shifts
    return np.concatenate([np.zeros((1, 3)), others.reshape(-1, 3)])


def _replicate(frac_coords: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fractional coordinates in the supercell, and the index of each point in `frac_coords`."""
    corners = np.array(list(np.ndindex(2, 2, 2))) @ cell
    low, high = np.floor(corners.min(0)).astype(int) - 1, np.ceil(corners.max(0)).astype(int) + 1
    shifts = np.stack(
        np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high, strict=True)], indexing="ij"), -1
    ).reshape(-1, 3)
    fractional = (frac_coords[None] + shifts[:, None]) @ np.linalg.inv(cell)
    index = np.broadcast_to(np.arange(len(frac_coords)), fractional.shape[:2])
    inside = ((fractional > -1e-7) & (fractional < 1 - 1e-7)).all(-1)
    return fractional[inside] % 1.0, index[inside]


def _pockets_in_cell(settings: GCMCSettings, cell: np.ndarray) -> list[list[float]]:
    """Blocking pockets of the crystal's cell repeated over the supercell."""
    if not settings.blocking_pockets:
        return []
    pockets = np.array(settings.blocking_pockets, dtype=float)
    positions, index = _replicate(pockets[:, :3] % 1.0, cell)
    return [[*map(float, p), float(pockets[i, 3])] for p, i in zip(positions, index, strict=True)]


def _job(crystal: Crystal, settings: GCMCSettings) -> tuple[dict, np.ndarray, np.ndarray]:
    """The job of `raspa_job`, the supercell, and RASPA3's matrix of it."""
    force_field = load_force_field(settings.force_field)
    framework, guest = force_field["framework"], force_field["guest"]
    unknown = sorted({int(z) for z in crystal.species if _SYMBOLS.get(int(z)) not in framework})
    if unknown:
        raise DataError(
            crystal.name or "crystal",
            f"no {settings.force_field} parameters for atomic numbers {unknown}",
            "Give an all-silica framework (Si and O only).",
        )
    cell = simulation_cell(crystal.lattice, _centring(crystal), 2 * settings.cutoff)
    positions, index = _replicate(crystal.frac_coords, cell)
    expected = len(crystal.species) * abs(np.linalg.det(cell))
    if abs(len(positions) - expected) > 1e-3:
        raise DataError(
            crystal.name or "crystal",
            f"replication gave {len(positions)} atoms instead of {expected:.3f}",
            "Read the crystal again with a looser symmetry tolerance.",
        )
    lengths, angles, standard = _standard_box(cell @ crystal.lattice)
    symbols = [_SYMBOLS[int(z)] for z in crystal.species]
    names = list(framework)
    charge = bond_charges(
        crystal.lattice, crystal.frac_coords, symbols, settings.force_field)[index]
    guest_types = list(guest["types"])
    number = {"Si": 14, "O": 8}
    types = [{**framework[s], "name": s, "framework": True, "number": number[s]} for s in names] + [
        {**guest["types"][s], "name": s, "framework": False, "number": 7} for s in guest_types
    ]
    volume = abs(np.linalg.det(cell @ crystal.lattice))
    per_molecule = grams_per_litre(guest["molar_mass"], volume)
    job = {
        "types": types,
        "lengths": lengths.tolist(),
        "angles": angles.tolist(),
        "positions": positions.tolist(),
        "atom_types": [names.index(symbols[i]) for i in index],
        "atom_charges": (charge - charge.mean()).tolist(),  # neutral to rounding
        "gases": [{
            "fraction": 1.0,
            "critical": [guest["critical_temperature"], guest["critical_pressure"],
                         guest["acentric_factor"]],
            "sites": [
                {
                    "z": s["z"],
                    "charge": guest["types"][s["type"]]["charge"],
                    "type": len(names) + guest_types.index(s["type"]),
                }
                for s in guest["sites"]
            ],
        }],
        "centre": _CENTRE_SITE,
        "moves": {
            "translation_probability": 0.05,
            "rotation_probability": 0.05,
            "swap_cbmc_probability": 1.0,
            "widom_probability": 1.0,
        },
        "temperature": settings.temperature,
        "pressure": settings.pressure,
        "cutoff": settings.cutoff,
        "charges": settings.charges,
        "seed": settings.seed,
        "init_cycles": settings.init_cycles,
        "min_cycles": settings.min_cycles,
        "max_cycles": settings.max_cycles,
        "check_every": settings.check_every,
        "target_relative": settings.target_relative,
        "target_absolute": settings.target_absolute / per_molecule,
        "max_seconds": settings.max_seconds,
        "blocking_pockets": _pockets_in_cell(settings, cell),
    }  # fmt: skip
    return job, cell, standard


def simulate(crystal: Crystal, settings: GCMCSettings | None = None) -> GCMCResult:
    """Simulate the uptake of a gas in a rigid framework with RASPA3.

    Parameters
    ----------
    crystal : Crystal
        An ordered framework of Si and O.
    settings : GCMCSettings, optional
        By default N2 at 298 K and 1 bar to a relative error of 3 %.

    Returns
    -------
    GCMCResult

    Raises
    ------
    DataError
        `raspalib` is not installed, an element has no parameters, or the run failed.
    """
    settings = settings or GCMCSettings()
    if importlib.util.find_spec("raspalib") is None:
        raise DataError(
            "raspalib", "RASPA3's Python package is not installed",
            "Install it: pip install raspalib (Linux x86-64, Python 3.11 or 3.12).",
        )  # fmt: skip
    if settings.check_every < 1 or settings.max_cycles < 2 or settings.cutoff <= 0:
        raise DataError("settings", f"unusable: {settings}", "Give positive cycles and cutoff.")
    job, cell, standard = _job(crystal, settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RASPALIB_QUIET": "1"}
    with tempfile.TemporaryDirectory(prefix="x3mat-gcmc-") as folder:
        job_path, out_path = Path(folder, "job.json"), Path(folder, "out.npz")
        job_path.write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).with_name("raspa_job.py")
        limit = min(20 * settings.max_seconds + 120, 86_400.0)  # wall time, on a busy machine
        try:
            done = subprocess.run(
                [sys.executable, str(script), str(job_path), str(out_path)],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DataError(
                crystal.name or "crystal", f"RASPA3 did not end within {limit:.0f} s",
                "Lower max_cycles or raise max_seconds.",
            ) from None  # fmt: skip
        if done.returncode or not out_path.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise DataError(
                crystal.name or "crystal",
                f"RASPA3 ended with code {done.returncode}: {last}",
                "Check the crystal; another seed may succeed.",
            )
        with np.load(out_path) as arrays:
            out = {key: arrays[key] for key in arrays.files}
    volume = abs(np.linalg.det(cell @ crystal.lattice))
    guest = load_force_field(settings.force_field)["guest"]
    framework = load_force_field(settings.force_field)["framework"]
    grams = grams_per_litre(guest["molar_mass"], volume)
    n_cells = abs(np.linalg.det(cell))
    mean = loading(out)
    per_cell = mean["mean"] / n_cells
    cell_mass = sum(framework[_SYMBOLS[int(z)]]["mass"] for z in crystal.species)  # g/mol
    fractional = (out["centres"] @ np.linalg.inv(standard) @ cell) % 1.0
    return GCMCResult(
        name=crystal.name,
        settings=settings,
        g_per_litre=mean["mean"] * grams,
        g_per_litre_error=mean["error"] * grams,
        counting=(mean["counting"] * grams, mean["counting_error"] * grams),
        insertion=(
            mean.get("insertion", math.nan) * grams,
            mean.get("insertion_error", math.nan) * grams,
        ),
        molecules_per_cell=per_cell,
        mol_per_kg=1000.0 * per_cell / cell_mass,
        counts=out["counts"],
        centres=fractional,
        n_cells=n_cells,
        fugacity_coefficient=float(out["fugacity_coefficient"]),
        seconds=float(out["seconds"]),
    )


def density_grid(
    centres: np.ndarray, crystal: Crystal, spacing: float, samples: float, *, symmetry: bool = True
) -> np.ndarray:
    """Histogram of centres on the unit cell, as a number density.

    Parameters
    ----------
    centres : numpy.ndarray
        (M, 3) fractional coordinates.
    crystal : Crystal
        Gives the cell and its space group operations.
    spacing : float
        Greatest grid spacing along each axis, Å.
    samples : float
        Unit cells times cycles over which the centres were collected.
    symmetry : bool
        Average over the space group, which lowers the noise.

    Returns
    -------
    numpy.ndarray
        (n1, n2, n3) molecules per Å3, voxel (i, j, k) spanning [i, i+1)/n1 and so on; the sum
        times the voxel's volume is the number of molecules per unit cell.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> cube = SimpleNamespace(lattice=2.0 * np.eye(3))
    >>> grid = density_grid(np.array([[0.1, 0.1, 0.9]]), cube, 1.0, 4, symmetry=False)
    >>> grid.shape, round(float(grid[0, 0, 1]), 6), round(float(grid.sum()), 6)
    ((2, 2, 2), 0.25, 0.25)
    """
    lattice = np.asarray(crystal.lattice)
    shape = np.ceil(np.linalg.norm(lattice, axis=1) / spacing - 1e-9).astype(int)
    histogram = np.zeros(int(np.prod(shape)))
    operations = (
        zip(crystal.rotations, crystal.translations, strict=True)
        if symmetry
        else [(np.eye(3, dtype=int), np.zeros(3))]
    )
    count = 0
    for rotation, translation in operations:
        images = (np.asarray(centres) @ rotation.T + translation) % 1.0
        voxel = np.minimum((images * shape).astype(int), shape - 1)
        histogram += np.bincount(np.ravel_multi_index(voxel.T, shape), minlength=len(histogram))
        count += 1
    voxel_volume = abs(np.linalg.det(lattice)) / np.prod(shape)
    return histogram.reshape(shape) / (count * samples * voxel_volume)
