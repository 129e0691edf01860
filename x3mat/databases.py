"""Crystals of public databases: the IZA zeolite frameworks, CoRE MOF 2019 and QMOF.

The first two come from packages of the Python Package Index: zeose (MIT) with the frameworks of the
IZA Structure Commission (C. Baerlocher, L. B. McCusker, Database of Zeolite Structures), and
core-mof (data CC BY 4.0) with CoRE MOF 2019 (Y. G. Chung et al., J. Chem. Eng. Data 2019, 64,
5985, doi:10.1021/acs.jced.9b00835). QMOF (CC BY 4.0; A. S. Rosen et al., Matter 2021, 4, 1578,
doi:10.1016/j.matt.2021.02.015) is read from ``qmof.npz`` in the folder that X3MAT_DATA names."""

from __future__ import annotations

import csv
import difflib
import json
import sqlite3
import tarfile
import warnings
import zipfile
from contextlib import closing
from functools import cache, lru_cache, partial
from importlib import metadata, util
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from x3mat import crystal as crystals
from x3mat import paths, results
from x3mat.crystal import SYMPREC, Crystal, crystal_from_arrays, parse_cif
from x3mat.errors import CrystalError, DataError

Subset = Literal["ASR", "FSR"]
_CACHE_FORMAT = 1


def iza_codes() -> tuple[str, ...]:
    """The 253 three-letter codes of the IZA frameworks, in alphabetical order.

    Raises a DataError if the package zeose is not installed.

    >>> codes = iza_codes()
    >>> len(codes), codes[:3]
    (253, ('ABW', 'ACO', 'AEI'))
    """
    return tuple(sorted(_iza_rows()))


def iza(code: str, symprec: float = SYMPREC) -> Crystal:
    """The pure-silica framework of an IZA code, in its conventional cell; of "LTA~2" the second
    of LTA's copies under random strain, :func:`strained`.

    Case, and the marks ``-`` and ``*`` of interrupted and partially disordered frameworks, do not
    matter; ``symprec`` is as for :func:`x3mat.crystal.crystal_from_arrays`. Raises a DataError if
    the code is unknown or the package zeose is not installed.

    >>> crystal = iza("SOD")
    >>> crystal.formula, crystal.n_atoms, crystal.space_group_symbol
    ('SiO2', 36, 'Im-3m')
    """
    rows = _iza_rows()
    key, _, copy = code.upper().lstrip("-*").partition("~")
    if key not in rows or not (copy or "1").isdigit():
        raise _unknown(code, key, sorted(rows), "IZA framework")
    return strained(_iza(key, 0.0), int(copy)) if copy else _iza(key, symprec)


def strained(crystal: Crystal, number: int, sd: float = 0.02) -> Crystal:
    """A copy NAME~number of a crystal: its lattice times 1 + ε, the same fractional coordinates.

    The components ε_xx, ε_yy, ε_zz, ε_yz, ε_xz, ε_xy of the symmetric strain are normal numbers of
    standard deviation ``sd`` that name and number determine.

    >>> strained(iza("SOD"), 1).name
    'SOD~1'
    """
    rng = np.random.default_rng([number, *crystal.name.encode()])
    xx, yy, zz, yz, xz, xy = rng.normal(0, sd, 6)
    strain = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return crystal_from_arrays(crystal.lattice @ (np.eye(3) + strain), crystal.species,
                               crystal.frac_coords, symprec=0.0, name=f"{crystal.name}~{number}")


@cache
def _iza(key: str, symprec: float) -> Crystal:
    return crystal_from_arrays(*_iza_rows()[key], symprec=symprec, name=key)


@lru_cache(maxsize=1)
def _iza_rows() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    path = _package_folder("zse", "zeose") / "collections" / "frameworks.db"
    if not path.is_file():
        raise DataError(path, "the database of frameworks is missing", "Reinstall zeose.")
    rows = {}  # of a database of ase, read without it: importing ase.db takes half a second
    query = "SELECT cell, numbers, positions, key_value_pairs FROM systems"
    with closing(sqlite3.connect(path)) as database:
        for cell, numbers, positions, keys in database.execute(query):
            lattice = np.frombuffer(cell, "<f8").reshape(3, 3)
            xyz = np.frombuffer(positions, "<f8").reshape(-1, 3)
            numbers = np.frombuffer(numbers, "<i4").astype(np.int64)
            rows[json.loads(keys)["fw"]] = lattice, numbers, np.linalg.solve(lattice.T, xyz.T).T
    return rows


@cache
def core_mof_names(subset: Subset = "ASR") -> tuple[str, ...]:
    """Names of the CoRE MOF 2019 crystals, in alphabetical order.

    From those of the subset "ASR" all solvent is removed (12,020), of "FSR" free solvent (7,061).
    Raises a DataError if the subset is unknown or the package core-mof is not installed."""
    return tuple(sorted(core_mof_table(subset)))


@cache
def core_mof_table(subset: Subset = "ASR") -> dict[str, dict[str, str]]:
    """The table of pore geometry and provenance that core-mof holds, by name.

    Columns (all text): LCD and PLD in Å, cm3_g (which is the density in g/cm3, despite its name),
    AV_VF (accessible void fraction), DISORDER, ... as the package gives them."""
    path = _core_mof_folder(subset) / f"2019-{subset}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return {row["filename"]: row for row in csv.DictReader(file)}


def core_mof(name: str, subset: Subset = "ASR", symprec: float = SYMPREC) -> Crystal:
    """A crystal of CoRE MOF 2019; ``symprec`` as above.

    The first call has the whole archive read, which takes up to a minute, into a compact file in
    the user's cache folder; later calls read that file.

    Raises a DataError if the name or subset is unknown or the package core-mof is not installed, a
    CrystalError if the crystal is refused; several hundred have overlapping atoms."""
    known = core_mof_table(subset)
    if name not in known:
        raise _unknown(name, name, known, f"CoRE MOF 2019 {subset} name")
    table = _core_mof_arrays(subset)
    if cause := str(table["cause"][table["index"][name]]):
        raise CrystalError(name, cause, "Restore the CIF.")
    return _crystal_of(table, name, "species", "frac_coords", symprec)


def qmof(name: str, symprec: float = SYMPREC) -> Crystal:
    """A relaxed crystal of QMOF, for example ``qmof-a2d95c3`` (MOF-5); ``symprec`` as above.

    Raises a DataError if the name is unknown or the file is missing."""
    table = _qmof_arrays()
    if name not in table["index"]:
        raise _unknown(name, name, table["index"], "QMOF name")
    return _crystal_of(table, name, "Z", "frac", symprec)


def expand(source: str) -> list[str]:
    """What :func:`crystal` takes: all crystals of a database or folder, else `source` itself.

    Databases are "iza", "core-mof:ASR", "core-mof:FSR" and "qmof"; of a folder the files count
    whose kind :func:`x3mat.read_crystal` reads, in alphabetical order; a DataError if none does.

    >>> expand("iza")[:2]
    ['iza:ABW', 'iza:ACO']
    """
    if source in DATABASES:
        return [f"{source}:{name}" for name in DATABASES[source][0]()]
    if not Path(source).is_dir():
        return [source]
    found = sorted(str(p) for p in Path(source).iterdir() if crystals.READ.search(p.name))
    if not found:
        raise DataError(source, "the folder holds no file of a crystal", "Give another one.")
    return found


def crystal(source: str) -> Crystal:
    """A crystal of a file, or of a database, for example "iza:LTA" or "core-mof:ASR:ABAVIJ_clean".

    Raises a CrystalError if there is none or it is refused."""
    for database, (_, read) in DATABASES.items():
        if source.lower().startswith(f"{database.lower()}:"):
            try:
                return read(source[len(database) + 1 :])
            except DataError as error:
                raise CrystalError(source, error.cause, error.remedy) from None
    return crystals.read_crystal(source)


#: Of each database a function that lists its names, and one that gives the crystal of a name.
DATABASES = {"iza": (iza_codes, iza), "qmof": (lambda: _qmof_arrays()["index"], qmof)} | {
    f"core-mof:{s}": (partial(core_mof_names, s), partial(core_mof, subset=s))
    for s in get_args(Subset)}


def _crystal_of(table: dict, name: str, species: str, frac_coords: str, symprec: float) -> Crystal:
    """A crystal of flat arrays, two of which are called `species` and `frac_coords`."""
    i = table["index"][name]
    atoms = slice(table["ptr"][i], table["ptr"][i + 1])
    return crystal_from_arrays(table["lattice"][i], table[species][atoms].astype(np.int64),
                               table[frac_coords][atoms], symprec=symprec, name=name)


def _indexed(path: Path, names: str) -> dict:
    """The arrays of a file, with the place of each of `names`, one of them, as "index"."""
    with np.load(path) as file:
        table = dict(file)
    return {**table, "index": {name: i for i, name in enumerate(table[names].tolist())}}


@lru_cache(maxsize=1)
def _qmof_arrays() -> dict:
    path = paths.external() / "qmof.npz"
    if not path.is_file():
        raise DataError(path, "the file of QMOF crystals is missing",
                        "Make it with tools/qmof_pack.py, and set X3MAT_DATA to its folder.")
    return _indexed(path, "id")


@lru_cache(maxsize=1)
def _core_mof_arrays(subset: Subset) -> dict:
    version = metadata.version("core-mof")
    path = paths.cache() / f"core-mof-{version}-{subset}-v{_CACHE_FORMAT}.npz"
    try:
        return _indexed(path, "names")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # absent or damaged
        with results.replacing(path) as file:
            np.savez_compressed(file, **_read_archive(subset))
        return _indexed(path, "names")


def _read_archive(subset: Subset) -> dict[str, np.ndarray]:
    """All CIFs of a subset as flat arrays; those that cannot be parsed with their cause."""
    found, archive = {}, _core_mof_folder(subset) / f"2019-{subset}.tar.xz"
    with tarfile.open(archive, "r|xz") as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a formula may still count the solvent removed
        for member in tar:
            name = Path(member.name).stem
            if not (member.isfile() and member.name.endswith(".cif")):
                continue
            try:
                text = tar.extractfile(member).read().decode("utf-8", "replace")
                found[name] = (*parse_cif(text, name), "")
            except CrystalError as error:
                found[name] = np.zeros((3, 3)), np.zeros(0), np.zeros((0, 3)), error.cause
    names = sorted(found)
    lattice, species, frac_coords, cause = zip(*(found[name] for name in names), strict=True)
    ptr = np.cumsum([0, *map(len, species)])
    return {"names": np.array(names), "cause": np.array(cause), "ptr": ptr,
            "lattice": np.array(lattice), "species": np.concatenate(species).astype(np.uint8),
            "frac_coords": np.concatenate(frac_coords)}


def _core_mof_folder(subset: Subset) -> Path:
    if subset not in get_args(Subset):
        raise DataError(subset, "it is no subset of CoRE MOF 2019", 'Choose "ASR" or "FSR".')
    return _package_folder("CoRE_MOF", "core-mof") / "data"


def _package_folder(module: str, package: str) -> Path:
    """Folder of an installed module, which is not imported (zse fails at import)."""
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DataError(package, "this optional package is not installed",
                        f"Type: pip install {package}")
    return Path(spec.origin).parent


def _unknown(given: str, key: str, known, kind: str) -> DataError:
    near = difflib.get_close_matches(key, known, n=5, cutoff=0.5)
    remedy = f"Did you mean {', '.join(near)}?" if near else "Look it up in the list of names."
    return DataError(given, f"it is no {kind}", remedy)
