"""A network that is told charges: how they are handed over, and what the chapter says of them."""

from __future__ import annotations

import convergence
import given_charges
import numpy as np
import pytest
import torch

from x3mat import databases, results
from x3mat.model import X3Mat, X3MatConfig
from x3mat.sampling import sample_windows

CONFIG = X3MatConfig(l_max=1, m_max=1, channels=8, heads=2, layers=2, cutoff=2.5,
                     radial_functions=8, radial_hidden=8, feed_forward=8,
                     encoding="crystal")  # fmt: skip


@pytest.fixture(scope="module")
def crystal():
    return databases.iza("SOD")


def charges_of(crystal, silicon=1.5):
    return np.where(crystal.species == 14, silicon, -silicon / 2)


def test_elements_and_charges_come_back(crystal):
    charges = np.linspace(-3.9, 3.9, crystal.n_atoms)
    species = torch.tensor(given_charges.coded(crystal, charges).species)
    elements, found = given_charges.decoded(species)
    assert elements.tolist() == crystal.species.tolist()
    assert found.numpy() == pytest.approx(charges, abs=0.5 / given_charges.PER_E + 1e-6)


def test_charges_are_heard_by_their_weights_alone(crystal):
    torch.manual_seed(0)
    told = given_charges.ChargedX3Mat(CONFIG)

    def contributions(silicon):
        coded = given_charges.coded(crystal, charges_of(crystal, silicon))
        return told.contributions(sample_windows(coded))

    assert not torch.allclose(contributions(1.5), contributions(0.5), atol=1e-3)
    usual, n = X3Mat(CONFIG), len(given_charges.CENTRES)
    with torch.no_grad():
        for name, p in told.named_parameters():
            mine = usual.get_parameter(name)
            if p.shape != mine.shape:
                p[-n:] = 0
                mine.copy_(p[:-n])
            else:
                mine.copy_(p)
    expected = usual.contributions(sample_windows(crystal))
    assert torch.allclose(contributions(1.5), expected, rtol=1e-4, atol=1e-5)


def test_charges_are_kept(crystal, tmp_path, monkeypatch):
    asked = []

    def found(name, key):
        asked.append(key)
        return key, np.arange(3, dtype=np.float32)

    monkeypatch.setattr(given_charges, "_charges", found)
    monkeypatch.setattr(given_charges, "for_each", lambda function, names: map(function, names))
    for names in (["a", "b"], ["b", "c"], ["a", "c"]):
        kept = given_charges.all_charges("mof-co2n2", tmp_path / "charges.npz", names)
        assert set(names) <= set(kept)
    assert asked == ["a", "b", "c"]


def test_what_is_said_of_charges_as_an_input():
    """ "Two of three seeds do better, one does worse, and the mean falls by less" ..."""
    found = results.read("mof-co2n2/given_charges.json")
    assert (found["half"], found["n"], found["seeds"]) == ("validation", 300, [0, 1, 2])
    assert (found["n_train"], found["epochs"]) == convergence.BRIEF
    usual, told = (row["mae_of_each_seed"] for row in found["rows"])
    assert [row["told"] for row in found["rows"]] == list(given_charges.KINDS)
    gain = np.subtract(usual, told)
    assert (gain > 0).sum() == 2
    assert 0 < gain.mean() < min(np.ptp(usual), np.ptp(told))
    for row in found["rows"]:
        assert row["mae"] == pytest.approx(np.mean(row["mae_of_each_seed"]))
