"""Windows of all IZA frameworks on plain, aligned and automatic grids, and the exactness of orbits.

For every framework: points, orbits, atoms and seconds of each kind of grid (one core, the crystal
read before). Then an untrained network in float64 (few channels, l_max = 2) compares the
contributions of windows that symmetry calls equal:

- if the grid has at most --all points, every window is computed and the weighted mean over orbits
  is compared with the plain mean over all points;
- else some orbits are drawn at random, and of each the representative and some other members.

Writes data/results/grids.json and data/results/grids.csv (one row per framework).

    python tools/grids.py
"""

from __future__ import annotations

import argparse
import csv
import math
import time

import numpy as np
import torch

from x3mat import databases, paths, results
from x3mat.crystal import Crystal
from x3mat.model import X3Mat, X3MatConfig
from x3mat.sampling import Windows, cut_spheres, sample_windows

KINDS = ("plain", "aligned", "auto")
CONFIG = X3MatConfig(l_max=2, m_max=2, channels=8, heads=2, layers=2, cutoff=2.5,
                     radial_functions=8, radial_hidden=8, feed_forward=8)  # fmt: skip


def contributions(net: X3Mat, crystal: Crystal, centers: np.ndarray) -> np.ndarray:
    """Contributions, (W,), of windows around given fractional coordinates."""
    ptr, positions, atom = (
        torch.as_tensor(a) for a in cut_spheres(crystal, centers, net.config.radius)
    )
    species = torch.as_tensor(crystal.species)[atom]
    with torch.no_grad():
        return torch.cat([
            net(positions[ptr[a] : ptr[b]], species[ptr[a] : ptr[b]], ptr[a : b + 1] - ptr[a])
            for a, b in ((i, min(i + 100, len(centers))) for i in range(0, len(centers), 100))
        ])[:, 0].numpy()  # fmt: skip


def grid_points(windows: Windows, index: np.ndarray) -> np.ndarray:
    """Fractional coordinates of grid points given by their number."""
    k = np.stack(np.unravel_index(index, windows.grid), axis=1)
    return k / np.array(windows.grid) + windows.origin


def deviation(
    net: X3Mat, crystal: Crystal, windows: Windows, limit: int, orbits: int, members: int, rng
) -> dict:
    """Largest difference within orbits, and of the two means where all windows are computed."""
    if windows.n_windows <= limit:
        every = contributions(net, crystal, grid_points(windows, np.arange(windows.n_windows)))
        kept = contributions(net, crystal, windows.centers)
        mean = abs(windows.weights @ kept / windows.n_windows - every.mean())
        return {"compared": len(every), "mean_deviation": mean, "spread": every.std(),
                "orbit_deviation": np.abs(kept[windows.orbit] - every).max()}  # fmt: skip
    drawn = rng.choice(windows.n_orbits, min(orbits, windows.n_orbits), replace=False)
    points = [rng.permutation(np.flatnonzero(windows.orbit == w))[:members] for w in drawn]
    kept = contributions(net, crystal, windows.centers[drawn])
    every = contributions(net, crystal, grid_points(windows, np.concatenate(points)))
    expected = np.repeat(kept, [len(p) for p in points])
    return {"compared": len(every), "mean_deviation": math.nan, "spread": every.std(),
            "orbit_deviation": np.abs(every - expected).max()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", nargs="*", help="IZA codes (default: all)")
    parser.add_argument("--all", type=int, default=300, help="grid points to compute all of")
    parser.add_argument("--orbits", type=int, default=16, help="orbits drawn on larger grids")
    parser.add_argument("--members", type=int, default=4, help="points drawn of each such orbit")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the draws")
    parser.add_argument("--out", default="grids", help="name below data/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(options.seed)
    net = X3Mat(CONFIG).eval()
    started, rows = time.perf_counter(), []
    for number, code in enumerate(options.codes or databases.iza_codes()):
        crystal = databases.iza(code)
        row = {"code": code, "space_group": crystal.space_group, "n_atoms": crystal.n_atoms,
               "operations": len(crystal.rotations),
               "improper": int((np.linalg.det(crystal.rotations) < 0).sum())}  # fmt: skip
        for kind in KINDS:
            begin = time.process_time()
            windows = sample_windows(crystal, grid=kind)
            row |= {f"{kind}_seconds": time.process_time() - begin,
                    f"{kind}_grid": "x".join(map(str, windows.grid)),
                    f"{kind}_points": windows.n_windows, f"{kind}_orbits": windows.n_orbits}
        sizes = np.repeat(windows.atoms_per_window, windows.weights)
        row |= {"atoms_min": sizes.min(), "atoms_median": np.median(sizes),
                "atoms_max": sizes.max(), "empty": int((sizes == 0).sum())}  # fmt: skip
        rng = np.random.default_rng([options.seed, number])
        begin = time.process_time()
        row |= deviation(net, crystal, windows, options.all, options.orbits, options.members, rng)
        row["exactness_seconds"] = time.process_time() - begin
        rows.append(row)
        print(f"{code} {row['auto_points']} points, {row['auto_orbits']} orbits, "
              f"deviation {row['orbit_deviation']:.1e}", flush=True)  # fmt: skip
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    whole = np.isfinite(column["mean_deviation"].astype(float))
    summary = {
        "frameworks": len(rows), "radius": 6.0, "step": 2.0,
        "grids": {kind: {
            "points": int(column[f"{kind}_points"].sum()),
            "orbits": int(column[f"{kind}_orbits"].sum()),
            "reduction": column[f"{kind}_points"].sum() / column[f"{kind}_orbits"].sum(),
            "median_reduction": float(np.median(column[f"{kind}_points"]
                                                / column[f"{kind}_orbits"])),
            "seconds": column[f"{kind}_seconds"].sum(),
        } for kind in KINDS},
        "capped": [r["code"] for r in rows if r["auto_grid"] != r["aligned_grid"]],
        "median_growth": float(np.median(column["aligned_points"] / column["plain_points"])),
        "with_improper_operations": int((column["improper"] > 0).sum()),
        "atoms_per_window": {"min": int(column["atoms_min"].min()),
                             "median_of_medians": float(np.median(column["atoms_median"])),
                             "max": int(column["atoms_max"].max())},
        "frameworks_with_empty_windows": int((column["empty"] > 0).sum()),
        "exactness": {
            "max_deviation": column["orbit_deviation"].max(),
            "max_mean_deviation": column["mean_deviation"][whole].max(initial=0.0),
            "max_relative_deviation": (column["orbit_deviation"] / column["spread"]).max(),
            "median_spread": float(np.median(column["spread"])),
            "frameworks_all_windows": int(whole.sum()),
            "frameworks_random_orbits": int((~whole).sum()),
            "all_up_to_points": options.all, "orbits_drawn": options.orbits,
            "members_drawn": options.members, "windows_compared": int(column["compared"].sum()),
            "dtype": "float64", "model": vars(CONFIG),
        },
    }  # fmt: skip
    path = paths.results(f"{options.out}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: ("" if v != v else f"{v:.3g}") if isinstance(v, float) else v
             for k, v in row.items()} for row in rows
        )  # fmt: skip
    command = "python tools/grids.py" + "".join(
        f" --{name} {value}" for name, value in vars(options).items()
        if name not in ("codes", "out") and value != parser.get_default(name)
    )  # fmt: skip
    results.write(f"{options.out}.json", summary, seed=options.seed, command=command,
                  wall_s=time.perf_counter() - started)  # fmt: skip


if __name__ == "__main__":
    main()
