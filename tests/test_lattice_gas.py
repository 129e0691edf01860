"""Densities of the lattice gas, what windows are told of them, and networks that are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from x3mat import databases, predict
from x3mat.crystal import crystal_from_arrays
from x3mat.errors import CrystalError, ModelError
from x3mat.maps import explain
from x3mat.model import X3MatConfig, contributions, graphs, load_checkpoint, save_checkpoint
from x3mat.predict import Ensemble
from x3mat.sampling import sample_windows
from x3mat.screening import means
from x3mat_gcmc import Framework, GCMCSettings, kernel
from x3mat_gcmc import lattice_gas as gas
from x3mat_gcmc.charges import predicted_charges, with_predicted_charges

SETTINGS = GCMCSettings(gases=("CO2", "N2"), fractions=(0.15, 0.85), charges="cif", spacing=0.4)
CONDITIONS = {k: getattr(SETTINGS, k) for k in gas.CONDITIONS}
CONFIG = X3MatConfig(l_max=1, m_max=1, channels=8, heads=2, radial_functions=8, radial_hidden=8,
                     feed_forward=8, outputs=2, encoding="crystal")  # fmt: skip


def network(seed: int = 0) -> gas.ToldX3Mat:
    """One that corrects what it is told."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = gas.ToldX3Mat(CONFIG)
        torch.nn.init.normal_(model.head[-1].weight, std=0.3)
    return model.eval()


def ensemble(*members: gas.ToldX3Mat) -> Ensemble:
    about = {"lattice_gas": CONDITIONS, "property": "uptake", "unit": "g/L",
             "columns": ["CO2", "N2"]}  # fmt: skip
    return Ensemble("small", members or (network(),), (about,) * max(len(members), 1))


@pytest.fixture(scope="module")
def sodalite():
    return databases.iza("SOD")


@pytest.fixture(scope="module")
def windows(sodalite):
    return ensemble().windows(sodalite)


def test_a_blurred_density_keeps_its_sum_and_its_place():
    lattice = np.array([[8.0, 0, 0], [2.0, 9.0, 0], [0, 1.0, 10.0]])
    density = np.zeros((16, 18, 20))
    density[3, 4, 5] = 1.0
    found = gas.blurred(lattice, density, 1.0)
    assert found.sum() == pytest.approx(1.0)
    assert np.unravel_index(found.argmax(), found.shape) == (3, 4, 5)
    step = np.array([2 / 16, 0, 0]) @ lattice  # two voxels on
    ratio = found[5, 4, 5] / found[3, 4, 5]
    assert ratio == pytest.approx(np.exp(-0.5 * step @ step), rel=1e-3)
    assert gas.blurred(lattice, np.full((4, 4, 4), 2.0), 1.5) == pytest.approx(2.0)


def test_densities_turn_with_the_crystal():
    """A cell with two axes exchanged has the same densities, exchanged."""
    crystal = databases.iza("SOD", symprec=0.0)
    charges = predicted_charges(crystal)
    frac = crystal.frac_coords * [1.0, 0.9, 1.1] % 1.0  # no longer cubic
    lattice = crystal.lattice * [[1.0], [1.05], [1.1]]
    turned = [1, 0, 2]
    one, swapped = (gas.densities(cell, gas.dilute(
        Framework(cell, crystal.species, places, charges), SETTINGS), SETTINGS.gases)
        for cell, places in ((lattice, frac), (lattice[turned], frac[:, turned])))  # fmt: skip
    for a, b in zip(one, swapped, strict=True):
        back = gas.blurred(lattice[turned], b, 1.0).swapaxes(0, 1)
        expected = gas.blurred(lattice, a, 1.0)
        assert back.shape == expected.shape  # places within voxels are random
        assert np.corrcoef(back.ravel(), expected.ravel())[0, 1] > 0.99
        assert back.mean() == pytest.approx(expected.mean(), rel=0.05)


def test_windows_are_told_all_the_gas_there_is(sodalite, windows):
    framework = with_predicted_charges(sodalite)
    found = gas.densities(sodalite.lattice, gas.dilute(framework, SETTINGS), SETTINGS.gases)
    told = windows.told
    assert told.shape == (windows.n_orbits, 2 * (3 + len(gas.QUANTILES)))
    mean = windows.weights @ told[:, :2] / windows.n_windows
    assert mean == pytest.approx([x.mean() for x in found], rel=1e-6)
    here = np.exp(told[:, 2:4]) - gas.SMALL
    assert (here / told[:, :2]).std(0) == pytest.approx(0, abs=1e-6)  # but for a factor near 1
    assert here / told[:, :2] == pytest.approx(1, abs=0.02)
    assert np.exp(told[:, 4:6]) - gas.SMALL == pytest.approx(np.tile(mean, (len(told), 1)))
    assert (np.diff(told[:, 6:].reshape(len(told), -1, 2), axis=1) >= 0).all()  # quantiles
    assert told[:, 4:] == pytest.approx(np.tile(told[0, 4:], (len(told), 1)))


def test_places_that_symmetry_makes_equal_are_told_nearly_the_same(sodalite):
    every = sample_windows(sodalite, 6.0, 2.0, symmetry=False)
    orbit = sample_windows(sodalite, 6.0, 2.0).orbit
    density = gas.told(every, CONDITIONS)[:, :2]
    spread = [density[orbit == k].std(0) / density.max(0) for k in np.unique(orbit)]
    assert np.max(spread) < 0.03


def test_a_moved_crystal_is_told_nearly_the_same(sodalite, windows):
    shift = np.array([0.13, 0.29, 0.41])
    moved = crystal_from_arrays(
        sodalite.lattice, sodalite.species, (sodalite.frac_coords + shift) % 1.0)  # fmt: skip
    again = ensemble().windows(moved)
    assert again.n_orbits == windows.n_orbits
    for before, after in zip(windows.told[:, :2].T, again.told[:, :2].T, strict=True):
        assert np.sort(after) == pytest.approx(np.sort(before), abs=0.08 * before.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_that_are_told_are_invariant(sodalite, windows, dtype):
    """Rotation and inversion of the windows, another order of the atoms."""
    model = network().to(dtype)
    like = torch.zeros(1, dtype=dtype)
    graph = next(graphs([windows], CONFIG, 10**9, like))
    rng = np.random.default_rng(0)
    turn = torch.as_tensor(np.linalg.qr(rng.normal(size=(3, 3)))[0], dtype=dtype)
    expected = model.network(graph)
    tolerance = {"abs": 2e-4 if dtype == torch.float32 else 1e-9}
    for matrix in (turn, -turn, -torch.eye(3, dtype=dtype)):
        turned = replace(graph, positions=graph.positions @ matrix, vector=graph.vector @ matrix)
        assert model.network(turned).detach().numpy() == pytest.approx(
            expected.detach().numpy(), **tolerance)  # fmt: skip
    order = rng.permutation(sodalite.n_atoms)
    shuffled = crystal_from_arrays(sodalite.lattice, sodalite.species[order],
                                   sodalite.frac_coords[order])  # fmt: skip
    again = ensemble().windows(shuffled)
    found = model.network(next(graphs([again], CONFIG, 10**9, like)))
    assert found.detach().numpy() == pytest.approx(expected.detach().numpy(), rel=0.02, abs=1e-3)


def test_paths_of_prediction_agree(sodalite, windows):
    """All at once, in chunks, atoms encoded first, two crystals together."""
    models, other = (network(0), network(1)), ensemble().windows(databases.iza("CHA"))
    with torch.no_grad():
        graph = next(graphs([windows], CONFIG, 10**9, models[0].shift))
        whole = torch.stack([m.plain_network(graph, m.plain_geometry(graph)) for m in models])
    for size in (10**9, 200, 1):
        found = contributions(models, [windows], size)
        assert found.numpy() == pytest.approx(whole.numpy(), abs=1e-4)
    both = contributions(models, [windows, other], 500)
    assert both[:, : windows.n_orbits].numpy() == pytest.approx(whole.numpy(), abs=1e-4)
    share = windows.weights / windows.n_windows
    assert means(models, [windows, other])[:, 0].numpy() == pytest.approx(
        np.einsum("mwk,w->mk", whole.double().numpy(), share), abs=1e-4)  # fmt: skip


def test_who_has_learned_nothing_repeats_what_it_is_told(windows):
    model = gas.ToldX3Mat(CONFIG)
    assert model.contributions(windows).numpy() == pytest.approx(windows.told[:, :2], rel=1e-5)


def test_corrections_depend_on_atoms_and_on_what_is_told(windows):
    model, n = network(), windows.n_orbits
    elsewhere = replace(windows, told=windows.told + np.eye(windows.told.shape[1])[-1])
    before = model.contributions(windows)
    assert (model.contributions(elsewhere) - before).abs().max() > 1e-4
    same = replace(windows, told=np.tile(windows.told[:1], (n, 1)))
    assert np.ptp(model.contributions(same).numpy(), axis=0).max() > 1e-4


def test_a_checkpoint_says_what_it_is_told(tmp_path, sodalite, windows):
    about = {**ensemble().about[0], "application": "mof-co2n2"}
    model = save_checkpoint(tmp_path / "a.pt", network(), about)
    loaded, said = load_checkpoint(tmp_path / "a.pt")
    assert type(loaded) is gas.ToldX3Mat
    assert said["lattice_gas"] == CONDITIONS
    assert asdict(loaded.config) == asdict(CONFIG)
    assert torch.equal(loaded.contributions(windows), model.contributions(windows))
    value = predict(sodalite, ensemble(loaded)).value
    y = loaded.contributions(windows)[:, 0].double().numpy()
    assert value == pytest.approx(windows.weights @ y / windows.n_windows)


def test_a_map_is_told_too(sodalite):
    found = explain(sodalite, ensemble(), step=1.5)
    assert found.windows.told.shape[0] == found.windows.n_orbits
    coarse = found.prediction.value
    assert np.average(found.values, weights=found.windows.weights) == pytest.approx(coarse, rel=0.3)


def test_who_is_told_nothing_says_so(sodalite):
    with pytest.raises(ModelError, match=r"Ensemble\.windows"):
        network().contributions(sample_windows(sodalite))


def test_an_element_without_charges_is_named(sodalite):
    strange = crystal_from_arrays(sodalite.lattice, np.where(sodalite.species == 14, 10,
                                  sodalite.species), sodalite.frac_coords)  # fmt: skip
    with pytest.raises(CrystalError, match="charges of Ne were never learned"):
        ensemble().windows(strange)


@pytest.mark.parametrize(("daemon", "threads"), [(False, 3), (True, 1)])
def test_a_process_of_a_loader_takes_one_core(sodalite, windows, monkeypatch, daemon, threads):
    """And finds the same."""
    asked = []

    def pool(workers):
        asked.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(kernel.config, "NUMBA_NUM_THREADS", 3)
    monkeypatch.setattr(kernel, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(kernel, "current_process", lambda: SimpleNamespace(daemon=daemon))
    again = gas.told(windows, CONDITIONS)
    assert set(asked) == {threads}
    assert again == pytest.approx(windows.told)
