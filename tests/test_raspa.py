"""GCMC with RASPA3: the runner, the pores, and its committed uptakes of the 253 frameworks."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gcmc_checks
import numpy as np
import pockets
import pytest
import raspa

from x3mat import databases, paths, results
from x3mat.crystal import crystal_from_arrays
from x3mat.errors import DataError
from x3mat_gcmc import Framework, engine, forcefield

needs_raspa = pytest.mark.skipif(
    importlib.util.find_spec("raspalib") is None,
    reason="raspalib (RASPA3) is not installed: pip install x3mat[labels]",
)
if importlib.util.find_spec("zse") is None:
    pytest.skip("zeose is not installed: pip install x3mat[zeolites]", allow_module_level=True)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    with (paths.data() / "zeolite-n2" / "raspa3.csv").open(encoding="utf-8") as file:
        return {row["code"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def lta():
    return databases.iza("LTA")


@pytest.fixture(scope="module")
def pore(lta):
    return pockets.pore_map(lta, spacing=0.35)


def _column(table, key):
    return np.array([float(row[key]) for row in table.values()])


# ------------------------------------------------------------------------------ uptakes


def test_table_holds_every_framework_with_errors(table):
    assert sorted(table) == sorted(databases.iza_codes())
    assert len(table) == 253
    uptake, error = _column(table, "n2_g_L"), _column(table, "error_g_L")
    blocked = _column(table, "n2_blocked_g_L")
    assert ((uptake >= 0) & (uptake < 40) & (error > 0)).all()
    assert ((blocked >= 0) & (blocked <= uptake + 1e-9)).all()
    assert all(len(row["seeds"].split()) >= 2 for row in table.values())
    assert np.median(error / uptake) <= 0.03


def test_summary_is_that_of_the_table(table):
    summary = results.read("zeolite-n2/raspa3.json")
    uptake, error = _column(table, "n2_g_L"), _column(table, "error_g_L")
    assert summary["n_frameworks"] == 253
    assert summary["mean_g_L"] == pytest.approx(uptake.mean(), rel=1e-4)
    assert summary["sd_g_L"] == pytest.approx(uptake.std(ddof=1), rel=1e-4)
    assert summary["median_relative_error"] == pytest.approx(np.median(error / uptake), rel=1e-3)
    for code, values in summary["named"].items():
        assert values["n2_g_L"][0] == pytest.approx(float(table[code]["n2_g_L"]), abs=1e-3)


@pytest.mark.parametrize(
    ("code", "uncharged", "tolerance"),
    # uncharged RASPA3 sweep of the same model; charges raise the uptake of some frameworks
    [
        ("LTA", 6.21, 0.10),
        ("MFI", 4.51, 0.20),
        ("CHA", 4.82, 0.20),
        ("FAU", 4.43, 0.15),
        ("ASV", 4.10, 0.35),
    ],
)
def test_named_uptakes_agree_with_an_independent_uncharged_sweep(table, code, uncharged, tolerance):
    assert float(table[code]["n2_g_L"]) == pytest.approx(uncharged, rel=tolerance)


def test_units_of_the_table_agree(table):
    for code in ("LTA", "MFI", "FAU", "ABW"):
        crystal, row = databases.iza(code), table[code]
        per_litre = float(row["molecules_per_cell"]) * 28.0134 / 0.602214076 / crystal.volume * 1e3
        assert float(row["n2_g_L"]) == pytest.approx(per_litre, rel=1e-3)
        per_kg = float(row["n2_g_L"]) / 28.0134 / crystal.density
        assert float(row["mol_per_kg"]) == pytest.approx(per_kg, rel=1e-3)


def test_two_estimators_agree(table):
    difference = _column(table, "counting_g_L") - _column(table, "insertion_g_L")
    error = np.hypot(_column(table, "error_counting_g_L"), _column(table, "error_insertion_g_L"))
    z = difference / error
    assert abs(z.mean()) < 0.35
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.4


def test_blocked_runs_confirm_the_share_of_open_pores(table):
    checks = results.read("zeolite-n2/blocking.json")
    assert len([c for c in checks if c != "provenance"]) >= 3
    for code, check in checks.items():
        if code != "provenance":
            assert abs(check["z"]) < 3.5, (code, check)
    lta = table["LTA"]
    assert float(lta["n2_blocked_g_L"]) == pytest.approx(3.4, abs=0.5)


def test_density_maps_hold_the_uptake(table):
    files = sorted((paths.data() / "zeolite-n2" / "density").glob("*.npz"))
    assert {"LTA", "ASV", "MFI", "CHA", "FAU"} <= {f.stem for f in files}
    for file in files:
        with np.load(file) as data:
            density, lattice = data["density"], data["lattice"]
        crystal = databases.iza(file.stem)
        np.testing.assert_allclose(lattice, crystal.lattice, atol=1e-4)
        assert (np.linalg.norm(lattice, axis=1) / density.shape <= 0.5 + 1e-9).all()
        molecules = density.sum(dtype=float) * crystal.volume / density.size
        label = float(table[file.stem]["molecules_per_cell"])
        assert molecules == pytest.approx(label, rel=0.15)


# ------------------------------------------------------------------------------ runner


@pytest.mark.parametrize("code", ["LTA", "FAU", "CHA", "AEN", "SOD"])
def test_simulated_cell_is_wide_and_is_the_same_crystal(code):
    crystal = databases.iza(code)
    job, cell, standard = raspa._job(crystal, raspa.GCMCSettings())
    assert (raspa.perpendicular_widths(cell @ crystal.lattice) >= 25.6 - 1e-6).all()
    assert np.linalg.det(cell) > 0
    plain = np.prod(np.ceil(25.6 / raspa.perpendicular_widths(crystal.lattice)))
    assert np.linalg.det(cell) <= plain + 1e-6
    assert len(job["positions"]) == round(crystal.n_atoms * np.linalg.det(cell))
    assert abs(sum(job["atom_charges"])) < 1e-9
    # every silicon keeps its four oxygens, in the cell that RASPA3 builds from lengths and angles
    metric = standard @ standard.T
    lengths = np.sqrt(np.diag(metric))
    np.testing.assert_allclose(lengths, job["lengths"])
    positions, kinds = np.array(job["positions"]), np.array(job["atom_types"])
    delta = positions[kinds == 0][:40, None] - positions[kinds == 1][None]
    distance = np.linalg.norm((delta - np.rint(delta)) @ standard, axis=-1)
    assert ((distance < 1.9).sum(1) == 4).all()


@needs_raspa
def test_short_run_agrees_with_the_table_and_repeats(table, lta):
    settings = raspa.GCMCSettings(seed=7).fixed(100)
    result = raspa.simulate(lta, settings)
    row = table["LTA"]
    error = np.hypot(result.g_per_litre_error, float(row["error_g_L"]))
    assert abs(result.g_per_litre - float(row["n2_g_L"])) < 3.5 * error
    assert result.cycles == 100
    assert 0 < result.relative_error < 0.3
    assert result.fugacity_coefficient == pytest.approx(0.99955, abs=2e-5)
    grid = result.density(lta, 0.5)
    in_cell = grid.sum() * lta.volume / grid.size
    assert in_cell == pytest.approx(result.counts.mean() / result.n_cells, rel=1e-9)
    again = raspa.simulate(lta, raspa.GCMCSettings(seed=7).fixed(20))
    np.testing.assert_array_equal(again.counts, result.counts[:20])
    np.testing.assert_allclose(again.centres, result.centres[: len(again.centres)])


@needs_raspa
def test_blocked_run_leaves_the_closed_cage_empty(lta, pore):
    spheres = pore.blocking_spheres()
    settings = raspa.GCMCSettings(seed=3, blocking_pockets=spheres).fixed(40)
    result = raspa.simulate(lta, settings)
    assert len(result.centres) > 20
    assert pore.contains(result.centres).all()


def test_unknown_element_and_missing_engine_are_named(lta, monkeypatch):
    salt = crystal_from_arrays(
        5.64 * np.eye(3), [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], name="salt"
    )
    with pytest.raises(DataError, match=r"salt: no .* parameters for atomic numbers \[11, 17\]"):
        raspa._job(salt, raspa.GCMCSettings())
    with pytest.raises(DataError, match="unknown force field"):
        raspa.load_force_field("no-such-field")
    monkeypatch.setattr(raspa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="raspalib"):
        raspa.simulate(lta)


# ------------------------------------------------------------------------------ pores


def test_pores_of_lta_are_a_network_and_a_closed_sodalite_cage(lta, pore):
    centre_of_sodalite, centre_of_alpha_cage = np.zeros((1, 3)), np.full((1, 3), 0.5)
    assert not pore.contains(centre_of_sodalite)[0]
    assert pore.contains(centre_of_alpha_cage)[0]
    ((x, y, z, radius),) = pore.blocking_spheres()
    offset = np.array([x, y, z]) - np.rint([x, y, z])
    assert np.abs(offset @ lta.lattice).max() < 0.4
    assert 1.5 < radius < 3.5


def test_regions_do_not_depend_on_the_origin():
    rng = np.random.default_rng(0)
    free = rng.random((9, 8, 7)) < 0.25
    labels, percolates = pockets.regions(free)
    moved = np.roll(free, (4, 3, 2), axis=(0, 1, 2))
    labels_moved, percolates_moved = pockets.regions(moved)
    assert len(percolates) == len(percolates_moved) > 3
    assert percolates.sum() == percolates_moved.sum()
    back = np.roll(labels_moved, (-4, -3, -2), axis=(0, 1, 2))
    pairs = set(zip(labels[free].tolist(), back[free].tolist(), strict=True))
    assert len(pairs) == len(percolates) - 1  # one region is one region


def test_density_grid_keeps_the_symmetry_and_the_number():
    rng = np.random.default_rng(1)
    lattice = 6.0 * np.eye(3)
    inversion = SimpleNamespace(
        lattice=lattice,
        rotations=np.array([np.eye(3), -np.eye(3)], dtype=int),
        translations=np.zeros((2, 3)),
    )
    grid = raspa.density_grid(rng.random((500, 3)), inversion, 0.5, 10)
    assert grid.sum() * 0.5**3 == pytest.approx(50.0)
    np.testing.assert_allclose(grid, grid[::-1, ::-1, ::-1])


@needs_raspa
def test_gases_of_a_mixture_have_their_partial_pressures(tmp_path):
    """In an all but empty box each gas holds N = φ x p V / k T."""
    gas = forcefield.guest
    gases = [
        {"fraction": fraction, "sites": [{"z": 0.0, "charge": 0.0, "type": k + 1}],
         "critical": [gas(name)[key] for key in ("critical_temperature", "critical_pressure",
                                                 "acentric_factor")]}
        for k, (name, fraction) in enumerate({"CO2": 0.3, "N2": 0.7}.items())
    ]  # fmt: skip
    tiny = {"epsilon": 1e-3, "sigma": 1.0, "mass": 28.0, "charge": 0.0, "number": 7}
    job = {
        "types": [{**tiny, "name": name, "framework": name == "X"} for name in ("X", "A", "B")],
        "lengths": [40.0] * 3, "angles": [90.0] * 3, "positions": [[20.0] * 3], "atom_types": [0],
        "atom_charges": [0.0], "gases": gases, "centre": 0, "temperature": 298.0,
        "pressure": 1e6, "cutoff": 12.0, "charges": False, "seed": 3, "init_cycles": 50,
        "min_cycles": 2000, "max_cycles": 2000, "check_every": 1000, "target_relative": 0.0,
        "target_absolute": 0.0, "max_seconds": 60.0, "blocking_pockets": [],
        "moves": {"translation_probability": 0.1, "swap_cbmc_probability": 1.0},
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(raspa.__file__).with_name("raspa_job.py")
    subprocess.run([sys.executable, script, "job.json", "out.npz"], cwd=tmp_path, check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    with np.load(tmp_path / "out.npz") as out:
        found = out["molecules"].mean(0)
        assert (out["molecules"][:, 0] == out["counts"]).all()
    fugacity = 1e6 * np.array([0.3, 0.7]) * forcefield.fugacity_coefficients(
        298.0, 1e6, ["CO2", "N2"], [0.3, 0.7])  # fmt: skip
    assert found == pytest.approx(fugacity * 40.0**3 * 1e-30 / (1.380649e-23 * 298.0), rel=0.06)


ENERGY = """
import json, sys, raspa_job, raspalib as rl
system, _ = raspa_job.build_system(json.load(open(sys.argv[1])))
sim = rl.MonteCarlo(number_of_cycles=1, number_of_initialization_cycles=1, systems=[system],
                    random_seed=1, output_to_files=False)
sim.setup()
energy = system.compute_total_energies().potential_energy()
print(json.dumps([list(system.number_of_molecules_per_component), energy]))
"""


@needs_raspa
def test_raspa_begins_with_the_molecules_of_our_chain(monkeypatch):
    """A hexagonal cell full of CO2 and N2: their numbers and the energy are those of the chain."""
    crystal, runs = databases.iza("CAN"), []
    framework = Framework(
        crystal.lattice, crystal.species, crystal.frac_coords, np.zeros(crystal.n_atoms), "CAN")
    settings = replace(
        gcmc_checks.SETTINGS["raspa-co2-n2"], equilibration=30, temperature=250.0)
    init = engine.Run.__init__
    monkeypatch.setattr(
        engine.Run, "__init__", lambda run, *args: runs.append(run) or init(run, *args))
    packed = gcmc_checks.overfilled([framework], settings, 2.0)
    simulate, found = subprocess.run, []

    def instead(command, **_):
        done = simulate(
            [sys.executable, "-W", "ignore", "-c", ENERGY, command[2]], capture_output=True,
            check=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
        raise StopIteration

    monkeypatch.setattr(subprocess, "run", instead)
    begin = [packed[f"begin-0-{k}"] for k in range(2)]
    with pytest.raises(StopIteration):
        gcmc_checks.raspa_uptake(framework, settings, 1.0, begin)
    [(numbers, energy)] = found
    assert numbers == runs[0].chains.count[0].tolist()
    assert min(numbers) > 0
    assert float(energy) * 1.202724 == pytest.approx(runs[0].chains.energy[0], rel=1e-3)  # 10 J/mol
