"""Pack the QMOF database into qmof.npz, the one file that x3mat reads.

QMOF (CC BY 4.0; A. S. Rosen et al., Matter 2021, 4, 1578) is not shipped. This downloads its
archive from figshare once (392 MB, version 18, doi:10.6084/m9.figshare.13147324.v18), checks its
hash, keeps it in the user's cache folder, and reads its table, ``qmof_database/qmof.csv``, and its
relaxed structures, ``relaxed_structures/<qmof_id>.cif`` in
``qmof_database/relaxed_structures.zip``. Only crystals of ``data/qmof-gap/folds.json`` are packed,
so that the split is the same; those that are missing are counted.

examples:
  python tools/qmof_pack.py --out mydata
  python tools/qmof_pack.py --archive qmof_database.zip --out mydata    of an archive at hand
  X3MAT_DATA=mydata x3mat data describe qmof-gap
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from download import fetch
from tqdm import tqdm

from x3mat import results
from x3mat.applications import application
from x3mat.crystal import parse_cif
from x3mat.errors import DataError, X3MatError

URL = "doi:10.6084/m9.figshare.13147324.v18/qmof_database.zip"
SHA256 = "97d23c0b4f9e5a30888e53dc16222b90443ad7167c3284d2258615d9f44eceef"
TABLE, STRUCTURES = "qmof_database/qmof.csv", "qmof_database/relaxed_structures.zip"
GAP = "outputs.pbe.bandgap"  # column of the table, eV
REMEDY = "Give qmof_database.zip, or none to have it downloaded."


def pack(archive: Path, out: Path, names: set[str]) -> list[str]:
    """Write ``out/qmof.npz``; returns the names that have no usable crystal or label.

    Raises a DataError if the archive is not QMOF's or has none of the crystals.
    """
    found, missing = {}, []
    try:
        with zipfile.ZipFile(archive) as outer:
            table = pd.read_csv(io.BytesIO(outer.read(TABLE)), usecols=["qmof_id", GAP])
            inner = zipfile.ZipFile(io.BytesIO(outer.read(STRUCTURES)))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(archive, f"it is not the archive of QMOF ({error})", REMEDY) from None
    gaps = table.set_index("qmof_id")[GAP].dropna()
    for name in tqdm(sorted(names), "reading", disable=not sys.stderr.isatty()):
        try:
            text = inner.read(f"relaxed_structures/{name}.cif").decode("utf-8", "replace")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = (*parse_cif(text, name), float(gaps[name]))
        except (KeyError, X3MatError):
            missing.append(name)
    if not found:
        raise DataError(archive, f"it has no crystal such as {min(names)}", REMEDY)
    lattice, species, frac_coords, gap = zip(*found.values(), strict=True)
    with results.replacing(out / "qmof.npz") as file:
        np.savez_compressed(
            file, id=np.array(list(found)),
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
    parser.add_argument("--archive", type=Path, help="qmof_database.zip, instead of a download")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of qmof.npz")
    args = parser.parse_args(arguments)
    folds = application("qmof-gap").folds()
    names = {*folds[0].train, *folds[0].rest}
    try:
        missing = pack(args.archive or fetch(URL, "qmof_database.zip", SHA256), args.out, names)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out / 'qmof.npz'}: {len(names) - len(missing)} of {len(names)} crystals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
