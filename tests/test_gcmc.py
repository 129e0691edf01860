"""The Monte Carlo engine: energies, distributions, reproducibility, errors, command line."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import erfc

from x3mat import gcmc as engine
from x3mat.crystal import cif_charges, read_crystal
from x3mat.errors import CrystalError, DataError
from x3mat.gcmc import Framework, GCMCSettings, gcmc

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed: pip install x3mat[simulation]", allow_module_level=True)

K_B = 1.380649e-23
A = 8.9  # Å

#: Sodalite-like cage: rings of oxygen and silicon around the origin, charged.
ATOMS = np.array([
    [0.25, 0.5, 0.0], [0.75, 0.5, 0.0], [0.0, 0.25, 0.5], [0.0, 0.75, 0.5], [0.5, 0.0, 0.25],
    [0.5, 0.0, 0.75], [0.3, 0.35, 0.02], [0.7, 0.65, 0.98], [0.02, 0.3, 0.35], [0.98, 0.7, 0.65],
    [0.35, 0.02, 0.3], [0.65, 0.98, 0.7],
])  # fmt: skip
SPECIES = np.array([14] * 6 + [8] * 6)
LATTICE = np.array([[A, 0, 0], [1.2, A, 0], [-0.7, 0.9, A]])
CAGE = Framework(LATTICE, SPECIES, ATOMS, np.where(SPECIES == 14, 0.9, -0.9), "cage")
BOX = Framework(26.0 * np.eye(3), np.array([2]), np.zeros((1, 3)), None, "box")
SHORT = GCMCSettings(
    gases=("Ar",), cutoff=8.0, spacing=0.3, equilibration=60, cycles=300, replicas=2
)


def plain_ewald(cell, positions, charges, alpha=0.55, largest=6.0):
    """Energy (K) of a neutral periodic set of charges: the textbook sum, with its own settings."""
    offset = (positions[:, None] - positions[None]) @ np.linalg.inv(cell)
    offset -= np.round(offset)
    energy = -alpha / math.sqrt(math.pi) * (charges**2).sum()
    for shift in np.ndindex(3, 3, 3):
        r = np.linalg.norm((offset + np.array(shift) - 1) @ cell, axis=2)
        if shift == (1, 1, 1):
            np.fill_diagonal(r, np.inf)
        energy += 0.5 * (np.outer(charges, charges) * erfc(alpha * r) / r).sum()
    limit = np.ceil(largest * np.linalg.norm(cell, axis=1) / (2 * np.pi)).astype(int)
    index = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in limit], indexing="ij"), -1)
    k = index.reshape(-1, 3) @ (2 * np.pi * np.linalg.inv(cell).T)
    k2 = (k**2).sum(1)
    k, k2 = k[(k2 > 0) & (k2 < largest**2)], k2[(k2 > 0) & (k2 < largest**2)]
    waves = np.abs(np.exp(1j * k @ positions.T) @ charges) ** 2
    energy += 2 * np.pi / abs(np.linalg.det(cell)) * (
        np.exp(-k2 / (4 * alpha**2)) / k2 * waves).sum()
    return 167_100.947 * energy


def plain_lj(cell, one, two, table, cutoff):
    """Sum over nearest images of 4 e ((s/r)^12 - (s/r)^6) with rows (e, s) from `table(i, j)`."""
    offset = (one[:, None] - two[None]) @ np.linalg.inv(cell)
    r = np.linalg.norm((offset - np.round(offset)) @ cell, axis=2)
    epsilon, sigma = table
    with np.errstate(all="ignore"):
        u = 4 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6)
    return np.where((r < cutoff) & (r > 0), u, 0.0)


def prepared(settings, framework=CAGE, *, direct):
    """Tables of one framework and one chain with room for 12 molecules."""
    guests = engine._guests(settings)
    system = engine._system(framework, settings, guests)
    if not direct:
        engine._make_grids(system, guests, settings, "cpu")
    tables = engine._tables([system], guests, [(0, settings)], direct=direct)
    return system, guests, tables, engine._chains([0], [7], len(settings.gases), 1, 12)


def filled(kernel, tables, chains, number):
    """Put molecules at random where they do not overlap; returns their total energy, K."""
    rng, total = np.random.default_rng(3), 0.0
    while chains.n[0] < number:
        slot = chains.n[0]
        chains.kind[0, slot] = slot % tables.n_sites.size
        chains.molecule[0, slot, :3] = rng.random(3)
        axis = rng.normal(size=3)
        chains.molecule[0, slot, 3:6] = axis / np.linalg.norm(axis)
        kernel.place(tables, chains, 0, 0, slot)
        energy = kernel.molecule_energy(tables, chains, 0, slot, -1)
        if energy < 1500:
            total += energy
            chains.count[0, chains.kind[0, slot]] += 1
            chains.n[0] += 1
    return total


@pytest.mark.parametrize("direct", [True, False])
def test_energy_of_charged_mixture_is_that_of_plain_sums(direct):
    from x3mat import gcmc_kernel as kernel

    settings = GCMCSettings(
        gases=("CO2", "N2"), fractions=(0.5, 0.5), charges="cif", force_field="trappe-n2-zeolite",
        cutoff=12.8, spacing=0.15,
    )  # fmt: skip
    system, guests, tables, chains = prepared(settings, direct=direct)
    total = filled(kernel, tables, chains, 6)
    sites = chains.molecule[0, :6, 6:].reshape(6, 3, 3) @ system.cell
    kinds = chains.kind[0, :6]
    charge, place = guests.site_charge[kinds].ravel(), sites.reshape(-1, 3)
    atoms = system.atoms @ system.cell
    coulomb = plain_ewald(
        system.cell, np.r_[atoms, place], np.r_[system.atom_charge, charge]
    ) - plain_ewald(system.cell, atoms, system.atom_charge)
    for one, q in zip(sites, guests.site_charge[kinds], strict=True):  # bonds are no interaction
        for i, j in ((0, 1), (0, 2), (1, 2)):
            coulomb -= 167_100.947 * q[i] * q[j] / np.linalg.norm(one[i] - one[j])
    data = {k: engine.guest(k) for k in ("CO2", "N2")}
    numbers = np.array([
        [data[gas]["types"][s["type"]][key] for key in ("epsilon", "sigma")]
        for gas in [settings.gases[k] for k in kinds] for s in data[gas]["sites"]
    ])  # fmt: skip
    silica = engine.framework_parameters("trappe-n2-zeolite")
    atom = np.array([[silica["Si" if z == 14 else "O"][key] for key in ("epsilon", "sigma")]
                     for z in np.tile(SPECIES, len(atoms) // 12)])  # fmt: skip

    def rules(a, b):
        return np.sqrt(np.outer(a[:, 0], b[:, 0])), (a[:, None, 1] + b[None, :, 1]) / 2

    host = plain_lj(system.cell, atoms, place, rules(atom, numbers), 12.8).sum()
    pairs = plain_lj(system.cell, place, place, rules(numbers, numbers), 12.8)
    different = np.repeat(np.arange(6), 3)[:, None] < np.repeat(np.arange(6), 3)[None]
    expected = coulomb + host + pairs[different].sum()
    assert abs(coulomb) > 100
    assert total == pytest.approx(expected, rel=1e-4 if direct else 2e-3)


def test_shift_and_tail():
    from x3mat import gcmc_kernel as kernel

    energies = {}
    for name, change in {"cut": {}, "shift": {"shifted": True}, "tail": {"tail_correction": True},
                         "long": {"cutoff": 26.0}}.items():  # fmt: skip
        settings = replace(SHORT, cutoff=10.0, gases=("CH4",), spacing=0.0)
        settings = replace(settings, **change)
        system, _, tables, chains = prepared(settings, direct=True)
        if name == "long":  # the same cage, periodic in the same way: shared positions in Å
            chains.kind[:] = 0
        chains.molecule[0, 0, :3] = np.array([0.5, 0.5, 0.5]) / system.replicas
        kernel.place(tables, chains, 0, 0, 0)
        energies[name] = kernel.molecule_energy(tables, chains, 0, 0, -1)
        if name == "cut":
            inside = engine.framework_parameters("uff")
            r = np.linalg.norm(((system.atoms - chains.molecule[0, 0, :3] + 0.5) % 1 - 0.5)
                               @ system.cell, axis=1)  # fmt: skip
            shift = sum(
                4 * math.sqrt(inside[s]["epsilon"] * 148) * (w**12 - w**6)
                for s in ("Si", "O")
                for w in [(inside[s]["sigma"] + 3.73) / 2 / 10.0]
                for _ in range(int(((r < 10) & (np.tile(SPECIES, len(r) // 12)
                                                == (14 if s == "Si" else 8))).sum()))
            )  # fmt: skip
    assert energies["shift"] == pytest.approx(energies["cut"] - shift, rel=1e-9)
    missing = energies["long"] - energies["cut"]  # what lies between 10 and 26 Å
    assert energies["tail"] - energies["cut"] == pytest.approx(missing, rel=0.1)


def test_henry_regime_is_the_integral():
    settings = replace(SHORT, pressure=2e4, cycles=1500)
    [result] = gcmc([CAGE], settings)
    system, guests, _, _ = prepared(settings, direct=True)
    n = 36
    points = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n] * 3, indexing="ij"), -1)
    points = points.reshape(-1, 3) / system.replicas
    energy = np.zeros(len(points))
    for atom, kind in zip(system.atoms, system.atom_type, strict=True):
        offset = points - atom
        r2 = (((offset - np.round(offset)) @ system.cell) ** 2).sum(1)
        w = (system.host_lj[kind, 0, 1] / np.maximum(r2, 0.5)) ** 3
        energy += np.where(r2 < 64.0, system.host_lj[kind, 0, 0] * (w * w - w), 0.0)
    z = result.fugacities[0] / (K_B * 298) * 1e-30
    expected = z * system.volume * np.exp(-energy / 298).mean() / result.n_cells
    found = result.loadings["Ar"]
    assert found.insertion[0] == pytest.approx(expected, abs=4 * found.insertion[1] + 0.02 * expected)
    assert found.insertion[1] < 0.05 * expected
    assert found.counting[0] == pytest.approx(expected, abs=4 * found.counting[1] + 0.03 * expected)


def test_ideal_gas_mixture():
    settings = replace(
        SHORT, gases=("Ar", "CH4"), fractions=(0.3, 0.7), pressure=1e5, cutoff=12.8, cycles=2500
    )
    [result] = gcmc([BOX], settings)
    for k, (gas, y) in enumerate(zip(settings.gases, settings.fractions, strict=True)):
        ideal = y * 1e5 / (K_B * 298) * 26.0**3 * 1e-30
        mean, error = result.loadings[gas].counting
        assert mean == pytest.approx(ideal, abs=4 * error + 0.01 * ideal)
        assert result.counts[..., k].var() == pytest.approx(ideal, rel=0.25)  # Poisson
        assert result.loadings[gas].molecules_per_cell == pytest.approx(ideal, rel=0.02)
    assert result.selectivity == pytest.approx(1.0, rel=0.03)
    assert result.loadings["Ar"].heat_kJ_per_mol == pytest.approx(8.314e-3 * 298, abs=0.3)


def test_every_set_of_moves_gives_the_same_distribution():
    settings = replace(
        SHORT, gases=("Ar", "CH4"), fractions=(0.5, 0.5), pressure=3e6, cycles=800, replicas=4
    )
    found = {
        moves: gcmc([CAGE], replace(settings, moves=moves))[0]
        for moves in [(0, 0, 0, 1, 0), (0.2, 0, 0.2, 0.3, 0.3), (0, 0, 0, 0.1, 0.9)]
    }
    first, *others = [
        [(x.counting[0], x.counting[1]) for x in r.loadings.values()] for r in found.values()
    ]
    assert min(r.acceptance["swap"] for r in found.values()) > 0.01
    for other in others:
        for (a, da), (b, db) in zip(first, other, strict=True):
            assert abs(a - b) < 4 * math.hypot(da, db)
            assert math.hypot(da, db) < 0.1 * a
    for r in found.values():  # counting and insertion are two views of the same average
        for x in r.loadings.values():
            assert abs(x.counting[0] - x.insertion[0]) < 5 * math.hypot(x.counting[1], x.insertion[1])


def test_running_energy_is_the_energy():
    from x3mat import gcmc_kernel as kernel

    settings = replace(
        SHORT, gases=("CO2", "N2"), fractions=(0.5, 0.5), charges="cif", pressure=1e6,
        force_field="trappe-n2-zeolite", replicas=1, cycles=40,
    )  # fmt: skip
    guests = engine._guests(settings)
    run = engine._Run([engine._system(CAGE, settings, guests)], guests, [(0, settings)], "cpu", None)
    while run.cycles_left:
        run.step()
    chains, n = run.chains, int(run.chains.n[0])
    assert n > 2
    total = 0.0
    for slot in range(n):
        chains.n[0] = slot
        total += kernel.molecule_energy(run.tables, chains, 0, slot, -1)
    assert chains.energy[0] == pytest.approx(total, rel=1e-6)
    assert chains.count[0].sum() == n


def test_result_does_not_depend_on_the_batch():
    other = Framework(LATTICE * 1.03, SPECIES, ATOMS, None, "wide")
    states = [replace(SHORT, cycles=60), replace(SHORT, cycles=60, temperature=350.0)]
    together = gcmc([CAGE, other], states)
    alone = [gcmc([f], s)[0] for f in (CAGE, other) for s in states]
    apart = gcmc([CAGE, other], states, memory=1.5e6)  # a group for each framework
    for a, b, c in zip(together, alone, apart, strict=True):
        assert a.counts.sum() > 0
        np.testing.assert_array_equal(a.counts, b.counts)
        np.testing.assert_array_equal(a.counts, c.counts)
        assert a.loadings == b.loadings == c.loadings
    assert not np.array_equal(together[0].counts, gcmc([CAGE], replace(SHORT, cycles=60, seed=2))[0].counts)


def test_slots_grow_without_a_trace(monkeypatch):
    settings = replace(SHORT, gases=("CH4",), pressure=5e7, temperature=200.0, cycles=40)
    [wide] = gcmc([CAGE], settings)
    original = engine._chains
    monkeypatch.setattr(
        engine, "_chains", lambda *a: original(*a[:4], 2 if a[4] == 64 else a[4], *a[5:]))
    [narrow] = gcmc([CAGE], settings)
    assert wide.counts.max() > 4
    np.testing.assert_array_equal(wide.counts, narrow.counts)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    settings = replace(SHORT, equilibration=100, cycles=200, density=True)
    [expected] = gcmc([CAGE], settings)
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", 0.0)
    original, calls = engine._Run.step, []

    def step(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(engine._Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        gcmc([CAGE], settings, checkpoint=tmp_path)
    [resumed] = gcmc([CAGE], settings, checkpoint=tmp_path)
    assert len(calls) == 4 + 3  # 6 launches in all, 3 of them before the kill
    np.testing.assert_array_equal(resumed.counts, expected.counts)
    np.testing.assert_array_equal(resumed.density["Ar"], expected.density["Ar"])
    [again] = gcmc([CAGE], settings, checkpoint=tmp_path)
    assert len(calls) == 7
    assert again.loadings == resumed.loadings
    next(tmp_path.glob("*.npz")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read"):
        gcmc([CAGE], settings, checkpoint=tmp_path)


def test_density_adds_up_to_the_loading():
    [result] = gcmc([CAGE], replace(SHORT, density=True, pressure=1e6))
    grid = result.density["Ar"]
    cell = abs(np.linalg.det(LATTICE))
    assert grid.sum() * cell / grid.size == pytest.approx(result.counts.mean() / result.n_cells)
    atom = tuple((ATOMS[6] * grid.shape).astype(int))
    assert grid[atom] == 0
    assert grid.max() > 0


def test_bad_frameworks_do_not_stop_the_others():
    bad = {
        "no parameters for Fe": Framework(LATTICE, np.array([26]), np.zeros((1, 3)), None, "iron"),
        "no atomic charges": Framework(LATTICE, SPECIES, ATOMS, None, "bare"),
        "net charge": Framework(LATTICE, SPECIES, ATOMS, np.ones(12), "ion"),
        "too small": Framework(np.eye(3), SPECIES[:1], ATOMS[:1], np.zeros(1), "tiny"),
        "too large": Framework(300 * np.eye(3), SPECIES[:1], ATOMS[:1], np.zeros(1), "huge"),
    }
    settings = replace(
        SHORT, charges="cif", force_field="trappe-n2-zeolite", cycles=20, equilibration=10)
    found = gcmc([*bad.values(), CAGE], settings, memory=1e8)
    for error, (text, framework) in zip(found[:-1], bad.items(), strict=True):
        assert isinstance(error, DataError)
        assert text in error.cause
        assert error.source == framework.name
        assert error.remedy
    assert found[-1].loadings["Ar"].mol_per_kg >= 0


@pytest.mark.parametrize("change", [
    {"gases": ("Xe",)}, {"force_field": "none"}, {"fractions": (0.5,)}, {"temperature": -1},
    {"pressure": math.nan}, {"charges": "some"}, {"cycles": 0}, {"spacing": 2.0},
    {"shifted": True, "tail_correction": True},
])  # fmt: skip
def test_bad_settings_are_refused(change):
    with pytest.raises(DataError):
        gcmc([CAGE], replace(SHORT, **change))


def test_settings_of_one_call_share_all_but_the_state():
    with pytest.raises(DataError, match="state"):
        gcmc([CAGE], [SHORT, replace(SHORT, cutoff=9.0)])
    with pytest.raises(DataError, match="device"):
        gcmc([CAGE], SHORT, device="tpu")


def test_standard_error_of_a_correlated_series():
    rng, n = np.random.default_rng(0), 400
    noise = rng.normal(size=(200, n))
    series = np.empty_like(noise)
    series[:, 0] = noise[:, 0] / math.sqrt(1 - 0.8**2)
    for i in range(1, n):
        series[:, i] = 0.8 * series[:, i - 1] + noise[:, i]
    true = series.mean(1).std()
    estimated = np.mean([engine.standard_error(x[None]) for x in series])
    assert estimated == pytest.approx(true, rel=0.15)
    assert estimated > 2 * series.std() / math.sqrt(n)


def test_fugacity_of_dense_carbon_dioxide():
    # NIST REFPROP: CO2 at 350 K and 10 MPa, f / P = 0.66; Peng-Robinson is good to 2 %
    [phi] = engine.fugacity_coefficients(350.0, 1e7, ["CO2"], [1.0])
    assert phi == pytest.approx(0.66, abs=0.02)
    assert engine.fugacity_coefficients(87.0, 1e5, ["Ar"], [1.0])[0] == pytest.approx(0.965, abs=0.02)


def test_charges_of_a_cif(tmp_path):
    text = """data_x
_cell_length_a 8
_cell_length_b 8
_cell_length_c 8
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_space_group_symop_operation_xyz
'x,y,z'
'-x,-y,-z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_charge
Si1 Si 0 0 0 2.0
O1 O 0.1 0.2 0.25 -1.0
"""
    path = tmp_path / "x.cif"
    path.write_text(text)
    charges, crystal = cif_charges(path), read_crystal(path)
    assert dict(zip(crystal.species.tolist(), charges.tolist(), strict=True)) == {14: 2.0, 8: -1.0}
    assert charges.sum() == 0
    path.write_text(text.replace("-1.0", "?"))
    with pytest.raises(CrystalError, match="no usable charge"):
        cif_charges(path)
    path.write_text(text.replace("_atom_site_charge", "_atom_site_other"))
    assert cif_charges(path) is None


def test_cuda_kernels_in_the_simulator_give_the_same_chain(tmp_path):
    script = tmp_path / "simulated.py"
    script.write_text(f"""
import sys, numpy as np
sys.path[:0] = {sys.path!r}
from test_gcmc import CAGE, SHORT
from dataclasses import replace
from x3mat import gcmc_kernel as kernel, gcmc as engine
kernel.ORIENTATIONS = 1
engine.VOXEL = 3.0
settings = replace(SHORT, gases=("N2",), charges="cif", force_field="trappe-n2-zeolite",
                   cutoff=5.0, spacing=0.6, equilibration=1, cycles=10, replicas=1, pressure=1e6)
engine.PAIR_SPACING = 0.4
result = engine.gcmc([CAGE], settings, device=sys.argv[1])[0]
print(result.counts.tolist(), result.energies.round(3).tolist(), file=open(sys.argv[2], "w"))
""")
    out = []
    for device, simulator in (("cpu", "0"), ("cuda", "1")):
        path = tmp_path / device
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": simulator, "NUMBA_CUDA_USE_NVIDIA_BINDING": "0"}
        if device == "cpu":  # the constants above must not reach the compiled functions of others
            environment["NUMBA_CACHE_DIR"] = str(tmp_path)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), device, str(path)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        out.append(path.read_text())
    assert out[0] == out[1]
    assert "[[[" in out[0]
