"""Make the tables of published uptakes that x3mat reads of the authors' own files.

mof-co2o2n2: CO2, O2 and N2, each alone, in 3,218 crystals of CoRE MOF 2019, 298 K and 1 bar.
mof-ch4n2: CH4 and N2 of their equimolar mixture in 4,591, likewise.

Both are ``rawdata.xlsx`` of a repository of H. C. Gulbalkan and others, which states no licence, so
that neither it nor its numbers are shipped. This downloads the file of one commit, keeps it in the
user's cache folder, takes the crystals of ``data/APPLICATION/folds.json``, and writes them to the
file that the application names, once their checksums are those of the numbers that our models
learned: for each gas the sums of all uptakes with four weights from -1 to 1 that the crystals'
names decide. Rounding does not change them; another value, unit or order of rows does.

examples:
  python tools/published_tables.py mof-co2o2n2 --out mydata
  python tools/published_tables.py mof-ch4n2 --file rawdata.xlsx --out mydata    of a file at hand
  X3MAT_DATA=mydata x3mat data describe mof-ch4n2
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from download import fetch

from x3mat import results
from x3mat.applications import Application, application
from x3mat.errors import DataError, X3MatError

HOST = "https://github.com/hasancangulbalkan"
URLS = {
    "mof-co2o2n2": f"{HOST}/MOFs_CO2N2O2_ML/raw/a086a85a66c8ad5b24198b9ce6bc638dc2c95cc0/",
    "mof-ch4n2": f"{HOST}/MOFs_CH4N2_ML/raw/bdb4f5e464220c4f02ce23a580be662e5cceae41/",
}
FILE = "rawdata.xlsx"
CHECKSUMS = {
    "mof-co2o2n2": {
        "CO2 1 bar (mol/kg)": [45.782273, -95.309965, 62.350987, 43.959291],
        "O2 1 bar (mol/kg)": [-10.040786, -23.802491, 29.732472, 10.54799],
        "N2 1 bar (mol/kg)": [-8.580229, -20.176094, 25.473146, 12.041208],
    },
    "mof-ch4n2": {
        "CH4 Uptake 1 Bar - Mixture": [6.810999, -26.389837, -17.59192, 16.952291],
        "N2 Uptake 1 Bar - Mixture": [0.129124, -2.24359, -2.052382, 0.226023],
    },
}
TOLERANCE = 1e-6  # of checksums, relative to the sum of all sizes


def weights(names: pd.Index) -> np.ndarray:
    """(names, 4) numbers from -1 to 1 that depend on nothing but each name."""
    digests = [hashlib.sha256(str(name).encode()).digest()[:16] for name in names]
    return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 4) / 2**31 - 1


def checksums(table: pd.DataFrame) -> dict[str, list[float]]:
    """Four weighted sums of each column of a table, which is indexed by names."""
    return {column: (values.to_numpy(float) @ weights(table.index)).round(6).tolist()
            for column, values in table.items()}  # fmt: skip


def read(path: Path, app: Application) -> pd.DataFrame:
    """The columns that the application names, of its crystals, from a sheet that has them.

    Raises a DataError if the file is no workbook, or no sheet has the columns or all crystals.
    """
    wanted = [app.source["name"], *app.source["columns"].values()]
    try:
        sheets = pd.read_excel(path, sheet_name=None)
    except ImportError:
        raise DataError(path, "reading it needs openpyxl", "Type: pip install openpyxl") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(path, f"it is not a workbook ({error})", f"Give {FILE}.") from None
    fitting = [s for s in sheets.values() if set(wanted) <= {str(c).strip() for c in s.columns}]
    if not fitting:
        raise DataError(path, f"no sheet has the columns {', '.join(wanted)}", f"Give {FILE}.")
    table = fitting[0].rename(columns=lambda column: str(column).strip())[wanted]
    table = table.drop_duplicates(wanted[0]).set_index(wanted[0])
    fold = app.folds()[0]
    names = sorted({*fold.train, *fold.rest})
    missing = [name for name in names if name not in table.index]
    if missing:
        raise DataError(path, f"{len(missing)} crystals are missing, as {missing[0]}",
                        f"Give {FILE}.")  # fmt: skip
    return table.loc[names]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", choices=list(URLS))
    parser.add_argument("--file", type=Path, help=f"{FILE}, instead of a download")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the table")
    args = parser.parse_args(arguments)
    app = application(args.application)
    try:
        path = args.file or fetch(URLS[app.name] + FILE, f"{app.name}-{FILE}")
        table = read(path, app)
        found, known = checksums(table), CHECKSUMS[app.name]
        for column, values in table.items():
            apart = np.abs(np.subtract(found[column], known[column])).max()
            if not apart <= TOLERANCE * np.abs(values.to_numpy(float)).sum():
                raise DataError(path, f"{column} is not what our models learned",
                                f"Give {FILE} of {URLS[app.name]}.")  # fmt: skip
        out = args.out / app.source["file"]
        out.parent.mkdir(parents=True, exist_ok=True)
        with results.replacing(out) as file:
            file.write(table.to_csv().encode())
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {len(table)} crystals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
