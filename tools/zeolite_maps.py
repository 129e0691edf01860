"""Site maps of zeolites against the N2 density of our own GCMC runs.

For every zeolite with a density in data/zeolite-n2/density: contributions on a grid of 1 Å and on
the model's own grid; the density averaged over balls of several radii around the same points; and
Spearman and Pearson correlations of the two over all grid points. "held_out" are only the members
of the ensemble that were not trained on the zeolite, "all" is the whole ensemble. Controls, which
know nothing of adsorption: untrained networks (several seeds), the number of atoms in the window,
and the distance to the nearest atom. As a ceiling: the Boltzmann factor of one N2 molecule in the
force field of the simulations, averaged over the same balls.

Writes data/results/zeolite-n2/maps.json and maps.npz (fields on the 1 Å grid), and with --figure
the picture of the README.

With --unseen the same is done, on one grid, with the networks alone that never saw a zeolite. The
densities of data/zeolite-n2/density-fold-0 are of the zeolites that fold 0 holds out; "paired" are
then medians of the differences to the controls, zeolite by zeolite. Zeolites without gas are named
in "empty" and left out.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from x3mat import databases, maps, paths, results
from x3mat.applications import application
from x3mat.crystal import Crystal
from x3mat.model import X3Mat
from x3mat.predict import Ensemble, load_model
from x3mat.sampling import Windows
from x3mat_book import densities
from x3mat_book.densities import grams_per_litre

EXAMPLES = """examples:
  python tools/zeolite_maps.py                       all zeolites with a density
  python tools/zeolite_maps.py --codes LTA ASV --output zeolite-n2/maps-test
  python tools/zeolite_maps.py --unseen --step 1.5 --seeds 3 \\
      --densities data/zeolite-n2/density-fold-0 --output zeolite-n2/maps-fold-0
  python tools/zeolite_maps.py --figure book/_static/site_map_lta.png --only-figure
"""
RADII = (6.0, 4.0, 3.0, 2.0)  # Å
STEP = 1.0  # Å
DRAWN = ("LTA", "ASV")
N2 = 28.0134  # g/mol
N_BOOTSTRAP = 2000
CONTROLS = (  # and the signs with which they rise with the density
    ("untrained", "spearman_abs", 1), ("atom_count", "spearman", -1),
    ("nearest_atom", "spearman", 1),
)  # fmt: skip


def untrained(ensemble: Ensemble, seed: int) -> X3Mat:
    """A network like the members, with their constants, before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = X3Mat(ensemble.config)
    for name in ("degree", "shift", "scale"):
        getattr(model, name).copy_(getattr(ensemble.members[0], name))
    return model.eval()


def boltzmann(crystal: Crystal) -> np.ndarray:
    """exp(−U / k_B T) of one N2 molecule at 298 K on a grid, U minimised over orientations."""
    from pockets import energy_grid

    return np.exp(-np.clip(energy_grid(crystal, spacing=0.5), -5000, None) / 298.0)


def load_density(code: str, folder: Path) -> np.ndarray:
    """Density of N2, g per litre."""
    with np.load(folder / f"{code}.npz") as file:
        return file["density"].astype(float) * grams_per_litre(N2, 1.0)


def ball_average(
    windows: Windows, crystal: Crystal, field: np.ndarray, radius: float, origin: float
) -> np.ndarray:
    """Mean over the ball around each window's centre, (W,), freed of noise by symmetry."""
    points = densities.grid_points(windows)
    average = densities.window_average(field, crystal.lattice, points, radius, origin)
    return densities.orbit_mean(windows, average)


def nearest_atom(windows: Windows) -> np.ndarray:
    """Distance from each centre to the nearest atom, (W,); the radius where there is none."""
    distance = np.append(np.linalg.norm(windows.positions, axis=1), np.inf)
    nearest = np.minimum.reduceat(distance, windows.ptr[:-1])
    return np.where(windows.atoms_per_window > 0, nearest, windows.radius)


def compare(
    code: str, ensemble: Ensemble, seeds: list[int], step: float,
    density: np.ndarray, factor: np.ndarray,
) -> tuple[dict, dict]:
    """Correlations of all maps of one zeolite with its density, and the fields."""
    crystal = databases.iza(code)
    windows = ensemble.windows(crystal, step)
    members = ensemble.contributions(windows)
    unseen = [i for i, about in enumerate(ensemble.about) if code not in about["train"]]
    controls = [untrained(ensemble, seed).contributions(windows)[:, 0].double().numpy()
                for seed in seeds]  # fmt: skip
    fields = {"all": members.mean(0), "atom_count": windows.atoms_per_window.astype(float),
              "nearest_atom": nearest_atom(windows)}  # fmt: skip
    if unseen:
        fields["held_out"] = members[unseen].mean(0)
    if len(unseen) == len(members):
        del fields["all"]
    out: dict = {"n_points": windows.n_windows, "n_orbits": windows.n_orbits,
                 "n_held_out": len(unseen)}  # fmt: skip
    for radius in RADII:
        reference = ball_average(windows, crystal, density, radius, 0.5)
        found = {name: densities.correlations(windows, field, reference)
                 for name, field in fields.items()}
        found["boltzmann"] = densities.correlations(
            windows, ball_average(windows, crystal, factor, radius, 0.0), reference
        )
        each = [densities.correlations(windows, field, reference) for field in controls]
        found["untrained"] = {
            key: float(np.mean([c[key] for c in each])) for key in ("spearman", "pearson")
        } | {"spearman_abs": float(np.mean([abs(c["spearman"]) for c in each])),
             "spearman_of_each": [c["spearman"] for c in each]}  # fmt: skip
        out[f"r{radius:g}"] = found
    pairs = list(combinations(unseen or range(len(members)), 2))
    out["between_members"] = float(np.mean(
        [densities.correlations(windows, members[i], members[j])["spearman"] for i, j in pairs]
    )) if pairs else None  # fmt: skip
    kept = {name: windows.expand(field).astype(np.float32)
            for name, field in {**fields, "untrained": controls[0]}.items()}
    return out, {**kept, "origin": windows.origin}


def uptakes(code: str, ensemble: Ensemble, density: np.ndarray) -> dict:
    """Simulated and predicted uptake, g per litre."""
    windows = ensemble.windows(databases.iza(code))
    values = ensemble.values(windows)
    unseen = [i for i, about in enumerate(ensemble.about) if code not in about["train"]]
    return {
        "label": float(application("zeolite-n2").labels().loc[code, "n2_g_L"]),
        "mean_density": float(density.mean()),
        "predicted_all": float(values.mean()),
        "predicted_held_out": float(values[unseen].mean()) if unseen else None,
    }  # fmt: skip


def strongest(code: str, ensemble: Ensemble, density: np.ndarray) -> dict:
    """The strongest site on the 1 Å grid, by the members that never saw the zeolite if any."""
    crystal = databases.iza(code)
    seen_by_all = ensemble.trained_on(code) == len(ensemble.members)
    used = ensemble if seen_by_all else ensemble.without(code)
    site = maps.explain(crystal, used, step=STEP).sites[0]
    here = np.array([site.x, site.y, site.z])
    fine = densities.window_average(density, crystal.lattice, here, 1.0)
    return {"value": site.value, "std": site.std, "frac": here.tolist(), "kind": site.kind,
            "multiplicity": site.multiplicity, "n_atoms": site.n_atoms, "nearest": site.nearest,
            "distance": site.distance, "density_g_L": float(fine)}  # fmt: skip


def medians(zeolites: dict) -> dict:
    """Median Spearman correlation over the zeolites with a 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    out: dict = {}
    for radius in (f"r{r:g}" for r in RADII):
        out[radius] = {}
        for name in ("held_out", "all", "untrained", "atom_count", "nearest_atom", "boltzmann"):
            key = "spearman_abs" if name == "untrained" else "spearman"
            values = np.array([z[radius][name][key] for z in zeolites.values()
                               if name in z[radius]])  # fmt: skip
            if len(values) == 0:
                continue
            draws = np.median(values[rng.integers(len(values), size=(N_BOOTSTRAP, len(values)))], 1)
            out[radius][name] = {"median": float(np.median(values)), "n": len(values),
                                 "interval": np.quantile(draws, [0.025, 0.975]).tolist()}
    return out


def paired(zeolites: dict) -> dict:
    """By how much held-out maps exceed the controls, each with the sign that it can be given."""
    rng = np.random.default_rng(0)
    out: dict = {}
    for radius in (f"r{r:g}" for r in RADII):
        out[radius] = {}
        for name, key, sign in CONTROLS:
            values = np.array([z[radius]["held_out"]["spearman"] - sign * z[radius][name][key]
                               for z in zeolites.values()])  # fmt: skip
            draws = np.median(values[rng.integers(len(values), size=(N_BOOTSTRAP, len(values)))], 1)
            out[radius][name] = {"median": float(np.median(values)),
                                 "n_better": int((values > 0).sum()), "n": len(values),
                                 "interval": np.quantile(draws, [0.025, 0.975]).tolist()}
    return out


def draw(path: Path, record: str, folder: Path, code: str = "LTA") -> None:
    """Density, its average over windows, and the site map, in one plane of the cell."""
    import matplotlib.pyplot as plt

    from x3mat_book.viz import plot_slice

    crystal = databases.iza(code)
    density = load_density(code, folder)
    with np.load(paths.results(f"{record}.npz")) as file:
        name = f"{code}_held_out" if f"{code}_held_out" in file else f"{code}_all"
        grid, origin = file[name].astype(float), file[f"{code}_origin"]
    panels = (
        ("simulated N₂ density",
         lambda x: densities.window_average(density, crystal.lattice, x, 0.7).clip(0)),
        ("averaged over windows of 6 Å",
         lambda x: densities.window_average(density, crystal.lattice, x, 6.0)),
        ("site map of X(3)mat", lambda x: maps.interpolate(grid, (x - origin) * grid.shape)),
    )  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for ax, (title, field), cmap in zip(axes, panels, ("magma", "viridis", "viridis"), strict=True):
        image = plot_slice(ax, crystal, field, height=0.5, slab=3.6, cmap=cmap)
        figure.colorbar(image, ax=ax, shrink=0.85, label="g/L")
        ax.set_title(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path)


def unseen_alone(options: argparse.Namespace, ensemble: Ensemble, codes: list[str]) -> dict:
    """All zeolites with gas, each by the networks that never saw it, on one grid."""
    zeolites, empty = {}, []
    for code in tqdm(codes):
        density = load_density(code, options.densities)
        if not density.any():
            empty.append(code)
            continue
        zeolites[code], _ = compare(code, ensemble.without(code), list(range(options.seeds)),
                                    options.step, density, boltzmann(databases.iza(code)))
    return {"empty": empty, "median": medians(zeolites), "paired": paired(zeolites),
            "zeolites": zeolites}  # fmt: skip


def on_both_grids(options: argparse.Namespace, ensemble: Ensemble, codes: list[str]) -> dict:
    """All zeolites on a fine grid, whose fields of some are kept, and on the model's own."""
    zeolites, own_grid, fields = {}, {}, {}
    seeds = list(range(options.seeds))
    for code in tqdm(codes):
        density = load_density(code, options.densities)
        given = density, boltzmann(databases.iza(code))
        zeolites[code], kept = compare(code, ensemble, seeds, options.step, *given)
        own_grid[code], _ = compare(code, ensemble, seeds, ensemble.config.step, *given)
        zeolites[code] |= {"uptake_g_L": uptakes(code, ensemble, density),
                           "strongest": strongest(code, ensemble, density)}  # fmt: skip
        if code in DRAWN:
            fields |= {f"{code}_{name}": field for name, field in kept.items()}
    np.savez_compressed(paths.results(f"{options.output}.npz"), **fields)
    return {"own_step": ensemble.config.step, "median": medians(zeolites),
            "median_own_grid": medians(own_grid), "zeolites": zeolites, "own_grid": own_grid}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = paths.data() / "zeolite-n2" / "density"
    parser.add_argument("--model", default="zeolite-n2")
    parser.add_argument("--densities", type=Path, default=folder)
    parser.add_argument("--codes", nargs="+", help="default: all with a density")
    parser.add_argument("--unseen", action="store_true",
                        help="only networks that never saw the zeolite, on one grid")  # fmt: skip
    parser.add_argument("--step", type=float, default=STEP, help="of the fine grid, Å (default 1)")
    parser.add_argument("--seeds", type=int, default=5, help="number of untrained networks")
    parser.add_argument("--output", default="zeolite-n2/maps", help="below data/results")
    parser.add_argument("--figure", type=Path, help="also draw LTA into this file")
    parser.add_argument("--only-figure", action="store_true", help="from results already there")
    options = parser.parse_args(argv)
    if not options.only_figure:
        started = time.perf_counter()
        torch.set_num_threads(1)
        ensemble = replace(load_model(options.model), workers=os.cpu_count() or 1)
        codes = options.codes or sorted(p.stem for p in options.densities.glob("*.npz"))
        compared = unseen_alone if options.unseen else on_both_grids
        found = compared(options, ensemble, codes)
        payload = {
            "model": options.model, "n_members": len(ensemble.members), "radii": list(RADII),
            "window_radius": ensemble.config.radius, "step": options.step,
            "n_untrained": options.seeds, "n_zeolites": len(found["zeolites"]), **found,
        }  # fmt: skip
        results.write(f"{options.output}.json", payload, seed=list(range(options.seeds)),
                      command=shlex.join(["python", "tools/zeolite_maps.py", *argv]),
                      wall_s=time.perf_counter() - started)  # fmt: skip
    if options.figure:
        draw(options.figure, options.output, options.densities)


if __name__ == "__main__":
    main()
