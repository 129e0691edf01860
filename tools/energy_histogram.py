"""Baseline for uptakes in MOFs: a 2-D energy histogram and a multilayer perceptron.

A spherical probe of each gas is put on a grid of 1 Å over the cell. Counted is how often its
Lennard-Jones energy with the framework (UFF, Lorentz-Berthelot, within 12.8 Å) and the norm of the
gradient fall into bins of 2 kJ/mol from -30 to 0 and of 5 kJ/mol/Å from 0 to 30, with overflows:
17 x 7 numbers for each gas, as fractions of the grid. Source: K. Shi et al., "Two-dimensional
energy histograms as features for machine learning to predict adsorption in diverse nanoporous
materials", J. Chem. Theory Comput. 2023, 19, 4568, whose network this is, too: layers of 256, 128,
32 and 32 with ReLU, dropout after the first, Adam, mean squared error.

Network and time of stopping are chosen on the validation half; the test half is then predicted
once for each seed. Both splits of the application are used. Histograms are kept in a file: a run
that was killed goes on when called again. The result is
data/results/APPLICATION/energy_histogram.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import numba
import numpy as np
import torch
from intervals import of_mean
from scipy.spatial import cKDTree
from torch import nn
from tqdm import tqdm

from x3mat import results
from x3mat.applications import Application, application
from x3mat.crystal import Crystal, periodic_images
from x3mat_gcmc.forcefield import SYMBOLS, framework_parameters

EXAMPLES = """examples:
  X3MAT_DATA=folder python tools/energy_histogram.py mof-ch4n2
  X3MAT_DATA=folder python tools/energy_histogram.py mof-co2o2n2 --seeds 0 1 2
"""
#: Lennard-Jones parameters of gases as spheres, K and Å (B. E. Poling, J. M. Prausnitz,
#: J. P. O'Connell, The Properties of Gases and Liquids, 5th ed., 2001, appendix B).
PROBES = {"CO2": (195.2, 3.941), "N2": (71.4, 3.798), "O2": (106.7, 3.467), "CH4": (148.6, 3.758)}
CUTOFF, SPACING = 12.8, 1.0  # Å
BLOCK = 5  # grid points along the edge of a block, for which the atoms near are looked up once
KELVIN = 0.00831446  # kJ/mol
ENERGIES = np.arange(-30.0, 0.1, 2.0)  # kJ/mol
GRADIENTS = np.arange(0.0, 30.1, 5.0)  # kJ/mol/Å
NETWORKS = [{"width": w, "dropout": d} for w, d in product((128, 256), (0.2, 0.4))]
EPOCHS, PATIENCE, BATCH, RATE = 1000, 100, 32, 5e-4


@numba.njit(fastmath=True)
def field(points, images, epsilon, sigma):
    """Lennard-Jones energy (n,) and norm of its gradient (n,) at points (n, 3) from all images."""
    energy, norm = np.zeros(len(points)), np.zeros(len(points))
    for i in range(len(points)):
        e = gx = gy = gz = 0.0
        for j in range(len(images)):
            x, y = points[i, 0] - images[j, 0], points[i, 1] - images[j, 1]
            z = points[i, 2] - images[j, 2]
            square = max(x * x + y * y + z * z, 0.01)
            s6 = (sigma[j] * sigma[j] / square) ** 3
            near = 4 * epsilon[j] * s6 if square < CUTOFF * CUTOFF else 0.0
            slope = -6 * near * (2 * s6 - 1) / square
            e += near * (s6 - 1)
            gx += slope * x
            gy += slope * y
            gz += slope * z
        energy[i], norm[i] = e, np.sqrt(gx * gx + gy * gy + gz * gz)
    return energy, norm


def histogram(crystal: Crystal, gases: list[str]) -> np.ndarray:
    """Fractions of the grid in each bin, (gases · 17 · 7,)."""
    uff = framework_parameters("uff")
    known = np.array([[uff[SYMBOLS[z - 1]][k] for k in ("epsilon", "sigma")]
                      for z in crystal.species])  # fmt: skip
    atoms, images = periodic_images(crystal.lattice, crystal.frac_coords, CUTOFF)
    tree = cKDTree(images)
    n = np.ceil(np.linalg.norm(crystal.lattice, axis=1) / SPACING).astype(int)
    index = np.stack(np.unravel_index(np.arange(n.prod()), n), 1)
    block = np.unique(index // BLOCK, axis=0, return_inverse=True)[1]
    order = np.argsort(block, kind="stable")
    counts = np.zeros((len(gases), len(ENERGIES) + 1, len(GRADIENTS)))
    for part in np.split(order, np.cumsum(np.bincount(block))[:-1]):
        points = index[part] / n @ crystal.lattice
        middle = points.mean(0)
        reach = CUTOFF + np.linalg.norm(points - middle, axis=1).max()
        near = np.array(tree.query_ball_point(middle, reach), dtype=int)
        for k, gas in enumerate(gases):
            epsilon = np.sqrt(known[atoms[near], 0] * PROBES[gas][0]) * KELVIN
            sigma = (known[atoms[near], 1] + PROBES[gas][1]) / 2
            energy, norm = field(points, images[near], epsilon, sigma)
            place = (np.searchsorted(ENERGIES, energy, "right"),
                     np.searchsorted(GRADIENTS, norm, "right") - 1)
            np.add.at(counts[k], place, 1 / len(index))
    return counts.ravel()


def histograms(chosen: Application, names: list[str], gases: list[str], path: Path) -> np.ndarray:
    """Features of all crystals, (n, features); known ones are read from a file."""
    known: dict[str, list[float]] = {}
    if path.exists():
        known = dict(map(json.loads, path.read_text().split("\n")[:-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for name in tqdm([name for name in names if name not in known], "histograms"):
            known[name] = histogram(chosen.crystal(name, symprec=0.0), gases).tolist()
            file.write(json.dumps([name, np.round(known[name], 6).tolist()]) + "\n")
    return np.array([known[name] for name in names])


def fit(data: list[tuple[torch.Tensor, torch.Tensor]], seed: int, width: int, dropout: float):
    """Mean absolute errors (outputs,) on validation and test half, and predictions of the latter.

    ``data``: features and standardised targets of training set, validation and test half.
    """
    (x, y), (x_val, y_val), (x_test, _) = data
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1], width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 128),
            nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
            nn.Linear(32, y.shape[1]))  # fmt: skip
        optimizer, best = torch.optim.Adam(network.parameters(), RATE), (np.inf, 0, None)
        for epoch in range(EPOCHS):
            network.train()
            for part in torch.randperm(len(x), generator=generator).split(BATCH):
                optimizer.zero_grad()
                nn.functional.mse_loss(network(x[part]), y[part]).backward()
                optimizer.step()
            network.eval()
            with torch.no_grad():
                error = float((network(x_val) - y_val).abs().mean())
                if error < best[0]:
                    best = error, epoch, network(x_test)
            if epoch - best[1] > PATIENCE:
                break
    return best


def evaluate(x: np.ndarray, y: np.ndarray, parts: list[np.ndarray], seeds: list[int]) -> dict:
    """Choose a network by validation, then test it with each seed."""
    mean, std = y[parts[0]].mean(0), y[parts[0]].std(0)
    tensors = [(torch.tensor(x[p], dtype=torch.float32),
                torch.tensor((y[p] - mean) / std, dtype=torch.float32)) for p in parts]  # fmt: skip
    tried = [{**network, "validation": fit(tensors, seeds[0], **network)[0]}
             for network in tqdm(NETWORKS, "networks")]  # fmt: skip
    best = min(tried, key=lambda row: row["validation"])
    options = {key: best[key] for key in ("width", "dropout")}
    found = np.stack([fit(tensors, seed, **options)[2].numpy() * std + mean for seed in seeds])
    error = np.abs(found - y[parts[2]])  # (seeds, crystals, outputs)
    return {
        "networks_tried": tried, "test_mae": error.mean(), "test_mae_of_each_output":
        error.mean((0, 1)), "test_mae_of_each_seed": error.mean((1, 2)),
        "interval": of_mean(error.mean((0, 2))),
        "mae_of_the_mean_label": np.abs(y[parts[2]] - mean).mean(0), "n_test": error.shape[1],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", help="as x3mat data list names it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gases", nargs="+", choices=list(PROBES), help="default: all outputs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the histograms")
    args = parser.parse_args()
    start, chosen = time.perf_counter(), application(args.application)
    gases, labels, folds = args.gases or list(chosen.columns), chosen.labels(), chosen.folds()
    names = sorted({*folds[0].train, *folds[0].rest})
    x = histograms(chosen, names, gases, args.runs / chosen.name / "histograms.jsonl")
    y, place = labels.loc[names, list(chosen.columns)].to_numpy(), {n: i for i, n in
                                                                    enumerate(names)}  # fmt: skip
    splits = [evaluate(x, y, [np.array([place[n] for n in part])
                              for part in (fold.train, *fold.halves)], args.seeds)
              for fold in folds]  # fmt: skip
    results.write(
        f"{chosen.name}/energy_histogram.json",
        {"application": chosen.name, "unit": chosen.unit, "columns": chosen.columns,
         "probes": {gas: PROBES[gas] for gas in gases}, "splits": splits},
        seed=args.seeds, command=" ".join(["python tools/energy_histogram.py", *sys.argv[1:]]),
        wall_s=time.perf_counter() - start,
    )  # fmt: skip
    for fold, split in enumerate(splits):
        print(f"split {fold}: test MAE {split['test_mae']:.4f} {chosen.unit}")


if __name__ == "__main__":
    main()
