"""Networks that differ from X3Mat in one thing, to measure what that thing buys.

usual       X3Mat as it is.
uniform     no attention: all logits are zero, so that a neighbour's weight in the mean follows from
            its distance alone, α_ij = u_ij / (1 + Σ_k u_ik).
se3         equivariant under rotations only, not under reflections: its SO(2) convolutions have
            the sine half that O(3) forbids (eSCN, Eq. 8).
window      atoms hear the atoms of their window only (``encoding``), as in the paper.
crystal     all windows of a crystal share its atoms, which hear their neighbours in the crystal.

tools/convergence.py trains them. A function other than the mean of contributions may make the
prediction, see predicting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from x3mat import training
from x3mat.model import SO2Convolution, X3Mat, X3MatConfig

NAMES = "usual", "uniform", "se3", "window", "crystal"


def network(variant: str, config: X3MatConfig) -> X3Mat:
    """An untrained network of that name; the last two are named in ``config``."""
    return {"uniform": UniformX3Mat, "se3": SE3X3Mat}.get(variant, X3Mat)(config)


class UniformX3Mat(X3Mat):
    """Without attention: logits are constants, not learned."""

    def __init__(self, config: X3MatConfig):
        super().__init__(config)
        for block in self.blocks:
            logit = torch.zeros_like(block.attention.logit)
            del block.attention.logit
            block.attention.register_buffer("logit", logit)


class SE3Convolution(SO2Convolution):
    """SO2Convolution with both halves: y_m = W1 x_m − W2 x_−m, y_−m = W1 x_−m + W2 x_m.

    Both start with half of the variance. Source: eSCN (Passaro & Zitnick 2023), Eq. 8.
    """

    def __init__(
        self, rows_in: Sequence[int], rows_out: Sequence[int], channels: int, extra: int = 0
    ):
        super().__init__(rows_in, rows_out, channels, extra)
        both = list(zip(rows_in, rows_out, strict=True))[1:]
        self.sine = nn.ModuleList(nn.Linear(a * channels, b * channels, False) for a, b in both)
        for half in (*self.linear[1:], *self.sine):
            nn.init.normal_(half.weight, std=math.sqrt(1 / half.in_features))

    def forward(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        out, extra = super().forward(blocks)
        for m, (x, sine) in enumerate(zip(blocks[1:], self.sine, strict=True), start=1):
            plus, minus = sine(x.flatten(2)).unbind(1)
            out[m] = out[m] + torch.stack([-minus, plus], 1).view_as(out[m])
        return out, extra


class SE3X3Mat(X3Mat):
    """With SE3Convolution; by the plain layers on all devices."""

    def __init__(self, config: X3MatConfig):
        super().__init__(config)
        for block in self.blocks:
            a = block.attention
            rows_out = [a.l_out + 1 - m for m in range(a.m_max + 1)]
            extra = (1 + a.l_max) * config.channels + a.n_logits
            a.first = SE3Convolution(a.sizes, [a.l_max, *a.sizes[1:]], config.channels, extra)
            a.second = SE3Convolution(a.sizes, rows_out, config.channels)
            for scalars in (a.first.linear[0], a.second.linear[0]):  # as X3Mat begins
                nn.init.normal_(scalars.weight, std=math.sqrt(2 / scalars.in_features))

    def _kernels(self, positions: Tensor) -> None:
        return None


@contextmanager
def predicting(function: Callable[..., Tensor] | None) -> Iterator[None]:
    """Train with function(model, graph, share, crystal, n) as prediction of n crystals, if one is
    given."""
    before = training.predict_mean, training.PaddedMean.forward

    def predict_mean(model: X3Mat, batch: training.Batch, max_atoms: int) -> Tensor:
        return function(model, batch.graph(), batch.share, batch.crystal, len(batch.target))

    def forward(self, positions, species, window, src, dst, crystal, share, *shared) -> Tensor:
        graph = training.WindowGraph(positions, species, window, src, dst, len(share), *shared)
        return function(self.model, graph, share, crystal, self.crystals)

    if function:
        training.predict_mean, training.PaddedMean.forward = predict_mean, forward
    try:
        yield
    finally:
        training.predict_mean, training.PaddedMean.forward = before
