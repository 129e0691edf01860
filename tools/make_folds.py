"""Write data/<application>/folds.json: five folds, every crystal in the rest of exactly one.

    python tools/make_folds.py zeolite-n2 [--seed 0]

Each fold trains on four fifths and splits the rest into two halves; each half is tested by a
model whose choices were made on the other half.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from x3mat.applications import application


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("application")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    app = application(arguments.application)
    names = np.array(sorted(app.labels().index))
    order = np.random.default_rng(arguments.seed).permutation(len(names))
    folds = []
    for rest in np.array_split(order, 5):
        middle = len(rest) // 2
        folds.append({
            "train": sorted(names[np.setdiff1d(order, rest)].tolist()),
            "halves": [sorted(names[part].tolist()) for part in (rest[:middle], rest[middle:])],
        })
    about = {"seed": arguments.seed, "rule": "numpy default_rng(seed).permutation of sorted names, "
             "array_split into 5 rests, each cut in two halves; train is everything else"}
    path = app.folder / "folds.json"
    path.write_text(json.dumps({**about, "folds": folds}, indent=1) + "\n")
    print(path.name, [(len(f["train"]), *map(len, f["halves"])) for f in folds])


if __name__ == "__main__":
    main()
