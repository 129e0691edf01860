"""N2 uptakes of CoRE MOF crystals at 298 K and 1 bar against published ones of the same crystals.

The published ones (application mof-co2o2n2, read from the folder that X3MAT_DATA names) are of
another program; the file that has them does not state force field, charges or temperature. Crystals
are those of at most 500 atoms whose charges can be predicted, in one random order. Each is
simulated with predicted charges (x3mat_gcmc.charges) and without any. Rows are appended to
rows.jsonl below --runs, so that it may be killed and called again: seconds for a crystal and core.

The result is data/results/gcmc/published-n2.json: how both kinds agree with the published uptakes,
and with one another. Published uptakes are not ours to show; instead of pairs there are counts of
how many crystals fall where.

examples:
  X3MAT_DATA=folder python tools/published_uptakes.py --limit 300
  X3MAT_DATA=folder python tools/published_uptakes.py --limit 300 --seconds 600
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import gcmc_checks
import numpy as np
from tqdm import tqdm

from x3mat import results
from x3mat.applications import application
from x3mat.errors import X3MatError
from x3mat_gcmc import Framework, GCMCSettings, gcmc, shards
from x3mat_gcmc.charges import with_predicted_charges

SETTINGS = GCMCSettings(equilibration=200, cycles=600, replicas=2)
KINDS = {"predicted": "cif", "none": "none"}  # how charges are called here and in the settings
TOGETHER = 6  # crystals
EDGES = np.round(np.geomspace(0.01, 10, 31), 5)  # mol/kg


def crystals(names: list[str], known: set[str]) -> list[Framework]:
    """Frameworks of some names with predicted charges; those that are known or refused left out."""
    found = []
    for name in names:
        if name in known:
            continue
        try:
            crystal = application("mof-co2o2n2").crystal(name, symprec=0.0)
            bare = Framework(crystal.lattice, crystal.species, crystal.frac_coords, None, name)
            if crystal.n_atoms <= gcmc_checks.MOST_ATOMS:
                found.append(with_predicted_charges(bare))
        except X3MatError:
            continue
    return found


def agreement(x: np.ndarray, y: np.ndarray) -> dict:
    """How x agrees with y, in mol/kg, and counts of pairs between EDGES: [of y, of x, n]."""
    counts, _, _ = np.histogram2d(*(np.clip(v, EDGES[0], EDGES[-1]) for v in (y, x)), bins=EDGES)
    i, j = np.nonzero(counts)
    ratio = np.log(x / y)
    return {
        "pearson": np.corrcoef(x, y)[0, 1], "pearson_of_logarithms": np.corrcoef(
            np.log(x), np.log(y))[0, 1], "mean_difference": (x - y).mean(),
        "mae": np.abs(x - y).mean(), "median_ratio": np.exp(np.median(ratio)),
        "ratio_quartiles": np.exp(np.quantile(ratio, [0.25, 0.75])),
        "n_within_10_percent": int((np.abs(x / y - 1) <= 0.1).sum()),
        "counts": np.stack([i, j, counts[i, j].astype(int)], 1),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=300, help="crystals (default 300)")
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop by then")
    parser.add_argument("--runs", type=Path, default=Path("runs/published-n2"))
    args = parser.parse_args()
    start, file = time.perf_counter(), args.runs / "rows.jsonl"
    labels = application("mof-co2o2n2").labels().N2
    names = np.random.default_rng(0).permutation(sorted(labels.index[labels > 0])).tolist()
    with tqdm(total=args.limit, unit="crystal") as bar:
        for k in range(0, len(names), TOGETHER):
            rows = shards.read_rows(file)
            bar.update(len(rows) - bar.n)
            if len(rows) >= args.limit or time.perf_counter() - start > args.seconds:
                break
            part = crystals(names[k : k + TOGETHER], {row["name"] for row in rows})
            found = {kind: gcmc(part, replace(SETTINGS, charges=charges))
                     for kind, charges in KINDS.items()}  # fmt: skip
            new = []
            for framework, *pair in zip(part, *found.values(), strict=True):
                if any(isinstance(result, X3MatError) for result in pair):
                    continue
                loadings = [result.loadings["N2"] for result in pair]
                new.append({
                    "name": framework.name, "seconds": sum(result.seconds for result in pair),
                    **{kind: [x.mol_per_kg, x.error_mol_per_kg]
                       for kind, x in zip(KINDS, loadings, strict=True)},
                })  # fmt: skip
            shards.append(file, new)
    rows = [r for r in shards.read_rows(file)[: args.limit]
            if min(r[kind][0] for kind in KINDS) > 0]  # fmt: skip
    values = {kind: np.array([row[kind][0] for row in rows]) for kind in KINDS}
    published = labels[[row["name"] for row in rows]].to_numpy()
    payload = {
        "gas": "N2", "settings": asdict(SETTINGS), "n": len(rows), "edges_mol_per_kg": EDGES,
        "median_relative_error": {kind: np.median([row[kind][1] / row[kind][0] for row in rows])
                                  for kind in KINDS},
        "mean_mol_per_kg": {kind: v.mean() for kind, v in values.items()},
        "against_published": {kind: agreement(v, published) for kind, v in values.items()},
        "predicted_against_none": agreement(values["predicted"], values["none"]),
    }  # fmt: skip
    results.write(
        "gcmc/published-n2.json", payload, seed=SETTINGS.seed,
        wall_s=sum(row["seconds"] for row in rows),
        command=f"python tools/published_uptakes.py --limit {args.limit}",
    )  # fmt: skip
    for kind, found in payload["against_published"].items():
        print(kind, {k: np.round(v, 3).tolist() for k, v in found.items() if k != "counts"})


if __name__ == "__main__":
    main()
