"""Training: a loss on the mean of contributions, with the exact gradient in bounded memory.

A crystal's prediction is Ŷ = Σ_w m_w y_w / Σ_w m_w over its windows with multiplicities m_w, and
only Ŷ has a label. The loss |Ŷ − Y| / s (s: standard deviation of the training targets; of several
outputs, means of both) reaches the windows through dL/dy_w = m_w / Σ m · dL/dŶ, one number for all
windows of a crystal. So windows are pushed through the network in chunks whose activations are
dropped and recomputed in the backward pass: memory is bounded by the chunk, the gradient is exact.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from scipy.spatial import cKDTree
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from x3mat import paths, results
from x3mat.applications import APPLICATIONS, Application
from x3mat.crystal import Crystal
from x3mat.descriptors import describe
from x3mat.errors import DataError, ModelError
from x3mat.model import WindowGraph, X3Mat, X3MatConfig, chunks, fitting_atoms, save_checkpoint
from x3mat.predict import Ensemble
from x3mat.sampling import STRIDE, Pairs, Windows, crystal_pairs, sample_windows, windows_at
from x3mat.screening import TRIAL_ATOMS, digest, for_each, processes, screen, side_by_side

EXAMPLES = 128  # batches whose sizes are captured
CAPTURED_ATOMS = 16_000  # larger batches keep a GPU busy without CUDA graphs, which take memory
#: Windows of each crystal in a validation on drawn windows, by what atoms hear.
CHECKED_WINDOWS = {"window": 8, "crystal": 32}
CPU_ATOMS = 5_000  # of windows in memory at a time, where nothing else is asked for

logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


@dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    model: X3MatConfig = field(default_factory=X3MatConfig)
    epochs: int = 100
    crystals_per_step: int = 8  # batch size, of all devices together
    windows_per_crystal: int = 24  # drawn in each step
    copies: int = 0  # under random strain of each training crystal, to learn from, too
    noise: float = 0.0  # standard deviation of random displacements of atoms in each step, Å
    learning_rate: float = 3e-3  # AdamW's peak rate
    weight_decay: float = 1e-3  # AdamW's
    clip: float = 10.0  # largest norm of the gradient
    warm_up: float = 0.05  # share of the steps in which the rate rises; then it falls as a cosine
    ema: float = 0.99  # decay per step of the exponential average of the weights, which is kept
    max_atoms: int = 0  # of windows in memory at a time; 0: as many as the device holds
    seed: int = 0  # of the weights, the order of crystals and the windows drawn


@dataclass(frozen=True)
class Batch:
    """Windows of several crystals and the crystals' targets.

    It can be cut into U units, windows or, where these share atoms, crystals. Of each kind of rows,
    ``ptr`` has the offsets of the units, (U + 1,)."""

    positions: Tensor  # (P, 3) Å
    species: Tensor  # (A,)
    window: Tensor  # (P,) window of each position
    src: Tensor  # (E,) atoms of each pair
    dst: Tensor  # (E,)
    crystal: Tensor  # (W,) crystal that each window belongs to
    share: Tensor  # (W,) m_w / Σ m; sums to 1 for each crystal
    target: Tensor  # (B, outputs)
    ptr: dict[str, np.ndarray]  # of the units among "windows", "positions", "atoms" and "pairs"
    atom: Tensor | None = None  # (P,) and
    vector: Tensor | None = None  # (E, 3) as in WindowGraph, where windows share atoms
    kind: Tensor | None = None  # (E,) and
    first: Tensor | None = None  # (K,) likewise, where they do not

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def to(self, device) -> Batch:  # Lightning calls it, too
        return replace(self, **{name: x.to(device) for name, x in self.tensors.items()})

    def graph(self, start: int = 0, stop: int = -1) -> WindowGraph:
        """The units start to stop."""
        part = {name: slice(ptr[start], ptr[stop]) for name, ptr in self.ptr.items()}
        positions, pairs, windows = part["positions"], part["pairs"], part["windows"]
        first = part["atoms"].start
        shared = () if self.atom is None else (self.atom[positions] - first, self.vector[pairs])
        graph = WindowGraph(self.positions[positions], self.species[part["atoms"]],
                            self.window[positions] - windows.start, self.src[pairs] - first,
                            self.dst[pairs] - first, int(windows.stop - windows.start), *shared)
        if self.kind is None or len(graph.src) == len(self.src):
            return replace(graph, kind=self.kind, first=self.first)
        return graph.with_kinds()


@dataclass(frozen=True)
class PackedBatch:
    """A batch in one piece of memory, which a loader's process hands over, a thread pins and a GPU
    is sent at once: for a dozen tensors one by one that takes longer than a step takes the GPU."""

    memory: Tensor  # bytes
    layout: dict[str, tuple[torch.dtype, torch.Size, int]]  # of each tensor, and its first byte
    ptr: dict[str, np.ndarray]  # as in Batch

    @classmethod
    def of(cls, batch: Batch) -> PackedBatch:
        layout, size = {}, 0
        for name, x in batch.tensors.items():
            layout[name] = x.dtype, x.shape, size
            size += -(-x.nbytes // 16) * 16  # kernels read 16 bytes at a time
        packed = cls(torch.empty(size, dtype=torch.uint8), layout, batch.ptr)
        for name, view in packed.to("cpu").tensors.items():
            view.copy_(getattr(batch, name))
        return packed

    def pin_memory(self) -> PackedBatch:  # a loader's thread calls it
        return replace(self, memory=self.memory.pin_memory())

    def to(self, device) -> Batch:
        memory = self.memory.to(device, non_blocking=True)
        return Batch(ptr=self.ptr, **{
            name: memory[a : a + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (dtype, shape, a) in self.layout.items()})


def predict_mean(model: X3Mat, batch: Batch, max_atoms: int) -> Tensor:
    """Ŷ of each crystal, (B, outputs), differentiable, with the memory of one chunk.

    Each chunk's activations are dropped and recomputed in the backward pass unless one chunk
    holds the whole batch."""
    parts = chunks(batch.ptr["positions"].tolist(), max_atoms)
    network = model.network
    if len(parts) > 1 and torch.is_grad_enabled():
        network = partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False)
    contributions = [network(batch.graph(a, b)) for a, b in parts]
    weighted = torch.cat(contributions) * batch.share[:, None]
    return torch.zeros_like(batch.target).index_add(0, batch.crystal, weighted)


class Flat(torch.nn.Module):
    """A network whose weights are parts of one vector, its only parameter with a gradient.

    What averages gradients over devices, clips them, steps and averages weights then launches one
    small kernel where it would launch a hundred, while the GPU waits."""

    def __init__(self, model: X3Mat):
        super().__init__()
        if len({(p.dtype, p.requires_grad) for p in model.parameters()}) > 1:
            raise ModelError(type(model).__name__, "some weights are frozen or of another type",
                             "give a network whose weights are all alike")
        self.model, self.config = model.requires_grad_(False), model.config
        self.vector = torch.nn.Parameter(parameters_to_vector(model.parameters()))
        self._apply(lambda x: x)

    def _apply(self, *args, **kwargs) -> Flat:  # Module's, which moves tensors one by one
        super()._apply(*args, **kwargs)
        vector_to_parameters(self.vector.data, self.model.parameters())
        return self

    def forward(self, graph: WindowGraph) -> Tensor:
        return self.model.network(graph)

    def network(self, graph: WindowGraph) -> Tensor:
        """:meth:`x3mat.model.X3Mat.network`, with a gradient of the vector."""
        parts = self.vector.split([p.numel() for p in self.model.parameters()])
        named = zip(parts, self.model.named_parameters(), strict=True)
        return functional_call(self, {f"model.{name}": x.view_as(p) for x, (name, p) in named},
                               (graph,))


class Replayed:
    """:func:`predict_mean` and its gradient on a GPU as CUDA graphs.

    Launching the thousand small kernels of a step takes longer than running them. A CUDA graph
    launches them all at once, but needs fixed shapes: batches are padded to one of a few sizes,
    each a quarter octave larger than the last. Padding has no weight, so results are the same.
    A graph can be captured only while no other gradient is pending, so that all sizes have to be
    named beforehand: that of each of the ``examples`` and one with room for all of them, and more;
    a larger batch takes the ordinary path. No batch has more ``crystals`` and ``windows``."""

    def __init__(self, model: X3Mat, crystals: int, windows: int, examples: Iterable[Batch]):
        self.model, self.crystals, self.windows = model, crystals, windows
        self.captured: dict[tuple[int, ...], Callable] = {}
        gc.collect()  # old graphs may not be deleted while one is captured
        pool = torch.cuda.graph_pool_handle()
        largest_first = sorted(examples, key=lambda b: -len(b.src))
        most = [6 * max(x) // 5 for x in zip(*map(self._least, largest_first), strict=True)]
        sizes = {self._size(most): b for b in largest_first[:1]}
        for size, batch in (sizes | {self._size(self._least(b)): b for b in largest_first}).items():
            self.captured[size] = torch.cuda.make_graphed_callables(
                PaddedMean(model, crystals), self._pad(batch, size), pool=pool)

    def __call__(self, batch: Batch) -> Tensor | None:
        """Ŷ of each crystal, (B, outputs), or None where no captured size is large enough."""
        least = self._least(batch)
        fitting = [size for size in self.captured
                   if all(a >= b for a, b in zip(size, least, strict=True))]
        if not fitting:
            return None
        size = min(fitting, key=sum)
        return self.captured[size](*self._pad(batch, size))[: len(batch.target)]

    @staticmethod
    def _least(batch: Batch) -> tuple[int, ...]:
        """Atoms, some of them padding that can share the added pairs, pairs, and positions where
        they are others than the atoms, else kinds of pairs, with some for the added ones."""
        atoms, pairs = 17 * len(batch.species) // 16 + 1, len(batch.src)
        more = len(batch.first) + pairs // 64 + 1 if batch.atom is None else len(batch.positions)
        return atoms, pairs, more

    @staticmethod
    def _size(least: Sequence[int]) -> tuple[int, ...]:
        return tuple(math.ceil(2 ** (math.ceil(4 * math.log2(n + 1)) / 4)) for n in least)

    def _pad(self, batch: Batch, size: tuple[int, ...]) -> tuple[Tensor, ...]:
        windows = self.windows + size[-1 if batch.atom is not None else 0] // 64 + 1
        return pad(batch, size, windows, self.model.config)


def pad(batch: Batch, size: tuple[int, ...], windows: int,
        config: X3MatConfig) -> tuple[Tensor, ...]:
    """The arguments of :class:`PaddedMean`: a batch with at least one atom and window more.

    Atoms are added on the surface of windows without a share, and pairs from these atoms to all:
    none has an effect. Both are spread evenly, since sums over a node's edges are made in a row.
    Where windows share atoms, the pairs are as long as the cutoff."""
    atoms, pairs, more = size
    positions = atoms if batch.atom is None else more

    def longer(x: Tensor, n: int, value: float) -> Tensor:
        return torch.cat([x, x.new_full((n - len(x), *x.shape[1:]), value)])

    def spread(x: Tensor, n: int, first: int, stop: int) -> Tensor:
        added = torch.arange(n - len(x), device=x.device)
        return torch.cat([x, first + added * (stop - first) // max(len(added), 1)])

    n_atoms = len(batch.species)
    dst, order = spread(batch.dst, pairs, 0, atoms).sort(stable=True)
    shared = ((spread(batch.kind, pairs, len(batch.first), more)[order],
               order.argsort()[longer(batch.first, more, 0)]) if batch.atom is None else
              (spread(batch.atom, positions, n_atoms, atoms),
               longer(batch.vector, pairs, config.cutoff)[order]))
    return (longer(batch.positions, positions, config.radius), longer(batch.species, atoms, 1),
            spread(batch.window, positions, len(batch.share), windows),
            spread(batch.src, pairs, n_atoms, atoms)[order], dst,
            longer(batch.crystal, windows, 0), longer(batch.share, windows, 0.0), *shared)


class PaddedMean(torch.nn.Module):
    """Weighted means of contributions from padded tensors, (crystals, outputs)."""

    def __init__(self, model: X3Mat, crystals: int):
        super().__init__()
        self.model, self.crystals = model, crystals

    def forward(self, positions, species, window, src, dst, crystal, share, *shared) -> Tensor:
        shared = shared if self.model.config.encoding == "crystal" else (None, None, *shared)
        graph = WindowGraph(positions, species, window, src, dst, len(share), *shared)
        weighted = self.model.network(graph) * share[:, None]
        out = weighted.new_zeros(self.crystals, weighted.shape[1])
        return out.index_add(0, crystal, weighted)


# ----------------------------------------------------------------------------------- data

class Item(NamedTuple):
    """Windows of a crystal."""

    windows: Windows
    pairs: Pairs
    share: np.ndarray  # their shares, which sum to 1
    target: np.ndarray  # (outputs,)


@lru_cache(maxsize=1024)
def find_pairs(windows: Windows, config: X3MatConfig) -> Pairs:
    """The pairs of :func:`x3mat.model.window_graph`, by a search tree, for many epochs; of
    :func:`x3mat.sampling.neighbours` where windows share atoms."""
    cutoff = config.cutoff
    if config.encoding == "crystal":
        return crystal_pairs(windows.crystal, cutoff)
    window = np.repeat(np.arange(windows.n_orbits), windows.atoms_per_window)
    apart = np.zeros((len(window), 3))
    apart[:, 0] = window * (2 * windows.radius + 2 * cutoff)
    found = cKDTree(windows.positions + apart).query_pairs(cutoff, output_type="ndarray")
    src, dst = np.concatenate([found, found[:, ::-1]]).T
    sends = (windows.positions**2).sum(1) < windows.radius**2
    src, dst = src[sends[src]], dst[sends[src]]
    order = np.lexsort((src, dst))
    src, dst = src[order], dst[order]
    ptr = np.concatenate([[0], np.cumsum(np.bincount(window[dst], minlength=windows.n_orbits))])
    first = windows.ptr[window[dst]]
    return Pairs(ptr, (src - first).astype(np.int32), (dst - first).astype(np.int32), None)


@dataclass(eq=False, repr=False)
class CrystalWindows(Dataset):
    """Windows of crystals with targets; item i gives all windows of crystal i."""

    windows: Sequence[Windows]
    targets: np.ndarray  # (n, outputs)
    config: X3MatConfig
    pairs: Sequence[Pairs] | None = None  # found if not given

    def __post_init__(self) -> None:
        self.pairs = self.pairs or [find_pairs(w, self.config) for w in self.windows]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Item:
        windows = self.windows[i]
        return Item(windows, self.pairs[i], windows.weights / windows.n_windows, self.targets[i])


@dataclass(eq=False, repr=False)
class DrawnWindows(Dataset):
    """Windows of crystals with targets; item (e, i): those of crystal i in epoch e; i: in epoch 0.

    They lie around ``windows_per_crystal`` points k, spread evenly over the cell:
    x_k = x_0 + k :data:`x3mat.sampling.STRIDE` mod 1. Then each atom, with all of its images, is
    displaced by ``noise`` Å (standard deviation of each coordinate). All depends on (seed, epoch,
    crystal) alone, so that a resumed run sees the same as an uninterrupted one."""

    names: Sequence[str]
    crystal: Callable[[str], Crystal]  # of a name
    targets: np.ndarray  # (n, outputs)
    config: X3MatConfig  # for radius, step and cutoff
    windows_per_crystal: int
    seed: int = 0
    noise: float = 0.0
    known: Sequence[tuple[Crystal, Pairs | None]] = ()  # read if not given, by several processes

    def __post_init__(self) -> None:
        if not self.known:  # the first fills the caches that the processes then share
            rest = for_each(self._read, self.names[1:])
            self.known = [*map(self._read, self.names[:1]), *rest]

    def _read(self, name: str) -> tuple[Crystal, Pairs | None]:
        crystal = self.crystal(name)
        shared = self.config.encoding == "crystal"
        return crystal, crystal_pairs(crystal, self.config.cutoff) if shared else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        epoch, i = item if isinstance(item, tuple) else (0, item)
        k = np.arange(self.windows_per_crystal)
        rng = np.random.default_rng([self.seed, epoch, i])
        centers = (rng.random(3) + k[:, None] * STRIDE) % 1.0
        crystal, pairs = self.known[i]
        windows = windows_at(crystal, centers, self.config.radius, self.config.step)
        if self.noise:
            moved = rng.normal(0, self.noise, (crystal.n_atoms, 3)).astype(np.float32)
            windows = replace(windows, positions=windows.positions + moved[windows.atom])
            pairs = pairs and pairs._replace(
                vector=pairs.vector + moved[pairs.dst] - moved[pairs.src])
        pairs = pairs or find_pairs.__wrapped__(windows, self.config)  # never asked for again
        return Item(windows, pairs, np.full(len(k), 1 / len(k)), self.targets[i])


def collate(items: Sequence[Item]) -> Batch:
    """Join the items of :class:`CrystalWindows` or :class:`DrawnWindows`."""
    shared = items[0].pairs.vector is not None
    arrays, sizes = defaultdict(list), defaultdict(list)  # rows of the batch; rows of each unit
    for k, (windows, pairs, share, target) in enumerate(items):
        n_rows, n_pairs = windows.atoms_per_window, np.diff(pairs.ptr)
        part = {"positions": windows.positions, "window": n_rows, "src": pairs.src,
                "dst": pairs.dst, "crystal": np.full(len(share), k), "share": share,
                "target": target[None]}
        if shared:  # the units are crystals
            part |= {"species": windows.crystal.species, "atom": windows.atom,
                     "vector": pairs.vector}
            units = [len(share)], [len(windows.atom)], [windows.crystal.n_atoms], n_pairs
        else:
            part["species"] = windows.species
            units = np.ones_like(n_rows), n_rows, n_rows, n_pairs
        for name, n in zip(("windows", "positions", "atoms", "pairs"), units, strict=True):
            sizes[name].append(n)
        for name, array in part.items():
            arrays[name].append(array)
    joined, counts = ({name: np.concatenate(parts) for name, parts in lists.items()}
                      for lists in (arrays, sizes))
    ptr = {name: np.concatenate([[0], np.cumsum(n)]) for name, n in counts.items()}
    joined["window"] = np.repeat(np.arange(len(joined["window"])), joined["window"])
    for name, of in (("src", "pairs"), ("dst", "pairs"), ("atom", "positions")):
        if name in joined:  # it counts from the first atom of its unit
            joined[name] = joined[name] + np.repeat(ptr["atoms"][:-1], counts[of])
    as_float = torch.get_default_dtype()
    batch = Batch(ptr=ptr, **{k: torch.as_tensor(v, dtype=as_float if v.dtype.kind == "f" else None)
                              for k, v in joined.items()})
    graph = batch.graph() if shared else batch.graph().with_kinds()
    return replace(batch, kind=graph.kind, first=graph.first)


# ------------------------------------------------------------------------------- learning

Crystals = CrystalWindows | DrawnWindows


@dataclass(frozen=True)
class Batches:
    """This device's items of each batch: every ``of``-th, or where none is left the first, which
    :class:`Learner` does not count."""

    orders: Callable[[], Iterable[Sequence]]  # of all n, in each epoch; asked for at the beginning
    n: int
    size: int
    rank: int
    of: int

    def __len__(self) -> int:
        return math.ceil(self.n / self.size)

    def __iter__(self) -> Iterator[Sequence]:
        for order in self.orders():
            for k in range(0, self.n, self.size):
                yield order[k : k + self.size][self.rank :: self.of] or [order[k]]


class Endless(DataLoader):
    """Goes on from epoch to epoch: while one ends, its processes make batches of the next."""

    def __iter__(self) -> Iterator[PackedBatch]:
        self.batches = getattr(self, "batches", None) or super().__iter__()
        return islice(self.batches, len(self))


class Learner(L.LightningModule):
    """X(3)mat with loss, optimiser and data, for Lightning's Trainer."""

    def __init__(self, config: TrainConfig, train: Crystals, validation: Crystals, jobs: int = 1,
                 network: Callable[[X3MatConfig], X3Mat] = X3Mat):
        super().__init__()
        self.config, self.jobs = config, jobs
        self.train_set, self.validation_set = train, validation
        self.weights = Flat(network(config.model))
        self.register_buffer("average", self.weights.vector.detach().clone())
        self.history: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._sums: dict[str, Tensor] = {}  # of the errors in this epoch, and how many
        self._replayed: Replayed | None = None
        self._max_atoms = config.max_atoms or CPU_ATOMS
        set_constants(self.model, train)

    @property
    def model(self) -> X3Mat:
        return self.weights.model

    def train_dataloader(self) -> DataLoader:
        # Lightning asks for it before it knows the epoch of a resumed run
        return self._loader(self.train_set, lambda: map(self._order, range(
            len(self.history), self.config.epochs)), Endless)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation_set, lambda: [range(len(self.validation_set))])

    def _order(self, epoch: int) -> Sequence:
        rng = np.random.default_rng([self.config.seed, epoch])
        order = rng.permutation(len(self.train_set)).tolist()
        return [(epoch, i) for i in order] if isinstance(self.train_set, DrawnWindows) else order

    def _loader(self, data: Crystals, orders: Callable[[], Iterable[Sequence]],
                kind: type[DataLoader] = DataLoader) -> DataLoader:
        batches = Batches(orders, len(data), self.config.crystals_per_step, self.global_rank,
                          self.trainer.world_size)
        work = isinstance(data, DrawnWindows)
        options = processes(len(data) * work, self.jobs * self.trainer.num_devices)
        return kind(data, batch_sampler=batches, pin_memory=self.device.type == "cuda",
                    persistent_workers=kind is Endless and bool(options),
                    collate_fn=lambda items: PackedBatch.of(collate(items)), **options)

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:  # Lightning's answer to SIGTERM waits for other processes
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and, in each step, for the GPU
            self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if self.device.type != "cuda":
            return
        torch.set_float32_matmul_precision("high")  # 10 bits of mantissa are enough for gradients
        crystals = math.ceil(self.config.crystals_per_step / self.trainer.world_size)
        loader = self._loader(self.train_set, lambda: map(self._order, count()))
        examples = [batch.to(self.device) for batch in islice(loader, EXAMPLES)]
        windows = crystals * self.config.windows_per_crystal
        self._replayed = Replayed(self.weights, crystals, windows,
                                  [b for b in examples if len(b.species) <= CAPTURED_ATOMS])
        trial = examples[0].graph(*chunks(examples[0].ptr["positions"].tolist(), TRIAL_ATOMS)[0])
        self._max_atoms = self.config.max_atoms or fitting_atoms(self.weights, trial, True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._mean_error("train_mae", batch, batch_idx, len(self.train_set))

    def on_train_batch_end(self, *_) -> None:
        """w̄ ← w̄ + (1 − d)(w − w̄), in step t with d = min(ema, (1 + t)/(10 + t)), so that the first
        weights are forgotten; Lightning's WeightAveraging has the host wait for the GPU."""
        t = self.global_step
        decay = min(self.config.ema, (1 + t) / (10 + t))
        self.average.lerp_(self.weights.vector.detach(), 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averaged weights in the place of the current ones, and the other way round."""
        current = self.weights.vector.clone()
        self.weights.vector.copy_(self.average)
        self.average.copy_(current)

    on_validation_start = on_validation_end = exchange

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._mean_error("val_mae", batch, batch_idx, len(self.validation_set))

    def _mean_error(self, name: str, batch: Batch, batch_idx: int, n: int) -> Tensor:
        """This device's share of |Ŷ − Y| / s in the mean over a batch, times the number of devices,
        over whose gradients DDP takes the mean. Errors are summed up under ``name``."""
        predicted = None
        if self._replayed is not None and torch.is_grad_enabled():
            predicted = self._replayed(batch)
        if predicted is None:
            predicted = predict_mean(self.weights, batch, self._max_atoms)
        size, of = self.config.crystals_per_step, self.trainer.world_size
        together = min(size, n - batch_idx * size)  # crystals in the batch
        counted = float(self.global_rank < together)
        error = (predicted - batch.target).abs() * counted
        sums = torch.stack([error.detach().sum(), torch.full_like(error, counted).sum()])
        self._sums[name] = self._sums.get(name, 0) + sums
        return error.mean(1).sum() * (of / together) / self.model.scale.mean()

    def on_train_epoch_end(self) -> None:
        sums = {k: self.trainer.strategy.reduce(v, reduce_op="sum") for k, v in self._sums.items()}
        means = {name: float(s[0] / s[1]) for name, s in sums.items()}
        self.log_dict(means, prog_bar=True)
        seconds = time.perf_counter() - self._began
        self.history.append({"epoch": self.current_epoch, "seconds": seconds, **means})
        self._sums = {}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["history"] = self.history
        checkpoint["seconds"] = time.perf_counter() - self._began  # with those before a kill

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = list(checkpoint["history"])
        self._began -= checkpoint["seconds"]

    def configure_optimizers(self) -> dict:
        c = self.config
        optimizer = torch.optim.AdamW([self.weights.vector], c.learning_rate,
                                      weight_decay=c.weight_decay, betas=(0.9, 0.98),
                                      fused=self.device.type == "cuda")
        steps = max(int(self.trainer.estimated_stepping_batches), 4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, c.learning_rate, steps, pct_start=min(max(c.warm_up, 2 / steps), 0.5),
            cycle_momentum=False, div_factor=20, final_div_factor=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def set_constants(model: X3Mat, train: Crystals) -> None:
    """Measure mean degree, and mean and spread of the target, on (at most 1,000 crystals of) the
    training set."""
    chosen = np.linspace(0, len(train) - 1, min(len(train), 1_000)).round().astype(int)
    with torch.no_grad():
        batches = [collate([train[i]]) for i in chosen]
        degrees = torch.stack([model.mean_degree(b.graph()) for b in batches])
        targets = torch.tensor(train.targets, dtype=model.shift.dtype)
        model.degree.copy_(degrees.mean(0).clamp(min=1e-3))
        model.shift.copy_(targets.mean(0))
        model.scale.copy_(targets.std(0).clamp(min=1e-6))


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how it was trained."""

    model: X3Mat  # on the device on which it was trained
    history: list[dict[str, float]]  # epoch, seconds, train_mae, and val_mae where validated
    wall_s: float


def train(config: TrainConfig, train_set: Crystals, validation_set: Crystals, folder: str | Path, *,
          device: str = "auto", devices: int = 1, check_every: int = 5, progress: bool = True,
          jobs: int = 1, callbacks: Sequence[L.Callback] = (),
          network: Callable[..., X3Mat] = X3Mat) -> TrainResult:
    """Train a model; resume if ``folder`` holds the checkpoint of an interrupted run.

    Parameters
    ----------
    config : TrainConfig
    train_set, validation_set : CrystalWindows or DrawnWindows; see :func:`crystals_of`
    folder : path; gets ``last.ckpt`` after each epoch
    device, devices : {"auto", "cpu", "cuda", ...}, int
        Lightning's accelerator, and how many share each batch (data parallelism: the same steps
        as on one, up to rounding). Under torchrun, its processes on all hosts.
    check_every : int; epochs between validations (with averaged weights)
    progress : bool; show a progress bar
    jobs : int; trainings that share the machine's processors
    callbacks : Lightning's, called in each epoch and step
    network : makes an untrained network of its configuration

    Raises a DataError if targets do not fit or are not finite, or the state is of another network.
    """
    for data in (train_set, validation_set):
        shape = (len(data), config.model.outputs)
        if np.shape(data.targets) != shape or not np.isfinite(data.targets).all() or not len(data):
            raise DataError("training set", f"targets are not finite numbers of shape {shape}",
                            "give one row of finite targets for each crystal")
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # of captured steps
        torch.manual_seed(config.seed)
        learner = Learner(config, train_set, validation_set, jobs, network)
        kept = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True,
                               enable_version_counter=False)
        hosts, start = 1, "spawn"
        if torch.distributed.is_torchelastic_launched():
            devices, start = int(os.environ["LOCAL_WORLD_SIZE"]), "popen"
            hosts = int(os.environ["WORLD_SIZE"]) // devices
        strategy = "auto" if devices == 1 == hosts else DDPStrategy(
            start_method=start, broadcast_buffers=False, gradient_as_bucket_view=True)
        trainer = L.Trainer(accelerator=device, devices=devices, max_epochs=config.epochs,
                            num_nodes=hosts, strategy=strategy, use_distributed_sampler=False,
                            gradient_clip_val=config.clip, check_val_every_n_epoch=min(check_every,
                            config.epochs), num_sanity_val_steps=0, callbacks=[kept, *callbacks],
                            logger=False, enable_progress_bar=progress, enable_model_summary=False)
        last = folder / "last.ckpt"
        device_used = trainer.strategy.root_device
        precision = torch.get_float32_matmul_precision()
        try:
            trainer.fit(learner, ckpt_path=last if last.exists() else None)
        except RuntimeError as error:
            if "loading state_dict" in str(error):
                raise DataError(last, "it is the state of a run with another network",
                                "delete it, or choose another folder of runs") from error
            raise
        finally:
            torch.set_float32_matmul_precision(precision)
        # a run that had already ended is not trained again and would keep unaveraged weights, and
        # of several processes this one may have trained nothing
        state = torch.load(last, map_location="cpu", weights_only=False)
        learner.load_state_dict(state["state_dict"])
        learner.exchange()
    model = learner.model.requires_grad_(True).to(device_used).eval()
    return TrainResult(model, state["history"], state["seconds"])


def crystals_of(application: Application, names: Sequence[str], config: TrainConfig,
                training: bool) -> Crystals:
    """An application's crystals with targets, windows drawn as for training or all of them.

    An application of thousands of crystals has its windows drawn for validation, too, always the
    same ``CHECKED_WINDOWS`` of each crystal."""
    table = application.labels()
    if training and config.copies:
        strained = application.copies(names, config.copies)
        names, table = [*names, *strained.index], pd.concat([table, strained])
    targets = table.loc[list(names), list(application.columns)].to_numpy(float)
    if application.drawn or training:
        number = config.windows_per_crystal if training else CHECKED_WINDOWS[config.model.encoding]
        crystal = partial(application.crystal, symprec=0.0)  # the points drawn have no orbits
        return DrawnWindows(names, crystal, targets, config.model, number, config.seed,
                            noise=config.noise * training)
    windows = [_windows(application.name, config.model.radius, config.model.step, name)
               for name in names]
    return CrystalWindows(windows, targets, config.model)


@lru_cache(maxsize=1024)  # runs that follow each other in one process share them
def _windows(application: str, radius: float, step: float, name: str) -> Windows:
    return sample_windows(APPLICATIONS[application].crystal(name), radius, step)


# --------------------------------------------------------------------------- applications

def train_config(application: Application, changes: Sequence[str] = ()) -> TrainConfig:
    """The application's hyper-parameters, with changes such as "epochs=10", "model.channels=8".

    >>> from x3mat.applications import application
    >>> train_config(application("zeolite-n2"), ["epochs=3", "model.l_max=4"]).model.l_max
    4
    """
    config = asdict(TrainConfig())
    known = application.hyper_parameters
    config = {**config, **known, "model": {**config["model"], **known.get("model", {})}}
    for change in changes:
        key, _, text = change.partition("=")
        group, name = (config["model"], key[6:]) if key.startswith("model.") else (config, key)
        if name not in group or name == "model":
            raise DataError(change, f"{key!r} is not a hyper-parameter",
                            f"choose from {sorted(set(config) - {'model'})} and model.*: "
                            f"{sorted(config['model'])}")
        try:
            group[name] = type(group[name])(text)
        except ValueError:
            raise DataError(change, f"{text!r} is not a {type(group[name]).__name__}",
                            f"give a number, for instance {key}={group[name]}") from None
    return TrainConfig(**{**config, "model": X3MatConfig(**config["model"])})


def train_fold(application: Application, fold: int, config: TrainConfig, *,
               models: Path | None = None, records: Path | None = None, runs: str | Path = "runs",
               limit: int | None = None, device: str = "auto", devices: int = 1,
               progress: bool = True, jobs: int = 1) -> dict:
    """Train on a fold of an application, predict its rest, write a checkpoint; the record of it.

    Under torchrun, all processes but the first only train and return an empty record.

    Parameters
    ----------
    models, records : path, optional
        Folders of the checkpoint ``fold{k}-seed{s}.pt`` and of the record ``fold{k}-seed{s}.json``
        (history, predictions of the rest, provenance); default ``data/models/<application>`` and
        ``data/results/<application>/runs``.
    runs : path
        Folder of resumable states; a finished run is not repeated unless its state is deleted.
    limit : int, optional
        Use only the first so many crystals of the training set and of each half (smoke runs).
    device, devices, progress, jobs : as for :func:`train`
    """
    split, labels = application.folds()[fold], application.labels()
    names = [part[:limit] for part in (split.train, *split.halves)]
    tag = f"fold{fold}-seed{config.seed}"
    tag_folder = Path(runs) / application.name / tag
    result = train(config, crystals_of(application, names[0], config, training=True),
                   crystals_of(application, names[1], config, training=False),
                   tag_folder, device=device, devices=devices, progress=progress, jobs=jobs)
    if int(os.environ.get("RANK", 0)) > 0:  # of torchrun's processes one writes
        return {}
    folder = models or paths.data() / "models" / application.name
    folder.mkdir(parents=True, exist_ok=True)
    about = description(application, fold, config, names[0])
    model = save_checkpoint(folder / f"{tag}.pt", result.model, about)
    rest = [*names[1], *names[2]]
    ensemble = Ensemble(application.name, (model.to(result.model.scale.device),), ({},))
    known = screen(rest[::-1], ensemble, tag_folder / f"predictions-{digest(ensemble)}",
                   read=application.crystal, progress=progress).set_index("file")
    if bad := sorted(set(known.error) - {""}):
        raise DataError(application.name, f"crystals of the rest cannot be predicted ({bad[0]})",
                        f"see the column error in {tag_folder}")
    found = known.loc[rest, [f"y{k}" for k in range(config.model.outputs)]].to_numpy()
    labels = labels.loc[rest, list(application.columns)].to_numpy(float)
    predictions = [{"name": name, "half": int(i >= len(names[1])), "predicted": p.tolist(),
                    **({"label": y.tolist()} if application.source is None else {})}
                   for i, (name, y, p) in enumerate(zip(rest, labels, found, strict=True))]
    record = {"application": application.name, "fold": fold, "n_train": len(names[0]),
              "rest_mae": float(np.abs(found - labels).mean()), "unit": application.unit,
              "config": asdict(config), "device": device, "history": result.history,
              "predictions": predictions}
    path = (records or paths.results(application.name) / "runs") / f"{tag}.json"
    return results.read_json(results.write(
        path.absolute(), record, seed=config.seed, wall_s=result.wall_s,
        command=f"x3mat train {application.name} --fold {fold} --seed {config.seed}"))


def description(application: Application, fold: int, config: TrainConfig,
                train: Sequence[str]) -> dict:
    """What a checkpoint says of itself."""
    data_hash = hashlib.sha256(application.labels().to_csv().encode()).hexdigest()
    return {"application": application.name, "property": application.property,
            "unit": application.unit, "conditions": application.conditions, "fold": fold,
            "columns": list(application.columns), "seed": config.seed, "train": list(train),
            "domain": _domain(application, train), "data_hash": data_hash,
            "training": asdict(config)}


def train_folds(application: Application, plan: Sequence[tuple[int, TrainConfig]], jobs: int = 1,
                **options) -> list[dict]:
    """Call :func:`train_fold` for several (fold, config), ``jobs`` at a time.

    Small networks leave most of a GPU, or of a processor with many cores, idle; several runs side
    by side fill it, and all GPUs. Returns the records in the order of ``plan``."""
    if jobs == 1:
        return [train_fold(application, fold, config, **options) for fold, config in plan]
    one = partial(train_fold, application, jobs=jobs, **{**options, "progress": False})
    return side_by_side(one, plan, jobs, options.get("devices", 1))


def _domain(application: Application, names: Sequence[str]) -> dict:
    """Elements and ranges of descriptors of the training crystals."""
    found = list(for_each(partial(_described, application.name), names))
    ranges = {key: [min(values), max(values)] for key in application.ranges
              if (values := [d[key] for _, d in found])}
    return {"species": sorted(set().union(*(species for species, _ in found))), **ranges}


@lru_cache(maxsize=1024)
def _described(application: str, name: str) -> tuple[frozenset[int], dict[str, float]]:
    crystal, ranges = APPLICATIONS[application].crystal(name), APPLICATIONS[application].ranges
    found = crystal if ranges == ("density",) else describe(crystal)  # which looks for pores
    return (frozenset(np.unique(crystal.species).tolist()),
            {key: float(getattr(found, key)) for key in ranges})
