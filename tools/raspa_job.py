"""Runs one RASPA3 simulation in a process of its own: ``python raspa_job.py JOB.json OUT.npz``.

RASPA3 is C++ and may abort the process, so `raspa.simulate` starts this file as a script.
It imports numpy and raspalib only. The job (JSON) holds the simulated cell, already replicated;
the output holds the number of molecules at every production cycle and where they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings

import numpy as np

_BLOCK = 10  # cycles between two readings of the test insertions
_BOLTZMANN = 1.380649e-23  # J/K


class _Stop(Exception):
    """Raised from the production callback: ends the run cleanly."""


def statistical_inefficiency(series: np.ndarray) -> float:
    """g = 1 + 2 sum of the autocorrelation, up to Geyer's first non-positive pair; at least 1."""
    x = np.asarray(series, dtype=float)
    x = x - x.mean()
    n = len(x)
    if n < 4 or not x.any():
        return 1.0
    spectrum = np.fft.rfft(x, 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:n] / n
    pairs = (covariance[: n - n % 2] / covariance[0]).reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs <= 0)
    return max(1.0, 2.0 * pairs[: negative[0] if len(negative) else len(pairs)].sum() - 1.0)


def standard_error(series: np.ndarray) -> float:
    """Standard error of the mean of a correlated series of molecule counts.

    sqrt(var g / n) with the statistical inefficiency g; never below that of one molecule seen
    once in n/g independent samples, so that an empty framework does not look exact.
    """
    x = np.asarray(series, dtype=float)
    if len(x) < 2:
        return float("inf")
    independent = len(x) / statistical_inefficiency(x)
    return float(max(np.sqrt(x.var() / independent), 1.0 / independent))


def loading(out: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean molecules in the simulated cell by counting, by insertion, and by both.

    Counting is the average of N. Insertion uses the grand-canonical identity
    ``<N> = z V <W>``, with activity z = f / k_B T and the Rosenbluth weight W of test insertions
    (Widom moves) averaged over the same chain. Both are unbiased and nearly independent; they are
    combined by inverse variance.

    Parameters
    ----------
    out : dict
        ``counts`` (cycles,), ``insertion_sums`` and ``insertion_counts`` (blocks of cycles: sum
        of W, number of insertions), and ``activity_volume`` (z V).

    Notes
    -----
    W has a heavy tail and the weights come from the same run as the values, so a single run's
    combination is low by somewhat less than 1 % on average; the labels take the weights from
    other runs instead.
    """
    counts = out["counts"]
    count_mean, count_error = float(np.mean(counts)), standard_error(counts)
    sums, tries = np.asarray(out["insertion_sums"]), np.asarray(out["insertion_counts"])
    result = {"counting": count_mean, "counting_error": count_error}
    if len(sums) < 5 or tries.sum() == 0:
        return {**result, "mean": count_mean, "error": count_error}
    weight = sums.sum() / tries.sum()
    residual = sums - weight * tries
    variance = len(sums) * residual.var() * statistical_inefficiency(residual)
    scale = float(out["activity_volume"])
    insert_mean, insert_error = scale * weight, scale * float(np.sqrt(variance)) / tries.sum()
    result.update(insertion=float(insert_mean), insertion_error=float(insert_error))
    if not insert_error > 0:
        return {**result, "mean": count_mean, "error": count_error}
    a, b = count_error**-2, insert_error**-2
    mean = (a * count_mean + b * insert_mean) / (a + b)
    return {**result, "mean": float(mean), "error": float((a + b) ** -0.5)}


def build_system(job: dict):
    """The raspalib System of a job."""
    import raspalib as rl

    types = list(job["types"])
    force_field = rl.ForceField(
        [
            rl.PseudoAtom(t["name"], t["framework"], t["mass"], t["charge"], 0.0, t["number"])
            for t in types
        ],
        [rl.VDWParameters(t["epsilon"], t["sigma"]) for t in types],
        rl.ForceField.MixingRule.LORENTZ_BERTHELOT,
        job["cutoff"], job["cutoff"], job["cutoff"], False, False, job["charges"],
    )  # fmt: skip
    framework = rl.Framework(
        force_field,
        "framework",
        rl.SimulationBox(*job["lengths"], *np.radians(job["angles"]).tolist()),
        1,
        [
            rl.Atom(position=p, charge=q, type=t)
            for p, q, t in zip(
                job["positions"], job["atom_charges"], job["atom_types"], strict=True
            )
        ],
        [1, 1, 1],
    )
    eos, gases = rl.EquationOfState, job["gases"]
    fluids = eos.compute_fluid_properties(
        job["temperature"],
        job["pressure"],
        [eos.FluidInput(*gas["critical"], gas["fraction"], True) for gas in gases],
        eos.EquationOfStateType.PENG_ROBINSON,
        eos.MixingRules.VAN_DER_WAALS,
    )
    coefficients = [float(fluid.fugacity_coefficient) for fluid in fluids]
    components = [
        rl.Component(
            force_field,
            f"guest-{k}",
            *gas["critical"],
            [
                rl.Atom(position=(0.0, 0.0, s["z"]), charge=s["charge"], type=s["type"])
                for s in gas["sites"]
            ],
            particle_probabilities=rl.MCMoveProbabilities(**job["moves"]),
            # the package cannot be told mole fractions and takes equal ones
            fugacity_coefficient=coefficient * gas["fraction"] * len(gases),
            blocking_pockets=[tuple(p) for p in job["blocking_pockets"]],
        )
        for k, (gas, coefficient) in enumerate(zip(gases, coefficients, strict=True))
    ]
    system = rl.System(
        force_field,
        external_temperature=job["temperature"],
        external_pressure=job["pressure"],
        framework_components=framework,
        components=components,
        initial_positions=job.get("begin", []),
        initial_number_of_molecules=[0] * len(gases),
    )
    return system, coefficients


def run(job: dict) -> dict[str, np.ndarray]:
    """Run the job: molecules of each gas, seconds; of the first gas also test insertions, and, if
    it is the only one, centres of mass (Å)."""
    import raspalib as rl

    start = time.perf_counter()
    system, coefficients = build_system(job)
    simulation = rl.MonteCarlo(
        number_of_cycles=job["max_cycles"],
        number_of_initialization_cycles=job["init_cycles"],
        systems=[system],
        random_seed=job["seed"],
        output_to_files=False,
    )
    gases, n_framework = job["gases"], len(job["positions"])
    counts: list[list[int]] = []
    centres: list[tuple[float, float, float]] = []
    insertions = [(0.0, 0.0)]  # cumulative sum of Rosenbluth weights, number of test insertions
    volume = system.simulation_box.volume * 1e-30
    fugacity = coefficients[0] * gases[0]["fraction"] * job["pressure"]
    activity_volume = fugacity * volume / (_BOLTZMANN * job["temperature"])

    def collected() -> dict[str, np.ndarray]:
        sums, tries = np.diff(np.array(insertions), axis=0).T
        return {
            "counts": np.array(counts, dtype=np.int32)[:, 0],
            "molecules": np.array(counts, dtype=np.int32),
            "insertion_sums": sums,
            "insertion_counts": tries,
            "activity_volume": np.array(activity_volume),
        }

    def sample() -> None:
        current = simulation.systems[0]
        counts.append(list(current.number_of_molecules_per_component))
        if len(gases) == 1:
            guests, sites = current.atom_data[n_framework:], len(gases[0]["sites"])
            centres.extend(atom.position for atom in guests[job["centre"] :: sites])
        if len(counts) % _BLOCK == 0:
            component = current.components[0]
            tries = component.mc_moves_statistics[rl.Move.Types.WIDOM].all_counts
            insertions.append((component.average_rosenbluth_weights.result()[0] * tries, tries))
        if len(counts) % job["check_every"] or len(counts) < job["min_cycles"]:
            return
        now = loading(collected())
        target = max(job["target_relative"] * now["mean"], job["target_absolute"])
        if now["error"] <= target or time.process_time() > job["max_seconds"]:
            raise _Stop

    simulation.setup()
    simulation.initialize()
    simulation.equilibrate()
    with contextlib.suppress(_Stop):
        simulation.production(sample, 1)
    return {
        **collected(),
        "centres": np.array(centres, dtype=np.float64).reshape(-1, 3),
        "fugacity_coefficient": np.array(coefficients[0]),
        "seconds": np.array(time.perf_counter() - start),
    }


def main(job_path: str, out_path: str) -> None:
    """Read the job, run it, write the arrays."""
    os.environ.setdefault("RASPALIB_QUIET", "1")
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    np.savez(out_path, **run(job))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
