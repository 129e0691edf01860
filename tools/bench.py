"""X(3)mat beside fairchem's UMA backbone: time, memory, FLOPs and bytes per window, in one run.

Both networks read the same windows: the same atoms and the same pairs of atoms that exchange
messages. Sizes are alike: l_max, m_max, channels, layers, width of the radial network (128), 64
radial functions, 64 channels in the feed-forward layers, fp32 storage, TF32 matrix products.

Windows
    random      40 atoms in a sphere of 6 Å, edges from the 20 nearest within 6 Å (16.6 per atom)
    zeolites    ten windows, R = 6 Å, of each of some IZA frameworks; pairs within 5 Å
    qmof        ten windows, R = 8 Å, of each of some QMOF crystals; pairs within 3.5 Å; needs
                X3MAT_DATA, and is measured only if asked for

As in training, X(3)mat is told which pairs of real windows recur (WindowGraph.kind).

Measured, each as the median of repeats after a warm-up, all in ms per window
    x3mat       forward, and forward + backward; operation by operation ("eager"), and on a GPU also
                replayed as a CUDA graph ("graph"), as the training does; on a GPU by the fused
                kernels of x3mat.kernels
    x3mat_plain the plain PyTorch layers on a GPU: same weights, same outputs
    x3mat_lean  the kernels on a quarter of the windows at a time, each computed again in the
                backward pass (x3mat.training.predict_mean, as where memory is short)
    x3mat+1     the same with one layer more. The last layer of X(3)mat computes only the nodes that
                are read out; this one has as many layers over all edges as the peer
    uma         forward, and forward + backward; at the end as a CUDA graph, too, where it can be
    uma_fast_*  UMA's backends for inference, forward only

For zeolites, iza_pass_s is what a pass over all IZA frameworks takes at these times: X(3)mat reads
one window of each orbit of its grid, the peer, which is not invariant under reflections, all
windows of the plain 2 Å grid (their numbers: data/results/grids.json).

peak_gib is the most memory that tensors took; for a CUDA graph it is all that the graph holds.
Counted are the FLOPs of matrix products and the bytes that operations and kernels read and write
if each runs by itself and touches each of its arrays once. One training step is profiled. The
result file is written anew after each measurement; what fails is recorded with its error, and
the rest goes on.

The peer is no dependency. Its backbone alone is imported, without fairchem's other requirements:

    pip install --no-deps fairchem-core==2.24.0

Examples
    python tools/bench.py                                    # all, on the GPU if there is one
    python tools/bench.py --device cpu --threads 2 --windows 4
    python tools/bench.py --l-max 4 --no-peer
    python tools/bench.py --l-max 6 2 --graphs zeolites qmof --seconds 150
    python tools/bench.py --quick --no-peer --out /tmp/quick.json
    x3mat bench --device cpu --json                          # the same; rows of the comparison

Writes data/results/bench/<name>.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.machinery
import importlib.util
import json
import math
import re
import shlex
import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from x3mat import databases, paths, results, sample_windows
from x3mat.applications import application
from x3mat.crystal import Crystal
from x3mat.model import WindowGraph, X3Mat, X3MatConfig, window_graph

PEER = "fairchem-core"
PEER_VERSION = "2.24.0"
RADIUS = 8.0  # Å; of the networks; of the random windows and those of zeolites: 6 Å
CUTOFF = 6.0  # Å; of both networks and of the random windows
EACH = 10  # windows of a crystal
# Dense TF32 TFLOP/s and GB/s by the makers' data sheets
CARDS = {"H100 PCIe": (378, 2000), "H100": (494.7, 3350), "H200": (494.7, 4800),
         "A100": (156, 2039)}  # fmt: skip
KINDS = {  # of kernels and operations, by their names; the first that fits
    "optimiser": r"adam|multi_tensor|foreach",
    "matrix products": r"gemm|cublas|cutlass|sm\d+_xmma|(add|b)?mm\b|splitk|gemv",
    "gather and scatter": r"index|gather|scatter",
    "copies and joins": r"copy|cat|memcpy|memset|fill|transpose",
    "sums and norms": r"reduce|norm|softmax|sum|mean",
    "element by element": r"elementwise|mul|add|sigmoid|silu|exp|pow|where",
}


# -------------------------------------------------------------------------------- windows


def random_windows(n: int, atoms: int, neighbours: int, seed: int, unique: int = 32) -> WindowGraph:
    """n random packings of atoms in a sphere, each atom with edges from its nearest neighbours.

    ``unique`` packings are drawn, the others are rotations of them with new species. The packings
    are those of the measurements that the goals were set by.
    """
    rng = torch.Generator().manual_seed(seed)
    packings = []
    for _ in range(min(unique, n)):
        positions, apart, tries = torch.empty(0, 3, dtype=torch.float64), 1.1, 0
        while len(positions) < atoms:
            point = (torch.rand(1, 3, generator=rng, dtype=torch.float64) * 2 - 1) * 6.0
            tries += 1
            if tries > 20000:
                apart, tries = 0.9 * apart, 0
            if point.norm() <= 6.0 and (
                len(positions) == 0 or torch.cdist(positions, point).min() > apart
            ):
                positions = torch.cat([positions, point])
        distances = torch.cdist(positions, positions)
        distances.fill_diagonal_(math.inf)
        near, src = distances.topk(min(neighbours, atoms - 1), largest=False)
        dst = torch.arange(atoms).repeat_interleave(src.shape[1])
        keep = near.flatten() < CUTOFF
        packings.append((positions, src.flatten()[keep], dst[keep]))
    elements = torch.tensor([1, 6, 7, 8, 30])
    positions, species, src, dst = [], [], [], []
    for w in range(n):
        packing, senders, receivers = packings[w % len(packings)]
        turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))
        turn[:, 0] *= torch.det(turn).sign()
        positions.append(packing @ turn.T)
        species.append(elements[torch.randint(len(elements), (atoms,), generator=rng)])
        src.append(senders + w * atoms)
        dst.append(receivers + w * atoms)
    window = torch.arange(n).repeat_interleave(atoms)
    return WindowGraph(torch.cat(positions).float(), torch.cat(species), window,
                       torch.cat(src), torch.cat(dst), n)  # fmt: skip


def crystal_windows(
    names: Sequence[str], read: Callable[[str], Crystal], radius: float, cutoff: float, n: int,
    seed: int,
) -> WindowGraph:
    """n windows, EACH of each crystal, both drawn at random; all grid points alike."""
    rng = np.random.default_rng(seed)
    positions, species = [], []
    for name in rng.choice(names, -(-n // EACH), replace=n > len(names)):
        windows = sample_windows(read(name), radius=radius)
        drawn = rng.choice(windows.n_orbits, EACH, p=windows.weights / windows.n_windows)
        for w in drawn[: n - len(species)]:
            atoms = slice(windows.ptr[w], windows.ptr[w + 1])
            positions.append(windows.positions[atoms])
            species.append(windows.species[atoms])
    ptr = np.concatenate([[0], np.cumsum([len(s) for s in species])])
    return window_graph(torch.as_tensor(np.concatenate(positions)).float(),
                        torch.as_tensor(np.concatenate(species)), torch.as_tensor(ptr),
                        cutoff, radius)  # fmt: skip


def first(graph: WindowGraph, n: int) -> WindowGraph:
    """The first n windows."""
    atoms = int((graph.window < n).sum())
    pairs = graph.dst < atoms
    some = WindowGraph(graph.positions[:atoms], graph.species[:atoms], graph.window[:atoms],
                       graph.src[pairs], graph.dst[pairs], min(n, graph.n_windows))  # fmt: skip
    return some if graph.kind is None else some.with_kinds()


def described(graph: WindowGraph) -> dict:
    n, atoms, pairs = graph.n_windows, len(graph.species), len(graph.src)
    kinds = {} if graph.first is None else {"kinds": len(graph.first)}
    return {"windows": n, "atoms": atoms, "edges": pairs, "atoms_per_window": atoms / n,
            "edges_per_atom": pairs / atoms, **kinds}  # fmt: skip


# ------------------------------------------------------------------------------- networks


def _packed(graph: WindowGraph) -> tuple[Tensor, ...]:
    return graph.positions, graph.species, graph.window, graph.src, graph.dst


class OurNetwork(nn.Module):
    """X(3)mat, from tensors, (W,)."""

    @staticmethod
    def pack(graph: WindowGraph) -> tuple[Tensor, ...]:
        return _packed(graph) + (() if graph.kind is None else (graph.kind, graph.first))

    def __init__(self, sizes: Sizes, l_max: int, way: str = "x3mat"):
        super().__init__()
        self.plain, self.lean, more_layers = way == "x3mat_plain", "lean" in way, int("+1" in way)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = X3Mat(X3MatConfig(
                l_max=l_max, m_max=min(sizes.m_max, l_max), channels=sizes.channels,
                heads=sizes.heads, layers=sizes.layers + more_layers, cutoff=CUTOFF, radius=RADIUS,
                radial_functions=sizes.radial_functions, radial_hidden=sizes.radial_hidden,
                feed_forward=sizes.channels,
            ))  # fmt: skip
        self.model.degree.copy_(torch.tensor([20.0, 10.0]))  # as in packed windows

    def forward(self, n_windows: int, *tensors: Tensor) -> Tensor:
        kinds = dict(zip(("kind", "first"), tensors[5:], strict=False))
        graph = WindowGraph(*tensors[:5], n_windows, **kinds)
        if self.plain:
            return self.model.plain_network(graph, self.model.plain_geometry(graph))[:, 0]
        if self.lean:
            from x3mat.training import predict_mean

            return predict_mean(self.model, as_batch(graph), len(graph.positions) // 4 + 1)[:, 0]
        return self.model.network(graph)[:, 0]


def as_batch(graph: WindowGraph):
    """A :class:`x3mat.training.Batch` of crystals of one window each."""
    from x3mat.training import Batch  # which takes long to import

    each = torch.arange(graph.n_windows + 1, device=graph.window.device)
    atoms = torch.searchsorted(graph.window, each)
    ptr = {"windows": each, "positions": atoms, "atoms": atoms,
           "pairs": torch.searchsorted(graph.dst, atoms)}  # fmt: skip
    one = torch.ones_like(each[1:], dtype=graph.positions.dtype)
    return Batch(graph.positions, graph.species, graph.window, graph.src, graph.dst, each[:-1], one,
                 torch.zeros_like(one)[:, None], {k: x.cpu().numpy() for k, x in ptr.items()},
                 kind=graph.kind, first=graph.first)  # fmt: skip


class PeerNetwork(nn.Module):
    """UMA's backbone with a head of two layers and the mean over a window's atoms, (W,)."""

    def __init__(self, backbone: type, sizes: Sizes, l_max: int, backend: str = "general"):
        super().__init__()
        c = sizes.channels
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = backbone(
                max_num_elements=100, sphere_channels=c, lmax=l_max, mmax=min(sizes.m_max, l_max),
                otf_graph=False, cutoff=CUTOFF, edge_channels=sizes.radial_hidden,
                num_distance_basis=sizes.radial_functions, direct_forces=True,
                regress_forces=False, num_layers=sizes.layers, hidden_channels=c,
                norm_type="rms_norm_sh", act_type="gate", ff_type="spectral",
                use_dataset_embedding=False, always_use_pbc=False, execution_mode=backend,
            )  # fmt: skip
            self.head = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1))
        self.eval()
        if backend != "general":
            self.backbone.backend.prepare_model_for_inference(self.backbone)

    @staticmethod
    def pack(graph: WindowGraph) -> tuple[Tensor, ...]:
        n = graph.n_windows
        zero = torch.zeros(n, dtype=torch.long, device=graph.src.device)
        return (*_packed(graph), torch.bincount(graph.window, minlength=n),
                torch.bincount(graph.window[graph.dst], minlength=n), zero,
                100 * torch.eye(3, device=zero.device).repeat(n, 1, 1),
                torch.zeros(len(graph.src), 3, device=zero.device))  # fmt: skip

    def forward(self, n_windows: int, *tensors: Tensor) -> Tensor:
        positions, species, window, src, dst, atoms, edges, zero, cell, offsets = tensors
        found = self.backbone(_Batch(
            pos=positions, atomic_numbers=species, batch=window, natoms=atoms, nedges=edges,
            edge_index=torch.stack([src, dst]), charge=zero, spin=zero, cell=cell,
            cell_offsets=offsets,
        ))["node_embedding"]  # fmt: skip
        values = self.head(found[:, 0])[:, 0]
        return values.new_zeros(n_windows).index_add_(0, window, values) / atoms.clamp(min=1)


class _Batch(dict):
    """Fairchem's batch, as far as its backbone uses it."""

    def get(self, key, default=None):
        return super().get(key, default)


class _Stub(types.ModuleType):
    """A module that stands for one of those which the backbone imports but does not use."""

    def __getattr__(self, name: str):
        if not name[0].isupper():  # then the import system asks for a module of this name
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Stubs:
    """Finder of stubs for the parts of fairchem outside of the models, and for omegaconf."""

    NAMES = ("omegaconf", *(f"fairchem.core.{name}" for name in (
        "common", "graph", "units", "datasets", "modules", "models.base")))  # fmt: skip

    def find_spec(self, name, path=None, target=None):
        if any(name == stub or name.startswith(f"{stub}.") for stub in self.NAMES):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        if module.__name__ == "fairchem.core.common.gp_utils":
            module.initialized = lambda: False  # no graph is spread over several GPUs
        if module.__name__ == "fairchem.core.common.registry":
            module.registry = types.SimpleNamespace(register_model=lambda name: lambda cls: cls)
        if module.__name__ == "fairchem.core.common.utils":
            module.conditional_grad = lambda context: lambda forward: forward


def load_peer() -> type:
    """UMA's backbone, without running the ``__init__`` of fairchem and what that requires."""
    name = "fairchem.core.models.uma.escn_md"
    if name not in sys.modules:
        spec = importlib.util.find_spec("fairchem.core")  # does not run it
        if spec is None:
            raise ImportError(f"{PEER} is not installed")
        core = types.ModuleType("fairchem.core")
        core.__path__ = list(spec.submodule_search_locations)
        sys.modules["fairchem.core"] = core
        stubs = _Stubs()
        sys.meta_path.insert(0, stubs)
        try:
            importlib.import_module(name)
        finally:
            sys.meta_path.remove(stubs)
    return sys.modules[name].eSCNMDBackbone


# ------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Sizes:
    """What both networks share."""

    channels: int = 64
    layers: int = 4
    m_max: int = 2
    heads: int = 8
    radial_functions: int = 64
    radial_hidden: int = 128


@dataclass
class Clock:
    """Median time of a call."""

    device: str
    warm_up: int
    repeats: int
    longest: float = 6.0  # s; fewer repeats, but at least three, if they take longer
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def name(self) -> str:
        """On one thread of a shared machine the time of the process is the steadier one."""
        return "process_time" if self.device == "cpu" and self.threads == 1 else "perf_counter"

    def __call__(self, call: Callable[[], object]) -> list[float]:
        """Seconds of each repeat, sorted."""
        now, seconds = getattr(time, self.name), []
        for _ in range(self.warm_up):
            call()
        self.wait()
        while len(seconds) < self.repeats and (len(seconds) < 3 or sum(seconds) < self.longest):
            begin = now()
            call()
            self.wait()
            seconds.append(now() - begin)
        return sorted(seconds)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def step(network: nn.Module, call: Callable[[], Tensor]) -> None:
    """Forward and backward."""
    network.zero_grad(set_to_none=True)
    (call().mean() - 1.0).square().backward()


def as_call(network: nn.Module, graph: WindowGraph, backward: bool, replay: bool) -> Callable:
    """A function without arguments that runs the network."""
    tensors, n = network.pack(graph), graph.n_windows
    if not replay:
        if backward:
            return lambda: step(network, lambda: network(n, *tensors))
        return lambda: _silent(network, n, tensors)
    if backward:  # as x3mat.training does
        captured = torch.cuda.make_graphed_callables(_OnTensors(network, n), tensors,
                                                     allow_unused_input=True)  # fmt: skip
        return lambda: step(network, lambda: captured(*tensors))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _silent(network, n, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        y = _silent(network, n, tensors)

    def call(y: Tensor = y) -> Tensor:
        cuda_graph.replay()
        return y

    return call


@torch.no_grad()
def _silent(network: nn.Module, n: int, tensors: tuple[Tensor, ...]) -> Tensor:
    return network(n, *tensors)


class _OnTensors(nn.Module):
    def __init__(self, network: nn.Module, n: int):
        super().__init__()
        self.network, self.n = network, n
        self.train(network.training)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.network(self.n, *tensors)


def clear() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(
    network: nn.Module, graph: WindowGraph, backward: bool, replay: bool, clock: Clock
) -> dict:
    """Time and memory of one way to run a network; half the windows if memory does not suffice."""
    gpu, graphs = clock.device != "cpu", [graph]
    while True:
        call = None
        clear()
        try:
            call = as_call(network, graphs[-1], backward, replay)
            y = _silent(network, graphs[-1].n_windows, network.pack(graphs[-1]))
            if not bool(torch.isfinite(y).all()):
                raise FloatingPointError("the network's output is not finite")
            found = {"windows": graphs[-1].n_windows}
            if replay:
                if not backward:
                    found["replay_deviation"] = float((call() - y).abs().max() / y.std())
                torch.cuda.empty_cache()
            seconds = clock(call)
            break
        except RuntimeError as error:
            if not _out_of_memory(error) or graphs[-1].n_windows < 8:
                raise
        graphs.append(first(graph, graphs[-1].n_windows // 2))
    n = found["windows"]
    found |= {"ms": 1e3 * statistics.median(seconds) / n, "ms_min": 1e3 * seconds[0] / n,
              "ms_max": 1e3 * seconds[-1] / n, "repeats": len(seconds)}  # fmt: skip
    if gpu:
        reserved = (torch.cuda.memory_reserved if replay else torch.cuda.max_memory_reserved)()
        peak = reserved if replay else torch.cuda.max_memory_allocated()
        found |= {"peak_gib": peak / 2**30, "reserved_gib": reserved / 2**30}
    if len(graphs) > 1:
        found["did_not_fit"] = [g.n_windows for g in graphs[:-1]]
    network.zero_grad(set_to_none=True)
    return found


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it followed from, is a lack of memory."""
    return error is not None and (
        isinstance(error, torch.OutOfMemoryError) or _out_of_memory(error.__context__)
    )


class ByteCounter(TorchDispatchMode):
    """Bytes that operations read and write: each input and output once for each operation.

    Views and empty tensors move nothing; what is changed in place is read and written. A tensor
    that repeats values (stride 0) counts by what it stores.
    """

    def __init__(self):
        super().__init__()
        self.total = 0
        self.by_operation: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, changes = func.overloadpacket.__name__, func._schema.is_mutable
        read, written = list(_tensors((args, kwargs or {}))), list(_tensors(out))
        stored = {x.untyped_storage().data_ptr() for x in read}
        if not changes:
            written = [x for x in written if x.untyped_storage().data_ptr() not in stored]
        if written and not re.match(r"(new_)?empty", name):
            moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                        for x in (*{id(x): x for x in read}.values(), *written))  # fmt: skip
            self.total += moved
            self.by_operation[name] += moved
        return out


@contextmanager
def launches(counter: ByteCounter) -> Iterator[None]:
    """Counts the arrays of Triton kernels, too: each once for each launch."""
    try:
        from triton.runtime import JITFunction
    except ImportError:
        yield
        return
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        arrays = {x.data_ptr(): x.numel() * x.element_size() for x in _tensors(args)}
        counter.total += sum(arrays.values())
        counter.by_operation[self.fn.__name__] += sum(arrays.values())
        return run(self, *args, **kwargs)

    JITFunction.run = counted
    try:
        yield
    finally:
        JITFunction.run = run


def _tensors(tree) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from _tensors(x)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def count(network: nn.Module, graph: WindowGraph, backward: bool) -> dict:
    """FLOPs of matrix products and bytes moved, per window."""
    call = as_call(network, graph, backward, replay=False)
    call()
    n = graph.n_windows
    with FlopCounterMode(display=False) as flops:
        call()
    with ByteCounter() as moved, launches(moved):
        call()
    of = {str(op).removeprefix("aten."): value / n / 1e9
          for op, value in flops.get_flop_counts()["Global"].items()}  # fmt: skip
    largest = sorted(moved.by_operation.items(), key=lambda item: -item[1])[:8]
    network.zero_grad(set_to_none=True)
    return {"gflop_per_window": flops.get_total_flops() / n / 1e9, "gflop_by_operation": of,
            "gb_per_window": moved.total / n / 1e9,
            "gb_by_operation": {name: value / n / 1e9 for name, value in largest}}  # fmt: skip


def limits(device: str, quick: bool) -> dict:
    """What the processor reaches in one large matrix product, and in one large copy."""
    n = 256 if quick else 2048 if device == "cpu" else 8192
    clock = Clock(device, 2, 5)
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    tflops = 2 * n**3 / statistics.median(clock(lambda: a @ b)) / 1e12
    source = torch.randn(2**16 if quick else 2**28 if device != "cpu" else 2**25, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    rate = moved / statistics.median(clock(lambda: target.copy_(source)))
    found = {"measured_tflops": tflops, "measured_gb_per_s": rate / 1e9}
    if device != "cpu":
        name = torch.cuda.get_device_name()
        for key, (peak, bandwidth) in CARDS.items():
            if all(word in name for word in key.split()):
                return found | {"card": key, "tf32_tflops": peak, "gb_per_s": bandwidth}
    return found


def occupied(events: Iterable) -> float:
    """Time in which at least one of a profile's kernels ran on the GPU, ms."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events
                   if e.device_type == torch.autograd.DeviceType.CUDA)  # fmt: skip
    total, until = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1e-3 * total


def profiled(network: nn.Module, graph: WindowGraph, replay: bool, clock: Clock) -> dict:
    """One training step, with AdamW: which kernels (on a CPU: operations) take the time."""
    gpu = clock.device != "cpu"
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=gpu)
    call = as_call(network, graph, backward=True, replay=replay)

    def train() -> None:
        call()
        optimizer.step()

    seconds = statistics.median(clock(train))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        train()
        clock.wait()
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    rows = [(e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e3)
            for e in profiler.key_averages()
            if e.device_type == kind and not getattr(e, "is_user_annotation", False)
            and not e.key.startswith(("Optimizer.", "ProfilerStep"))]  # fmt: skip
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(ms for _, _, ms in rows)
    groups: defaultdict[str, float] = defaultdict(float)
    for name, _, ms in rows:
        fitting = (k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        groups[next(fitting, "other")] += ms / total
    network.zero_grad(set_to_none=True)
    return {
        "windows": graph.n_windows, "step_ms": 1e3 * seconds, "kernels_ms": total,
        **({"busy": occupied(profiler.events()) / (1e3 * seconds)} if gpu else {}),
        "kernels": sum(n for _, n, _ in rows),
        "share_of_kind": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "top": [{"name": name[:160], "calls": n, "ms": ms, "share": ms / total}
                for name, n, ms in rows[:25]],
    }  # fmt: skip


# ----------------------------------------------------------------------------------- run


class Bench:
    """Measurements one after the other, each recorded at once."""

    def __init__(self, options: argparse.Namespace, argv: list[str]):
        self.options, self.argv, self.started = options, argv, time.perf_counter()
        gpu, quick = options.device != "cpu", options.quick
        self.sizes = Sizes(8, 2, 1, 2, 8, 8) if quick else Sizes(options.channels, options.layers)
        self.clock = Clock(options.device, *((1, 2) if quick else (3, 10) if gpu else (2, 5)))
        self.path = output_path(options)
        self.peer: type | None = None
        about = {"name": PEER, "measured": False}
        if options.no_peer:
            about["reason"] = "--no-peer"
        else:
            try:
                self.peer = load_peer()
                version = metadata.version(PEER)
                about |= {"measured": True, "version": version, "network": "eSCNMDBackbone (UMA)"}
                if version != PEER_VERSION:
                    about["reason"] = f"the comparison is meant with {PEER_VERSION}"
            except Exception as error:
                about["reason"] = f"not importable: {_text(error)}"
        self.payload = {
            "device": torch.cuda.get_device_name() if gpu else f"cpu, {self.clock.threads} threads",
            "sizes": vars(self.sizes) | {"fp32_precision": torch.get_float32_matmul_precision()},
            "clock": self.clock.name, "quick": quick, "peer": about, "graphs": {},
            "comparison": [], "measurements": [], "counts": [], "profiles": [], "skipped": [],
        }  # fmt: skip
        print(f"peer: {about}", flush=True)

    def run(self) -> None:
        l_max = self.options.l_max
        self._try("limits", {}, lambda: self.payload.update(
            limits=limits(self.options.device, self.options.quick)))  # fmt: skip
        self.graphs = {}
        for name in self.options.graphs:
            self._try("windows", {"graphs": name}, lambda name=name: self._windows(name))
        for number, l_ in enumerate(l_max):
            self._compare(l_, main=number == 0)
        if not self.options.quick:
            self._extra(l_max[0])
            if self.peer and 2 in l_max and self.options.device != "cpu":
                self._measure_all("uma_fast_gpu", 2, [(False, False)], "umas_fast_gpu")
            if self.peer and self.options.device != "cpu":  # may leave CUDA unusable: last
                self._measure_all("uma", l_max[0], [(False, True), (True, True)])
        self._write(complete=True)
        print(f"{self.path} after {self._elapsed():.0f} s", flush=True)

    def _windows(self, name: str) -> None:
        n, quick, seed = self.options.windows, self.options.quick, self.options.seed
        if name == "random":
            graph = random_windows(n, *((8, 4) if quick else (40, 20)), seed)
        elif name == "zeolites":
            graph = crystal_windows(databases.iza_codes(), databases.iza, 6.0, 5.0, n, seed)
        else:
            names = application("qmof-gap").labels().index
            graph = crystal_windows(names, databases.qmof, 8.0, 3.5, n, seed)
        self.payload["graphs"][name] = described(graph)
        self.graphs[name] = graph.to(self.options.device)

    def _compare(self, l_max: int, main: bool) -> None:
        ways = [(False, False), (True, False)]
        replayed = [(False, True), (True, True)] if self.options.device != "cpu" else []
        network = self._measure_all("x3mat", l_max, ways + replayed)
        if self.peer:  # first the comparison: counts and profiles take long
            peer = self._measure_all("uma", l_max, ways)
            self._measure_all("uma_fast_pytorch", l_max, ways[:1], "umas_fast_pytorch")
            self._count("uma", l_max, peer)
        self._count("x3mat", l_max, network)
        if main:
            self._profile("x3mat", l_max, network, (False, True) if replayed else (False,))

    def _count(self, model: str, l_max: int, network: nn.Module | None) -> None:
        for backward in (False, True) if network and self.graphs else ():
            about = {"model": model, "l_max": l_max, "pass": _pass(backward)}

            def call(about: dict = about, backward: bool = backward) -> None:
                graph = first(next(iter(self.graphs.values())), 4)
                self.payload["counts"].append(about | count(network, graph, backward))

            self._try("count", about, call)

    def _profile(
        self, model: str, l_max: int, network: nn.Module | None, modes: Iterable[bool]
    ) -> None:
        for replay in modes if network and self.graphs else ():
            about = {"model": model, "l_max": l_max, "mode": _mode(replay)}

            def call(about: dict = about, replay: bool = replay) -> None:
                graph = next(iter(self.graphs.values()))
                found = profiled(network, graph, replay, self.clock)
                self.payload["profiles"].append(about | found)

            self._try("profile", about, call)

    def _extra(self, l_max: int) -> None:
        replay = self.options.device != "cpu"
        self._measure_all("x3mat+1", l_max, [(False, replay), (True, replay)])
        if replay:
            self._measure_all("x3mat_lean", l_max, [(True, False)])
            network = self._measure_all("x3mat_plain", l_max, [(False, True), (True, True)])
            self._count("x3mat_plain", l_max, network)

    def _measure_all(
        self, model: str, l_max: int, ways: Iterable[tuple[bool, bool]], backend: str = "general"
    ) -> nn.Module | None:
        """Build a network and measure it on all kinds of windows; ways: (backward, replay)."""
        found = []

        def build() -> None:
            network = (OurNetwork(self.sizes, l_max, model)
                       if model.startswith("x3mat")
                       else PeerNetwork(self.peer, self.sizes, l_max, backend))  # fmt: skip
            found.append(network.to(self.options.device))

        self._try("build", {"model": model, "l_max": l_max}, build)
        for network in found:
            parameters = sum(p.numel() for p in network.parameters())
            for name, graph in self.graphs.items():
                for way in ways:
                    about = {"graphs": name, "model": model, "l_max": l_max,
                             "pass": _pass(way[0]), "mode": _mode(way[1]),
                             "parameters": parameters}  # fmt: skip

                    def call(about=about, way=way, network=network, graph=graph) -> None:
                        found = measure(network, graph, *way, self.clock)
                        self.payload["measurements"].append(about | found)

                    self._try("measure", about, call)
        return found[0] if found else None

    def _try(self, what: str, about: dict, call: Callable[[], object]) -> None:
        """Do something unless time is up; record an error; write what there is."""
        label = " ".join([what, *(str(v) for k, v in about.items() if k != "parameters")])
        if self._elapsed() > self.options.seconds:
            self.payload["skipped"].append({"what": what, **about, "error": "time is up"})
            print(f"{self._elapsed():6.1f} s  {label}: skipped", flush=True)
            return
        said = ""
        clear()
        try:
            call()
            done = self.payload["measurements"]
            if what == "measure":
                memory = f", {done[-1]['peak_gib']:.2f} GiB" if "peak_gib" in done[-1] else ""
                said = f"{done[-1]['ms']:.4f} ms per window{memory}"
        except Exception as error:
            self.payload["skipped"].append({"what": what, **about, "error": _text(error)})
            said = _text(error)[:300]
        print(f"{self._elapsed():6.1f} s  {label}: {said or 'done'}", flush=True)
        self._write()

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _write(self, complete: bool = False) -> None:
        self.payload["complete"] = complete
        self.payload["comparison"] = compare(self.payload, self.sizes)
        self.payload["counts"] = [reached(c, self.payload) for c in self.payload["counts"]]
        found = rounded(self.payload)
        if not complete:  # provenance takes longer than a measurement
            results.write_json(self.path, found)
            return
        results.write(self.path, found, seed=self.options.seed, wall_s=self._elapsed(),
                      command=shlex.join(["python", "tools/bench.py", *self.argv]))  # fmt: skip


def compare(payload: dict, sizes: Sizes) -> list[dict]:
    """One row for each kind of windows and l_max; ratios where both networks were measured.

    ``ms_*`` and ``peak_gib`` of X(3)mat are those of its faster mode, which is named;
    ``peer_ms_*`` and ``ratio_*`` belong to the peer's general backend as it is. The other ratios:
    ``_fast`` against the fastest of the peer's backends for inference, ``_graph`` against the peer
    as a CUDA graph, ``_one_layer_more`` of x3mat+1 against the peer.
    """
    done, rows = payload["measurements"], []
    for graphs, l_max in dict.fromkeys((m["graphs"], m["l_max"]) for m in done):
        row = {"peer": PEER if payload["peer"]["measured"] else None, "graphs": graphs,
               "lmax": l_max, "channels": sizes.channels, "layers": sizes.layers}  # fmt: skip
        for name in ("fwd", "fwd+bwd"):
            key = graphs, l_max, name
            here = [m for m in done if (m["graphs"], m["l_max"], m["pass"]) == key]
            row |= _compared(here, name.replace("+", "_"))
        rows.append(row | (iza_pass(row) if graphs == "zeolites" else {}))
    return rows


def iza_pass(row: dict) -> dict:
    """Seconds of one training pass over all IZA frameworks; see above."""
    grids = results.read("grids.json")["grids"]
    counts = {"": grids["auto"]["orbits"], "peer_": grids["plain"]["points"]}
    found = {f"{who}iza_pass_s": n * row[f"{who}ms_fwd_bwd"] / 1e3
             for who, n in counts.items() if f"{who}ms_fwd_bwd" in row}  # fmt: skip
    if len(found) == 2:
        found["ratio_iza_pass"] = found["peer_iza_pass_s"] / found["iza_pass_s"]
    return found


def _compared(measured: list[dict], name: str) -> dict:
    def get(model: str, mode: str = "") -> list[dict]:
        return [m for m in measured if m["model"] == model and m["mode"].startswith(mode)]

    def fastest(found: list[dict]) -> dict:
        return min(found, key=lambda m: m["ms"])

    row = {}
    if ours := get("x3mat"):
        best = fastest(ours)
        row |= {"windows": best["windows"], f"ms_{name}": best["ms"], f"mode_{name}": best["mode"]}
        row |= {f"ms_{name}_{m['mode']}": m["ms"] for m in ours}
    if peer := get("uma", "eager"):
        row |= {"peer_windows": peer[0]["windows"], f"peer_ms_{name}": peer[0]["ms"]}
    if more := get("x3mat+1"):
        row[f"ms_{name}_one_layer_more"] = fastest(more)["ms"]
    if graph := get("uma", "graph"):
        row[f"peer_ms_{name}_graph"] = graph[0]["ms"]
    for way in ("plain", "lean"):
        if found := get(f"x3mat_{way}"):
            row[f"ms_{name}_{way}"] = fastest(found)["ms"]
            if name == "fwd_bwd" and "peak_gib" in found[0]:
                row[f"peak_gib_{way}"] = min(m["peak_gib"] for m in found)
    fast = get("uma_fast_pytorch") + get("uma_fast_gpu")
    row |= {f"peer_ms_{name}_{m['model'].removeprefix('uma_')}": m["ms"] for m in fast}
    for label, a, b in (("", peer, ours), ("_fast", fast, ours), ("_graph", graph, ours),
                        ("_one_layer_more", peer, more)):  # fmt: skip
        if a and b:
            row[f"ratio_{name}{label}"] = fastest(a)["ms"] / fastest(b)["ms"]
    if name == "fwd_bwd":
        if ours and "peak_gib" in best:
            row |= {"peak_gib": best["peak_gib"],
                    **{f"peak_gib_{m['mode']}": m["peak_gib"] for m in ours}}  # fmt: skip
        if peer and "peak_gib" in peer[0]:
            row["peer_peak_gib"] = peer[0]["peak_gib"]
    return row


def reached(counted: dict, payload: dict) -> dict:
    """Adds to what was counted how much of the processor's limits the fastest run reaches."""
    graphs = next(iter(payload["graphs"]), None)  # what was counted
    times = [m["ms"] for m in payload["measurements"]
             if (m["graphs"], m["model"], m["l_max"], m["pass"])
             == (graphs, *(counted[k] for k in ("model", "l_max", "pass")))]  # fmt: skip
    if not times or "limits" not in payload:
        return counted
    seconds, peak = min(times) / 1e3, payload["limits"]
    tflops = counted["gflop_per_window"] / seconds / 1e3
    rate = counted["gb_per_window"] / seconds
    found = {"ms": min(times), "tflops": tflops, "gb_per_s": rate,
             "of_measured_tflops": tflops / peak["measured_tflops"],
             "of_measured_gb_per_s": rate / peak["measured_gb_per_s"]}  # fmt: skip
    if "tf32_tflops" in peak:
        found |= {"of_tf32_peak": tflops / peak["tf32_tflops"],
                  "of_bandwidth": rate / peak["gb_per_s"],
                  "ms_at_tf32_peak": counted["gflop_per_window"] / peak["tf32_tflops"],
                  "ms_at_bandwidth": counted["gb_per_window"] / peak["gb_per_s"] * 1e3}  # fmt: skip
    return counted | found


def output_path(options: argparse.Namespace) -> Path:
    """``--out`` if it ends in .json, else data/results/bench/<name>.json."""
    if options.out.endswith(".json"):
        return Path(options.out).absolute()
    name = "cpu"
    if options.device != "cpu":
        card = re.search(r"[A-Z]+\d+\w*", torch.cuda.get_device_name())
        name = card.group().lower() if card else "gpu"
    return paths.results(f"bench/{options.out or name}.json")


def rounded(value):
    """All numbers to five significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _mode(replay: bool) -> str:
    return "graph" if replay else "eager"


def _pass(backward: bool) -> str:
    return "fwd+bwd" if backward else "fwd"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


@contextmanager
def settings(options: argparse.Namespace) -> Iterator[None]:
    """TF32 on a GPU, and the number of threads, for the time of the run."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--l-max", type=int, nargs="+",
                        help="degrees; counts, profile and extras at the first (default 4 2 3 6)")
    parser.add_argument("--windows", type=int, help="default 100 on a GPU, 4 on a CPU")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--graphs", nargs="+", default=["random", "zeolites"],
                        choices=["random", "zeolites", "qmof"],
                        help="kinds of windows (default random zeolites)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch has it)")
    parser.add_argument("--no-peer", action="store_true", help="X(3)mat alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="begin no further measurement after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the windows")
    parser.add_argument("--json", action="store_true", help="print the rows of the comparison")
    parser.add_argument("--out", default="", help="name of the result (default: the device's), "
                        "or a path that ends in .json")  # fmt: skip
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    options.device = options.device or ("cuda" if gpu else "cpu")
    if options.device != "cpu" and not gpu:
        parser.error("there is no GPU that torch can use; give --device cpu")
    options.l_max = options.l_max or ([2] if options.quick else [4, 2, 3, 6])
    options.windows = options.windows or (3 if options.quick else 4 if not gpu
                                          or options.device == "cpu" else 100)  # fmt: skip
    with settings(options), redirect_stdout(sys.stderr) if options.json else nullcontext():
        bench = Bench(options, argv)
        bench.run()
    if options.json:
        print(json.dumps(rounded(bench.payload["comparison"]), indent=1))


if __name__ == "__main__":
    main()
