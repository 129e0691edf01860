"""Untrained networks as checkpoints, for the tests of what is done with trained ones."""

from __future__ import annotations

from pathlib import Path

import torch

from x3mat.model import X3Mat, X3MatConfig, save_checkpoint

CONFIG = X3MatConfig(l_max=1, m_max=1, channels=8, heads=2, layers=1, feed_forward=8,
                     radial_functions=8, radial_hidden=8)  # fmt: skip
ABOUT = {
    "application": "zeolite-n2", "property": "N2 uptake", "unit": "g/L",
    "conditions": "298 K, 1 bar", "train": ["CHA", "SOD"],
    "domain": {"species": [8, 14], "density": [1.0, 2.0], "void_fraction": [0.1, 0.7],
               "largest_cavity": [2.0, 12.0]},
}  # fmt: skip


def write(path: Path, seed: int = 0, config: X3MatConfig = CONFIG, **about) -> Path:
    """A checkpoint of an untrained network whose contributions vary from window to window."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = X3Mat(config)
        model.shift.fill_(4.0)
        model.scale.fill_(20.0)
        model.degree.copy_(torch.tensor([10.0, 5.0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, {**ABOUT, "seed": seed, **about})
    return path
