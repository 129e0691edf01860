"""X(3)mat: an equivariant graph transformer that gives each window a scalar contribution.

Conventions
-----------
Features have the shape ``(nodes, (l_max + 1)², channels)``: degree l has 2l + 1 rows in e3nn's
order (m = −l..l, polar axis y) and natural parity (−1)^l, so that they transform under a rotation
or reflection Q as x → D(Q) x with D(−1) = (−1)^l. Letters in shapes: W windows, A atoms,
N = W + A nodes, E edges, L = l_max, M = m_max, C channels, H heads, S = (L + 1)² rows,
T = rows with \\|m\\| ≤ M.

The first W nodes are *probes*, one at the centre of each window; they hear every atom of the
window and nothing hears them. The contribution is read from the probe, so that an empty window
has one too. The other nodes are the atoms. All weights of edges vanish smoothly at the cutoff and
at the surface of the window: the contribution is a smooth function of the window's centre.

Atoms hear other atoms of their window only (``encoding`` "window", as in the paper), or all their
neighbours in the crystal ("crystal"). In the first case each window has atoms of its own; in the
second all windows of a crystal share its atoms, whose features are computed once, and what a
window tells depends on atoms up to layers · cutoff outside of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from x3mat.errors import ModelError
from x3mat.sampling import neighbours

MAX_SPECIES = 100
PLATEAU = 0.8  # of a cutoff; up to there edges have full weight
UNDIRECTED = 0.5  # Å; below this distance edges lose their direction
COPIES = 16  # pairs of one kind at most, so that a GPU has many sums of a few to make


@dataclass(frozen=True)
class X3MatConfig:
    """Hyper-parameters of :class:`X3Mat` and of the windows that it reads."""

    l_max: int = 2  # largest degree of the features
    m_max: int = 2  # largest order kept in the edge frame, m_max ≤ l_max
    channels: int = 32  # of each degree
    heads: int = 4  # of the attention; divides channels
    layers: int = 2  # transformer blocks
    cutoff: float = 4.0  # Å; atoms closer than this are joined by an edge
    radius: float = 6.0  # of the windows, Å
    step: float = 2.0  # largest spacing of the grid of windows, Å
    radial_functions: int = 32  # Gaussians in the radial basis
    radial_hidden: int = 32  # width of the radial network
    feed_forward: int = 64  # channels inside the feed-forward layers
    outputs: int = 1  # properties predicted together
    encoding: str = "window"  # what atoms hear: their "window" or the whole "crystal"

    def __post_init__(self):
        problems = [f"{f.name} = {getattr(self, f.name)}" for f in fields(self) if f.name not in
                    ("l_max", "m_max", "encoding") and not getattr(self, f.name) > 0]
        if self.encoding not in ("window", "crystal"):
            problems.append(f"encoding = {self.encoding!r} is not \"window\" or \"crystal\"")
        if not 0 <= self.m_max <= self.l_max:
            problems.append(f"m_max = {self.m_max} is not between 0 and l_max = {self.l_max}")
        if not problems and self.channels % self.heads:
            problems.append(f"{self.heads} heads do not divide {self.channels} channels")
        if problems:
            raise ModelError("X3MatConfig", "; ".join(problems), "give usable hyper-parameters")


# ------------------------------------------------------------------------------- geometry


def edge_frames(vectors: Tensor) -> Tensor:
    """Rotations R, (E, 3, 3), that turn each vector, (E, 3), onto +y: R r = \\|r\\| e_y.

    The roll about r is fixed by the Cartesian axis least aligned with r. Any roll serves, since
    the layers in the edge frame are equivariant under rotation about y and reflection.

    >>> R = edge_frames(torch.tensor([[0.0, 0.0, 2.0]]))
    >>> (R @ torch.tensor([0.0, 0.0, 2.0])).tolist()
    [[0.0, 2.0, 0.0]]
    """
    y = nn.functional.normalize(vectors, dim=-1)
    axis = torch.arange(3, device=y.device)
    helper = (y.abs().argmin(dim=-1, keepdim=True) == axis).to(y)
    x = nn.functional.normalize(torch.linalg.cross(helper, y), dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-2)


class WignerMatrices(nn.Module):
    """Wigner matrices of rotations, in e3nn's convention, from spherical harmonics.

    Y_l(R x) = D_l(R) Y_l(x) holds for every x, so D_l(R)ᵀ = Y_l(X)⁺ Y_l(X Rᵀ) for any set X of
    well-spread points; ⁺ is the pseudo-inverse, computed once in float64. Rows with \\|m\\| > M are
    dropped, the others are sorted by \\|m\\| (m = 0, then +1, −1, +2, −2, ...; within each by l).

    Output: (E, T, S) for rotations (E, 3, 3)."""

    def __init__(self, l_max: int, m_max: int):
        super().__init__()
        self.l_max = l_max
        i = torch.arange(4 * l_max + 2, dtype=torch.float64) + 0.5  # Fibonacci sphere
        z, phi = 1 - 2 * i / len(i), math.pi * (1 + math.sqrt(5)) * i
        s = torch.sqrt(1 - z**2)
        points = torch.stack([s * torch.cos(phi), z, s * torch.sin(phi)], dim=-1)
        self.register_buffer("points", points, persistent=False)
        rows = m_major_rows(l_max, m_max)
        inverse = torch.zeros(rows.numel(), len(i), dtype=torch.float64)
        degree = torch.tensor([math.isqrt(k) for k in range((l_max + 1) ** 2)])
        for l_ in range(l_max + 1):
            values = spherical_harmonics(points, l_max)[:, degree == l_]
            block = torch.linalg.pinv(values)  # (2l + 1, P)
            keep = degree[rows] == l_
            inverse[keep] = block[rows[keep] - l_ * l_]
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("same_l", degree[rows][:, None] == degree[None, :], persistent=False)

    def forward(self, rotations: Tensor) -> Tensor:
        # D(R) = D(Rᵀ)ᵀ: the points are turned back, so that the pseudo-inverse gives rows of D.
        turned = self.points.to(rotations) @ rotations  # (E, P, 3) = X Rᵀ for R → Rᵀ
        harmonics = spherical_harmonics(turned, self.l_max)  # (E, P, S)
        return (self.inverse.to(rotations) @ harmonics) * self.same_l


def m_major_rows(l_max: int, m_max: int) -> Tensor:
    """Rows of the l-major layout, (T,), sorted as the SO(2) layers read them.

    >>> m_major_rows(2, 1).tolist()  # m = 0 of l = 0, 1, 2; m = +1 of l = 1, 2; m = −1
    [0, 2, 6, 3, 7, 1, 5]
    """
    order = [0] + [m for k in range(1, m_max + 1) for m in (k, -k)]
    return torch.tensor([l_ * (l_ + 1) + m for m in order for l_ in range(abs(m), l_max + 1)])


def spherical_harmonics(vectors: Tensor, l_max: int) -> Tensor:
    """Real solid harmonics r^l Y_lm, (..., (l_max + 1)²), of vectors (..., 3), as e3nn has them.

    On the unit sphere Σ_m Y_lm² = 2l + 1. With the polar axis y and (z + i x)^m = C_m + i S_m,

        Y_lm = N_lm Π_lm C_m, Y_l−m = N_lm Π_lm S_m, N_lm² = (2l + 1)(2 − δ_m0)(l − m)!/(l + m)!

    where Π_mm = (2m − 1)!!, (l + 1 − m) Π_{l+1,m} = (2l + 1) y Π_lm − (l + m) r² Π_{l−1,m}. Written
    out because importing e3nn takes longer than a prediction.

    >>> from e3nn import o3
    >>> x = torch.tensor([[0.3, -1.2, 0.5]])
    >>> expected = o3.spherical_harmonics(list(range(5)), x, False, normalization="component")
    >>> torch.allclose(spherical_harmonics(x, 4), expected, rtol=1e-5, atol=1e-5)
    True
    """
    x, y, z = vectors.unbind(-1)
    square = vectors.square().sum(-1)
    rows: list[list[Tensor]] = [[y] * (2 * l_ + 1) for l_ in range(l_max + 1)]
    cosine, sine = torch.ones_like(y), torch.zeros_like(y)
    for m in range(l_max + 1):
        before, legendre = torch.zeros_like(y), torch.full_like(y, math.prod(range(1, 2 * m, 2)))
        for l_ in range(m, l_max + 1):
            ratio = math.factorial(l_ - m) / math.factorial(l_ + m)
            scaled = math.sqrt((2 * l_ + 1) * (2 if m else 1) * ratio) * legendre
            rows[l_][l_ - m] = scaled * sine
            rows[l_][l_ + m] = scaled * cosine
            after = ((2 * l_ + 1) * y * legendre - (l_ + m) * square * before) / (l_ + 1 - m)
            before, legendre = legendre, after
        cosine, sine = z * cosine - x * sine, x * cosine + z * sine
    return torch.stack([value for row in rows for value in row], dim=-1)


def envelope(x: Tensor) -> Tensor:
    """Smooth cutoff u(x) of x = distance / cutoff: 1 up to x = 0.8, 0 from x = 1.

    u = 1 − t³ (10 − 15 t + 6 t²) with t = (x − 0.8) / 0.2 between; u, u' and u'' are continuous.
    Flat over most of its range, so that atoms well inside count in full."""
    t = ((x - PLATEAU) / (1 - PLATEAU)).clamp(0, 1)
    return 1 - t**3 * (10 - t * (15 - 6 * t))


@dataclass(frozen=True)
class WindowGraph:
    """Windows with the pairs of atoms that exchange messages; what the network reads.

    Every shape in the network follows from those here. What stands in a window is sorted by
    window, pairs by dst. In a window stand P = A atoms or, where windows share the atoms of a
    crystal, P images of A atoms. Atoms that no window needs (padding) sit on the surface, where
    edges have no weight."""

    positions: Tensor  # (P, 3) relative to the window's centre, Å
    species: Tensor  # (A,)
    window: Tensor  # (P,) window of each position
    src: Tensor  # (E,) sending and
    dst: Tensor  # (E,) receiving atom of each pair
    n_windows: int
    atom: Tensor | None = None  # (P,) atom at each position, where windows share atoms
    vector: Tensor | None = None  # (E, 3) from src to dst, Å, likewise
    kind: Tensor | None = None  # (E,) of each pair, where pairs that recur are told, and
    first: Tensor | None = None  # (K,) a pair of each kind
    told: Tensor | None = None  # (W, ...) as Windows.told

    def to(self, device) -> WindowGraph:
        """The graph on a device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()
                                if isinstance(x, Tensor)})

    def with_kinds(self) -> WindowGraph:
        """The graph with kinds: pairs of one distance, but for rounding, between like elements.

        Pairs recur in some hundred windows, and by symmetry; radial weights are made once for each.
        """
        distance = (self.positions[self.dst] - self.positions[self.src]).norm(dim=-1)
        key = (distance / (128 * torch.finfo(distance.dtype).eps)).round().long()
        for species in (self.species[self.src], self.species[self.dst]):
            key = key * (MAX_SPECIES + 1) + species
        key, order = key.sort(stable=True)
        new = key.diff(prepend=key[:1] - 1) != 0
        place = torch.arange(len(key), device=key.device)
        new |= (place - (place * new).cummax(0).values) % COPIES == 0
        first, begun = order[new].sort()  # by place, so that what is near in memory comes together
        kind = torch.empty_like(key).scatter_(0, order, begun.argsort()[new.cumsum(0) - 1])
        return replace(self, kind=kind, first=first)

    def apart(self) -> tuple[WindowGraph, WindowGraph]:
        """Shared atoms with their pairs, without windows; and the windows without pairs."""
        alone = replace(self, positions=self.positions[:0], window=self.window[:0],
                        atom=self.atom[:0], n_windows=0)
        return alone, replace(self, src=self.src[:0], dst=self.dst[:0], vector=self.vector[:0])


def window_graph(positions: Tensor, species: Tensor, ptr: Tensor, cutoff: float,
                 radius: float) -> WindowGraph:
    """The graph of windows in the layout of :class:`x3mat.Windows`: all pairs within ``cutoff``.

    Parameters
    ----------
    positions : (A, 3); Relative to the window's centre, Å.
    species : (A,) int64; Atomic numbers.
    ptr : (W + 1,) int64; Offsets of the windows.
    cutoff, radius : float
        Å. Atoms on the window's surface, whose edges have no weight, send nothing.

    Pairs are sorted by dst."""
    counts = ptr.diff()
    window = torch.arange(len(counts), device=ptr.device).repeat_interleave(counts)
    partners = counts[window]  # candidates of each atom: all atoms of its window
    dst = torch.arange(len(window), device=ptr.device).repeat_interleave(partners)
    first = partners.cumsum(0) - partners
    src = torch.arange(len(dst), device=ptr.device) + (ptr[window] - first)[dst]
    near = (positions[dst] - positions[src]).square().sum(-1) < cutoff**2
    near &= (src != dst) & (positions.square().sum(-1) < radius**2)[src]
    graph = WindowGraph(positions, species, window, src[near], dst[near], len(counts))
    return graph if positions.requires_grad else graph.with_kinds()


# --------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Edges:
    """Directed edges src → dst between nodes, and what the layers read of them."""

    src: Tensor  # (E,)
    dst: Tensor  # (E,)
    vector: Tensor  # (E, 3) from src to dst, Å
    weight: Tensor  # (E,) smooth, in [0, 1]
    basis: Tensor  # (K, radial functions) of each kind of edges, whose distances and elements agree
    first: Tensor | slice  # (K,) an edge of each kind
    kind: Tensor | None  # (E,) of each edge; None: each is of its own
    element: Tensor  # (N, elements) of the nodes, one-hot

    def probes(self, n: int) -> Edges:
        """The first n edges, to probes; each is of its own kind."""
        parts = (x[:n] for x in (self.src, self.dst, self.vector, self.weight, self.basis))
        return Edges(*parts, slice(None), None, self.element)


class SphericalLinear(nn.Module):
    """y_lm = W_l x_lm (+ b for l = 0), one matrix W_l per degree: (N, rows, in) → (N, rows, out).

    The only linear maps of the channels that commute with rotations (Schur's lemma). The rows are
    those of the degrees l_min to l_max."""

    def __init__(self, l_max: int, inputs: int, outputs: int, l_min: int = 0):
        super().__init__()
        weight = torch.empty(l_max + 1 - l_min, inputs, outputs)
        self.weight = nn.Parameter(nn.init.normal_(weight, std=math.sqrt(2 / inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if l_min == 0 else None
        self.rows = [2 * l_ + 1 for l_ in range(l_min, l_max + 1)]

    def forward(self, x: Tensor) -> Tensor:
        parts = [rows @ w for rows, w in zip(x.split(self.rows, dim=1), self.weight, strict=True)]
        if self.bias is not None:
            parts[0] = parts[0] + self.bias
        return torch.cat(parts, dim=1)


class SphericalLayerNorm(nn.Module):
    """Equivariant layer norm: LayerNorm for l = 0, one common r.m.s. for all l > 0.

    x_lm ← γ_l x_lm / √(mean over l > 0 of mean over m, c of x² + ε). Source: EquiformerV2
    (``layer_norm_sh``): each degree has the same weight in the mean. There ε = 1e-5. At a point of
    high symmetry all x_lm with 0 < l ≤ l_max vanish, and rounding errors, enlarged by 1/√ε = 316
    in each of several norms, would become as large as features: hence the larger ε."""

    def __init__(self, l_max: int, channels: int, eps: float = 1e-2):
        super().__init__()
        self.l_max, self.eps = l_max, eps
        self.scalars = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.ones(l_max, channels)) if l_max else None
        degree = torch.tensor([math.isqrt(k) for k in range(1, (l_max + 1) ** 2)], dtype=torch.long)
        self.register_buffer("degree", degree - 1, persistent=False)
        self.register_buffer("share", 1.0 / ((2 * degree + 1) * max(l_max, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scalars = self.scalars(x[:, :1])
        if self.gamma is None:
            return scalars
        rest = x[:, 1:]
        mean = (rest.square().mean(dim=-1) * self.share.to(x)).sum(dim=-1)
        rest = rest * (mean + self.eps).rsqrt()[:, None, None] * self.gamma[self.degree]
        return torch.cat([scalars, rest], dim=1)


def split_orders(x: Tensor, l_max: int, m_max: int) -> list[Tensor]:
    """Rows (E, T, C), sorted by \\|m\\|, as one block per m ≥ 0: (E, 1, L + 1, C) for m = 0 and
    (E, 2, L + 1 − m, C) for +m and −m."""
    sizes = [(1 if m == 0 else 2) * (l_max + 1 - m) for m in range(m_max + 1)]
    return [part.unflatten(1, (1 if m == 0 else 2, -1))
            for m, part in enumerate(x.split(sizes, dim=1))]


def join_orders(blocks: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`split_orders`."""
    return torch.cat([block.flatten(1, 2) for block in blocks], dim=1)


class SO2Convolution(nn.Module):
    """Linear map of features in the edge frame that commutes with O(2) about the edge.

    For m = 0: y_0 = W_0 x_0 + b. For m > 0: y_±m = W_m x_±m, the cosine half W1 of eSCN's
    SO(2) convolution; its sine half W2 (y_m = −W2 x_−m, y_−m = W2 x_m) couples features of opposite
    parity and would break inversion symmetry. W mixes degrees and channels. Source: eSCN
    (Passaro & Zitnick 2023), Eq. 8, restricted to O(3).

    Input: one block per m ≥ 0, (E, 1 or 2, rows_in[m], channels), see :func:`split_orders`.
    Output: blocks (E, 1 or 2, rows_out[m], channels), and ``extra`` scalars (E, extra)."""

    def __init__(self, rows_in: Sequence[int], rows_out: Sequence[int], channels: int,
                 extra: int = 0):
        super().__init__()
        self.rows_out, self.channels, self.extra = rows_out, channels, extra
        self.linear = nn.ModuleList(nn.Linear(a * channels, b * channels + (0 if m else extra),
                                    bias=m == 0) for m, (a, b) in enumerate(zip(rows_in, rows_out,
                                    strict=True)))

    def forward(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        out = [linear(x.flatten(2)) for linear, x in zip(self.linear, blocks, strict=True)]
        out[0], extra = out[0].split([out[0].shape[-1] - self.extra, self.extra], dim=-1)
        return [y.unflatten(-1, (rows, self.channels))
                for y, rows in zip(out, self.rows_out, strict=True)], extra[:, 0]


class RadialNetwork(nn.Module):
    """Network of the distance and of the elements at both ends: edges → (E, outputs)."""

    def __init__(self, config: X3MatConfig, outputs: int):
        super().__init__()
        hidden = config.radial_hidden
        self.distance = nn.Linear(config.radial_functions, hidden)
        self.sender = nn.Parameter(torch.empty(MAX_SPECIES + 1, hidden).uniform_(-1e-3, 1e-3))
        self.receiver = nn.Parameter(torch.empty(MAX_SPECIES + 1, hidden).uniform_(-1e-3, 1e-3))
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                  nn.Linear(hidden, outputs))

    def forward(self, edges: Edges) -> Tensor:
        x = self.distance(edges.basis)
        sender, receiver = edges.src[edges.first], edges.dst[edges.first]
        x = x + (edges.element @ self.sender).index_select(0, sender)
        x = self.rest(x + (edges.element @ self.receiver).index_select(0, receiver))
        return x if edges.kind is None else x.index_select(0, edges.kind)


class Attention(nn.Module):
    """Equivariant graph attention with eSCN messages (EquiformerV2, Sec. 4 and Fig. 1b).

    The message from j to i is computed in the frame of the edge, where +y points along it:

        m_ij = D_ij (A x_j + B x_i) ⊙ radial(r_ij, Z_j, Z_i)
        h_ij, s_ij = SO2(m_ij);   v_ij = SO2(gate(h_ij))
        z_ij = a_h · LeakyReLU(LayerNorm(s_ij)) for each head h
        α_ij = u_ij e^{z_ij} / (1 + Σ_k u_ik e^{z_ik})
        out_i = P Σ_j α_ij D_ijᵀ v_ij

    The logit z is bounded by its normalisation; u is the smooth weight of the edge.
    The 1 in the denominator makes a lone neighbour fade out smoothly, too."""

    LOGIT_CHANNELS = 16

    def __init__(self, config: X3MatConfig, l_out: int):
        super().__init__()
        l_max, c = config.l_max, config.channels
        self.l_max, self.l_out, self.heads = l_max, l_out, config.heads
        self.m_max = min(config.m_max, l_out)  # larger orders would not reach the output
        rows = [l_max + 1 - m for m in range(self.m_max + 1)]  # of each m ≥ 0
        self.sizes = rows
        self.n_logits = self.heads * self.LOGIT_CHANNELS
        self.of_sender = SphericalLinear(l_max, c, c)
        self.of_receiver = SphericalLinear(l_max, c, c)
        self.radial = RadialNetwork(config, sum(rows) * c)
        extra = (1 + l_max) * c + self.n_logits
        self.first = SO2Convolution(rows, [l_max, *rows[1:]], c, extra)
        self.second = SO2Convolution(rows, [l_out + 1 - m for m in range(self.m_max + 1)], c)
        self.logit_norm = nn.LayerNorm(self.LOGIT_CHANNELS)
        logit = torch.empty(self.heads, self.LOGIT_CHANNELS).uniform_(-0.25, 0.25)
        self.logit = nn.Parameter(logit)
        self.project = SphericalLinear(l_out, c, c)
        kept = m_major_rows(l_max, self.m_max)
        back = torch.nonzero(kept < (l_out + 1) ** 2).squeeze(-1)
        self.register_buffer("back", back, persistent=False)

    def forward(self, sender: Tensor, receiver: Tensor, edges: Edges, wigner: Tensor) -> Tensor:
        channels = sender.shape[-1]
        wigner = wigner[:, : sum((2 if m else 1) * n for m, n in enumerate(self.sizes))]
        x = self.of_sender(sender).index_select(0, edges.src)
        x = x + self.of_receiver(receiver).index_select(0, edges.dst)
        x = split_orders(wigner @ x, self.l_max, self.m_max)
        radial = self.radial(edges).unflatten(1, (-1, channels)).split(self.sizes, dim=1)
        x, extra = self.first([a * b[:, None] for a, b in zip(x, radial, strict=True)])
        scalars, gates, logits = extra.split([channels, self.l_max * channels, self.n_logits],
                                             dim=1)
        gates = torch.sigmoid(gates).unflatten(1, (self.l_max, channels))[:, None]
        x[0] = torch.cat([nn.functional.silu(scalars)[:, None, None], x[0] * gates], dim=2)
        value, _ = self.second([x[0], *(b * gates[:, :, m:] for m, b in enumerate(x[1:]))])
        z = nn.functional.leaky_relu(self.logit_norm(logits.unflatten(1, (self.heads, -1))), 0.2)
        weight = torch.exp((z * self.logit).sum(-1)) * edges.weight[:, None]  # (E, H)
        total = weight.new_ones(len(receiver), self.heads).index_add(0, edges.dst, weight)
        alpha = weight / total.index_select(0, edges.dst)
        alpha = alpha.repeat_interleave(channels // self.heads, dim=1)
        message = join_orders(value) * alpha[:, None, :]
        rows_out = (self.l_out + 1) ** 2
        if self.l_out:  # the scalar row of D is 1
            message = wigner[:, self.back, :rows_out].transpose(1, 2) @ message
        out = message.new_zeros(len(receiver), rows_out, channels)
        return self.project(out.index_add(0, edges.dst, message))


class FeedForward(nn.Module):
    """SphericalLinear → gate → SphericalLinear, node by node: (N, S, C) → (N, S, C).

    The gate multiplies each degree l > 0 by sigmoid(g_l): exactly equivariant, since each degree is
    multiplied by an invariant number. The scalars inside are SiLU(s). s and g are linear in the
    scalars of the input."""

    def __init__(self, config: X3MatConfig, l_max: int):
        super().__init__()
        c, inner = config.channels, config.feed_forward
        self.rows = [2 * l_ + 1 for l_ in range(1, l_max + 1)]
        self.expand = SphericalLinear(l_max, c, inner, l_min=1) if l_max else None
        self.gates = nn.Linear(c, (1 + l_max) * inner)
        self.contract = SphericalLinear(l_max, inner, c)

    def forward(self, x: Tensor) -> Tensor:
        scalars, *gates = self.gates(x[:, 0]).chunk(1 + len(self.rows), dim=1)
        inner = [nn.functional.silu(scalars)[:, None]]
        if self.expand is not None:
            parts = self.expand(x[:, 1:]).split(self.rows, dim=1)
            inner += [part * torch.sigmoid(g)[:, None]
                      for part, g in zip(parts, gates, strict=True)]
        return self.contract(torch.cat(inner, dim=1))


class Block(nn.Module):
    """Pre-norm transformer block: x ← x + attention(norm x); x ← x + feed_forward(norm x).

    Output: the degrees up to l_out, (N, (l_out + 1)², C)."""

    def __init__(self, config: X3MatConfig, l_out: int):
        super().__init__()
        self.norm_attention = SphericalLayerNorm(config.l_max, config.channels)
        self.attention = Attention(config, l_out)
        self.norm_feed_forward = SphericalLayerNorm(l_out, config.channels)
        self.feed_forward = FeedForward(config, l_out)

    def forward(self, x: Tensor, receivers: slice, edges: Edges, wigner: Tensor) -> Tensor:
        """New features of the nodes ``receivers``, the first ones."""
        h = self.norm_attention(x)
        update = self.attention(h, h[receivers], edges, wigner)
        x = x[receivers, : update.shape[1]] + update
        return x + self.feed_forward(self.norm_feed_forward(x))


class X3Mat(nn.Module):
    """Contribution y of each window to the property; a crystal's property is their mean.

    Attributes
    ----------
    degree : (2,) buffer; Mean sum of edge weights at a probe and at an atom of the training set.
    shift, scale : (outputs,) buffers
        Mean and standard deviation of the training targets; y = shift + scale · network.

    Examples
    --------
    >>> from x3mat import databases, sample_windows
    >>> model = X3Mat(X3MatConfig(channels=8, heads=2))
    >>> windows = sample_windows(databases.iza("SOD"))
    >>> model.contributions(windows).shape == (windows.n_orbits, 1)
    True
    """

    def __init__(self, config: X3MatConfig):
        super().__init__()
        self.config = config
        l_max, c = config.l_max, config.channels
        self.embedding = nn.Parameter(torch.empty(MAX_SPECIES + 1, c))  # 0 is the probe
        self.degree_embedding = RadialNetwork(config, (l_max + 1) * c)
        self.wigner = WignerMatrices(l_max, config.m_max)
        # Only scalars of the probes are read out, so that is all that the last block computes.
        self.blocks = nn.ModuleList(Block(config, l_max if k + 1 < config.layers else 0)
                                    for k in range(config.layers))
        self.norm = nn.LayerNorm(c)
        self.head = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, config.outputs))
        centers = torch.linspace(0, max(config.cutoff, config.radius), config.radial_functions)
        self.register_buffer("centers", centers, persistent=False)
        degrees = torch.tensor([math.isqrt(k) for k in range((l_max + 1) ** 2)])
        self.register_buffer("degree_of_row", degrees, persistent=False)
        self.register_buffer("degree", torch.ones(2))
        self.register_buffer("shift", torch.zeros(config.outputs))
        self.register_buffer("scale", torch.ones(config.outputs))
        self._initialize()

    def _initialize(self) -> None:
        """He initialisation: normal weights of variance 2 / inputs (as in SphericalLinear).

        Smaller ones, such as PyTorch's default, shrink the signal in each of the ten or so layers
        between atoms and contribution, until all windows look alike and training stands still."""
        nn.init.normal_(self.embedding, std=0.3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_features))

    def forward(self, positions: Tensor, species: Tensor, ptr: Tensor) -> Tensor:
        """Contributions, (W, outputs), of windows in the layout of :class:`x3mat.Windows`.

        Parameters
        ----------
        positions : (A, 3); Relative to the window's centre, Å.
        species : (A,) int64; Atomic numbers.
        ptr : (W + 1,) int64; Offsets of the windows.
        """
        return self.network(window_graph(positions, species, ptr, self.config.cutoff,
                            self.config.radius))

    def geometry(self, graph: WindowGraph) -> tuple:
        """What :meth:`network` reads of a graph and does not depend on the weights."""
        fast = self._kernels(graph.positions)
        return fast.geometry(self, graph) if fast else self.plain_geometry(graph)

    def plain_geometry(self, graph: WindowGraph) -> tuple[Edges, Tensor]:
        """Edges and their Wigner matrices, (E, T, S)."""
        edges = self._edges(graph)
        directed = self._directed(edges.vector)[:, None, :]
        return edges, self.wigner(edge_frames(edges.vector)) * directed

    def network(self, graph: WindowGraph, geometry: tuple | None = None) -> Tensor:
        """Contributions, (W, outputs): by fused kernels where they can run, else the plain layers.

        ``geometry``, from another model of the same configuration, saves computing it again."""
        geometry, fast = geometry or self.geometry(graph), self._kernels(graph.positions)
        return (fast.network if fast else X3Mat.plain_network)(self, graph, geometry)

    def _kernels(self, positions: Tensor):
        """:mod:`x3mat.kernels` where it can stand in for the plain layers. Imported when needed,
        since Triton takes long to import."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not (positions.is_cuda or interpreted) or not find_spec("triton"):
            return None
        from x3mat import kernels
        return kernels if kernels.usable(self, positions) else None

    def plain_network(self, graph: WindowGraph, geometry: tuple[Edges, Tensor]) -> Tensor:
        """:meth:`network` by the layers of this module, on any device: the reference."""
        edges, wigner = geometry
        n_windows, n_probe = graph.n_windows, len(graph.positions)  # edges to probes come first
        x = self._embed(edges, n_windows)
        for block in self.blocks[:-1]:
            x = block(x, slice(None), edges, wigner)
        x = self.blocks[-1](x, slice(n_windows), edges.probes(n_probe), wigner[:n_probe])
        return self.readout(x[:, 0], graph.told)

    def readout(self, scalars: Tensor, told: Tensor | None) -> Tensor:
        """Contributions, (W, outputs), from the probes' scalars, (W, C); some networks use more."""
        return self.shift + self.scale * self.head(self.norm(scalars))

    def encode(self, geometry: tuple[Edges, Tensor]) -> list[Tensor]:
        """Features of shared atoms before each block, from a graph without windows."""
        features = [self._embed(geometry[0], 0)]
        for block in self.blocks[:-1]:
            features.append(block(features[-1], slice(None), *geometry))
        return features

    def read(self, graph: WindowGraph, geometry: tuple, atoms: list[Tensor]) -> Tensor:
        """:meth:`plain_network` of windows, without pairs, whose atoms are encoded already."""
        x = self._embed(geometry[0], graph.n_windows)[: graph.n_windows]
        for block, encoded in zip(self.blocks, atoms, strict=True):
            x = block(torch.cat([x, encoded]), slice(graph.n_windows), *geometry)
        return self.readout(x[:, 0], graph.told)

    def _edges(self, graph: WindowGraph) -> Edges:
        """Edges from each atom to the probe of its window, then the pairs.

        Weight of a pair: u(r_ij / cutoff) w_i, where w_i = u(\\|r_i\\| / radius) belongs to the
        sender: an atom fades out of the graph before it leaves the window. To a probe: w_i. Where
        windows share atoms, pairs have the weight u(r_ij / cutoff)."""
        positions, src, dst, n_windows = graph.positions, graph.src, graph.dst, graph.n_windows
        inside = envelope(positions.norm(dim=-1) / self.config.radius)
        between, atoms = graph.vector, graph.atom
        if atoms is None:
            between = positions.index_select(0, dst) - positions.index_select(0, src)
            atoms = torch.arange(len(positions), device=positions.device)
        vector = torch.cat([-positions, between])
        distance = vector.norm(dim=-1)
        near = envelope(distance[len(positions) :] / self.config.cutoff)
        if graph.atom is None:
            near = near * inside.index_select(0, src)
        spacing = self.centers[1] - self.centers[0] if len(self.centers) > 1 else self.centers[0]
        nodes = torch.cat([graph.species.new_zeros(n_windows), graph.species])
        element = nodes[:, None] == torch.arange(MAX_SPECIES + 1, device=positions.device)
        src, dst = torch.cat([atoms, src]) + n_windows, torch.cat([graph.window, dst + n_windows])
        kind, first, own = None, slice(None), torch.arange(len(positions), device=src.device)
        if graph.kind is not None:
            kind, first = (torch.cat([own, x + len(own)]) for x in (graph.kind, graph.first))
        basis = torch.exp(-0.5 * ((distance[first, None] - self.centers) / spacing) ** 2)
        weight = torch.cat([inside, near])
        return Edges(src, dst, vector, weight, basis, first, kind, element.to(vector))

    def _embed(self, edges: Edges, n_windows: int) -> Tensor:
        """Element embedding plus Σ_j u_ij radial_l(r_ij) Y_l(r_ij) / mean degree: (N, S, C)."""
        c, n = self.config.channels, len(edges.element)
        radial = self.degree_embedding(edges).split(c, dim=1)
        direction = nn.functional.normalize(edges.vector, dim=-1)
        harmonics = spherical_harmonics(direction, self.config.l_max)
        harmonics = harmonics * self._directed(edges.vector) * self.share(edges, n_windows)[:, None]
        parts = [harmonics[:, l_ * l_ : (l_ + 1) ** 2, None] * radial_l[:, None]
                 for l_, radial_l in enumerate(radial)]
        scalars = (edges.element @ self.embedding)[:, None]
        x = torch.cat([scalars, scalars.new_zeros(n, len(self.degree_of_row) - 1, c)], dim=1)
        return x.index_add(0, edges.dst, torch.cat(parts, dim=1))

    def share(self, edges: Edges, n_windows: int) -> Tensor:
        """u_ij / mean degree, (E,)."""
        return edges.weight / torch.where(edges.dst < n_windows, self.degree[0], self.degree[1])

    def _directed(self, vectors: Tensor) -> Tensor:
        """Factor of each row, (E, S): 1 for l = 0, else 1 − u(r / 0.5 Å).

        An atom that passes through the probe has no direction there; so that the contribution
        stays continuous, its message is a scalar at r = 0."""
        directed = 1 - envelope(vectors.norm(dim=-1, keepdim=True) / UNDIRECTED)
        return torch.where(self.degree_of_row > 0, directed, torch.ones_like(directed))

    @torch.no_grad()
    def mean_degree(self, graph: WindowGraph) -> Tensor:
        """Mean sum of edge weights at a probe and at an atom, (2,); see :attr:`degree`."""
        to_probes, pairs = self._edges(graph).weight.tensor_split([len(graph.positions)])
        return torch.stack([to_probes.sum() / max(graph.n_windows, 1),
                            pairs.sum() / max(len(graph.species), 1)])

    def contributions(self, windows, max_atoms: int = 20_000) -> Tensor:
        """Contributions, (W, outputs), of all windows of a crystal, in chunks of bounded memory."""
        return contributions((self,), [windows], max_atoms)[0]


def contributions(models: Sequence[X3Mat], every: Sequence, max_atoms: int,
                  apply: Callable[..., Iterable] = map) -> Tensor:
    """Contributions of all windows of some crystals, (models, W, outputs).

    ``max_atoms`` bounds the atoms of windows in memory at a time; ``apply`` may be the ``map`` of
    an executor. Models of one configuration share what does not depend on the weights."""
    first = models[0]
    if any(model.config != first.config for model in models):
        return torch.cat([contributions((model,), every, max_atoms) for model in models])
    parts, atoms, src = [], [None] * len(models), None
    for graph in graphs(every, first.config, max_atoms, first.shift):
        if graph.atom is not None and not first._kernels(graph.positions):
            alone, graph = graph.apart()
            if alone.src is not src:  # else a further chunk of the same atoms
                encode = partial(X3Mat.encode, geometry=first.geometry(alone))
                atoms, src = list(apply(torch.no_grad()(encode), models)), alone.src
        geometry = first.geometry(graph)

        @torch.no_grad()  # here: the threads of an executor do not inherit it
        def one(model: X3Mat, atoms: list[Tensor] | None, graph=graph, geometry=geometry) -> Tensor:
            return model.read(graph, geometry, atoms) if atoms else model.network(graph, geometry)

        parts.append(torch.stack(list(apply(one, models, atoms))))
    return torch.cat(parts, dim=1)


def graphs(every: Sequence, config: X3MatConfig, max_atoms: int,
           like: Tensor) -> Iterator[WindowGraph]:
    """Graphs of runs of windows of some crystals, of at most ``max_atoms`` atoms (at least one
    window) each; where windows share the atoms of their crystal, each run has all of these. Dtype
    and device are those of ``like``."""
    if config.encoding == "crystal":
        run: list[WindowGraph] = []
        for graph in (g for w in every for g in _shared_graphs(w, config, max_atoms, like.dtype)):
            if run and sum(len(g.positions) for g in [*run, graph]) > max_atoms:
                yield joined(run).to(like.device)
                run = []
            run.append(graph)
        yield joined(run).to(like.device)
        return
    positions, species = (np.concatenate([getattr(w, name) for w in every])
                          for name in ("positions", "species"))
    ptr = np.cumsum(np.concatenate([[0], *(w.atoms_per_window for w in every)]))
    for a, b in chunks(ptr, max_atoms):
        part = slice(ptr[a], ptr[b])
        own = (torch.as_tensor(x, device=like.device)
               for x in (positions[part], species[part], ptr[a : b + 1] - ptr[a]))
        yield window_graph(next(own).to(like), *own, config.cutoff, config.radius)


def _shared_graphs(windows, config: X3MatConfig, max_atoms: int, dtype) -> Iterator[WindowGraph]:
    """Graphs of one crystal, whose windows share its atoms, on the host."""
    pairs = windows.pairs[1:] if windows.pairs else neighbours(windows.crystal, config.cutoff)
    src, dst, vector = (torch.as_tensor(x) for x in pairs)
    src, dst, vector = src.long(), dst.long(), vector.to(dtype)
    positions, atom = torch.as_tensor(windows.positions).to(dtype), torch.as_tensor(windows.atom)
    species = torch.tensor(windows.crystal.species)
    told = None if windows.told is None else torch.as_tensor(windows.told).to(dtype)
    for a, b in chunks(windows.ptr, max_atoms):
        part = slice(windows.ptr[a], windows.ptr[b])
        window = torch.as_tensor(np.repeat(np.arange(b - a), windows.atoms_per_window[a:b]))
        yield WindowGraph(positions[part], species, window, src, dst, b - a, atom[part], vector,
                          told=None if told is None else told[a:b])


def joined(graphs: Sequence[WindowGraph]) -> WindowGraph:
    """Graphs of several crystals, whose windows share their atoms, as one."""
    if len(graphs) == 1:
        return graphs[0]
    atoms, windows = ([0, *accumulate(sizes)] for sizes in (
        [len(g.species) for g in graphs], [g.n_windows for g in graphs]))
    first = {"window": windows, "src": atoms, "dst": atoms, "atom": atoms}
    return WindowGraph(n_windows=windows[-1], **{name: torch.cat([getattr(g, name) + (first[name][k]
        if name in first else 0) for k, g in enumerate(graphs)]) for name, x in vars(graphs[0]
        ).items() if isinstance(x, Tensor)})


def fitting_atoms(model: X3Mat, graph: WindowGraph, gradient: bool, share: float = 0.6) -> int:
    """How many atoms of windows fit into ``share`` of a GPU's free memory, judged by the most that
    the network takes at a time for ``graph``, with or without its gradient."""
    device = graph.positions.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.set_grad_enabled(gradient):
        y = model.network(graph).sum()
        if gradient:
            torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad])
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what is only set aside is free
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(share * free * len(graph.positions) / max(taken, 1)))


def chunks(ptr, max_atoms: int) -> list[tuple[int, int]]:
    """Split windows into runs [a, b) of at most ``max_atoms`` atoms (at least one window each).

    >>> chunks([0, 3, 6, 9], max_atoms=6)
    [(0, 2), (2, 3)]
    """
    out, start = [], 0
    for w in range(1, len(ptr)):
        if w - start > 1 and ptr[w] - ptr[start] > max_atoms:
            out.append((start, w - 1))
            start = w - 1
    return [*out, (start, len(ptr) - 1)]


def save_checkpoint(path, model: X3Mat, about: dict) -> X3Mat:
    """Write config, constants, weights in half precision, and a description, such that they load
    with ``weights_only=True``; returns the model that :func:`load_checkpoint` will give."""
    half = {k: p.half() for k, p in model.named_parameters()}  # seeds change far more than rounding
    state = {k: v.detach().cpu() for k, v in (model.state_dict() | half).items()}
    torch.save({"config": asdict(model.config), "state": state, "about": about}, path)
    return load_checkpoint(path)[0]


def load_checkpoint(path) -> tuple[X3Mat, dict]:
    """Read what :func:`save_checkpoint` wrote.

    Raises a ModelError if the file is missing, damaged, or of another format."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        kind = X3Mat
        if "lattice_gas" in data["about"]:
            from x3mat_gcmc.lattice_gas import ToldX3Mat as kind
        model = kind(X3MatConfig(**data["config"]))
        model.load_state_dict(data["state"])
        return model.eval(), data["about"]
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(str(path), f"not a readable checkpoint ({error})",
                         "give a file written by x3mat train, or a model's name") from error
