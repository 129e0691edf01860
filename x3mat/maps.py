"""Site maps: where in a crystal a predicted property comes from (paper, Fig. 3).

A site map is the field of contributions y(r) over the unit cell, one value for each grid point.
The model's prediction is its mean. The label fixes only that mean, so that y plus any field of
zero mean would fit the label as well: what a map shows is what the network, trained on many
crystals, makes of each window, and it has to be compared with something physical. Such a
comparison is :func:`x3mat_book.densities.window_average` of a simulated density."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from x3mat import paths
from x3mat.crystal import Crystal, images_in_box, symbol
from x3mat.descriptors import DEFAULT_RADIUS, RADII
from x3mat.errors import DataError
from x3mat.predict import DEFAULT_MODEL, Ensemble, Prediction, predicted, spread
from x3mat.sampling import Windows

if TYPE_CHECKING:
    from pymatgen.core import Structure

BOHR = 0.529177210544  # Å; CODATA 2022
#: Å; half of nitrogen's kinetic diameter, 3.64 Å (D. W. Breck, Zeolite Molecular Sieves, 1974)
PROBE_RADIUS = 1.82
N_SITES = 12  # rows of the table of sites
PAGE_SPACING = 0.7  # Å; the page's isosurfaces are interpolated to this
PAGE_POINTS = 60_000
FORMULAS = re.compile(r"(?<![\w-])(?:[A-Z][a-z]?\d*)+(?![\w-])")  # in a text


@dataclass(frozen=True)
class Site:
    """A local maximum of a site map."""

    rank: int  # 1 for the strongest
    value: float  # contribution, in the property's unit
    std: float  # its standard deviation over the members
    x: float  # fractional coordinates of the window's centre, one of `multiplicity` equivalent ones
    y: float
    z: float
    cartesian: tuple[float, float, float]  # the same in Å
    multiplicity: int  # grid points in the orbit
    n_atoms: int  # in the window
    nearest: str  # element of the nearest atom; "" if the window is empty
    distance: float  # from the centre to it, Å
    kind: str  # "Interior" if a nitrogen molecule fits at the centre, else "Exterior" (`interior`)


@dataclass(frozen=True, eq=False)
class SiteMap:
    """Contributions over the unit cell of one crystal."""

    crystal: Crystal
    windows: Windows  # of the map, whose grid may be finer than the model's own
    prediction: Prediction  # on the model's own grid, of which it is the mean
    conditions: str
    model: str
    members: np.ndarray  # (M, W) float64; contribution of each window by each member

    @property
    def values(self) -> np.ndarray:
        """Mean over the members, (W,)."""
        return self.members.mean(axis=0)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation over the members, (W,); nan for a single one."""
        return spread(self.members)

    @cached_property
    def grid(self) -> np.ndarray:
        """The values on the whole grid, (n1, n2, n3), orbits expanded; see :attr:`origin`."""
        return np.roll(self.windows.expand(self.values), self._shift, axis=(0, 1, 2))

    @property
    def origin(self) -> np.ndarray:
        """Fractional coordinates of ``grid[0, 0, 0]``, less than one grid spacing from 0."""
        return self.windows.origin - self._shift / np.array(self.windows.grid)

    @property
    def _shift(self) -> np.ndarray:
        return np.floor(self.windows.origin * self.windows.grid + 1e-6).astype(int)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The strongest local maxima (no neighbour on the grid is stronger), at most 12."""
        w = self.windows
        values, std = self.values, self.std
        whole = w.expand(values)
        peak = (whole >= ndimage.maximum_filter(whole, size=3, mode="wrap") - 1e-9).reshape(-1)
        orbits = np.setdiff1d(w.orbit[peak], w.orbit[~peak])  # peaks at all of their points
        order = orbits[np.argsort(-values[orbits], kind="stable")][:N_SITES]
        inside, out = interior(w), []
        for rank, k in enumerate(order.tolist(), start=1):
            atoms = slice(w.ptr[k], w.ptr[k + 1])
            distance = np.linalg.norm(w.positions[atoms], axis=1)
            nearest = "", float("nan")
            if len(distance):
                nearest = symbol(w.species[atoms][distance.argmin()]), float(distance.min())
            out.append(Site(rank, float(values[k]), float(std[k]), *w.centers[k].tolist(),
                tuple((w.centers[k] @ self.crystal.lattice).tolist()), int(w.weights[k]),
                len(distance), *nearest, "Interior" if inside[k] else "Exterior"))
        return tuple(out)

    def at(self, points: np.ndarray) -> np.ndarray:
        """The map at any points, (..., 3) fractional, by periodic cubic splines.

        Splines pass through the grid's values; between them they guess."""
        return interpolate(self.grid, (np.asarray(points) - self.origin) * self.grid.shape, 3)

    def to_cube(self, path: str | Path) -> Path:
        """Write the map as a Gaussian cube file, which VESTA, VMD and ASE read.

        Lengths are in bohr, as the format asks; the values are in the property's unit. The file's
        origin is that of the grid: a reader that ignores it is off by less than one spacing, and
        by nothing at all where the grid contains the origin of the cell."""
        path, lattice, p = Path(path), self.crystal.lattice, self.prediction
        mean = np.average(self.values, weights=self.windows.weights)
        text = cube_text(self.grid, lattice / np.array(self.grid.shape)[:, None], self.origin @
            lattice, self.crystal, f"{self.crystal.name}: site map of {p.property} in {p.unit}"
            f" ({self.conditions}), model {self.model}", f"mean {mean:.6g}, prediction"
            f" {p.value:.6g}; windows of radius {self.windows.radius:g} A")
        path.write_text(text, encoding="ascii", errors="replace")
        return path

    def to_csv(self, path: str | Path) -> Path:
        """Write the table of the strongest sites."""
        import pandas as pd
        unit = self.prediction.unit
        columns = ["rank", f"value ({unit})", f"std ({unit})", *"xyz", "X (Å)", "Y (Å)", "Z (Å)",
                   "multiplicity", "atoms in window", "nearest atom", "distance (Å)", "kind"]
        pd.DataFrame([[s.rank, f"{s.value:.6g}", f"{s.std:.6g}", *(f"{v:.6f}" for v in
                       (s.x, s.y, s.z)), *(f"{v:.4f}" for v in s.cartesian), s.multiplicity,
                       s.n_atoms, s.nearest, f"{s.distance:.4f}", s.kind] for s in self.sites],
                     columns=columns).to_csv(path, index=False)
        return Path(path)

    def to_html(self, path: str | Path) -> Path:
        """Write one page with structure, isosurfaces and sites; it needs no network."""
        path = Path(path)
        path.write_text(_page(self), encoding="utf-8")
        return path

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write ``NAME.cube``, ``NAME-sites.csv`` and ``NAME.html`` into `folder`."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stem = re.sub(r"[^\w.+-]+", "_", self.crystal.name).strip(".") or "crystal"
            return {"cube": self.to_cube(folder / f"{stem}.cube"),
                    "sites": self.to_csv(folder / f"{stem}-sites.csv"),
                    "html": self.to_html(folder / f"{stem}.html")}
        except OSError as error:
            raise DataError(folder, f"cannot write there ({error.strerror})",
                            "Give a folder that can be written to.") from error


def explain(structure: str | Path | Crystal | Structure,
            model: str | Path | Ensemble = DEFAULT_MODEL, out: str | Path | None = None, *,
            step: float | None = None) -> SiteMap:
    """Map the contributions to a predicted property over the unit cell.

    Parameters
    ----------
    structure : path, Crystal or pymatgen Structure; as :func:`x3mat.read_crystal` takes it
    model : str, path or Ensemble; as :func:`x3mat.load_model` takes it, or what it returned
    out : path, optional; folder for the files of :meth:`SiteMap.save`
    step : float, optional
        Grid spacing of the map, Å; default the model's. The prediction is always on the model's.

    Raises the errors of :func:`x3mat.predict`, and a DataError if `out` cannot be written to."""
    crystal, ensemble, windows, members, prediction = predicted(structure, model)
    if step is not None and step != windows.step:
        windows = ensemble.windows(crystal, step)
        members = ensemble.contributions(windows)
    site_map = SiteMap(crystal, windows, prediction, ensemble.conditions, ensemble.name, members)
    if out is not None:
        site_map.save(out)
    return site_map


def interior(windows: Windows, probe_radius: float = PROBE_RADIUS) -> np.ndarray:
    """Whether a spherical probe fits at the centre of each window, (W,) bool.

    The paper calls a strong site whose centre the gas can occupy "Interior" and one inside the
    wall, beside which the gas sits, "Exterior", without a criterion. Here it fits if the nearest
    atom's surface is at least `probe_radius` (Å) away, with the radii of
    :data:`x3mat.descriptors.RADII`. Whether the gas can get there is another question."""
    radii = np.array([RADII.get(z, DEFAULT_RADIUS) for z in range(101)])
    gap = np.linalg.norm(windows.positions, axis=1) - radii[windows.species]
    nearest = np.minimum.reduceat(np.append(gap, np.inf), windows.ptr[:-1])
    return np.where(windows.atoms_per_window > 0, nearest, np.inf) >= probe_radius


def interpolate(grid: np.ndarray, index: np.ndarray, order: int = 3) -> np.ndarray:
    """Values, (...), of a periodic grid at fractional indices, (..., 3), by splines."""
    flat = index.reshape(-1, 3).T
    values = ndimage.map_coordinates(grid, flat, order=order, mode="grid-wrap")
    return values.reshape(index.shape[:-1])


def cube_text(grid: np.ndarray, voxels: np.ndarray, origin: np.ndarray, crystal: Crystal,
              title: str, comment: str = "", number: str = "12.5E") -> str:
    """A field, (n1, n2, n3), as the text of a Gaussian cube file with the atoms of `crystal`.

    The rows of `voxels`, (3, 3), are the steps of the grid along its axes, and `origin`, (3,), is
    where ``grid[0, 0, 0]`` lies, both in Å; `title` and `comment` are the first two lines, `number`
    is the format of the values."""
    lines = [" ".join(title.split()), " ".join(comment.split())]
    for count, vector in [(crystal.n_atoms, origin), *zip(grid.shape, voxels, strict=True)]:
        lines.append(f"{count:5d}" + "".join(f"{x:15.9f}" for x in np.asarray(vector) / BOHR))
    atoms = crystal.frac_coords @ crystal.lattice / BOHR
    for z, position in zip(crystal.species.tolist(), atoms, strict=True):
        lines.append(f"{z:5d}{float(z):12.6f}" + "".join(f"{x:15.9f}" for x in position))
    for row in grid.reshape(-1, grid.shape[2]).tolist():
        parts = (row[i : i + 6] for i in range(0, len(row), 6))
        lines += [" ".join(format(v, number) for v in part) for part in parts]
    return "\n".join(lines) + "\n"


def closed_cube(crystal: Crystal, field: Callable[[np.ndarray], np.ndarray],
                spacing: float) -> tuple[np.ndarray, str]:
    """A periodic field on a grid that includes all faces of the cell, for isosurfaces.

    ``field`` takes fractional coordinates, (..., 3), to values, (...); ``spacing`` is the largest
    of the grid, Å. Returns the values, (n1 + 1, n2 + 1, n3 + 1), and their :func:`cube_text`."""
    shape = np.ceil(np.linalg.norm(crystal.lattice, axis=1) / spacing).astype(int)
    axes = (np.arange(n + 1) / n for n in shape)
    values = field(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1))
    voxels = crystal.lattice / shape[:, None]
    return values, cube_text(values, voxels, np.zeros(3), crystal, crystal.name, number=".4g")


def viewer_script() -> str:
    """The text of 3Dmol.js, which the page carries along, from the package or the repository."""
    name = Path("3dmol") / "3Dmol-min.js"
    root = paths.root()
    for folder in (Path(__file__).parent / "assets", root and root / "book/_static/vendor"):
        if folder and (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise DataError("3Dmol-min.js", "the viewer's script is missing", "Reinstall the package.")


def _page(site_map: SiteMap) -> str:
    from pymatgen.util.string import unicodeify  # sets the digits of formulas low
    m, p, several = site_map, site_map.prediction, len(site_map.members) > 1
    spacing = max(PAGE_SPACING, (m.crystal.volume / PAGE_POINTS) ** (1 / 3))
    fine, cube = closed_cube(m.crystal, m.at, spacing)
    low, high = float(fine.min()), float(fine.max())
    atoms, images = with_faces(m.crystal)
    data = {"cube": cube, "xyz": xyz_text(m.crystal.species[atoms], images @ m.crystal.lattice),
            "cell": m.crystal.lattice.tolist(), "low": low, "high": high,
            "level": float(np.quantile(fine, 0.85)), "unit": p.unit,
            "sites": [{"rank": s.rank, "at": list(s.cartesian)} for s in m.sites]}
    rows = "\n".join(
        f'<tr><th scope="row">{s.rank}</th><td>{s.value:.3g}{f" ± {s.std:.2g}" if several else ""}'
        f"</td><td>{s.x:.3f}, {s.y:.3f}, {s.z:.3f}</td>"
        f"<td>{', '.join(f'{v:.2f}' for v in s.cartesian)}</td>"
        f"<td>{s.multiplicity}</td><td>{s.n_atoms}</td>"
        f"<td>{f'{s.nearest}, {s.distance:.2f} Å' if s.nearest else 'none'}</td>"
        f"<td>{s.kind}</td></tr>" for s in m.sites)
    fields = {"name": m.crystal.name or m.crystal.formula, "formula": m.crystal.formula,
              "group": f"{m.crystal.space_group_symbol} ({m.crystal.space_group})",
              "property": p.property, "unit": p.unit, "conditions": m.conditions,
              "value": f"{p.value:.3g}" + (f" ± {p.std:.2g}" if several else ""),
              "spread": f"mean ± standard deviation over {len(m.members)} models" if several
              else "one model, so no spread is known",
              "model": m.model, "grid": " × ".join(map(str, m.windows.grid)),
              "points": f"{m.windows.n_windows:,}", "orbits": f"{m.windows.n_orbits:,}",
              "radius": f"{m.windows.radius:g}", "probe": f"{PROBE_RADIUS:g}",
              "range": f"{low:.3g} to {high:.3g}", "shown": str(len(m.sites))}
    notes = "".join(f"<li>{html.escape(w)}</li>" for w in p.warnings)
    raw = {"rows": rows, "script": viewer_script().replace("</script", "<\\/script"),
           "warnings": f'<section class="warn" aria-label="Warnings"><h2>Warnings</h2><ul>{notes}'
           "</ul></section>" if notes else "",
           "data": json.dumps(data).replace("<", "\\u003c")}
    for key in ("formula", "property"):
        fields[key] = FORMULAS.sub(lambda match: unicodeify(match[0]), fields[key])
    values = {**{k: html.escape(v) for k, v in fields.items()}, **raw}
    template = (Path(__file__).parent / "assets" / "map.html").read_text(encoding="utf-8")
    return re.sub(r"@@(\w+)@@", lambda match: values[match[1]], template)


def xyz_text(species: Sequence[int], positions: np.ndarray) -> str:
    """Atoms, with positions in Å, in the xyz format."""
    lines = [f"{symbol(z)} {x[0]:.4f} {x[1]:.4f} {x[2]:.4f}"
             for z, x in zip(species, positions, strict=True)]
    return "\n".join([str(len(lines)), "", *lines])


def with_faces(crystal: Crystal, edge: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of the cell, those within `edge` (Å) of a face also on the opposite one.

    Returns the atoms' indices, (M,), and fractional coordinates, (M, 3)."""
    margin = edge * np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)
    return images_in_box(crystal.frac_coords, -margin, 1 + margin)
