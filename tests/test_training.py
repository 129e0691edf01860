"""Training: sampling, loss and gradient, determinism, resuming, records and their summary."""

from __future__ import annotations

import copy
import json
import multiprocessing
import signal
from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from summarize import main, summarize

from x3mat import databases, paths, results, sample_windows
from x3mat.applications import APPLICATIONS, Fold, application
from x3mat.descriptors import describe
from x3mat.errors import DataError, ModelError
from x3mat.model import X3Mat, X3MatConfig, fitting_atoms, load_checkpoint, window_graph
from x3mat.sampling import STRIDE, cut_spheres, neighbours
from x3mat.screening import means, read_results
from x3mat.training import (
    Batches,
    CrystalWindows,
    DrawnWindows,
    Endless,
    Flat,
    Learner,
    PackedBatch,
    PaddedMean,
    Replayed,
    TrainConfig,
    collate,
    crystals_of,
    find_pairs,
    pad,
    predict_mean,
    set_constants,
    train,
    train_config,
    train_fold,
    train_folds,
)

SMALL = TrainConfig(
    model=X3MatConfig(l_max=1, m_max=1, channels=8, heads=2, layers=1, cutoff=2.5,
                      radial_functions=8, radial_hidden=8, feed_forward=8),
    epochs=4, crystals_per_step=2, windows_per_crystal=6, learning_rate=5e-3, ema=0.5,
)
CODES = ("SOD", "ABW", "ATN", "AFI")
TARGETS = np.array([[3.0], [1.0], [2.0], [4.0]])
FOLDED = [app for app in APPLICATIONS.values() if not app.drawn]


@pytest.fixture(scope="module")
def windows():
    return [sample_windows(databases.iza(code)) for code in CODES]


def fit(windows, folder, config=SMALL):
    read = partial(databases.iza, symprec=0.0)
    return train(
        config, DrawnWindows(CODES, read, TARGETS, config.model, config.windows_per_crystal,
                             config.seed),
        CrystalWindows(windows[:2], TARGETS[:2], config.model), folder, device="cpu",
        progress=False, check_every=1,
    )  # fmt: skip


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(),
                                                 strict=True))


def mean_contribution(model, windows):
    return means([model], [windows])[0, 0].numpy()


def graph(windows):
    tensors = (torch.tensor(a) for a in (windows.positions, windows.species, windows.ptr))
    return window_graph(*tensors, SMALL.model.cutoff, windows.radius)


def test_all_windows_have_their_multiplicities_as_shares(windows):
    whole, _, share, target = CrystalWindows(windows, TARGETS, SMALL.model)[1]
    assert whole is windows[1]
    assert share == pytest.approx(windows[1].weights / windows[1].n_windows)
    assert target == TARGETS[1]


def test_pairs_found_once_are_those_of_the_network(windows):
    data = CrystalWindows(windows, TARGETS, SMALL.model)
    batch = collate([data[i] for i in range(len(data))])
    again = window_graph(batch.positions, batch.species, torch.tensor(batch.ptr["atoms"]),
                         SMALL.model.cutoff, SMALL.model.radius)
    assert torch.equal(again.src, batch.src)
    assert torch.equal(again.dst, batch.dst)
    assert torch.equal(again.window, batch.window)


@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_a_packed_batch_is_the_batch(windows, encoding):
    data = CrystalWindows(windows, TARGETS, replace(SMALL.model, encoding=encoding))
    batch = collate([data[i] for i in range(3)])
    again = PackedBatch.of(batch).to("cpu")
    assert list(again.tensors) == list(batch.tensors)
    for name, x in batch.tensors.items():
        assert again.tensors[name].dtype == x.dtype
        assert torch.equal(again.tensors[name], x)
        assert again.tensors[name].data_ptr() % 16 == 0
    assert again.ptr.keys() == batch.ptr.keys()
    assert {x.untyped_storage().data_ptr() for x in again.tensors.values()} == {
        again.positions.untyped_storage().data_ptr()}  # fmt: skip


@pytest.mark.parametrize("of", [1, 2, 3])
def test_devices_share_every_batch(of):
    order = [5, 3, 1, 2, 4, 0, 6]
    each = [list(Batches(lambda: [order], 7, 3, rank, of)) for rank in range(of)]
    assert all(len(parts) == len(Batches(list, 7, 3, 0, of)) == 3 for parts in each)
    for k, whole in enumerate(([5, 3, 1], [2, 4, 0], [6])):
        parts = [parts[k] for parts in each]
        assert parts == [whole[rank::of] or whole[:1] for rank in range(of)]


def in_double(batch):
    return replace(batch, **{k: v.double() for k, v in vars(batch).items()
                             if isinstance(v, torch.Tensor) and v.is_floating_point()})


@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_padding_changes_nothing(windows, encoding):
    """What a CUDA graph replays, without the graph: predictions and gradients of padded batches."""
    torch.manual_seed(0)
    config = replace(SMALL.model, encoding=encoding, layers=2)
    model = X3Mat(config).double()
    data = CrystalWindows(windows, TARGETS, config)
    batch = in_double(collate([data[i] for i in range(3)]))
    third = batch.first if encoding == "window" else batch.positions
    size = len(batch.species) + 9, len(batch.src) + 17, len(third) + 13
    found = []
    for mean in (predict_mean(model, batch, 10**9),
                 PaddedMean(model, 5)(*pad(batch, size, len(batch.share) + 4, config))):
        model.zero_grad()
        mean[:3].square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((mean[:3].detach(), gradient))
    (plain, plain_gradient), (padded, padded_gradient) = found
    assert torch.allclose(padded, plain, rtol=1e-12, atol=0)
    assert torch.allclose(padded_gradient, plain_gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_batches_and_their_parts_give_what_contributions_give(windows, encoding):
    torch.manual_seed(0)
    config = replace(SMALL.model, encoding=encoding, layers=2)
    model = X3Mat(config).double()
    data = CrystalWindows(windows, TARGETS, config)
    batch = in_double(collate([data[i] for i in range(len(data))]))
    expected = torch.stack([torch.as_tensor(w.weights / w.n_windows) @ model.contributions(w)
                            for w in windows])
    for max_atoms in (100, 10**9):
        found = predict_mean(model, batch, max_atoms)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)  # positions were rounded


@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_one_captured_size_has_room_for_every_example(windows, encoding, monkeypatch):
    """With the module in the place of its CUDA graphs."""
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.make_graphed_callables", lambda module, *_, **__: module)
    model = X3Mat(replace(SMALL.model, encoding=encoding)).double()
    data = CrystalWindows(windows, TARGETS, model.config)
    batches = [in_double(collate([data[i] for i in part])) for part in ((0, 1), (2, 3), (1, 3))]
    replayed = Replayed(model, 2, max(len(b.share) for b in batches), batches)
    sizes = np.array(list(replayed.captured))
    assert (sizes[0] >= 1.15 * sizes[1:].max(0)).all()
    for batch in batches:
        assert torch.allclose(replayed(batch), predict_mean(model, batch, 10**9), atol=1e-10)
    assert replayed(collate([data[i % 4] for i in range(9)])) is None
    assert Replayed(model, 2, 9, [])(batches[0]) is None


@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_one_vector_has_the_gradients_of_all_weights(windows, encoding):
    """Also in parts, which are computed again in the backward pass, and after a move."""
    config = replace(SMALL.model, encoding=encoding, layers=2)
    model = X3Mat(config)
    flat = Flat(copy.deepcopy(model)).double()
    model.double()
    batch = in_double(collate([CrystalWindows(windows, TARGETS, config)[i] for i in range(4)]))
    for max_atoms in (10**9, 300):
        means = [predict_mean(net, batch, max_atoms) for net in (model, flat)]
        assert torch.equal(*means)
        model.zero_grad()
        flat.zero_grad()
        for mean in means:
            mean.square().sum().backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(flat.vector.grad, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        flat.vector.zero_()
    assert not any(p.any() for p in flat.model.parameters())
    assert [p.requires_grad for p in flat.parameters()].count(True) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_replayed_steps_are_those_of_the_reference(windows, encoding):
    torch.manual_seed(0)
    config = replace(SMALL.model, encoding=encoding, layers=2, channels=16)
    model = Flat(X3Mat(config)).cuda()
    data = CrystalWindows(windows, TARGETS, config)
    batches = [collate([data[i] for i in part]).to("cuda") for part in ((0, 1), (2, 3))]
    replayed = Replayed(model, 2, max(len(b.share) for b in batches), batches)
    for batch in batches:
        found = []
        for mean in (replayed, lambda b: predict_mean(model, b, 10**9)):
            model.zero_grad()
            mean(batch).square().sum().backward()
            found.append(model.vector.grad.clone())
        assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()
    assert replayed(collate([data[i % 4] for i in range(9)]).to("cuda")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_trainings_one_after_the_other(windows, tmp_path):
    """Graphs of the first are garbage when those of the second are captured."""
    for k in range(2):
        data = CrystalWindows(windows, TARGETS, SMALL.model)
        run = train(replace(SMALL, epochs=1), data, data, tmp_path / str(k), device="cuda",
                    progress=False)
        assert len(run.history) == 1
        del run


def test_garbage_is_collected_before_graphs_are_captured(windows, monkeypatch):
    """Without a GPU: in this order."""
    calls = []
    monkeypatch.setattr("x3mat.training.gc.collect", lambda: calls.append("collect"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: calls.append("pool"))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda module, *_, **__: calls.append("capture") or module)
    model = X3Mat(SMALL.model)
    data = CrystalWindows(windows, TARGETS, SMALL.model)
    Replayed(model, 2, 99, [collate([data[0], data[1]])])
    assert calls[:2] == ["collect", "pool"]
    assert set(calls[2:]) == {"capture"}


def test_collated_prediction_is_the_weighted_mean_of_contributions(windows):
    model = X3Mat(SMALL.model)
    data = CrystalWindows(windows, TARGETS, SMALL.model)
    batch = collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        together = predict_mean(model, batch, max_atoms=300).numpy()
    alone = np.stack([mean_contribution(model, w) for w in windows])
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_gradient_is_the_same_for_any_budget(windows):
    torch.manual_seed(0)
    model = X3Mat(replace(SMALL.model, l_max=2, m_max=2, layers=2))
    data = CrystalWindows(windows, TARGETS, model.config)
    batch = collate([data[i] for i in range(len(data))])
    assert len(batch.species) > 2_000
    found = []
    for max_atoms in (10**9, 1_000, 60):
        model.zero_grad()
        (predict_mean(model, batch, max_atoms) - batch.target).abs().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_budget_fits_a_full_card(windows):
    """With most of the card taken, chunks get smaller, and the gradient is the same."""
    torch.manual_seed(0)
    model = X3Mat(replace(SMALL.model, l_max=2, m_max=2, layers=2)).cuda()
    data = CrystalWindows(windows * 10, np.tile(TARGETS, (10, 1)), model.config)
    batch = collate([data[i] for i in range(len(data))]).to("cuda")
    budgets, found = [], []
    for left in (1.0, 0.01):
        free = torch.cuda.mem_get_info()[0]
        taken = torch.empty(int((1 - left) * free), dtype=torch.uint8, device="cuda")
        budgets.append(fitting_atoms(model, batch.graph(0, 40), gradient=True))
        model.zero_grad()
        predict_mean(model, batch, budgets[-1]).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        del taken
        torch.cuda.empty_cache()
    assert budgets[1] < 0.1 * budgets[0]
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


def test_constants_come_from_the_training_set(windows):
    model = X3Mat(SMALL.model)
    set_constants(model, CrystalWindows(windows, TARGETS, SMALL.model))
    assert model.shift.item() == pytest.approx(TARGETS.mean())
    assert model.scale.item() == pytest.approx(TARGETS.std(ddof=1))
    by_hand = np.mean([model.mean_degree(graph(w)).numpy() for w in windows], axis=0)
    assert model.degree.numpy() == pytest.approx(by_hand, rel=1e-5)


def test_training_learns_and_repeats_itself(windows, tmp_path):
    config = replace(SMALL, epochs=16, windows_per_crystal=60)
    one, two = fit(windows, tmp_path / "a", config), fit(windows, tmp_path / "b", config)
    assert same_weights(one.model, two.model)
    errors = [row["train_mae"] for row in one.history]
    assert np.mean(errors[-3:]) < 0.8 * np.mean(errors[:3]), errors
    other = fit(windows, tmp_path / "c", replace(config, epochs=1, seed=1))
    brief = fit(windows, tmp_path / "d", replace(config, epochs=1))
    assert not same_weights(other.model, brief.model)


def test_global_random_state_is_left_alone(windows, tmp_path):
    before = torch.random.get_rng_state()
    fit(windows, tmp_path / "a", replace(SMALL, epochs=1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(windows, tmp_path, monkeypatch, workers):
    """Without and with processes that cut windows, which are kept from epoch to epoch."""
    whole = fit(windows, tmp_path / "whole")
    options = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    monkeypatch.setattr("x3mat.training.processes", lambda n, share: options if n else {})

    def killed(self):
        if self.current_epoch == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "on_train_epoch_start", killed, raising=False)
        with pytest.raises(RuntimeError, match="killed"):
            fit(windows, tmp_path / "cut")
    assert (tmp_path / "cut" / "last.ckpt").exists()
    resumed = fit(windows, tmp_path / "cut")
    assert same_weights(whole.model, resumed.model)
    assert [r["train_mae"] for r in resumed.history] == [r["train_mae"] for r in whole.history]
    assert [r["epoch"] for r in resumed.history] == [r["epoch"] for r in whole.history]


def test_the_processes_that_cut_windows_live_as_long_as_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("x3mat.training.processes", lambda *_: {
        "num_workers": 1, "multiprocessing_context": "fork", "prefetch_factor": 2})
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_):
            seen.append([p.pid for p in multiprocessing.active_children()])

    config = replace(SMALL, epochs=3, crystals_per_step=2)
    train(config, drawn(), drawn(), tmp_path, device="cpu", progress=False, check_every=9,
          callbacks=[Watch()])
    assert len(seen) == 3 * 2
    assert seen == [seen[0]] * 6
    assert len(seen[0]) == 1
    assert seen[0][0] not in [p.pid for p in multiprocessing.active_children()]


def test_a_loader_goes_on_from_epoch_to_epoch():
    asked = []

    def orders():
        for epoch in range(3):
            asked.append(epoch)
            yield [10 * epoch + i for i in range(5)]

    loader = Endless(range(100), batch_sampler=Batches(orders, 5, 2, 0, 1), collate_fn=list)
    epochs = [list(loader) for _ in range(3)]
    assert len(loader) == 3
    assert epochs == [[[k, k + 1], [k + 2, k + 3], [k + 4]] for k in (0, 10, 20)]
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("change", ["freeze", "double"])
def test_weights_of_one_vector_are_alike(change):
    model = X3Mat(SMALL.model)
    if change == "freeze":
        model.head.requires_grad_(False)
    else:
        model.head.double()
    with pytest.raises(ModelError, match="frozen or of another type"):
        Flat(model)


class CountQuestions(L.Callback):
    """How often a process asks the others something between the steps of a training."""

    asked = 0

    def on_train_start(self, trainer, learner):
        broadcast = torch.distributed.broadcast

        def counted(*args, **kwargs):
            self.asked += 1
            return broadcast(*args, **kwargs)

        torch.distributed.broadcast = counted

    def state_dict(self):
        return {"asked": self.asked, "ends": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL}


def test_two_devices_take_the_steps_of_one(tmp_path):
    """Batches that two processes share unevenly, or of which one gets nothing."""
    config = replace(SMALL, epochs=3, crystals_per_step=3)
    found = [
        train(config, drawn(), drawn(seed=1, names=CODES[:1]), tmp_path / str(devices),
              device="cpu", devices=devices, check_every=1, progress=False,
              callbacks=[CountQuestions()])
        for devices in (1, 2)
    ]  # fmt: skip
    one, two = found
    state = torch.load(tmp_path / "2" / "last.ckpt", weights_only=False)["callbacks"]
    # Lightning's loop would ask before each step, and wait for the GPU for the answer
    assert state[CountQuestions.__qualname__] == {"asked": 0, "ends": True}
    assert all({"train_mae", "val_mae"} < set(row) for row in two.history)
    for a, b in zip(one.history, two.history, strict=True):
        assert b.pop("seconds") > 0 < a.pop("seconds")
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    for x, y in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-5)


def test_finished_run_gives_its_averaged_weights_again(windows, tmp_path):
    once, again = (fit(windows, tmp_path) for _ in range(2))
    assert same_weights(once.model, again.model)
    raw = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    raw = {k.removeprefix("weights.model."): v for k, v in raw.items()}
    kept = dict(again.model.named_parameters())
    assert set(kept) <= set(raw)
    assert not any(torch.equal(v, raw[k]) for k, v in kept.items())


def test_state_of_another_network_is_refused(windows, tmp_path):
    fit(windows, tmp_path, replace(SMALL, epochs=1))
    other = replace(SMALL, epochs=2, model=replace(SMALL.model, channels=4))
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(DataError, match=r"another network.*delete it"):
        fit(windows, tmp_path, other)
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (2, 0.25), (10**6, SMALL.ema)])
def test_average_of_weights(windows, monkeypatch, step, decay):
    monkeypatch.setattr(Learner, "global_step", step)
    learner = Learner(SMALL, CrystalWindows(windows, TARGETS, SMALL.model),
                      CrystalWindows(windows, TARGETS, SMALL.model))
    weight = learner.model.head[0].weight
    first = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    learner.on_train_batch_end()
    learner.on_validation_start()
    assert torch.allclose(weight, first + 1 - decay, atol=1e-6)
    learner.on_validation_end()
    assert torch.equal(weight, first + 1)


def drawn(seed=0, names=CODES):
    return DrawnWindows(names, databases.iza, TARGETS[: len(names)], SMALL.model, 6, seed)


def test_drawn_windows_are_windows_of_the_crystal():
    item = drawn()[0]
    assert item.windows.n_windows == 6
    assert item.share.tolist() == pytest.approx([1 / 6] * 6)
    assert item.target.tolist() == TARGETS[0].tolist()
    crystal = databases.iza(CODES[0])
    ptr, positions, atom = cut_spheres(crystal, item.windows.centers, 6.0)
    np.testing.assert_array_equal(item.windows.ptr, ptr)
    np.testing.assert_array_equal(item.windows.positions, positions)
    np.testing.assert_array_equal(item.windows.species, crystal.species[atom])
    near = np.linalg.norm(positions[item.pairs.src[:50]] - positions[item.pairs.dst[:50]], axis=1)
    assert (near < SMALL.model.cutoff).all()


def test_drawn_windows_depend_on_seed_epoch_and_crystal_alone():
    draws = {(seed, epoch, i): drawn(seed=seed)[epoch, i].windows.centers.tolist()
             for seed in (0, 1) for epoch in (0, 1) for i in (0, 1)}  # fmt: skip
    assert len({str(draw) for draw in draws.values()}) == 8
    data = drawn()
    assert data[4, 1].windows.centers.tolist() not in draws.values()
    assert data[1, 1].windows.centers.tolist() == draws[0, 1, 1]
    assert data[1].windows.centers.tolist() == draws[0, 0, 1]
    assert len(list(data)) == len(data)


def test_pairs_of_a_crystal_are_found_once():
    shared = replace(SMALL.model, encoding="crystal")
    data = DrawnWindows(CODES[:1], databases.iza, TARGETS[:1], shared, 2)
    src, dst, vector = neighbours(databases.iza(CODES[0]), shared.cutoff)
    for item in (data[0], data[1, 0]):
        assert item.pairs is data.known[0][1]
    np.testing.assert_array_equal(item.pairs.src, src)
    np.testing.assert_array_equal(item.pairs.dst, dst)
    np.testing.assert_allclose(item.pairs.vector, vector, atol=1e-6)


@pytest.mark.parametrize("encoding", ["window", "crystal"])
def test_displaced_atoms_take_their_images_and_pairs_along(encoding):
    config = replace(SMALL.model, encoding=encoding)
    still = DrawnWindows(CODES[:1], databases.iza, TARGETS[:1], config, 6)
    noisy = replace(still, noise=0.1)
    a, b = still[0], noisy[0]
    np.testing.assert_array_equal(noisy[0].windows.positions, b.windows.positions)
    np.testing.assert_array_equal(a.windows.centers, b.windows.centers)
    assert not np.allclose(noisy[1, 0].windows.positions.sum(), b.windows.positions.sum())
    shift, atom = b.windows.positions - a.windows.positions, a.windows.atom
    moved = np.zeros((a.windows.crystal.n_atoms, 3))
    moved[atom] = shift
    np.testing.assert_allclose(moved[atom], shift, atol=1e-5)  # the same for all images
    assert moved[np.unique(atom)].std() == pytest.approx(0.1, rel=0.25)
    if encoding == "crystal":
        known = np.isin(a.pairs.src, atom) & np.isin(a.pairs.dst, atom)
        change = moved[a.pairs.dst] - moved[a.pairs.src]
        np.testing.assert_allclose((b.pairs.vector - a.pairs.vector)[known], change[known],
                                   atol=1e-5)  # fmt: skip
    else:  # pairs are those of the atoms where they are now
        again = find_pairs.__wrapped__(b.windows, config)
        np.testing.assert_array_equal(b.pairs.src, again.src)
        assert len(a.pairs.src) != len(b.pairs.src)


def test_atoms_are_displaced_in_training_only():
    config = replace(SMALL, noise=0.05)
    app = application("zeolite-n2")
    names = app.folds()[0].train[:1]
    assert crystals_of(app, names, config, training=True).noise == 0.05
    checked = crystals_of(replace(app, drawn=True), names, config, training=False)
    assert checked.noise == 0.0


def test_drawn_points_cover_the_cell_evenly():
    k = np.arange(4096)[:, None] * STRIDE % 1
    counts, _ = np.histogramdd(k, bins=8, range=[(0, 1)] * 3)
    assert counts.min() >= 4  # 8 on average; of independent points some boxes would have none
    assert counts.max() <= 14


def test_application_of_drawn_windows_from_training_to_summary(tmp_path, monkeypatch):
    """Zeolites in the place of a large database, killed between training and prediction."""
    zeolites = application("zeolite-n2")
    folds = [Fold(("SOD", "ABW", "ATN"), (("LTA",), ("CHA", "AFI")))]
    monkeypatch.setenv("X3MAT_DATA", str(zeolites.folder))
    source = {"file": "labels.csv", "name": "code", "columns": {"n2_g_L": "n2_g_L"}, "remedy": ""}
    app = replace(zeolites, name="many", drawn=True, ranges=("density",), source=source)
    monkeypatch.setitem(APPLICATIONS, "many", app)
    monkeypatch.setattr(type(app), "folds", lambda self: folds)
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    config = replace(SMALL, epochs=2)
    folders = {"models": tmp_path / "models", "runs": tmp_path / "states"}
    with monkeypatch.context() as patch:
        patch.setattr("x3mat.screening.PART", 1)
        results_of = iter([np.zeros(1)])  # of one crystal only
        patch.setattr("x3mat.screening.spread", lambda _: next(results_of))
        with pytest.raises(StopIteration):
            train_fold(app, 0, config, **folders, device="cpu", progress=False)
    model, about = load_checkpoint(tmp_path / "models" / "fold0-seed0.pt")
    assert set(about["domain"]) == {"species", "density"}
    (state,) = (tmp_path / "states" / "many" / "fold0-seed0").glob("predictions-*")
    (first,) = state.glob("*.parquet")
    known = read_results(state)
    assert known.file.tolist() == ["AFI"]  # the last half comes first
    known.assign(y0=7.0).to_parquet(first)
    record = train_fold(app, 0, config, **folders, device="cpu", progress=False)
    found = {p["name"]: p for p in record["predictions"]}
    assert [found[n]["half"] for n in ("LTA", "CHA", "AFI")] == [0, 1, 1]
    assert found["AFI"]["predicted"] == [7.0]
    windows = sample_windows(databases.iza("CHA"))
    assert found["CHA"]["predicted"] == pytest.approx(mean_contribution(model, windows).tolist())
    assert not any("label" in p for p in record["predictions"])
    summary = summarize(app)
    label = zeolites.labels().n2_g_L
    errors = [abs(found[n]["predicted"][0] - label[n]) for n in ("CHA", "AFI", "LTA")]
    assert summary["n_test"] == 2
    assert summary["test_mae"] == pytest.approx(np.mean(errors[:2]))
    assert summary["validation_mae"] == pytest.approx(errors[2])
    assert "label" not in pd.read_csv(tmp_path / "many" / "predictions.csv").columns


def test_summary_of_several_outputs(tmp_path, monkeypatch):
    app = application("mof-ch4n2")
    table = pd.DataFrame({"CH4": [1.0, 2.0, 3.0], "N2": [0.1, 0.3, 0.2]}, index=["a", "b", "c"])
    monkeypatch.setattr(type(app), "labels", lambda self: table)
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    for seed in (0, 1):
        record = {"fold": 0, "n_train": 5, "config": {}, "predictions": [
            {"name": name, "half": int(name != "a"), "predicted": [x + 0.5 * seed, y - 0.1]}
            for name, (x, y) in zip(table.index, table.to_numpy(), strict=True)]}
        results.write(tmp_path / app.name / "runs" / f"fold0-seed{seed}.json", record, seed=seed,
                      command="", wall_s=1.0)
    summary = summarize(app)
    assert summary["outputs"]["CH4"]["test_mae_of_each_seed"] == pytest.approx([0.0, 0.5])
    assert summary["outputs"]["N2"]["test_mae"] == pytest.approx(0.1)
    assert summary["test_mae"] == pytest.approx((0.25 + 0.1) / 2)
    assert summary["n_test"] == 2
    shown = pd.read_csv(tmp_path / app.name / "predictions.csv")
    assert shown.output.tolist() == ["CH4", "CH4", "N2", "N2"]
    assert "label" not in shown.columns


@pytest.mark.parametrize("targets", [TARGETS[:3], TARGETS * np.nan, TARGETS[:, 0]])
def test_bad_targets_are_refused(windows, tmp_path, targets):
    with pytest.raises(DataError, match="targets"):
        train(SMALL, CrystalWindows(windows, targets, SMALL.model),
              CrystalWindows(windows[:1], TARGETS[:1], SMALL.model), tmp_path)


def test_hyper_parameters_can_be_changed_by_name():
    config = train_config(application("zeolite-n2"), ["epochs=3", "model.cutoff=3.5"])
    assert config.epochs == 3
    assert config.model.cutoff == 3.5
    for bad in ("epoch=3", "model=3", "model.width=2", "epochs=many"):
        with pytest.raises(DataError, match=r"hyper-parameter|is not a"):
            train_config(application("zeolite-n2"), [bad])
    with pytest.raises(DataError, match="no such application"):
        application("zeolite-h2")


@pytest.mark.parametrize("app", FOLDED, ids=lambda app: app.name)
def test_every_crystal_is_tested_once_and_never_learned_from(app):
    folds, names = app.folds(), set(app.labels().index)
    assert sorted(name for fold in folds for name in fold.rest) == sorted(names)
    for fold in folds:
        assert set(fold.train) | set(fold.rest) == names
        assert not set(fold.train) & set(fold.rest)
        assert abs(len(fold.halves[0]) - len(fold.halves[1])) <= 1
        assert len(fold.train) == pytest.approx(0.8 * len(names), abs=1)


def test_fold_writes_checkpoint_and_record(tmp_path):
    app = application("zeolite-n2")
    config = replace(SMALL, epochs=1)
    record = train_fold(app, 1, config, models=tmp_path / "models", records=tmp_path / "records",
                        runs=tmp_path / "runs", limit=4, device="cpu", progress=False)
    assert record["n_train"] == 4
    assert len(record["predictions"]) == 8
    model, about = load_checkpoint(tmp_path / "models" / "fold1-seed0.pt")
    assert model.config == config.model
    assert about["train"] == list(app.folds()[1].train[:4])
    assert about["domain"]["species"] == [8, 14]
    first = record["predictions"][0]
    again = mean_contribution(model, sample_windows(app.crystal(first["name"])))
    assert first["predicted"] == pytest.approx(again.tolist())
    assert first["label"] == [pytest.approx(app.labels().loc[first["name"], "n2_g_L"])]


def test_copies_are_learned_from_with_their_originals_only():
    app = application("zeolite-n2")
    names, config = app.folds()[0].train[:3], replace(SMALL, copies=2)
    learned = crystals_of(app, names, config, training=True)
    copies = [f"{name}~{k}" for k in (1, 2) for name in names]
    assert list(learned.names) == [*names, *copies]
    table = pd.read_csv(app.folder / "strained.csv", index_col=0).n2_g_L
    assert learned.targets[3:, 0].tolist() == table[copies].tolist()
    assert learned.targets[:3, 0].tolist() == app.labels().n2_g_L[list(names)].tolist()
    assert learned[3].windows.crystal.name == copies[0]
    assert len(crystals_of(app, names, config, training=False)) == 3
    with pytest.raises(DataError, match="strained copies"):
        crystals_of(app, names, replace(config, copies=7), training=True)


def test_runs_side_by_side_are_those_one_by_one(tmp_path):
    plan = [(fold, replace(SMALL, epochs=1)) for fold in (0, 2)]
    found = []
    for jobs in (1, 2):
        folders = {k: tmp_path / str(jobs) / k for k in ("models", "records", "runs")}
        found.append(train_folds(application("zeolite-n2"), plan, jobs, **folders, limit=3,
                                 device="cpu", progress=False))
    for one, other in zip(*found, strict=True):
        assert one["fold"] == other["fold"]
        for a, b in zip(one["predictions"], other["predictions"], strict=True):
            assert a["name"] == b["name"]
            assert a["predicted"] == pytest.approx(b["predicted"], rel=1e-4)


def test_summaries_of_what_is_not_there(tmp_path, monkeypatch, capsys):
    assert main(["zeolite-n3"]) == 1
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    assert main(["zeolite-n2"]) == 1
    errors = capsys.readouterr().err
    assert "there is no such application" in errors
    assert "run x3mat train zeolite-n2" in errors


# ------------------------------------------------------------------------ committed results


@pytest.mark.parametrize("app", FOLDED, ids=lambda app: app.name)
def test_summary_follows_from_the_records(app, tmp_path, monkeypatch):
    folder = paths.results(app.name)
    stated = results.read_json(folder / "summary.json")
    (tmp_path / app.name / "runs").mkdir(parents=True)
    for path in (folder / "runs").glob("*.json"):
        (tmp_path / app.name / "runs" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    again = summarize(app)
    for key in ("test_mae", "test_r2", "interval", "n_test", "n_train", "seeds", "folds"):
        assert json.dumps(again[key]) == json.dumps(stated[key]), key
    table = pd.read_csv(folder / "predictions.csv", index_col=0)
    assert set(table.index) == set(app.labels().index)
    assert (table.predicted - table.label).abs().mean() == pytest.approx(
        stated["mae_of_mean_over_seeds"], abs=1e-3)


@pytest.mark.parametrize("app", FOLDED, ids=lambda app: app.name)
def test_shipped_models_give_the_recorded_predictions(app):
    models = sorted((paths.data() / "models" / app.name).glob("*.pt"))
    assert len(models) >= len(app.folds())
    for path in models:
        model, about = load_checkpoint(path)
        record = results.read_json(paths.results(app.name) / "runs" / f"{path.stem}.json")
        rest = {p["name"]: p["predicted"] for p in record["predictions"]}
        assert not set(rest) & set(about["train"])
        name = min(rest, key=lambda n: app.crystal(n).n_atoms)
        windows = sample_windows(app.crystal(name), model.config.radius, model.config.step)
        assert mean_contribution(model, windows).tolist() == pytest.approx(rest[name], rel=1e-3)


def test_what_the_chapter_says_of_the_zeolites():
    table = pd.read_csv(paths.results("zeolite-n2") / "predictions.csv", index_col=0)
    raspa3 = pd.read_csv(application("zeolite-n2").folder / "raspa3.csv", index_col=0)
    worst = (table.predicted - table.label).abs().nlargest(12).index
    cavity = pd.Series({code: describe(databases.iza(code)).largest_cavity for code in worst})
    narrow = cavity.index[cavity < 5]
    assert set(narrow) == {"PAR", "NPO", "RWR", "CDO", "CHI"}
    assert (table.predicted > table.label)[narrow].all()
    assert cavity.drop(narrow).between(5, 10).all()
    assert cavity.idxmax() == "UFI"
    assert (table.predicted < table.label)[["MTN", "AST", "UFI"]].all()
    assert table.predicted["SOD"] > table.label["SOD"]
    assert (table.label[["MTN", "AST", "SOD"]] > table.label.quantile(0.95)).all()
    assert raspa3.interrupted.sum() == 16
    assert set(raspa3.index) == set(table.index)


def test_what_the_chapter_says_of_labels_seeds_and_choices():
    folder = paths.results("zeolite-n2")
    summary = results.read_json(folder / "summary.json")
    before = results.read_json(folder / "raspa3-labels.json")
    first, today, last = (before["mae_of_mean_over_seeds"],
                          before["mae_of_mean_over_seeds_against_the_new_labels"],
                          summary["mae_of_mean_over_seeds"])
    assert (first - today) / (first - last) == pytest.approx(1 / 4, abs=0.05)
    assert max(summary["test_mae_of_each_seed"]) < 0.30
    label_error = application("zeolite-n2").labels().error_g_L.mean() * np.sqrt(2 / np.pi)
    assert label_error < 0.01
    coarse, fine = results.read_json(folder / "spacing.json")["rows"]
    assert (coarse["step_A"], fine["step_A"]) == (2.0, summary["config"]["model"]["step"])
    assert fine["mae_g_L"] == pytest.approx(summary["test_mae"])
    assert (np.array(fine["mae_of_halves_g_L"]) < coarse["mae_of_halves_g_L"]).all()
    rows = results.read_json(folder / "choices.json")["rows"]
    halves = [np.mean(row["mae_of_halves_g_L"], axis=0) for row in rows]
    assert halves[1][0] < halves[0][0]  # copies help on one half
    assert halves[1][1] > halves[0][1]  # and not on the other
    small, large = (np.array(rows[k]["mae_of_halves_g_L"][-1]) for k in (1, 3))
    assert (large < small).all()
    assert rows[3]["folds"] == [3]
    assert summary["config"]["model"]["l_max"] == 3
