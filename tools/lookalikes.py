"""What a look-alike in the training set is worth: the same crystals, predicted with and without.

Networks were trained on two splits of an application: fold 0 keeps near-duplicates together (see
tools/mof_split.py), fold 1 is random. Some crystals are in the rest, validation or test, of both.
Of these, some have a near-duplicate in the training set of fold 1, and none in that of fold 0.
Their gain,

    mean |error| of the networks of fold 0 - mean |error| of the networks of fold 1,

is compared with that of the crystals that have one in neither: the difference is what look-alikes
buy. Errors are means over the seeds and outputs, and intervals hold 95 % of bootstraps of groups
of near-duplicates. The validation halves chose hyper-parameters only.

Groups are found anew, from the crystals, in half a minute or one. The result is
data/results/<application>/lookalikes.json.

examples:
  python tools/lookalikes.py mof-n2
  python tools/lookalikes.py mof-co2n2
  X3MAT_DATA=folder python tools/lookalikes.py qmof-gap
"""

from __future__ import annotations

import argparse
import time

import mof_split
import numpy as np
import pandas as pd
from tqdm import tqdm

from x3mat import paths, results
from x3mat.applications import application

DRAWS = 10_000


def errors(name: str, fold: int) -> pd.Series:
    """Mean absolute error of each crystal of a fold's rest, over seeds and outputs."""
    labels, columns = application(name).labels(), list(application(name).columns)
    files = sorted((paths.results(name) / "runs").glob(f"fold{fold}-seed*.json"))
    each = []
    for file in files:
        rows = results.read_json(file)["predictions"]
        found = pd.DataFrame([p["predicted"] for p in rows], [p["name"] for p in rows])
        each.append(np.abs(found - labels.loc[found.index, columns].to_numpy()).mean(axis=1))
    return pd.concat(each, axis=1).mean(axis=1)


def groups(name: str) -> pd.Series:
    """Number of the group of near-duplicates of each crystal."""
    crystals = mof_split.crystals_of(name)
    hashes = [mof_split.graph_hashes(atoms) for atoms in tqdm(crystals.values(), "graphs")]
    return pd.Series(mof_split.groups(hashes), list(crystals))


def interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, [0.025, 0.975]).tolist()


def compared(table: pd.DataFrame, seed: int = 0) -> dict:
    """Gains of crystals with and without a look-alike in the training set, and their difference.

    ``table`` has a row for each crystal: ``group``, ``known`` (has one) and the errors ``before``
    and ``after``.
    """
    rng, out, drawn = np.random.default_rng(seed), {}, []
    for known in (True, False):
        part = table[table.known == known].assign(gain=lambda t: t.before - t.after)
        sums = part.groupby("group").gain.agg(["sum", "count"]).to_numpy()
        picked = sums[rng.integers(len(sums), size=(DRAWS, len(sums)))].sum(1)
        drawn.append(picked[:, 0] / picked[:, 1])
        out["with" if known else "without"] = {
            "n": len(part), "groups": len(sums), "mae_fold0": part.before.mean(),
            "mae_fold1": part.after.mean(), "gain": part.gain.mean(),
            "interval": interval(drawn[-1])}  # fmt: skip
    difference = out["with"]["gain"] - out["without"]["gain"]
    return {**out, "difference": difference, "interval": interval(drawn[0] - drawn[1])}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", choices=["mof-n2", "mof-co2n2", "qmof-gap"])
    name, start = parser.parse_args().application, time.perf_counter()
    group, (kept, mixed) = groups(name), application(name).folds()
    seen = [set(group[list(fold.train)]) for fold in (kept, mixed)]
    before, after = errors(name, 0), errors(name, 1)
    table = pd.DataFrame({"group": group, "known": group.isin(seen[1]), "before": before,
                          "after": after}).dropna()  # fmt: skip
    if group[before.index].isin(seen[0]).any():
        raise ValueError("fold 0 does not keep near-duplicates together")
    rest = pd.DataFrame({"error": after, "known": group[after.index].isin(seen[1])})
    both = compared(table)
    results.write(
        f"{name}/lookalikes.json",
        {"application": name, "unit": application(name).unit, "both": both,
         "fold1": {text: {"n": int((rest.known == known).sum()),
                          "mae": rest.error[rest.known == known].mean()}
                   for text, known in (("with", True), ("without", False))}},
        seed=0, command=f"python tools/lookalikes.py {name}", wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(both)


if __name__ == "__main__":
    main()
