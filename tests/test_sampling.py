"""Windows against brute force, symmetry of grids, and what must not depend on the description."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch

from x3mat import databases
from x3mat.crystal import Crystal, crystal_from_arrays, read_crystal
from x3mat.errors import CrystalError, DataError
from x3mat.model import X3Mat, X3MatConfig
from x3mat.sampling import EDGE, choose_grid, cut_spheres, sample_windows

EXACT = ["LTA", "SOD", "CHA", "MFI", "FAU", "ASV", "MTW", "CAN", "LTL", "ABW", "STI"]


def random_crystal(seed: int, sizes=(3.0, 11.0), atoms=8) -> Crystal:
    """A triclinic cell, possibly very oblique, with up to `atoms` atoms at least 0.7 Å apart."""
    rng = np.random.default_rng(seed)
    while True:
        lengths, angles = rng.uniform(*sizes, 3), np.radians(rng.uniform(35, 145, 3))
        ca, cb, cg = np.cos(angles)
        cy = (ca - cb * cg) / np.sin(angles[2])
        if 1 - cb**2 - cy**2 < 0.05:
            continue
        lattice = lengths[:, None] * np.array(
            [[1, 0, 0], [cg, np.sin(angles[2]), 0], [cb, cy, math.sqrt(1 - cb**2 - cy**2)]]
        )
        n = int(rng.integers(1, atoms + 1))
        species = rng.choice([8, 14, 30], n)
        with contextlib.suppress(CrystalError):  # overlapping atoms, too small a cell: draw again
            return crystal_from_arrays(lattice, species, rng.uniform(size=(n, 3)))


def brute_force(crystal, center, radius):
    """All images, cell by cell, with no cleverness: positions about the centre, and species."""
    reach = np.ceil((radius + 1) * np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)) + 1
    cells = np.array(list(itertools.product(*(np.arange(-k, k + 1) for k in reach))))
    vectors = (cells[:, None] + crystal.frac_coords - center % 1.0) @ crystal.lattice
    inside = np.linalg.norm(vectors, axis=-1) <= radius + EDGE
    return vectors[inside], np.broadcast_to(crystal.species, inside.shape)[inside]


def same_atoms(a, b, tolerance=1e-8) -> bool:
    """Whether two lists of (positions, species) are the same set, each atom once."""
    (xa, za), (xb, zb) = a, b
    if len(xa) != len(xb):
        return False
    if len(xa) == 0:
        return True
    distance = np.linalg.norm(xa[:, None] - xb[None], axis=-1)
    partner = distance.argmin(axis=1)
    return (
        distance[np.arange(len(xa)), partner].max() < tolerance
        and len(set(partner.tolist())) == len(xa)
        and bool((np.asarray(za) == np.asarray(zb)[partner]).all())
    )


def contents(windows, w):
    part = slice(windows.ptr[w], windows.ptr[w + 1])
    return windows.positions[part], windows.species[part]


# -------------------------------------------------------------------------------- spheres


@pytest.mark.parametrize("seed", range(12))
def test_random_cells_against_brute_force(seed):
    crystal = random_crystal(seed)
    rng = np.random.default_rng(100 + seed)
    centers = np.vstack([np.zeros(3), rng.uniform(-1.5, 1.5, (4, 3)), crystal.frac_coords[:1]])
    radius = float(rng.uniform(1.0, 9.0))
    ptr, positions, atom = cut_spheres(crystal, centers, radius)
    species = crystal.species[atom]
    for w, center in enumerate(centers):
        part = slice(ptr[w], ptr[w + 1])
        assert same_atoms((positions[part], species[part]), brute_force(crystal, center, radius))


@pytest.mark.parametrize("length", [2.3, 3.0])
@pytest.mark.parametrize("radius", [6.0, 9.2])
def test_spheres_much_larger_than_the_cell(length, radius):
    """Simple cubic: lattice points in a sphere, those exactly on it included."""
    crystal = crystal_from_arrays(np.eye(3) * length, [29], [[0, 0, 0]])
    windows = sample_windows(crystal, radius, step=10, symmetry=False, grid="plain")
    k = np.arange(-6, 7)
    squares = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2) * length**2
    assert windows.grid == (1, 1, 1)
    assert windows.atoms_per_window.tolist() == [(squares <= (radius + EDGE) ** 2).sum()]


def test_atoms_on_the_surface_belong_to_the_window():
    crystal = crystal_from_arrays(np.eye(3) * 12, [14], [[0.5, 0.5, 0.5]])
    counts = []
    for beyond in (0, 0.9e-6, 1.1e-6):  # the centre lies between two images, 12 Å apart
        center = np.array([[beyond / 12, 0.5, 0.5]])
        counts.append(int(cut_spheres(crystal, center, 6.0)[0][-1]))
    assert counts == [2, 2, 1]


@pytest.mark.parametrize("seed", range(4))
def test_windows_do_not_depend_on_how_the_crystal_is_written(seed):
    """Order of atoms, origin, choice of cell, and centres in other cells."""
    crystal = random_crystal(20 + seed)
    rng = np.random.default_rng(seed)
    centers = rng.uniform(size=(3, 3))
    order, move = rng.permutation(crystal.n_atoms), rng.uniform(size=3)
    cell = np.array([[1, 1, 0], [0, 2, 1], [0, 0, 1]])
    wide = read_crystal(crystal.structure.make_supercell(cell))
    other_ways = [
        (crystal_from_arrays(crystal.lattice, crystal.species[order], crystal.frac_coords[order]),
         centers),
        (crystal_from_arrays(crystal.lattice, crystal.species, (crystal.frac_coords + move) % 1),
         centers + move),
        (wide, centers @ np.linalg.inv(cell)),
        (crystal, centers + np.array([2, -3, 1])),
    ]  # fmt: skip
    ptr, positions, atom = cut_spheres(crystal, centers, 5.0)
    species = crystal.species[atom]
    for other, elsewhere in other_ways:
        ptr2, positions2, atom2 = cut_spheres(other, elsewhere, 5.0)
        species2 = other.species[atom2]
        assert np.array_equal(ptr, ptr2)
        for a, b in itertools.pairwise(ptr):
            assert same_atoms((positions[a:b], species[a:b]), (positions2[a:b], species2[a:b]))


# ---------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("step", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("kind", ["plain", "aligned", "auto"])
def test_spacing_is_at_most_the_step(kind, step):
    for code in EXACT[:6]:
        crystal = databases.iza(code)
        spacing = np.linalg.norm(crystal.lattice, axis=1) / choose_grid(crystal, step, kind)
        assert spacing.max() <= step + 1e-9


def test_grids_are_aligned_capped_and_selectable():
    fcc = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    diamond = crystal_from_arrays(np.eye(3) * 3.567, [6] * 8, np.vstack([fcc, fcc + 0.25]))
    capped = 0
    for crystal in (diamond, *map(databases.iza, databases.iza_codes()[::15])):
        plain, aligned, auto = (choose_grid(crystal, 2.0, k) for k in ("plain", "aligned", "auto"))
        assert auto == (aligned if math.prod(aligned) <= 2 * math.prod(plain) else plain)
        capped += auto != aligned
        n = np.array(aligned)
        matrices = crystal.rotations * n[:, None] / n  # every operation keeps an aligned grid
        o = crystal.origin
        shifts = (crystal.translations + crystal.rotations @ o - o) * n
        assert np.abs(matrices - np.rint(matrices)).max() < 1e-9
        assert np.abs(shifts - np.rint(shifts)).max() < 1e-4
    assert capped == 1  # diamond: 4³ points instead of 2³


@pytest.mark.parametrize("code", ["LTA", "MFI", "CHA"])
def test_orbits_are_those_of_the_group_acting_on_points(code):
    """Straight from the definition: images of every grid point, found by their coordinates."""
    crystal = databases.iza(code)
    windows = sample_windows(crystal, radius=0.5, step=3.5)
    n = np.array(windows.grid)
    points = np.stack(np.unravel_index(np.arange(n.prod()), n), axis=1) / n + windows.origin
    for rotation, translation in zip(crystal.rotations, crystal.translations, strict=True):
        k = (points @ rotation.T + translation - windows.origin) * n
        whole = np.abs(k - np.rint(k)).max() < 1e-4
        if whole:
            image = np.ravel_multi_index(tuple((np.rint(k).astype(int) % n).T), n)
            assert np.array_equal(windows.orbit, windows.orbit[image])
    assert np.array_equal(np.bincount(windows.orbit), windows.weights)
    divides = len(crystal.rotations) % windows.weights
    assert not divides.any()  # orbit-stabiliser theorem


@pytest.mark.parametrize("grid", ["plain", "aligned", "auto"])
@pytest.mark.parametrize("symmetry", [True, False])
def test_layout(grid, symmetry):
    windows = sample_windows(databases.iza("ABW"), symmetry=symmetry, grid=grid)
    assert windows.weights.sum() == windows.n_windows == math.prod(windows.grid)
    assert windows.n_orbits == len(windows.centers) == len(windows.ptr) - 1
    assert len(windows.positions) == len(windows.species) == windows.ptr[-1]
    assert (windows.n_orbits < windows.n_windows) == symmetry
    assert np.linalg.norm(windows.positions, axis=1).max() <= windows.radius + EDGE
    field = windows.expand(windows.centers)
    assert field.shape == (*windows.grid, 3)
    if not symmetry:  # then grid point k sits at k / n + origin
        index = np.moveaxis(np.indices(windows.grid), 0, -1)
        difference = field - index / windows.grid - windows.origin
        assert np.abs(difference - np.rint(difference)).max() < 1e-12


# ------------------------------------------------------------------------------- exactness


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    config = X3MatConfig(l_max=2, channels=8, heads=2, layers=1, cutoff=2.5,
                         radial_functions=8, radial_hidden=8, feed_forward=8)
    return X3Mat(config).double().eval()


@pytest.mark.parametrize("code", EXACT)
def test_the_mean_over_orbits_is_the_mean_over_all_windows(code, net):
    crystal = databases.iza(code)
    few = sample_windows(crystal, step=3.0)
    all_ = sample_windows(crystal, step=3.0, symmetry=False)
    assert few.grid == all_.grid
    assert few.n_orbits < all_.n_orbits / 1.9
    some = np.random.default_rng(0).permutation(all_.n_windows)[:150]  # of large cells
    ptr, positions, atom = cut_spheres(crystal, all_.centers[some], few.radius)
    species = crystal.species[atom]
    with torch.no_grad():
        kept = net.contributions(few).numpy()
        each = net(torch.tensor(positions), torch.tensor(species), torch.tensor(ptr)).numpy()
    assert each.std() > 1e-6
    assert np.abs(kept[few.orbit[some]] - each).max() < 1e-10


def test_improper_operations_need_a_mirror_invariant_model():
    """A chirality, which changes sign under reflection, has mean zero over all windows of a
    crystal with mirrors, but not over the representatives."""
    crystal = databases.iza("CHA")
    few = sample_windows(crystal, step=3.0)
    all_ = sample_windows(crystal, step=3.0, symmetry=False)

    def chirality(windows):
        sums = []
        for w in range(windows.n_orbits):
            x, _ = contents(windows, w)
            r = np.linalg.norm(x, axis=1)[:, None] / windows.radius
            inside = np.clip(1 - r, 0, None)
            sums.append(np.linalg.det([(inside * x * r**k).sum(axis=0) for k in range(3)]))
        return np.array(sums)

    assert (np.linalg.det(crystal.rotations) < 0).any()
    over_all, over_few = chirality(all_), chirality(few)
    assert abs(over_all.mean()) < 1e-9 * np.abs(over_all).max()
    assert abs(few.weights @ over_few / few.n_windows) > 0.01 * np.abs(over_few).max()


@pytest.mark.parametrize("code", ["LTA", "CHA"])
def test_supercells_and_shifted_origins_give_the_same_mean(code, net):
    crystal = databases.iza(code)
    structure = crystal.structure
    structure.translate_sites(range(len(structure)), [0.21, 0.33, 0.07])
    doubled = read_crystal(crystal.structure.make_supercell([2, 1, 1]))
    first = sample_windows(crystal, step=3.0)
    reference = first.weights @ net.contributions(first).numpy() / first.n_windows
    for other in (read_crystal(structure), doubled):
        windows = sample_windows(other, step=3.0, grid="aligned")
        mean = windows.weights @ net.contributions(windows).numpy() / windows.n_windows
        if windows.n_windows in (first.n_windows, 2 * first.n_windows):
            assert np.abs(mean - reference).max() < 1e-10
        else:  # another grid: another quadrature of the same integral
            assert np.abs(mean - reference).max() < 0.05 * np.abs(reference).max()


# --------------------------------------------------------------------------- unusual input


def test_windows_without_atoms():
    crystal = crystal_from_arrays(np.eye(3) * 20, [6], [[0.5, 0.5, 0.5]])
    windows = sample_windows(crystal)
    assert 0 < (windows.atoms_per_window == 0).sum() < windows.n_orbits
    hollow = cut_spheres(crystal, np.zeros((2, 3)), 3.0)
    assert (hollow[0].tolist(), hollow[1].shape, hollow[2].shape) == ([0, 0, 0], (0, 3), (0,))


@pytest.mark.parametrize(
    "wrong",
    [{"radius": 0}, {"radius": -1}, {"radius": 100}, {"radius": math.nan}, {"step": 0},
     {"step": -2}, {"step": math.nan}, {"step": 0.05}],
)  # fmt: skip
def test_unusable_parameters_are_refused(wrong):
    with pytest.raises(DataError) as caught:
        sample_windows(databases.iza("SOD"), **wrong)
    assert caught.value.source == "SOD"
    assert caught.value.remedy
