"""The baseline of energy histograms."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from x3mat import databases
from x3mat.applications import application
from x3mat.crystal import crystal_from_arrays, periodic_images

pytest.importorskip("numba", reason="energies on a grid need numba")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import energy_histogram as eh

GASES = ["CO2", "N2"]


def test_gradient_is_that_of_the_energy():
    crystal = databases.iza("SOD")
    _, images = periodic_images(crystal.lattice, crystal.frac_coords, eh.CUTOFF)
    points = np.random.default_rng(0).random((20, 3)) @ crystal.lattice
    epsilon, sigma = np.full(len(images), 0.5), np.full(len(images), 3.3)
    near = np.linalg.norm(points[0] - images, axis=1)
    near = near[near < eh.CUTOFF]
    energy, norm = eh.field(points, images, epsilon, sigma)
    assert energy[0] == pytest.approx((2.0 * ((3.3 / near) ** 12 - (3.3 / near) ** 6)).sum())
    steps = 1e-4 * np.eye(3)
    slopes = [(eh.field(points + step, images, epsilon, sigma)[0]
               - eh.field(points - step, images, epsilon, sigma)[0]) / 2e-4
              for step in steps]  # fmt: skip
    assert norm == pytest.approx(np.linalg.norm(slopes, axis=0), rel=1e-4)


def test_histogram_of_a_crystal():
    crystal = databases.iza("SOD")
    found = eh.histogram(crystal, GASES)
    assert found.reshape(2, -1).sum(1) == pytest.approx([1, 1])
    assert 0.5 < found.reshape(2, 17, 7)[:, -1].sum(1).min() < 1  # most of a crystal is wall
    doubled = crystal_from_arrays(
        crystal.lattice * [[2], [1], [1]], np.tile(crystal.species, 2),
        np.concatenate([crystal.frac_coords / [2, 1, 1], crystal.frac_coords / [2, 1, 1]
                        + [0.5, 0, 0]]), symprec=0.0)  # fmt: skip
    assert np.ceil(2 * crystal.lattice[0, 0]) == 2 * np.ceil(crystal.lattice[0, 0])
    assert eh.histogram(doubled, GASES) == pytest.approx(found, abs=2e-3)


def test_network_learns_what_the_features_tell(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.random((300, 6))
    y = np.stack([x[:, 0] + x[:, 1], 3 * x[:, 2]], 1)
    parts = np.split(np.arange(300), [200, 250])
    monkeypatch.setattr(eh, "EPOCHS", 60)
    found = eh.evaluate(x, y, parts, [0])
    assert (np.array(found["test_mae_of_each_output"])
            < 0.4 * np.array(found["mae_of_the_mean_label"])).all()
    assert found["n_test"] == 50


@pytest.mark.parametrize("name", ["mof-co2o2n2", "mof-ch4n2"])
def test_gases_have_probes(name):
    assert set(application(name).columns) <= set(eh.PROBES)
