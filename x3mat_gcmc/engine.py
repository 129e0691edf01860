"""Grand-canonical Monte Carlo (GCMC) of rigid molecules in rigid frameworks.

Data flow: frameworks and settings → force field and fugacities → for each framework a simulated
cell, Ewald terms and energy grids → Markov chains of all frameworks × state points × replicas at
once (`kernel`) → loadings with errors, heats of adsorption, densities.

Model: Lennard-Jones with Lorentz-Berthelot rules, truncated at the cutoff; point charges with
Ewald summation. The framework's energy of a guest site depends on its place in the unit cell alone
and is interpolated on a grid with cubic B-splines; guests interact directly, and in reciprocal
space by the structure factors that each chain keeps.
A chain depends on seed, framework and state only, not on what runs beside it.

Limits
------
- Filled pores relax slowly, although insertions are biased (see `kernel.move`) and chains are
  annealed: where molecules are bound by 20 k_B T and more (Ar at 87 K in a zeolite), numbers hardly
  fluctuate, and what a chain holds depends on how long it has packed. ``start="both"`` lets chains
  come from the empty and from the filled framework; `GCMCResult.warnings` tells where they differ,
  drift, or never accepted a swap. Take many trials there, and mostly swaps. Chains that exchange
  states with hotter ones (``ladder``, some twenty times the work) get out of a packing, but need
  not find a denser one that hardly ever forms (``gcmc/n2-77k-ladder.json``).
- The chains from the filled framework must really be overfilled: then they come from above and the
  others from below, and the truth lies between. With a lower `system.FILL`, or in short chains,
  both may come from below and agree better, which proves nothing: MOFs at 77 K take up more in
  longer chains than the two starts of short ones tell (``data/results/mof-n2/longer.json``). Half
  the gap is the least error of a mean, and `standard_error` of two chains is never less.
- On CUDA a launch ends with its slowest chain, which may take as long as all others together: run
  as many crystals at once as memory allows.
- Standard errors are about right: of 253 zeolites 236 lie within two standard errors of
  RASPA3, with a root mean square of 1.10 (``zeolite-n2/gcmc.json``).
- All pores count, those too that no gas can reach from outside; nothing is blocked.
- Guests are rigid and linear with at most three sites; frameworks are rigid.
- Energies are interpolated on grids in float32. At 0.25 Å those of N2 in LTA and FER are off by 0.3
  and 0.7 K on average, mostly downwards, and by 9 K at most, of some 1000 K; that is 0.1 to 0.2 %
  of the uptake at 298 K. ``spacing=0`` sums over the atoms instead, slowly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import fft

from x3mat.errors import DataError, X3MatError
from x3mat_gcmc.forcefield import framework_parameters, guest
from x3mat_gcmc.system import (
    CYCLES_PER_EXCHANGE,
    CYCLES_PER_LAUNCH,
    FILL,
    HEAT,
    HOTTEST,
    K_B,
    LONGEST,
    MOLECULE_VOLUME,
    SHORTEST,
    GCMCSettings,
    Guests,
    System,
    bytes_needed,
    empty_chains,
    insertion_cdfs,
    key_of,
    make_grids,
    make_guests,
    make_system,
    make_tables,
)  # fmt: skip

if TYPE_CHECKING:
    from x3mat.crystal import Crystal
    from x3mat_gcmc.framework import Framework

_N_A = 6.02214076e23
_R = 8.31446261815324e-3  # kJ/(mol K)
ENOUGH = 100  # cycles that must share the insertion weights for them to be used
APART = 4.0  # standard errors by which means from numbers and from insertions may differ
CHECKPOINT_SECONDS = 20.0  # between two writes of a checkpoint


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
        Share of accepted moves at the lowest temperature, and of all exchanges on a ladder.
    swaps : (replicas,) int array
        Accepted insertions and deletions of each chain, at all its temperatures, during sampling.
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
    swaps: np.ndarray
    density: dict[str, np.ndarray] | None
    moves: int
    seconds: float
    device: str

    @property
    def is_equilibrated(self) -> bool:
        """Whether nothing speaks against it, that is, there are no `warnings`."""
        return not self.warnings

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the chains are not equilibrated; then the errors mean nothing.

        Those from the empty and from the full framework differ, by three standard errors and by
        2 %; more was discarded than the half of the cycles that may be at most; or chains, named
        by their numbers from 1 on, never accepted a swap, and no other start confirms them: they
        are stuck, or the framework has no pores for the gas.
        """
        out, agree = [], False
        if self.settings.start == "both" and len(self.counts) > 1:
            n = self.counts[:, self.discarded :].sum(-1)
            parts = n[::2], n[1::2]
            gap = float(parts[1].mean() - parts[0].mean())
            agree = abs(gap) <= max(0.02 * n.mean(), 3 * math.hypot(*map(standard_error, parts)))
            if not agree:
                out.append(f"chains from full and from empty differ by {gap / n.mean():.0%}")
        if self.discarded >= self.counts.shape[1] // 2 - 5:
            out.append("the chains still drift; let equilibration be longer")
        stuck = np.flatnonzero(self.swaps == 0) + 1
        if len(stuck) and not agree:
            names = ", ".join(map(str, stuck))
            out.append(
                f"no insertion or deletion was accepted in chain {names} of {len(self.swaps)}; it"
                " is stuck, or there are no pores"
            )
        return tuple(out)

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
            "selectivity": self.selectivity, "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3), "device": self.device,
        }  # fmt: skip


# ------------------------------------------------------------------------------ the chains


class Run:
    """Chains of a group of systems that run together, from the start to the end."""

    def __init__(
        self, systems: Sequence[System], guests: Guests,
        states: Sequence[tuple[int, GCMCSettings]], device: str, checkpoint: Path | None,
        cdfs: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> None:  # fmt: skip
        from x3mat_gcmc import kernel

        self.kernel, self.systems, self.states, self.device = kernel, systems, states, device
        self.settings = settings = states[0][1]
        for system in systems:
            if settings.spacing and not system.grids:
                make_grids(system, guests, settings, device)
        if cdfs is None:
            cdfs = insertion_cdfs(systems, guests, states, device)
        self.tables = make_tables(systems, guests, states, cdfs, direct=not settings.spacing)
        self.on_device = kernel.to_device(self.tables, device)
        self.rungs = rungs = settings.ladder
        each = settings.replicas * rungs
        state = np.repeat(np.arange(len(states)), each)
        keys = [
            key_of(s.seed, systems[i].framework.name, s.temperature, s.pressure, s.gases,
                 s.fractions, r)
            for i, s in states for r in range(each)
        ]  # fmt: skip
        self.per_launch = CYCLES_PER_LAUNCH if rungs == 1 else CYCLES_PER_EXCHANGE
        species = len(settings.gases)
        cells = [int(np.prod(systems[states[p][0]].voxels)) * species for p in state]
        self.chains = empty_chains(
            state, keys, species, self.per_launch, 64, settings.trials,
            cells if settings.density else (),
            [len(systems[states[p][0]].coefficients) for p in state],
        )
        odd = np.arange(len(state)) // rungs % settings.replicas % 2
        self.full = {"empty": 0 * odd, "full": 0 * odd + 1, "both": odd}[settings.start]
        self.phases = [("equilibration", settings.equilibration), ("sampling", settings.cycles)]
        self.phase, self.done = 0, 0
        # chain at each rung of each ladder, the coldest first; and exchanges between neighbours
        self.ladder = np.arange(len(state)).reshape(-1, rungs)
        self.exchanges = np.zeros((2, len(self.ladder)), int)  # attempted and accepted
        self._anneal()
        self.records: dict[str, list[np.ndarray]] = {
            k: [] for k in ("counts", "energies", "weights")
        }
        self.checkpoint, self.saved = checkpoint, time.monotonic()
        if checkpoint is not None and checkpoint.is_file():
            self._load()
        self.there = kernel.to_device(self.chains, device)  # on cores the same arrays

    @property
    def cycles_left(self) -> int:
        """Cycles still to run."""
        return sum(n for _, n in self.phases[self.phase :]) - self.done

    def step(self) -> int:
        """Advance all chains by one launch; returns the number of cycles."""
        name, total = self.phases[self.phase]
        last = min(self.done + self.per_launch, total)
        self._advance(last, name == "equilibration")
        cycles, self.done = last - self.done, last
        self._fetch(*self.records)
        chains = self.chains
        if name == "sampling":
            for key, parts in self.records.items():
                parts.append(getattr(chains, key)[self.ladder[:, 0], :cycles])
        chains.weights[:] = 0
        changed = {"weights"}
        if name == "equilibration":
            # A cycle is N moves within bounds, and its length stays the same while sampling:
            # lengths that followed N would sample states with many molecules less often.
            number = chains.counts[:, :cycles].sum(-1).mean(1)
            chains.length[:] = np.clip(np.rint(number), SHORTEST, LONGEST)
            chains.step[:] = self.done * chains.length
            chains.order[:] = np.argsort(-number, kind="stable")
            self._anneal()
            changed |= {"length", "step", "order", "beta", "boost"}
        if self.rungs > 1:
            changed |= self._exchange()
        if self.done == total:
            self.phase, self.done = self.phase + 1, 0
            chains.step[:] = 0
            changed.add("step")
            if name == "equilibration":
                chains.tally[:], chains.density[:] = 0, 0
                changed |= {"tally", "density"}
        if self.there is not chains:
            for key in changed:
                getattr(self.there, key).copy_to_device(getattr(chains, key))
        if self.cycles_left == 0:
            self._fetch(*chains._fields)
        if self.checkpoint is not None and (
            self.cycles_left == 0 or time.monotonic() > self.saved + CHECKPOINT_SECONDS
        ):
            self._save()
        return cycles

    def _anneal(self) -> None:
        """Temperatures and fugacities: during the first half of equilibration from higher ones."""
        left = max(0.0, 1 - 2 * self.done / self.phases[0][1])
        rung = np.empty(len(self.chains.n))
        rung[self.ladder] = np.linspace(0, 1, self.rungs) if self.rungs > 1 else 0.0
        share = 1 / (1 + np.maximum((HEAT - 1) * left, (HOTTEST - 1) * rung))  # of beta
        self.chains.beta[:] = self.tables.beta[self.chains.state] * share
        volume = np.array([self.systems[i].volume for i, _ in self.states])[:, None]
        dilute = np.log(volume / MOLECULE_VOLUME) - self.tables.log_activity
        self.chains.boost[:] = (1 - share) * dilute.mean(1)[self.chains.state]
        self.chains.boost[:] += math.log(FILL) * left * self.full

    def _exchange(self) -> set[str]:
        """Let neighbours of each ladder exchange their rungs; returns what changed.

        With probability min(1, exp((beta_i - beta_j) (U_i - U_j) - (b_i - b_j) (N_i - N_j))), b
        what is added to ln(z V) (K. Hukushima and K. Nemoto, J. Phys. Soc. Jpn. 65, 1604 (1996),
        doi:10.1143/JPSJ.65.1604; with numbers: Q. Yan and J. J. de Pablo, J. Chem. Phys. 111, 9509
        (1999), doi:10.1063/1.480282).
        """
        chains, half = self.chains, (self.phase + self.done // self.per_launch) % 2
        self._fetch("n", "energy", "tally", "size")
        moved = "beta", "boost", "length", "size", "tally", "density_start"
        for ladder, counts in zip(self.ladder, self.exchanges.T, strict=True):
            random = np.random.default_rng([int(chains.key[ladder].min()), self.phase, self.done])
            for r in range(half, self.rungs - 1, 2):
                i, j = ladder[r], ladder[r + 1]
                exponent = (chains.beta[i] - chains.beta[j]) * (chains.energy[i] - chains.energy[j])
                exponent -= (chains.boost[i] - chains.boost[j]) * (chains.n[i] - chains.n[j])
                counts[0] += 1
                if math.log(1 - random.random()) < exponent:
                    counts[1] += 1
                    ladder[[r, r + 1]] = j, i
                    for name in moved:
                        array = getattr(chains, name)
                        array[[i, j]] = array[[j, i]]
        chains.step[:] = self.done * chains.length
        return {*moved, "step"}

    def _fetch(self, *names: str) -> None:
        """Copy arrays of the chains from the device."""
        for name in names if self.there is not self.chains else ():
            getattr(self.there, name).copy_to_host(getattr(self.chains, name))

    def _advance(self, last: int, adapting: bool) -> None:
        kernel = self.kernel
        while True:
            kernel.launch(
                self.device, kernel.advance, len(self.chains.n), self.on_device, self.there,
                self.done, last, int(adapting),
            )  # fmt: skip
            self._fetch("step")
            chains = self.chains
            if (chains.step >= last * chains.length).all():
                return
            self._fetch(*chains._fields)
            slots = chains.kind.shape[1]  # some chains are full: double the slots
            kind, molecule = (
                np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, slots)])
                for a in (chains.kind, chains.molecule)
            )
            self.chains = chains._replace(kind=kind, molecule=molecule)
            self.there = kernel.to_device(self.chains, self.device)

    def _save(self) -> None:
        self._fetch(*self.chains._fields)
        arrays = {f"chains_{k}": v for k, v in self.chains._asdict().items()}
        arrays |= {"ladder": self.ladder, "exchanges": self.exchanges}
        for key, parts in self.records.items():
            arrays[f"records_{key}"] = np.concatenate(parts, 1) if parts else np.zeros(0)
        handle, temporary = tempfile.mkstemp(dir=self.checkpoint.parent, suffix=".npz")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, at=[self.phase, self.done], **arrays)
        os.replace(temporary, self.checkpoint)
        self.saved = time.monotonic()

    def _load(self) -> None:
        try:
            with np.load(self.checkpoint) as file:
                self.phase, self.done = file["at"].tolist()
                self.ladder, self.exchanges = file["ladder"], file["exchanges"]
                self.chains = type(self.chains)(
                    *(file[f"chains_{k}"] for k in self.chains._fields))
                for key in self.records:
                    part = file[f"records_{key}"]
                    self.records[key] = [part] if part.size else []
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                self.checkpoint, f"it cannot be read ({error})", "Delete it to start again."
            ) from None

    def results(self, seconds: float) -> list[GCMCResult]:
        """One result for each state."""
        arrays = {k: np.concatenate(parts, 1) for k, parts in self.records.items()}
        out = []
        for p, (i, settings) in enumerate(self.states):
            rows = np.flatnonzero(self.chains.state[self.ladder[:, 0]] == p)
            out.append(self._result(
                self.systems[i], settings, p, self.ladder[rows],
                {k: v[rows] for k, v in arrays.items()}, seconds / len(self.states),
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
                part["counts"][..., k], *np.moveaxis(part["weights"][..., k, :], -1, 0),
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
                for start in self.chains.density_start[rows[:, 0]]
            ).reshape(len(gases), *shape)
            per_voxel = system.volume / n * settings.cycles * len(rows)
            density = {g: counts[k] / per_voxel for k, g in enumerate(gases)}
        tried, accepted = self.chains.tally[rows[:, 0]].transpose(1, 0, 2)
        of = self.chains.state[self.ladder[:, 0]] == p
        attempts, exchanged = self.exchanges[:, of].sum(1).tolist()
        exchanges = {"exchange": exchanged / attempts} if attempts else {}
        kinds = ("translation", "rotation", "reinsertion", "swap", "identity")
        return GCMCResult(
            name=system.framework.name, settings=settings, loadings=loadings,
            counts=records["counts"], energies=records["energies"], discarded=skip,
            n_cells=n_cells,
            fugacities=tuple((activity / system.volume * 1e30 * K_B * settings.temperature)
                             .tolist()),
            acceptance={
                name: float(accepted[:, j].sum() / tried[:, j].sum())
                for j, name in enumerate(kinds) if tried[:, j].any()
            } | exchanges,
            swaps=self.chains.tally[rows, 1, kinds.index("swap")].sum(1),
            density=density, moves=int(self.chains.moves[rows].sum()), seconds=seconds,
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

    The larger of the autocorrelation-corrected error and, of several chains, that from the spread
    of their means.
    """
    x = np.asarray(series, dtype=float)
    within = x.var() * statistical_inefficiency(x) / x.size
    between = x.mean(1).var(ddof=1) / len(x) if len(x) > 1 else 0.0
    return math.sqrt(max(within, between))


def combined(
    counts: np.ndarray, weights: np.ndarray, inserts: np.ndarray, activity: float
) -> tuple[float, float, tuple[float, float], tuple[float, float]]:
    """Mean number of molecules from their number and from insertions, <N> = z V <W>.

    Both are averages over the same chains and without bias. A half of each chain is averaged with
    the inverse variances that the other half shows, so that the weights know nothing of what they
    weigh; the error is that of the combined series. The number alone counts where few cycles make
    up the sum of the weights, as in filled pores, so that their variance cannot be known, and
    where the two differ by more than APART standard errors, so that it is not what it seems.

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

    a, b = variances(slice(None))
    views = (float(n.mean()), math.sqrt(a)), (float(activity * w), math.sqrt(b))
    apart = abs(views[0][0] - views[1][0]) > APART * math.sqrt(a + b)
    few = weights.sum() ** 2 < ENOUGH * (weights**2).sum() or weights.sum() == 0
    if apart or few:
        return *views[0], *views
    half = n.shape[1] // 2
    halves = slice(0, half), slice(half, None)
    series = np.empty_like(n)
    for part, other in (halves, halves[::-1]):
        a, b = variances(other)
        share = b / (a + b)
        series[:, part] = share * n[:, part] + (1 - share) * tested[:, part]
    return float(series.mean()), standard_error(series), *views


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
    settings : GCMCSettings, or several that differ in temperature, pressure, fractions, seed only
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
        settings differ in more than state and seed.

    Examples
    --------
    An empty box takes up an ideal gas:

    >>> from x3mat_gcmc import Framework
    >>> box = Framework(30 * np.eye(3), np.array([2]), np.zeros((1, 3)), name="helium")
    >>> short = GCMCSettings(gases=("Ar",), cycles=200, replicas=1)
    >>> [result] = gcmc([box], short)
    >>> 0.6 < result.loadings["Ar"].molecules_per_cell < 0.8
    True
    """
    several = [settings] if isinstance(settings, GCMCSettings) else list(settings)
    common = [replace(s, temperature=1.0, pressure=1.0, fractions=several[0].fractions, seed=0)
              for s in several]  # fmt: skip
    if not several or any(c != common[0] for c in common):
        raise DataError(
            "settings", "they differ in more than state and seed", "Make several calls.")
    free = free_memory(device)
    framework_parameters(several[0].force_field)
    guests = make_guests(several[0])
    out: list[GCMCResult | X3MatError | None] = [None] * len(frameworks) * len(several)
    groups: list[list[tuple[int, System]]] = [[]]
    limit, used = memory or free, 0.0
    for i, framework in enumerate(frameworks):
        try:
            need = bytes_needed(framework, several, guests)
            if need > limit:
                raise DataError(
                    framework.name, f"its cell is too large: it needs {need / 1e9:.1f} GB",
                    "Give more memory, a smaller cell or a coarser grid.",
                )  # fmt: skip
            system = make_system(framework, several[0], guests)
        except X3MatError as error:
            for j in range(len(several)):
                out[i * len(several) + j] = error
            continue
        if used + need > limit and groups[-1]:
            groups.append([])
            used = 0.0
        groups[-1].append((i, system))
        used += need
    cycles = several[0].equilibration + several[0].cycles
    bar = _bar(cycles * sum(len(g) for g in groups), progress)
    with bar, fft.set_workers(os.cpu_count() or 1):
        for group in filter(None, groups):
            started = time.perf_counter()
            systems = [system for _, system in group]
            states = [(i, s) for i in range(len(systems)) for s in several]
            file = None
            if checkpoint is not None:
                Path(checkpoint).mkdir(parents=True, exist_ok=True)
                file = Path(checkpoint) / f"gcmc-{_digest(systems, several)}.npz"
            run = Run(systems, guests, states, device, file)
            bar.update((cycles - run.cycles_left) * len(group))  # what a checkpoint held
            while run.cycles_left:
                bar.update(run.step() * len(group))
            done = run.results(time.perf_counter() - started)
            for n, (i, system) in enumerate(group):
                system.grids.clear()
                for j in range(len(several)):
                    out[i * len(several) + j] = done[n * len(several) + j]
    return out


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="cycle", disable=not progress, smoothing=0.05)


def _digest(systems: Sequence[System], settings: Sequence[GCMCSettings]) -> str:
    digest = hashlib.sha256(repr([asdict(s) for s in settings]).encode())
    for s in systems:
        digest.update(s.framework.name.encode())
        for array in (s.cell, s.atoms, s.atom_charge, s.host_lj):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def free_memory(device: str) -> float:
    """Bytes to use by default; checks that the device is there."""
    if importlib.util.find_spec("numba") is None:
        raise DataError(
            "numba", "this optional package is not installed", "Type: pip install x3mat[labels]"
        )
    if device == "cpu":
        return 2e9
    if device != "cuda":
        raise DataError(device, "it is no device", 'Choose "cpu" or "cuda".')
    from x3mat_gcmc.kernel import cuda_target

    cuda = cuda_target()
    try:
        free = cuda.current_context().get_memory_info()[0]
    except Exception as error:  # the type depends on numba's version
        reason = " ".join(str(error).split()).rstrip(": ") or type(error).__name__
        raise DataError(
            "cuda", f"no CUDA device can be used ({reason})",
            "Install a driver and numba-cuda, or choose the device cpu.",
        ) from None  # fmt: skip
    return free * 2 / 3
