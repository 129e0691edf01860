"""Pictures of the chapters: crystals, grids and windows in 3-D (py3Dmol) and flat (Matplotlib);
errors by the size of windows and by what a network is made of."""

from __future__ import annotations

from itertools import product

import numpy as np

from x3mat.crystal import Crystal
from x3mat.maps import closed_cube, with_faces, xyz_text
from x3mat.sampling import EDGE, Windows, cut_spheres
from x3mat_book.densities import grid_points

SIZE = (640, 420)  # pixels
WINDOW, NEIGHBOUR, FAINT, CELL = "#1f77b4", "#d95f02", "#c8c8c8", "#555555"


def cell_view(crystal: Crystal, windows: Windows | None = None, center=None, radius: float = 6.0,
              size: tuple[int, int] = SIZE):
    """The unit cell in 3-D, a py3Dmol.view, with grid points and the sphere of one window.

    Parameters
    ----------
    crystal : Crystal
    windows : Windows, optional; its grid points are drawn, those of one orbit in one colour
    center : (3,) array, optional; fractional coordinates of the centre of a sphere to draw
    radius : float; of that sphere, Å
    """
    view = _view(size)
    _atoms(view, crystal.species, crystal.frac_coords @ crystal.lattice, stick=0.1, sphere=0.16)
    _edges_of_cell(view, crystal.lattice)
    if windows is not None:
        points = grid_points(windows) % 1.0 @ crystal.lattice
        for orbit, colour in enumerate(_colours(windows.n_orbits)):
            here = points[windows.orbit == orbit]
            _atoms(view, [2] * len(here), here, sphere=0.35, colour=colour)
    if center is not None:
        _sphere(view, np.asarray(center) @ crystal.lattice, radius)
    return _look(view)


def window_view(
    crystal: Crystal, center, radius: float = 6.0, cutoff: float | None = None,
    size: tuple[int, int] = SIZE,
):
    """One window in 3-D: its atoms in the cell, those from neighbouring cells, and the graph.

    The rest of the cell is faint; atoms of the window that are images from other cells are
    orange. With `cutoff`, the edges between atoms of the window are drawn as thin lines.
    """
    center = np.asarray(center, dtype=float) % 1.0
    _, positions, atom = cut_spheres(crystal, center[None], radius)
    species = crystal.species[atom]
    middle = center @ crystal.lattice
    fractional = (positions + middle) @ np.linalg.inv(crystal.lattice)
    inside = ((fractional > -1e-6) & (fractional < 1 - 1e-6)).all(axis=1)
    view = _view(size)
    cell = crystal.frac_coords @ crystal.lattice
    outside = np.linalg.norm(cell - middle, axis=1) > radius + EDGE
    _atoms(view, crystal.species[outside], cell[outside], stick=0.06, colour=FAINT)
    _atoms(view, species, positions + middle, stick=0.12, sphere=0.22)
    _atoms(view, species[~inside], (positions + middle)[~inside], sphere=0.3, colour=NEIGHBOUR)
    _edges_of_cell(view, crystal.lattice)
    _sphere(view, middle, radius)
    if cutoff is not None:
        distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
        for i, j in np.argwhere(np.triu(distance < cutoff, 1)):
            _line(view, positions[i] + middle, positions[j] + middle, WINDOW)
    return _look(view)


def plot_grid(ax, crystal: Crystal, windows: Windows, title: str | None = None, along: int = 2):
    """First layer of grid points, seen along axis `along` (0, 1, 2), coloured by orbit.

    Larger points stand for larger orbits; atoms of the same layer are grey.
    """
    i, j = sorted({0, 1, 2} - {along})
    flat = crystal.lattice @ _plane(crystal, i, j) * (np.arange(3) != along)[:, None]
    index = np.stack(np.unravel_index(np.arange(windows.n_windows), windows.grid), axis=1)
    layer = index[:, along] == 0
    orbit = windows.orbit[layer]
    atoms = (crystal.frac_coords - windows.origin) % 1.0
    near = atoms[:, along] < 1 / windows.grid[along]
    ax.scatter(*(atoms[near] @ flat).T, s=6, c=FAINT, zorder=1)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    ax.plot(*(corners @ flat[[i, j]]).T, color=CELL, lw=1)
    _, local = np.unique(orbit, return_inverse=True)
    colours = np.array(_colours(local.max() + 1))
    ax.scatter(*(index[layer] / np.array(windows.grid) @ flat).T, c=colours[local], zorder=2,
               s=8 + 12 * np.log2(1 + windows.weights[orbit]), edgecolors="white", linewidths=0.4)
    ax.set_aspect("equal")
    ax.set_xlabel(f"{'abc'[i]} axis, Å")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title or crystal.name, fontsize=10)


def plot_slice(ax, crystal: Crystal, field, height: float = 0.0, slab: float = 1.6, **mesh):
    """A field in the plane at the fractional height `height` along c, with atoms near the plane.

    Parameters
    ----------
    field : callable; from fractional coordinates, (..., 3), to values, (...)
    slab : float; atoms within slab / 2 (Å) of the plane are drawn
    **mesh : of Matplotlib's pcolormesh, whose QuadMesh is returned
    """
    flat = _plane(crystal)
    normal = np.cross(*crystal.lattice[:2])
    rise = abs(crystal.lattice[2] @ normal) / np.linalg.norm(normal)
    u, v = np.meshgrid(np.linspace(0, 1, 121), np.linspace(0, 1, 121), indexing="ij")
    points = np.stack([u, v, np.full_like(u, height)], axis=-1)
    image = ax.pcolormesh(*np.moveaxis(points @ crystal.lattice @ flat, -1, 0), field(points),
                          shading="gouraud", rasterized=True, **mesh)
    atoms, frac = with_faces(crystal)
    off = (frac[:, 2] - height + 0.5) % 1.0 - 0.5
    near = np.abs(off) * rise <= slab / 2
    xy = (frac[near] * [1, 1, 0] + [0, 0, height]) @ crystal.lattice @ flat
    silicon = crystal.species[atoms[near]] == 14
    for kind, colour, area in ((silicon, "#e8c468", 34), (~silicon, "#d62728", 18)):
        ax.scatter(*xy[kind].T, s=area, c=colour, edgecolors="black", linewidths=0.4, zorder=3)
    ax.set_aspect("equal")
    ax.set_xlabel("Å")
    ax.spines[:].set_visible(False)
    return image


def plot_convergence(axes, radii: dict, steps: dict) -> None:
    """Errors by the radius of the windows and by the spacing of their grid, on two axes.

    ``radii`` and ``steps`` are what tools/convergence.py writes.
    """
    first, second = axes
    side = first.twinx(), second.twinx()
    rows = radii["rows"]
    values = [row["value"] for row in rows]
    for seed, mae in zip(radii["seeds"], zip(*(r["mae_of_each_seed"] for r in rows), strict=True),
                         strict=True):
        first.plot(values, mae, "ox^"[seed], color="tab:blue", mfc="none", label=f"seed {seed}")
    first.plot(values, [row["mae"] for row in rows], color="tab:blue", label="mean")
    side[0].plot(values, [np.mean(row["seconds"]) for row in rows], "s:", color="tab:gray", ms=4)
    first.set(xlabel="radius of the windows (Å)", ylabel=f"MAE ({radii['unit']})")
    side[0].set(ylabel=f"training, {radii['jobs']} side by side (s)")
    first.legend(loc="lower right", fontsize=8)
    rows = steps["rows"]
    values = [row["value"] for row in rows]
    second.plot(values, [r["mae"] for r in rows], "o-", color="tab:blue", label="MAE")
    second.plot(values, [r["mean_change_from_first"] for r in rows], "^-", color="tab:green",
                label=f"change from {values[0]:g} Å")
    side[1].semilogy(values, [r["windows"] / steps["n"] for r in rows], "s:", color="tab:gray",
                     ms=4)
    second.set(xlabel="spacing of the grid (Å)", ylabel=steps["unit"])
    side[1].set(ylabel="windows per crystal")
    second.legend(loc="center right", fontsize=8)
    for ax in (first, second, side[0]):
        ax.set_ylim(0, 1.08 * max(line.get_ydata().max() for line in ax.lines))
    for ax in side:
        ax.yaxis.label.set_color("tab:gray")


def plot_choices(ax, record: dict, labels: dict) -> None:
    """Errors of tools/convergence.py's trainings: a mark for each seed, a bar for their mean.

    ``labels`` has a name for each value.
    """
    for k, row in enumerate(record["rows"]):
        ax.plot([k - 0.3, k + 0.3], [row["mae"]] * 2, color="tab:blue")
        for seed, mae in zip(record["seeds"], row["mae_of_each_seed"], strict=True):
            ax.plot(k, mae, "ox^"[seed], color="tab:blue", mfc="none",
                    label=f"seed {seed}" if k == 0 else None)
    ax.set_xticks(range(len(record["rows"])), [labels[row["value"]] for row in record["rows"]])


def field_view(crystal: Crystal, surfaces, size: tuple[int, int] = SIZE):
    """The unit cell in 3-D with isosurfaces.

    Parameters
    ----------
    surfaces : sequence of (field, level, colour); `field` as in :func:`plot_slice`
    """
    view = cell_view(crystal, size=size)
    for field, level, colour in surfaces:
        _, cube = closed_cube(crystal, field, 0.7)
        look = {"isoval": level, "color": colour, "opacity": 0.7, "smoothness": 3}
        view.addVolumetricData(cube, "cube", look)
    return view


def _plane(crystal: Crystal, i: int = 0, j: int = 1) -> np.ndarray:
    """Orthonormal axes in the plane of two cell axes, (3, 2), the first along axis i."""
    x_axis = crystal.lattice[i] / np.linalg.norm(crystal.lattice[i])
    y_axis = crystal.lattice[j] - (crystal.lattice[j] @ x_axis) * x_axis
    return np.stack([x_axis, y_axis / np.linalg.norm(y_axis)], axis=1)


def _view(size: tuple[int, int]):
    import py3Dmol

    view = py3Dmol.view(width=size[0], height=size[1])
    view.setBackgroundColor("white")
    return view


def _look(view):
    """Look at the whole from slightly right and above."""
    view.zoomTo()
    view.rotate(-20, "y")
    view.rotate(12, "x")
    view.zoom(1.3)
    return view


def _atoms(view, species, positions, *, stick=0.0, sphere=0.0, colour=None) -> None:
    """Add atoms as one more model of the view; without `colour` each element has its own."""
    if len(positions) == 0:
        return
    view.addModel(xyz_text(species, positions), "xyz")
    look = {"color": colour} if colour else {"colorscheme": "Jmol"}
    shapes = {"stick": stick, "sphere": sphere}
    view.setStyle({"model": -1}, {k: {"radius": r, **look} for k, r in shapes.items() if r})


def _edges_of_cell(view, lattice: np.ndarray) -> None:
    for start in np.array(list(product((0, 1), repeat=3))):
        for axis in np.flatnonzero(start == 0):
            _line(view, start @ lattice, (start + np.eye(3)[axis]) @ lattice, CELL)


def _line(view, start, end, colour: str) -> None:
    view.addLine({"start": _point(start), "end": _point(end), "color": colour})


def _sphere(view, middle, radius: float) -> None:
    view.addSphere({"center": _point(middle), "radius": radius, "color": WINDOW, "opacity": 0.25})


def _point(x) -> dict[str, float]:
    return dict(zip("xyz", np.round(x, 4).tolist(), strict=True))


def _colours(n: int) -> list[str]:
    """n colours that differ, in a fixed order that puts unlike ones side by side."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"]((0.05 + 0.618034 * i) % 0.9 + 0.05)) for i in range(n)]
