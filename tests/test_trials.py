"""The tool that tries ideas for band gaps: what each idea changes, on zeolites."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import trials
import variants

from x3mat import databases, training
from x3mat.model import X3Mat, X3MatConfig
from x3mat.training import DrawnWindows, collate

CONFIG = X3MatConfig(l_max=1, m_max=1, channels=8, heads=2, layers=2, cutoff=2.5, radius=5.0,
                     radial_functions=8, radial_hidden=8, feed_forward=8, encoding="crystal")


@pytest.fixture(scope="module")
def data():
    read = partial(databases.iza, symprec=0.0)
    return DrawnWindows(("SOD", "ABW"), read, np.array([[3.0], [1.0]]), CONFIG, 4)


def networks(**options):
    """X3Mat, and the same weights in a network of trials."""
    torch.manual_seed(0)
    usual, other = X3Mat(CONFIG), trials.TrialX3Mat(CONFIG, **options)
    state = usual.state_dict()
    if "channels" in options:
        state = {k.replace("blocks.0.", "blocks.0.block.").replace(
            "blocks.1.", "blocks.1.block."): v for k, v in state.items()}  # fmt: skip
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    return usual, other


@pytest.mark.parametrize("options", [{}, {"channels": 0.5}, {"last": 0.5}])
def test_dropout_is_of_training_only(data, options):
    usual, other = networks(**options)
    graph = collate([data[0], data[1]]).graph()
    with torch.no_grad():
        assert torch.equal(other.eval().network(graph), usual.network(graph))
        other.train()
        differ = not torch.equal(other.network(graph), usual.network(graph))
    assert differ == bool(options)


def test_weighted_mean(data):
    usual, other = networks(weighted=True)
    batch = collate([data[0], data[1]])
    with torch.no_grad():
        y = other.network(batch.graph())
        assert y.shape == (8, 2)
        assert torch.equal(y[:, :1], usual.network(batch.graph()))
        assert (y[:, 1] == 0).all()  # it begins as the plain mean
        plain = [y[:4, 0].mean(), y[4:, 0].mean()]
        found = trials.weighted_mean(y, batch.share, batch.crystal, 3)
        assert found[:2, 0].numpy() == pytest.approx(np.array(plain), rel=1e-5)
        assert found[2] == 0  # padding
        y[:, 1] = torch.arange(8.0) / 4
        found = trials.weighted_mean(y, batch.share, batch.crystal, 2)
    weights = np.exp(np.arange(4) / 4)
    for k in range(2):
        part = y[4 * k : 4 * k + 4, 0].numpy()
        assert found[k, 0] == pytest.approx((weights * part).sum() / weights.sum(), rel=1e-5)


def test_weighted_means_are_used_while_asked_for(data):
    _, other = networks(weighted=True)
    batch, before = collate([data[0], data[1]]), training.predict_mean
    with variants.predicting(trials.weighted_means), torch.no_grad():
        found = training.predict_mean(other, batch, 1000)
        expected = other.network(batch.graph())[:, 0].view(2, 4).mean(1)
    assert found[:, 0].numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    assert training.predict_mean is before


def test_start_keeps_all_but_what_reads_out(tmp_path):
    torch.manual_seed(1)
    before = X3Mat(CONFIG)
    for value in before.state_dict().values():
        value += torch.rand_like(value)
    torch.save(before.state_dict(), tmp_path / "start.pt")
    torch.manual_seed(2)
    fresh = X3Mat(CONFIG).state_dict()
    torch.manual_seed(2)
    after = trials.TrialX3Mat(CONFIG, start=tmp_path / "start.pt").state_dict()
    for name, value in before.state_dict().items():
        own = name.split(".")[0] in ("head", "norm", "shift", "scale", "degree")
        assert not torch.equal(fresh[name], value)
        assert torch.equal(after[name], fresh[name] if own else value)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="another network"):
        trials.TrialX3Mat(CONFIG, start=tmp_path / "other.pt")


def test_pairs_are_left_out_and_elements_masked(data):
    plain, altered = data[3, 1], trials.AlteredWindows(**vars(data), left_out=0.3, masked=0.2)
    one, again, other = (altered[key] for key in ((3, 1), (3, 1), (4, 1)))
    n, m = len(plain.pairs.src), len(one.pairs.src)
    assert 0.6 < m / n < 0.8
    assert one.pairs.ptr.tolist() == [0, m]
    assert np.array_equal(one.pairs.src, again.pairs.src)
    every, kept, later = ({*zip(x.src, x.dst, map(tuple, x.vector), strict=True)}
                          for x in (plain.pairs, one.pairs, other.pairs))  # fmt: skip
    assert kept < every
    assert later < every
    assert kept - later
    assert later - kept
    species, known = one.windows.crystal.species, plain.windows.crystal.species
    assert (species[species > 0] == known[species > 0]).all()
    assert 0 < (species == 0).sum() < len(species)
    assert np.array_equal(one.windows.positions, plain.windows.positions)
    collate([one, other]).graph()
    same = trials.AlteredWindows(**vars(replace(data, known=data.known)))[3, 1]
    assert np.array_equal(same.pairs.src, plain.pairs.src)
    assert np.array_equal(same.windows.crystal.species, known)


def test_order_has_each_crystal_once_an_epoch():
    batches = list(trials.Order(10, 3, 2, 0))
    assert len(batches) == len(trials.Order(10, 3, 2, 0)) == 6
    for epoch in range(2):
        seen = [item for batch in batches[3 * epoch : 3 * epoch + 3] for item in batch]
        assert {e for e, _ in seen} == {epoch}
        assert len({i for _, i in seen}) == 9
