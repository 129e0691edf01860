"""The network on a GPU: fused Triton kernels behind :meth:`x3mat.model.X3Mat.network`.

Same weights and same outputs as the plain PyTorch layers of :mod:`x3mat.model`, to which every
name here refers; tests compare outputs and all gradients. On a GPU those layers wait for memory,
not for arithmetic: each of a hundred small operations reads and writes all features of all edges.
Here an attention layer is four fused steps between the matrix products, which cuBLAS does:

    rotate   gather x_j and x_i, turn into the edge frame, scale by the radial weights
    gate     SiLU of the scalars, sigmoid gates of the other degrees
    weigh    logits → w_ij = u_ij e^{z_ij}
    attend   Σ_j w_ij D_ijᵀ v_ij / (1 + Σ_j w_ij), one program for each receiving node

No sum over edges needs an atomic addition: permutations sort the edges, which stand by receiver, by
sender and kind. For its backward pass a layer keeps some five numbers of each row and channel of an
edge. There gradients of weights, for which nothing waits, run on a second stream and fill the gaps.

Layouts: nodes (S, N, C), row by row of the degrees; edges as one block for each order m ≥ 0, of
shape (E, L + 1, C) for m = 0 and (2, E, L + 1 − m, C) for ±m, one behind the other, so that the
SO(2) convolutions are plain matrix products. Of the Wigner matrices only what is not zero by
symmetry is kept: 115 of 475 numbers for L = 4, M = 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language import constexpr

from x3mat.model import MAX_SPECIES, edge_frames

EDGES = 8  # of a program that works edge by edge; some are faster with 4 or 16, as measured


def usable(model, x: Tensor) -> bool:
    """Whether the kernels can stand in for the plain layers: float32 on a GPU, no gradient with
    respect to positions, channels, heads and hidden layers as wide as a power of two."""
    c = model.config
    widths = c.channels, c.feed_forward, c.heads, c.radial_hidden
    powers = all(n & (n - 1) == 0 for n in widths)
    return x.dtype == torch.float32 and not x.requires_grad and widths[0] >= 16 and powers


@dataclass(frozen=True)
class Packed:
    """Geometry of some edges, in the order of :class:`x3mat.model.Edges`."""

    src: Tensor  # (E,)
    dst: Tensor  # (E,) sorted
    weight: Tensor  # (E,)
    share: Tensor  # (E,) weight over the mean degree
    one: Tensor  # (E,) 1, whose product with a matrix sums its rows
    inputs: Tensor  # (K, ...) of radial networks: basis, elements of both ends as one-hot, 1
    wigner: Tensor  # (E, P) not-zero elements of the Wigner matrices, row by row
    start: Tensor  # (N + 1,) first edge of each receiver
    by_src: Tensor  # (E,) permutation that sorts the edges by sender
    start_src: Tensor  # (N + 1,) first of each sender in by_src
    kind: Tensor | None  # (E,), and likewise; None: each edge is of its own
    by_kind: Tensor | None  # (E,)
    start_kind: Tensor | None  # (K + 1,)

    def summed(self, x: Tensor, c: int) -> Tensor:
        """Sums over the edges of each kind, (K, rows · c), of x, (E, rows · c)."""
        if self.kind is None:
            return x
        out = x.new_empty(len(self.inputs), x.shape[1])
        sum_kernel[(len(out), x.shape[1] // c)](self.by_kind, self.start_kind, x, out, c,
                                                x.shape[1], num_warps=max(1, c // 64))
        return out


# Compiled once, not again for numbers of edges or nodes that are multiples of 16.
any_size = triton.jit(do_not_specialize=["n_edges", "n_nodes"])


@triton.constexpr_function
def orders(l_, m_max):
    """Largest order kept of degree l."""
    return min(l_, m_max)


@triton.constexpr_function
def wigner_at(l_, m, m_max):
    """Offset of row (l, m) of the packed Wigner matrices; (L + 1, −M) gives their size."""
    before = sum((2 * k + 1) * (2 * min(k, m_max) + 1) for k in range(l_))
    return before + (m + min(l_, m_max)) * (2 * l_ + 1)


@triton.constexpr_function
def row_at(l_, m, l_max):
    """Place of row (l, m) where the rows are sorted by |m|."""
    k = abs(m)
    before = sum((2 if j else 1) * (l_max + 1 - j) for j in range(k))
    return before + (l_max + 1 - k if m < 0 else 0) + l_ - k


@triton.constexpr_function
def degree_at(l_, m, m_max):
    """Place of row (l, m) where the rows are sorted by l."""
    return sum(2 * min(k, m_max) + 1 for k in range(l_)) + m + min(l_, m_max)


@triton.constexpr_function
def radial_at(l_, m, l_max):
    """Row of the radial weights of (l, ±m)."""
    return sum(l_max + 1 - j for j in range(abs(m))) + l_ - abs(m)


@triton.constexpr_function
def harmonic_scale(l_, m):
    """√((2l + 1)(2 − δ_m0)(l − m)!/(l + m)!)."""
    ratio = math.factorial(l_ - m) / math.factorial(l_ + m)
    return math.sqrt((2 * l_ + 1) * (2 if m else 1) * ratio)


@triton.jit
def edge_row(e, n_edges, l_: constexpr, m: constexpr, L: constexpr, C: constexpr,
             NODES: constexpr = False):
    """Address of row (l, m) of edge e in the blocks, or of a node."""
    if NODES:
        return ((l_ * l_ + l_ + m) * n_edges + e) * C
    k: constexpr = m if m >= 0 else -m  # row_at(k, m, L): rows before the block of order m
    return (row_at(k, m, L) * n_edges + e * (L + 1 - k) + l_ - k) * C


@triton.jit
def mixed_row(e, n_edges, l_: constexpr, m: constexpr, L: constexpr, C: constexpr,
              width: constexpr):
    """The same in the output of the first convolution, whose m = 0 block has the degrees
    l ≥ 1, the scalars, the gates and the logits: ``width`` numbers in all. Width 0: of nodes, with
    the degrees l ≥ 1 alone."""
    if width == 0:
        return edge_row(e - n_edges, n_edges, l_, m, L, C, True)
    if m == 0:
        return e * width + (l_ - 1) * C
    more: constexpr = width - (L + 1) * C  # e has 64 bits, n_edges alone may have 32
    return edge_row(e, n_edges, l_, m, L, C) + (e + n_edges) * more - e * more


@triton.jit
def some_edges(n_edges, C: constexpr, EDGES: constexpr):
    """Edges of this program, which of them exist, channels (1, C), mask (EDGES, C)."""
    e = (tl.program_id(0) * EDGES + tl.arange(0, EDGES)).to(tl.int64)
    c = tl.arange(0, C)[None, :]
    return e, e < n_edges, c, (e < n_edges)[:, None] & (c < C)


@triton.jit
def one_node(start, C: constexpr):
    """Node of this program, channels (C,), first edge and end of its edges."""
    n = tl.program_id(0).to(tl.int64)
    return n, tl.arange(0, C), tl.load(start + n), tl.load(start + n + 1)


@triton.jit
def kind_of(kind, e, live):
    """Row of what the radial network gives for edges e."""
    return e if kind is None else tl.load(kind + e, mask=live, other=0)


@triton.jit
def messages(h, offset, src, dst, e, live, n_nodes, l_: constexpr, C: constexpr):
    """Rows of degree l of A x_j + B x_i, for edges (EDGES,)."""
    c = tl.arange(0, C)[None, :]
    mask = live[:, None] & (c < C)
    j = tl.load(src + e, mask=live, other=0)[:, None]
    i = tl.load(dst + e, mask=live, other=0)[:, None]
    rows = ()
    for s in tl.static_range(l_ * l_, (l_ + 1) * (l_ + 1)):
        sent = tl.load(h + (s * n_nodes + j) * (2 * C) + c, mask=mask, other=0.0)
        heard = tl.load(h + (s * n_nodes + i) * (2 * C) + C + c, mask=mask, other=0.0)
        rows = rows + (sent + heard if l_ else sent + heard + tl.load(offset + c),)
    return rows


@triton.jit
def turn(row, x, live, l_: constexpr):
    """A row of D, at ``row``, times the rows x of degree l."""
    total = tl.load(row, mask=live, other=0.0)[:, None] * x[0]
    for s in tl.static_range(1, 2 * l_ + 1):
        total += tl.load(row + s, mask=live, other=0.0)[:, None] * x[s]
    return total


@triton.jit
def rows_of(x, e, live, n_edges, L: constexpr, M: constexpr, C: constexpr):
    """Rows of an edge, degree by degree. Nodes are worked through edge by edge, and the rows of
    the next are asked for before those of one are used: memory answers late."""
    c = tl.arange(0, C)
    rows = ()
    for l_ in tl.static_range(L + 1):
        for m in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
            row = x + edge_row(e, n_edges, l_, m, L, C) + c
            rows = rows + (tl.load(row, mask=live & (c < C), other=0.0),)
    return rows


@triton.jit
def turned_back(acc, wigner, rows, factor, L: constexpr, M: constexpr, stored: constexpr):
    """acc plus factor Dᵀ x of the rows x of one edge, whose packed D begins at ``wigner``."""
    out = ()
    for l_ in tl.static_range(L + 1):
        part = acc[l_ * l_ : (l_ + 1) * (l_ + 1)]
        for m in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
            at = wigner + wigner_at(l_, m, stored)
            g = factor * rows[degree_at(l_, m, M)]
            added = ()
            for s in tl.static_range(2 * l_ + 1):
                added = added + (part[s] + tl.load(at + s) * g,)
            part = added
        out = out + part
    return out


# --------------------------------------------------------------------------- kernels
# h: (S, N, 2C), of_sender and of_receiver side by side; n_edges, n_nodes: E, N as in model.py.


@any_size
def wigner_kernel(frames, directed, points, inverse, wigner, n_edges, L: constexpr, M: constexpr,
                  P: constexpr, LANES: constexpr, EDGES: constexpr):
    """Packed D: see :class:`x3mat.model.WignerMatrices`."""
    size: constexpr = wigner_at(L + 1, -M, M)
    e = (tl.program_id(0) * EDGES + tl.arange(0, EDGES)).to(tl.int64)
    live = e < n_edges
    p = tl.arange(0, LANES)
    x = tl.zeros([EDGES, LANES], tl.float32)
    y, z = x, x
    for i in tl.static_range(3):
        point = tl.load(points + p * 3 + i, mask=p < P, other=0.0)[None, :]
        x += tl.load(frames + e * 9 + 3 * i, mask=live, other=0.0)[:, None] * point
        y += tl.load(frames + e * 9 + 3 * i + 1, mask=live, other=0.0)[:, None] * point
        z += tl.load(frames + e * 9 + 3 * i + 2, mask=live, other=0.0)[:, None] * point
    factor = tl.load(directed + e, mask=live, other=0.0)
    square = x * x + y * y + z * z
    cosine = tl.full([EDGES, LANES], 1.0, tl.float32)
    first, sine = cosine, tl.zeros([EDGES, LANES], tl.float32)
    for m in tl.static_range(L + 1):
        before, legendre = tl.zeros([EDGES, LANES], tl.float32), first
        for l_ in tl.static_range(m, L + 1):
            for order in tl.static_range(-m, m + 1, 2 * m if m else 1):
                value = harmonic_scale(l_, m) * legendre * (sine if order < 0 else cosine)
                for k in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
                    row = inverse + row_at(l_, k, L) * P + p
                    weight = tl.load(row, mask=p < P, other=0.0)[None, :]
                    total = tl.sum(weight * value, axis=1)
                    total = total * factor if l_ else total
                    at = wigner_at(l_, k, M) + l_ + order
                    tl.store(wigner + e * size + at, total, mask=live)
            after = ((2 * l_ + 1) * y * legendre - (l_ + m) * square * before) / (l_ + 1 - m)
            before, legendre = legendre, after
        cosine, sine = z * cosine - x * sine, x * cosine + z * sine
        first *= 2 * m + 1


@any_size
def rotate_kernel(h, offset, src, dst, wigner, radial, kind, out, n_edges, n_nodes, L: constexpr,
                  M: constexpr, stored: constexpr, C: constexpr, EDGES: constexpr):
    """D (A x_j + B x_i) ⊙ radial; ``offset``: the biases of A and B."""
    size: constexpr = wigner_at(L + 1, -stored, stored)
    width: constexpr = radial_at(L + 1, M, L) * C
    e, live, c, mask = some_edges(n_edges, C, EDGES)
    row = radial + kind_of(kind, e, live)[:, None] * width + c
    for l_ in tl.static_range(L + 1):
        x = messages(h, offset, src, dst, e, live, n_nodes, l_, C)
        for m in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
            turned = turn(wigner + e * size + wigner_at(l_, m, stored), x, live, l_)
            r = row + radial_at(l_, m, L) * C
            to = out + edge_row(e, n_edges, l_, m, L, C)[:, None] + c
            tl.store(to, turned * tl.load(r, mask=mask, other=0.0), mask=mask)


@any_size
def rotate_back_kernel(h, offset, src, dst, wigner, radial, kind, grad, grad_radial, n_edges,
                       n_nodes, L: constexpr, M: constexpr, stored: constexpr, C: constexpr,
                       EDGES: constexpr):
    """Gradient of radial; grad ← grad ⊙ radial, the gradient of D (A x_j + B x_i)."""
    size: constexpr = wigner_at(L + 1, -stored, stored)
    width: constexpr = radial_at(L + 1, M, L) * C
    e, live, c, mask = some_edges(n_edges, C, EDGES)
    given = kind_of(kind, e, live)[:, None]
    for l_ in tl.static_range(L + 1):
        x = messages(h, offset, src, dst, e, live, n_nodes, l_, C)
        for k in tl.static_range(orders(l_, M) + 1):
            at = radial_at(l_, k, L) * C + c
            r = tl.load(radial + given * width + at, mask=mask, other=0.0)
            total = tl.zeros([EDGES, C], tl.float32)
            for m in tl.static_range(-k, k + 1, 2 * k if k else 1):
                row = wigner + e * size + wigner_at(l_, m, stored)
                to = grad + edge_row(e, n_edges, l_, m, L, C)[:, None] + c
                g = tl.load(to, mask=mask, other=0.0)
                total += turn(row, x, live, l_) * g
                tl.store(to, g * r, mask=mask)
            tl.store(grad_radial + e[:, None] * width + at, total, mask=mask)


@any_size
def turn_back_kernel(order, start, wigner, x, kind, weight, out, inverse, n_edges, n_nodes,
                     size: constexpr, L: constexpr, M: constexpr, stored: constexpr, C: constexpr,
                     H: constexpr, SENDER: constexpr, width: constexpr):
    """Σ w Dᵀ x over the edges from a node, or to it, with the ``weight`` of each head, or 1; over
    1 + Σ w, whose ``inverse`` is kept, if asked for. ``kind``: rows of x; ``width``: from row to
    row of the output."""
    n, c, k, stop = one_node(start, C)
    acc = (tl.zeros([C], tl.float32),) * ((L + 1) * (L + 1))
    total = tl.full([C], 1.0, tl.float32)
    e = tl.load(order + k, mask=k < stop, other=0) if SENDER else k
    rows = rows_of(x, kind_of(kind, e, k < stop), k < stop, n_edges, L, M, C)
    while k < stop:
        k += 1
        at = wigner + e * size
        w = 1.0 if weight is None else tl.load(weight + e * H + c // (C // H))
        if inverse is not None:
            total += w
        e = tl.load(order + k, mask=k < stop, other=0) if SENDER else k
        after = rows_of(x, kind_of(kind, e, k < stop), k < stop, n_edges, L, M, C)
        acc = turned_back(acc, at, rows, w, L, M, stored)
        rows = after
    for s in tl.static_range((L + 1) * (L + 1)):
        tl.store(out + (s * n_nodes + n) * width + c, acc[s] / total)
    if inverse is not None:
        tl.store(inverse + n * H + c // (C // H), 1 / total)


@any_size
def gate_kernel(gates, mixed, out, n_edges, stride: constexpr, width: constexpr, L: constexpr,
                M: constexpr, C: constexpr, EDGES: constexpr):
    """``gates``: scalars and gates, of edges in ``mixed``; ``stride``: from one to the next."""
    e, _, c, mask = some_edges(n_edges, C, EDGES)
    e = e[:, None]
    scalar = tl.load(gates + e * stride + c, mask=mask, other=0.0)
    to = out + edge_row(e, n_edges, 0, 0, L, C, width == 0) + c
    tl.store(to, scalar * tl.sigmoid(scalar), mask=mask)
    for l_ in tl.static_range(1, L + 1):
        gate = tl.sigmoid(tl.load(gates + e * stride + l_ * C + c, mask=mask, other=0.0))
        for m in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
            x = mixed + mixed_row(e, n_edges, l_, m, L, C, width) + c
            to = out + edge_row(e, n_edges, l_, m, L, C, width == 0) + c
            tl.store(to, tl.load(x, mask=mask, other=0.0) * gate, mask=mask)


@any_size
def gate_back_kernel(gates, mixed, grad, grad_gates, grad_mixed, n_edges, stride: constexpr,
                     width: constexpr, L: constexpr, M: constexpr, C: constexpr, EDGES: constexpr):
    e, _, c, mask = some_edges(n_edges, C, EDGES)
    e = e[:, None]
    scalar = tl.load(gates + e * stride + c, mask=mask, other=0.0)
    s = tl.sigmoid(scalar)
    g = tl.load(grad + edge_row(e, n_edges, 0, 0, L, C, width == 0) + c, mask=mask, other=0.0)
    tl.store(grad_gates + e * stride + c, g * s * (1 + scalar * (1 - s)), mask=mask)
    for l_ in tl.static_range(1, L + 1):
        at = e * stride + l_ * C + c
        gate = tl.sigmoid(tl.load(gates + at, mask=mask, other=0.0))
        total = tl.zeros([EDGES, C], tl.float32)
        for m in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
            row = mixed_row(e, n_edges, l_, m, L, C, width) + c
            x = tl.load(mixed + row, mask=mask, other=0.0)
            from_ = grad + edge_row(e, n_edges, l_, m, L, C, width == 0) + c
            g = tl.load(from_, mask=mask, other=0.0)
            total += g * x
            tl.store(grad_mixed + row, g * gate, mask=mask)
        tl.store(grad_gates + at, total * gate * (1 - gate), mask=mask)


@triton.jit
def logits(mixed, gain, bias, n_edges, width: constexpr, H: constexpr, A: constexpr,
           EDGES: constexpr):
    """Edges of this program, which exist, addresses (EDGES, A) of the logits s of its head, their
    inverse standard deviation, normalised s, and LayerNorm(s)."""
    e = (tl.program_id(0) * EDGES + tl.arange(0, EDGES)).to(tl.int64)
    a = tl.arange(0, A)
    at = ((e + 1) * width - (H - tl.program_id(1)) * A)[:, None] + a[None, :]  # they come last
    s = tl.load(mixed + at, mask=(e < n_edges)[:, None], other=0.0)
    s = s - tl.sum(s, axis=1)[:, None] / A
    inverse = 1 / tl.sqrt(tl.sum(s * s, axis=1)[:, None] / A + 1e-5)
    s = s * inverse
    return e, e < n_edges, at, inverse, s, s * tl.load(gain + a)[None] + tl.load(bias + a)[None]


@any_size
def weigh_kernel(mixed, edge_weight, gain, bias, logit, out, n_edges, width: constexpr,
                 H: constexpr, A: constexpr, EDGES: constexpr):
    """w = u exp(a · LeakyReLU(LayerNorm(s))) of one head."""
    e, live, _, _, _, t = logits(mixed, gain, bias, n_edges, width, H, A, EDGES)
    head = tl.program_id(1)
    t = tl.where(t > 0, t, 0.2 * t) * tl.load(logit + head * A + tl.arange(0, A))[None, :]
    weight = tl.exp(tl.sum(t, axis=1)) * tl.load(edge_weight + e, mask=live, other=0.0)
    tl.store(out + e * H + head, weight, mask=live)


@any_size
def weigh_back_kernel(mixed, weight, gain, bias, logit, grad, grad_mixed, grad_parameters,
                      n_edges, width: constexpr, H: constexpr, A: constexpr, EDGES: constexpr):
    e, live, at, inverse, s, t = logits(mixed, gain, bias, n_edges, width, H, A, EDGES)
    head, a = tl.program_id(1), tl.arange(0, A)
    g = tl.load(grad + e * H + head, mask=live, other=0.0)
    g = (g * tl.load(weight + e * H + head, mask=live, other=0.0))[:, None]
    to = grad_parameters + (tl.program_id(0) * H + head) * (3 * A) + a
    tl.store(to + 2 * A, tl.sum(g * tl.where(t > 0, t, 0.2 * t), axis=0))
    g = g * tl.load(logit + head * A + a)[None, :] * tl.where(t > 0, 1.0, 0.2)
    tl.store(to, tl.sum(g * s, axis=0))
    tl.store(to + A, tl.sum(g, axis=0))
    g = g * tl.load(gain + a)[None, :]
    g = g - tl.sum(g, axis=1)[:, None] / A - s * (tl.sum(g * s, axis=1)[:, None] / A)
    tl.store(grad_mixed + at, g * inverse, mask=live[:, None])


@any_size
def attend_back_kernel(value, weight, dst, wigner, inverse, mean, grad, grad_value, grad_weight,
                       n_edges, n_nodes, size: constexpr, L: constexpr, M: constexpr,
                       stored: constexpr, C: constexpr, H: constexpr, EDGES: constexpr):
    """``mean``: gradient times output of each head, (N, H)."""
    e, live, c, mask = some_edges(n_edges, C, EDGES)
    n = tl.load(dst + e, mask=live, other=0)[:, None]
    head = c // (C // H)
    scale = tl.load(inverse + n * H + head, mask=mask, other=0.0)
    w = scale * tl.load(weight + e[:, None] * H + head, mask=mask, other=0.0)
    change = tl.zeros([EDGES, C], tl.float32)
    for l_ in tl.static_range(L + 1):
        g = ()
        for s in tl.static_range(l_ * l_, (l_ + 1) * (l_ + 1)):
            g = g + (tl.load(grad + (s * n_nodes + n) * C + c, mask=mask, other=0.0),)
        for m in tl.static_range(-orders(l_, M), orders(l_, M) + 1):
            turned = turn(wigner + e * size + wigner_at(l_, m, stored), g, live, l_)
            row = edge_row(e, n_edges, l_, m, L, C)[:, None] + c
            change += turned * tl.load(value + row, mask=mask, other=0.0)
            tl.store(grad_value + row, turned * w, mask=mask)
    change = tl.sum(tl.reshape(change, [EDGES, H, C // H]), axis=2)
    a = tl.arange(0, H)[None, :]
    mask = live[:, None] & (a < H)
    change -= tl.load(mean + n * H + a, mask=mask, other=0.0)
    change *= tl.load(inverse + n * H + a, mask=mask, other=0.0)
    tl.store(grad_weight + e[:, None] * H + a, change, mask=mask)


@triton.jit
def sum_kernel(order, start, x, out, C: constexpr, width: constexpr):
    """Σ x over the edges of a kind, C of ``width`` numbers."""
    n, c, k, stop = one_node(start, C)
    c += tl.program_id(1) * C
    acc = tl.zeros([C], tl.float32)
    while k < stop:
        acc += tl.load(x + tl.load(order + k) * width + c)
        k += 1
    tl.store(out + n * width + c, acc)


@triton.jit
def normalised(x, C: constexpr):
    """x, (EDGES, C), without its mean, over its standard deviation; the inverse of this."""
    x = x - tl.sum(x, axis=1)[:, None] / C
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / C + 1e-5)
    return x * inverse, inverse


@any_size
def norm_kernel(x, weight, bias, gamma, out, n_nodes, eps, L: constexpr, C: constexpr,
                EDGES: constexpr):
    n, _, c, mask = some_edges(n_nodes, C, EDGES)
    n = n[:, None]
    scalars, _ = normalised(tl.load(x + n * C + c, mask=mask, other=0.0), C)
    tl.store(out + n * C + c, scalars * tl.load(weight + c) + tl.load(bias + c), mask=mask)
    square = tl.zeros([EDGES, C], tl.float32)
    for l_ in tl.static_range(1, L + 1):
        for s in range(l_ * l_, (l_ + 1) * (l_ + 1)):
            v = tl.load(x + (s * n_nodes + n) * C + c, mask=mask, other=0.0)
            square += v * v / ((2 * l_ + 1) * L * C)
    scale = 1 / tl.sqrt(tl.sum(square, axis=1)[:, None] + eps)
    for l_ in tl.static_range(1, L + 1):
        g = scale * tl.load(gamma + (l_ - 1) * C + c)
        for s in range(l_ * l_, (l_ + 1) * (l_ + 1)):
            at = (s * n_nodes + n) * C + c
            tl.store(out + at, tl.load(x + at, mask=mask, other=0.0) * g, mask=mask)


@any_size
def norm_back_kernel(x, weight, gamma, beside, grad, grad_x, parts, n_nodes, eps, L: constexpr,
                     C: constexpr, EDGES: constexpr):
    """``beside``: gradient of x from elsewhere. ``parts``: of the gradients of weight, bias and
    gamma, the share of each program."""
    n, _, c, mask = some_edges(n_nodes, C, EDGES)
    n = n[:, None]
    part = parts + tl.program_id(0) * ((L + 2) * C) + tl.arange(0, C)
    v, scale = normalised(tl.load(x + n * C + c, mask=mask, other=0.0), C)
    g = tl.load(grad + n * C + c, mask=mask, other=0.0)
    other = tl.load(beside + n * C + c, mask=mask, other=0.0)
    tl.store(part, tl.sum(g * v, axis=0))
    tl.store(part + C, tl.sum(g, axis=0))
    g *= tl.load(weight + c)
    g -= tl.sum(g, axis=1)[:, None] / C + v * (tl.sum(g * v, axis=1)[:, None] / C)
    tl.store(grad_x + n * C + c, g * scale + other, mask=mask)
    square = tl.zeros([EDGES, C], tl.float32)
    product = tl.zeros([EDGES, C], tl.float32)
    totals = ()
    for l_ in tl.static_range(1, L + 1):
        total = tl.zeros([EDGES, C], tl.float32)
        for s in range(l_ * l_, (l_ + 1) * (l_ + 1)):
            at = (s * n_nodes + n) * C + c
            v = tl.load(x + at, mask=mask, other=0.0)
            square += v * v / ((2 * l_ + 1) * L * C)
            total += v * tl.load(grad + at, mask=mask, other=0.0)
        product += total * tl.load(gamma + (l_ - 1) * C + c)
        totals = totals + (total,)
    scale = 1 / tl.sqrt(tl.sum(square, axis=1)[:, None] + eps)
    common = tl.sum(product, axis=1)[:, None] * scale * scale * scale
    for l_ in tl.static_range(1, L + 1):
        tl.store(part + (l_ + 1) * C, tl.sum(totals[l_ - 1] * scale, axis=0))
        r = scale * tl.load(gamma + (l_ - 1) * C + c)
        for s in range(l_ * l_, (l_ + 1) * (l_ + 1)):
            at = (s * n_nodes + n) * C + c
            g = tl.load(grad + at, mask=mask, other=0.0) * r
            g -= tl.load(x + at, mask=mask, other=0.0) * (common / ((2 * l_ + 1) * L * C))
            g += tl.load(beside + at, mask=mask, other=0.0)
            tl.store(grad_x + at, g, mask=mask)


def _programs(n: int, each: int = EDGES) -> tuple[int]:
    return (max(1, -(-n // each)),)


@cache
def side(device: torch.device) -> torch.cuda.Stream | None:
    """A GPU's stream for what nothing waits for before the end of a backward pass."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def beside(like: Tensor) -> torch.cuda.StreamContext:
    """What is computed inside runs on a GPU beside what follows, until :func:`together`; what it
    reads has to be kept until then."""
    if stream := side(like.device):
        stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def together(like: Tensor) -> None:
    if stream := side(like.device):
        torch.cuda.current_stream().wait_stream(stream)


def by_degree(x: Tensor, weight: Tensor, degrees: Tensor, residual: Tensor | None = None,
              bias: Tensor | None = None) -> Tensor:
    """:class:`x3mat.model.SphericalLinear` of (S, N, in), row by row, plus ``residual``."""
    weight = weight.index_select(0, degrees)
    if residual is None:
        return torch.bmm(x, weight)
    out = torch.baddbmm(residual, x, weight)
    out[0] += bias
    return out


def by_degree_back(x: Tensor, grad: Tensor, weight: Tensor, degrees: Tensor,
                   out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of x and, :func:`beside`, of the weight."""
    with beside(x):
        grad_weight = torch.zeros_like(weight).index_add_(0, degrees, torch.bmm(x.mT, grad))
    return torch.bmm(grad, weight.index_select(0, degrees).mT, out=out), grad_weight


class Norm(torch.autograd.Function):
    """x itself, so that its gradients come together here, and its
    :class:`x3mat.model.SphericalLayerNorm`."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, eps):
        out, (_, n, c), ctx.eps = torch.empty_like(x), x.shape, eps
        norm_kernel[_programs(n, 4)](x, weight, bias, gamma, out, n, eps, len(gamma), c, 4)
        ctx.save_for_backward(x, weight, gamma)
        return x.view_as(x), out

    @staticmethod
    def backward(ctx, beside, grad):
        x, weight, gamma = ctx.saved_tensors
        grad_x, (_, n, c) = torch.empty_like(x), x.shape
        parts = x.new_empty(*_programs(n, 4), len(gamma) + 2, c)
        norm_back_kernel[_programs(n, 4)](x, weight, gamma, beside.contiguous(), grad.contiguous(),
                                          grad_x, parts, n, ctx.eps, len(gamma), c, 4)
        parts = (x.new_ones(len(parts)) @ parts.flatten(1)).unflatten(0, (-1, c))
        return grad_x, parts[0], parts[1], parts[2:], None


class FeedForward(torch.autograd.Function):
    """x plus :class:`x3mat.model.FeedForward` of y, both (S, N, C). ``expand``: of the degrees from
    1 on."""

    @staticmethod
    def forward(ctx, x, y, degrees, w_gates, b_gates, expand, contract, bias):
        gates, n = torch.addmm(b_gates, y[0], w_gates.T), y.shape[1]
        inner = by_degree(y[1:], expand, degrees[1:] - 1)
        ctx.sizes = n, len(w_gates), 0, len(expand), len(expand), contract.shape[1]
        gated = y.new_empty(*y.shape[:2], contract.shape[1])
        gate_kernel[_programs(n)](gates, inner, gated, *ctx.sizes, EDGES)
        ctx.save_for_backward(y, degrees, w_gates, expand, contract, gates, inner, gated)
        return by_degree(gated, contract, degrees, x, bias)

    @staticmethod
    def backward(ctx, grad):
        y, degrees, w_gates, expand, contract, gates, inner, gated = ctx.saved_tensors
        grad, (n, *_), grad_y = grad.contiguous(), ctx.sizes, torch.empty_like(y)
        grad_gated, grad_contract = by_degree_back(gated, grad, contract, degrees)
        grads = grad_gates, grad_inner = torch.empty_like(gates), torch.empty_like(inner)
        gate_back_kernel[_programs(n)](gates, inner, grad_gated, *grads, *ctx.sizes, EDGES)
        _, grad_expand = by_degree_back(y[1:], grad_inner, expand, degrees[1:] - 1, grad_y[1:])
        torch.mm(grad_gates, w_gates, out=grad_y[0])
        with beside(y):
            one = y.new_ones(n)
            rest = grad_gates.T @ y[0], one @ grad_gates, grad_expand, grad_contract, one @ grad[0]
        together(y)
        return grad, grad_y, None, *rest


def radial_weights(packed: Packed, first: Tensor, second: Tensor, bias: Tensor, last: Tensor,
                   last_bias: Tensor) -> tuple[Tensor, ...]:
    """:class:`x3mat.model.RadialNetwork` of each kind, (K, ...), and what its gradient reads."""
    x = packed.inputs @ first
    y = nn.functional.silu(x)
    z = torch.addmm(bias, y, second.T)
    hidden = nn.functional.silu(z)
    return torch.addmm(last_bias, hidden, last.T), x, y, z, hidden


def radial_back(packed: Packed, grad: Tensor, second: Tensor, last: Tensor, x: Tensor, y: Tensor,
                z: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the five parameters of :func:`radial_weights`."""
    one, slope = packed.one[: len(grad)], torch.ops.aten.silu_backward
    grad_z = slope(grad @ last, z)
    grad_x = slope(grad_z @ second, x)
    return packed.inputs.T @ grad_x, grad_z.T @ y, one @ grad_z, grad.T @ hidden, one @ grad


class Embed(torch.autograd.Function):
    """Scalars plus Σ_j u_ij radial_l(r_ij) Y_l(r_ij) / mean degree, see
    :meth:`x3mat.model.X3Mat._embed`: Y_l / √(2l + 1) is the row m = 0 of D. ``parameters``: of
    :func:`radial_weights`, the last map and its bias times √(2l + 1)."""

    @staticmethod
    def forward(ctx, scalars, edges, sizes, *parameters):
        ctx.edges, ctx.sizes, (n, c) = edges, sizes, scalars.shape
        radial, *kept = radial_weights(edges, *parameters)
        out = scalars.new_empty((sizes[0] + 1) ** 2, n, c)
        turn_back_kernel[(n,)](edges.by_src, edges.start, edges.wigner, radial, edges.kind,
                               edges.share, out, None, len(edges.src), n, edges.wigner.shape[1],
                               sizes[0], 0, sizes[1], c, 1, False, c, num_warps=1)
        out[0] += scalars
        ctx.save_for_backward(parameters[1], parameters[3], *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        edges, (l_max, stored) = ctx.edges, ctx.sizes
        grad, (_, n, c), n_edges = grad.contiguous(), grad.shape, len(edges.src)
        out, one = grad.new_zeros(n_edges, (l_max + 1) * c), grad.new_ones(n)
        attend_back_kernel[_programs(n_edges, 4)](  # of one head whose weights are not normalised
            out, edges.share, edges.dst, edges.wigner, one, torch.zeros_like(one), grad, out,
            torch.empty_like(edges.share), n_edges, n, edges.wigner.shape[1], l_max, 0, stored, c,
            1, 4, num_warps=2)
        out = edges.summed(out, c)
        return grad[0], None, None, *radial_back(edges, out, *ctx.saved_tensors)


@dataclass(frozen=True)
class Sizes:
    """Static sizes of one attention layer."""

    l_max: int
    l_out: int
    m_max: int  # at most l_out
    stored: int  # m_max of the packed Wigner matrices
    channels: int
    heads: int
    logits: int  # channels of a head
    receivers: int

    @property
    def mixed(self) -> int:
        """Numbers of an edge in the m = 0 block that the first convolution gives: degrees l ≥ 1,
        scalars, gates, logits."""
        return (1 + 2 * self.l_max) * self.channels + self.heads * self.logits

    def blocks(self, x: Tensor, n_edges: int, l_max: int, width: int = 0) -> list[Tensor]:
        """The block of each order of a flat buffer, as a matrix; ``width`` of that of m = 0."""
        columns = [(l_max + 1 - m) * self.channels for m in range(self.m_max + 1)]
        columns[0] = width or columns[0]
        parts = x.split([n * n_edges * (2 if m else 1) for m, n in enumerate(columns)])
        return [part.view(-1, n) for part, n in zip(parts, columns, strict=True)]

    def buffer(self, like: Tensor, n_edges: int, l_max: int, width: int = 0) -> Tensor:
        rest = sum(2 * (l_max + 1 - m) for m in range(1, self.m_max + 1)) * self.channels
        return like.new_empty(n_edges * ((width or (l_max + 1) * self.channels) + rest))


class Attend(torch.autograd.Function):
    """x, (S_out, receivers, C), plus :class:`x3mat.model.Attention` of y, (S, N, C).

    ``parameters``: five of :func:`radial_weights`, the maps A and B side by side, the sum of their
    biases, the last map and its bias, the biases of both convolutions, gain and bias of the norm of
    the logits, the logit vectors, then the weights of both convolutions, order by order."""

    @staticmethod
    def forward(ctx, x, y, degrees, edges: Packed, sizes: Sizes, *parameters):
        s, n_edges, orders_ = sizes, len(edges.src), sizes.m_max + 1
        radial, *kept = radial_weights(edges, *parameters[:5])
        both, offset, project, bias_out, *rest = parameters[5:]
        bias_1, bias_2, gain, bias, logit, *weights = rest
        h = by_degree(y, both, degrees)
        mixed = s.buffer(h, n_edges, s.l_max, s.mixed)
        turned = s.buffer(h, n_edges, s.l_max)
        rotate_kernel[_programs(n_edges)](h, offset, edges.src, edges.dst, edges.wigner, radial,
                                          edges.kind, turned, n_edges, h.shape[1], s.l_max, s.m_max,
                                          s.stored, s.channels, EDGES)
        Attend.products(turned, mixed, n_edges, s, s.l_max, s.mixed, weights[:orders_], bias_1)
        weight = h.new_empty(n_edges, s.heads)
        weigh_kernel[(*_programs(n_edges, 64), s.heads)](
            mixed, edges.weight, gain, bias, logit, weight, n_edges, s.mixed, s.heads, s.logits, 64)
        gated, value = s.buffer(mixed, n_edges, s.l_max), s.buffer(mixed, n_edges, s.l_out)
        gate_kernel[_programs(n_edges)](mixed[s.l_max * s.channels :], mixed, gated, n_edges,
                                        s.mixed, s.mixed, s.l_max, s.m_max, s.channels, EDGES)
        Attend.products(gated, value, n_edges, s, s.l_out, 0, weights[orders_:], bias_2)
        out = h.new_empty((s.l_out + 1) ** 2, s.receivers, s.channels)
        inverse = h.new_empty(s.receivers, s.heads)
        turn_back_kernel[(s.receivers,)](edges.by_src, edges.start, edges.wigner, value, None,
            weight, out, inverse, n_edges, s.receivers, edges.wigner.shape[1], s.l_out, s.m_max,
            s.stored, s.channels, s.heads, False, s.channels, num_warps=max(1, s.channels // 64))
        ctx.save_for_backward(y, degrees, h, mixed, weight, out, inverse, radial, turned, gated,
                              value, *kept, *parameters)
        ctx.edges, ctx.sizes = edges, sizes
        return by_degree(out, project, degrees[: len(out)], x, bias_out)

    @staticmethod
    def products(x, out, n_edges, s, l_out, width, weights, bias):
        """An SO(2) convolution: one matrix product for each order."""
        pairs = zip(s.blocks(x, n_edges, s.l_max), s.blocks(out, n_edges, l_out, width),
                    weights, strict=False)
        for m, (a, b, w) in enumerate(pairs):
            torch.mm(a, w.T, out=b) if m else torch.addmm(bias, a, w.T, out=b)

    @staticmethod
    def back(x, grad, edges, s, l_out, width, weights):
        """Gradients of an SO(2) convolution: of its input, and, beside, its weights and bias."""
        n_edges = len(edges.src)
        a, b = s.blocks(x, n_edges, s.l_max), s.blocks(grad, n_edges, l_out, width)
        with beside(x):
            found = [g.T @ y for g, y in zip(b, a, strict=False)], edges.one @ b[0]
        out = s.buffer(x, n_edges, s.l_max)
        for g, w, to in zip(b, weights, s.blocks(out, n_edges, s.l_max), strict=False):
            torch.mm(g, w.T.contiguous().T, out=to)  # a faster kernel than for w as it is
        return out, *found

    @staticmethod
    def backward(ctx, grad):
        edges, s, n_edges, grad = ctx.edges, ctx.sizes, len(ctx.edges.src), grad.contiguous()
        y, degrees, h, mixed, weight, out, inverse, radial, turned, gated, value, *rest = \
            ctx.saved_tensors
        kept, (_, second, _, last, _) = rest[:4], rest[4:9]
        both, offset, project, _, _, _, gain, bias, logit, *weights = rest[9:]
        orders_, n, one = s.m_max + 1, h.shape[1], y.new_ones(h.shape[1])
        grad_out, grad_project = by_degree_back(out, grad, project, degrees[: len(out)])
        grad_value, grad_weight = torch.empty_like(value), torch.empty_like(weight)
        mean = (grad_out * out).sum(0).unflatten(1, (s.heads, -1)).sum(2)
        attend_back_kernel[_programs(n_edges, 4)](value, weight, edges.dst, edges.wigner, inverse,
            mean, grad_out, grad_value, grad_weight, n_edges, s.receivers, edges.wigner.shape[1],
            s.l_out, s.m_max, s.stored, s.channels, s.heads, 4, num_warps=2)
        grad_gated, grads_2, grad_bias_2 = Attend.back(gated, grad_value, edges, s, s.l_out, 0,
                                                       weights[orders_:])
        grad_mixed, at = torch.empty_like(mixed), s.l_max * s.channels
        gate_back_kernel[_programs(n_edges)](mixed[at:], mixed, grad_gated, grad_mixed[at:],
            grad_mixed, n_edges, s.mixed, s.mixed, s.l_max, s.m_max, s.channels, EDGES)
        grid = (*_programs(n_edges, 64), s.heads)
        parts = h.new_empty(*grid, 3, s.logits)
        weigh_back_kernel[grid](mixed, weight, gain, bias, logit, grad_weight, grad_mixed, parts,
                                n_edges, s.mixed, s.heads, s.logits, 64)
        grad_turned, grads_1, grad_bias_1 = Attend.back(turned, grad_mixed, edges, s, s.l_max,
                                                        s.mixed, weights[:orders_])
        grad_h, grad_radial = torch.empty_like(h), h.new_empty(n_edges, radial.shape[1])
        sizes = s.l_max, s.m_max, s.stored, s.channels
        rotate_back_kernel[_programs(n_edges)](h, offset, edges.src, edges.dst, edges.wigner,
            radial, edges.kind, grad_turned, grad_radial, n_edges, n, *sizes, EDGES)
        with beside(h):
            summed = edges.summed(grad_radial, s.channels)
            of_radial = radial_back(edges, summed, second, last, *kept)
            norm = (h.new_ones(len(parts)) @ parts.flatten(1)).view(s.heads, 3, s.logits)
            norm = norm[:, 0].sum(0), norm[:, 1].sum(0), norm[:, 2]
        for start, part, sender in ((edges.start, grad_h[:, :, s.channels :], False),
                                    (edges.start_src, grad_h, True)):
            turn_back_kernel[(n,)](edges.by_src, start, edges.wigner, grad_turned, None, None, part,
                                   None, n_edges, n, edges.wigner.shape[1], *sizes, 1, sender,
                                   2 * s.channels, num_warps=max(1, s.channels // 64))
        grad_y, grad_both = by_degree_back(y, grad_h, both, degrees)
        grad_offset = one @ grad_h[0, :, s.channels :]
        together(h)
        return (grad, grad_y, None, None, None, *of_radial, grad_both, grad_offset, grad_project,
                one[: s.receivers] @ grad[0], grad_bias_1, grad_bias_2, *norm, *grads_1, *grads_2)


def geometry(model, graph) -> tuple:
    """Edges, the packed geometry of all edges and of those to probes."""
    edges = model._edges(graph)
    frames, directed = edge_frames(edges.vector), model._directed(edges.vector)
    module, m_max, n_edges, n = model.wigner, model.config.m_max, len(frames), graph.n_windows
    points, lanes = module.points.to(frames), triton.next_power_of_2(len(module.points))
    wigner = frames.new_empty(n_edges, wigner_at(module.l_max + 1, -m_max, m_max))
    wigner_kernel[_programs(n_edges, 16)](frames.contiguous(), directed[:, -1].contiguous(), points,
                                          module.inverse.to(frames), wigner, n_edges, module.l_max,
                                          m_max, len(points), lanes, 16)
    both = model.share(edges, n), nn.functional.pad(graph.species, (n, 0)), wigner
    return (edges, *(pack(some, *both) for some in (edges, edges.probes(len(graph.window)))))


def pack(edges, share: Tensor, species: Tensor, wigner: Tensor) -> Packed:
    """Edges with the offsets that sums without atomics need."""
    n_nodes, n_basis, device = len(edges.element), edges.basis.shape[1], edges.src.device
    ends = species[torch.stack([edges.src, edges.dst], dim=1)[edges.first]]
    one = torch.arange(n_basis, n_basis + 2 * MAX_SPECIES + 2, MAX_SPECIES + 1, device=device)
    last = n_basis + 2 * MAX_SPECIES + 2
    inputs = share.new_zeros(len(ends), -(-(last + 1) // 8) * 8)  # as matrix products want it
    inputs[:, :n_basis], inputs[:, last] = edges.basis, 1
    inputs.scatter_(1, ends + one, 1.0)
    each = torch.arange(max(n_nodes, len(ends)) + 1, device=device, dtype=torch.int32)
    nodes, kinds = each[: n_nodes + 1], (None,) * 3
    sorted_src, by_src = edges.src.int().sort(stable=True)  # half the passes of 64 bits
    start, start_src = (torch.searchsorted(x, nodes) for x in (edges.dst.int(), sorted_src))
    if edges.kind is not None:
        kind, by_kind = edges.kind.int().sort(stable=True)
        kinds = edges.kind, by_kind, torch.searchsorted(kind, each[: len(ends) + 1])
    return Packed(edges.src, edges.dst, edges.weight, share, torch.ones_like(edges.weight), inputs,
                  wigner, start, by_src, start_src, *kinds)


def network(model, graph, geometry: tuple) -> Tensor:
    """:meth:`x3mat.model.X3Mat.plain_network` with the kernels: contributions, (W, outputs)."""
    edges, packed, probes = geometry
    n_windows, c = graph.n_windows, model.config
    scale = torch.arange(1, 2 * c.l_max + 2, 2, device=edges.src.device).sqrt()
    scale = scale.repeat_interleave(c.channels)
    *radial, weight, bias = radial_parameters(model.degree_embedding, packed)
    x = Embed.apply(edges.element @ model.embedding, packed, (c.l_max, c.m_max), *radial,
                    weight * scale[:, None], bias * scale)
    for layer in model.blocks[:-1]:
        x = block(model, layer, x, len(edges.element), packed)
    x = block(model, model.blocks[-1], x, n_windows, probes)
    return model.readout(x[0], graph.told)


def radial_parameters(network, packed: Packed) -> list[Tensor]:
    """Of a :class:`x3mat.model.RadialNetwork`, for :func:`radial_weights`; first what its inputs
    are multiplied by, with rows of zeros where these have."""
    first, parts = network.distance, (network.sender, network.receiver)
    first = torch.cat([first.weight.T, *parts, first.bias[None]])
    first = nn.functional.pad(first, (0, 0, 0, packed.inputs.shape[1] - len(first)))
    return [first, *(p for k in (1, 3) for p in network.rest[k].parameters())]


def norm(x: Tensor, module) -> tuple[Tensor, Tensor]:
    gamma = x.new_empty(0, x.shape[2]) if module.gamma is None else module.gamma
    return Norm.apply(x, module.scalars.weight, module.scalars.bias, gamma, module.eps)


def block(model, layer, x: Tensor, receivers: int, packed: Packed) -> Tensor:
    """:class:`x3mat.model.Block`: (S, N, C) → (S_out, receivers, C)."""
    a, f, degrees = layer.attention, layer.feed_forward, model.degree_of_row
    s = Sizes(a.l_max, a.l_out, a.m_max, model.config.m_max, x.shape[2], a.heads,
              a.LOGIT_CHANNELS, receivers)
    first, second = a.first.linear, a.second.linear
    x, y = norm(x, layer.norm_attention)
    x = Attend.apply(
        x[: (a.l_out + 1) ** 2, :receivers], y, degrees, packed, s,
        *radial_parameters(a.radial, packed),
        torch.cat([a.of_sender.weight, a.of_receiver.weight], dim=2),
        a.of_sender.bias + a.of_receiver.bias, a.project.weight, a.project.bias,
        first[0].bias, second[0].bias, a.logit_norm.weight, a.logit_norm.bias, a.logit,
        *(w.weight for w in [*first, *second]))
    x, y = norm(x, layer.norm_feed_forward)
    expand = f.expand.weight if a.l_out else y.new_empty(0, *f.contract.weight.shape[:0:-1])
    return FeedForward.apply(x, y, degrees[: len(x)], f.gates.weight, f.gates.bias, expand,
                             f.contract.weight, f.contract.bias)
