"""Pack the QMOF database into qmof.npz, the one file that x3mat reads.

QMOF (CC BY 4.0) is not shipped. Its archive on figshare (linked from
https://github.com/Andrew-S-Rosen/QMOF) holds a folder of relaxed structures, ``<qmof_id>.cif``, and
a table, ``qmof.csv``. Only crystals of ``data/qmof-gap/folds.json`` are packed, so that the split
is the same; those that are missing are counted.

examples:
  python tools/qmof_pack.py relaxed_structures qmof.csv --out mydata
  X3MAT_DATA=mydata x3mat data describe qmof-gap
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from x3mat.applications import application
from x3mat.crystal import parse_cif
from x3mat.errors import X3MatError


def pack(structures: Path, table: Path, column: str, out: Path, names: set[str]) -> list[str]:
    """Write ``out/qmof.npz``; returns the names that have no usable crystal or label."""
    gaps = pd.read_csv(table, index_col="qmof_id", usecols=["qmof_id", column])[column].dropna()
    found, missing = {}, []
    for name in tqdm(sorted(names), "reading", disable=not sys.stderr.isatty()):
        try:
            text = (structures / f"{name}.cif").read_text("utf-8", "replace")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = (*parse_cif(text, name), float(gaps[name]))
        except (OSError, KeyError, X3MatError):
            missing.append(name)
    lattice, species, frac_coords, gap = zip(*found.values(), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out / "qmof.npz", id=np.array(list(found)),
        Z=np.concatenate(species).astype(np.uint8),
        frac=np.concatenate(frac_coords).astype(np.float32),
        ptr=np.cumsum([0, *map(len, species)]).astype(np.int64),
        lattice=np.array(lattice, dtype=np.float32),
        bandgap_pbe_eV=np.array(gap, dtype=np.float32),
    )  # fmt: skip
    return missing


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("structures", type=Path, help="folder of CIF files")
    parser.add_argument("table", type=Path, help="qmof.csv")
    parser.add_argument("--column", default="outputs.pbe.bandgap", help="of the label, in eV")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of qmof.npz")
    args = parser.parse_args(arguments)
    folds = application("qmof-gap").folds()
    names = {*folds[0].train, *folds[0].rest}
    if not args.structures.is_dir() or not args.table.is_file():
        print("error: give the folder of CIF files and the table", file=sys.stderr)
        return 1
    have = {path.stem for path in args.structures.glob("*.cif")}
    if not names & have:
        print(f"error: {args.structures} has no file such as {min(names)}.cif", file=sys.stderr)
        return 1
    missing = pack(args.structures, args.table, args.column, args.out, names)
    print(f"{args.out / 'qmof.npz'}: {len(names) - len(missing)} of {len(names)} crystals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
