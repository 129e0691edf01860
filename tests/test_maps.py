"""Site maps: the field itself, its files, and the comparison with densities."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from ase.io.cube import read_cube
from scipy import stats
from small_models import CONFIG, write

import x3mat
from x3mat import databases, maps, results
from x3mat.applications import application
from x3mat.predict import load_model
from x3mat.sampling import cut_spheres
from x3mat_book import densities, viz

CODES = ("LTA", "CAN", "ABW")  # cubic; hexagonal; a grid that does not contain the cell's origin
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    for seed in range(2):
        write(folder / f"{seed}.pt", seed)
    return load_model(folder)


@pytest.fixture(scope="module")
def site_maps(ensemble):
    return {code: x3mat.explain(databases.iza(code), ensemble) for code in CODES}


def contribution_at(ensemble, crystal, frac) -> float:
    """From the definition: a window cut at this very point."""
    import torch

    ptr, positions, atom = cut_spheres(crystal, np.asarray(frac)[None], CONFIG.radius)
    species = crystal.species[atom]
    inputs = torch.tensor(positions, dtype=torch.float32), torch.tensor(species), torch.tensor(ptr)
    with torch.no_grad():
        return float(np.mean([m(*inputs).item() for m in ensemble.members]))


@pytest.mark.parametrize("code", CODES)
def test_grid_values_lie_where_origin_and_spacing_say(site_maps, ensemble, code):
    m = site_maps[code]
    assert m.grid.shape == m.windows.grid
    assert m.grid.mean() == pytest.approx(m.prediction.value, rel=1e-6)
    assert np.ptp(m.grid) > 0.01
    assert (m.origin >= -1e-9).all()
    assert (m.origin < 1 / np.array(m.grid.shape)).all()
    rng = np.random.default_rng(0)
    for index in rng.integers(m.grid.shape, size=(6, 3)):
        here = m.origin + index / np.array(m.grid.shape)
        assert m.grid[tuple(index)] == pytest.approx(
            contribution_at(ensemble, m.crystal, here), rel=1e-4
        )
        assert m.at(here) == pytest.approx(m.grid[tuple(index)], abs=1e-6)


def test_one_of_the_codes_has_its_grid_off_the_origin(site_maps):
    assert np.abs(site_maps["ABW"].origin).max() > 0.01
    assert np.abs(site_maps["LTA"].origin).max() < 1e-9


@pytest.mark.parametrize("code", CODES)
def test_cube_round_trip(site_maps, ensemble, tmp_path, code):
    m = site_maps[code]
    with m.to_cube(tmp_path / "map.cube").open() as file:
        read = read_cube(file)
    atoms, data = read["atoms"], read["data"]
    assert atoms.numbers.tolist() == m.crystal.species.tolist()
    assert np.abs(atoms.cell.array - m.crystal.lattice).max() < 1e-6
    assert np.abs(atoms.positions - m.crystal.frac_coords @ m.crystal.lattice).max() < 1e-6
    index = np.array(np.unravel_index(data.argmax(), data.shape))
    position = read["origin"] + index / np.array(data.shape) @ m.crystal.lattice
    frac = position @ np.linalg.inv(m.crystal.lattice)
    assert data.max() == pytest.approx(contribution_at(ensemble, m.crystal, frac), rel=1e-4)
    assert np.abs(data - m.grid).max() < 1e-4 * np.abs(data).max()


def test_finer_map_keeps_the_prediction(ensemble):
    crystal = databases.iza("SOD")
    coarse, fine = (x3mat.explain(crystal, ensemble, step=s) for s in (None, 1.0))
    assert fine.prediction == coarse.prediction
    assert fine.windows.n_windows > 4 * coarse.windows.n_windows
    # contributions are a smooth function of the place, so the means of both grids are close
    assert fine.grid.mean() == pytest.approx(coarse.grid.mean(), rel=0.05)


@pytest.mark.parametrize("code", CODES)
def test_strongest_sites(site_maps, code):
    m = site_maps[code]
    first = m.sites[0]
    assert first.value == pytest.approx(m.grid.max())
    assert [s.value for s in m.sites] == sorted((s.value for s in m.sites), reverse=True)
    images = (m.crystal.frac_coords[:, None] + np.stack(np.meshgrid(
        *[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)).reshape(-1, 3) @ m.crystal.lattice
    for s in m.sites:
        assert np.allclose(np.array([s.x, s.y, s.z]) @ m.crystal.lattice, s.cartesian)
        distance = np.linalg.norm(images - s.cartesian, axis=1)
        if s.n_atoms:
            assert s.distance == pytest.approx(distance.min(), abs=1e-6)
        index = np.rint((np.array([s.x, s.y, s.z]) - m.origin) * m.grid.shape).astype(int)
        around = np.ix_(*((index[:, None] + [-1, 0, 1]) % np.array(m.grid.shape)[:, None]))
        assert s.value >= m.grid[around].max() - 1e-6
        here = np.ravel_multi_index(tuple((index - m._shift) % m.grid.shape), m.grid.shape)
        assert s.multiplicity == (m.windows.orbit == m.windows.orbit[here]).sum()


def test_interior_means_that_nitrogen_fits(ensemble):
    windows = x3mat.sample_windows(databases.iza("LTA"))
    inside = maps.interior(windows)
    cage = np.flatnonzero(np.isclose(windows.centers, 0.5).all(axis=1))
    assert inside[cage].all()
    nearest = [np.linalg.norm(windows.positions[a:b], axis=1).min(initial=np.inf)
               for a, b in zip(windows.ptr[:-1], windows.ptr[1:], strict=True)]  # fmt: skip
    assert not inside[np.array(nearest) < 1.52 + maps.PROBE_RADIUS].any()
    assert inside[np.array(nearest) > 2.1 + maps.PROBE_RADIUS].all()
    assert inside.sum() > maps.interior(windows, 2.5).sum() > 0


# ------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize("code", ["LTA", "CAN"])
@pytest.mark.parametrize("radius", [2.0, 6.0])
def test_window_average_is_the_mean_over_the_ball(code, radius):
    lattice = databases.iza(code).lattice
    shape = np.ceil(np.linalg.norm(lattice, axis=1) / 0.5).astype(int)
    rng = np.random.default_rng(1)
    waves = rng.integers(-2, 3, size=(6, 3))
    x = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij"), -1)

    def density(frac):
        return 3 + sum(np.cos(2 * np.pi * (frac @ k) + i) for i, k in enumerate(waves))

    points = rng.random((5, 3))
    found = densities.window_average(density(x), lattice, points, radius)
    ball = rng.normal(size=(40_000, 3))
    ball *= (radius * rng.random(len(ball)) ** (1 / 3) / np.linalg.norm(ball, axis=1))[:, None]
    for point, value in zip(points, found, strict=True):
        sample = density(point + ball @ np.linalg.inv(lattice))
        assert value == pytest.approx(sample.mean(), abs=5 * sample.std() / 200 + 0.01)


def test_window_average_keeps_the_mean():
    density = np.random.default_rng(2).random((8, 9, 10))
    lattice = np.array([[8.0, 0, 0], [2, 9, 0], [1, 1, 10]])
    points = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in density.shape),
                                  indexing="ij"), -1)  # fmt: skip
    average = densities.window_average(density, lattice, points, 3.0)
    assert average.mean() == pytest.approx(density.mean(), rel=1e-9)
    assert average.std() < density.std() / 2
    assert np.allclose(densities.window_average(density, lattice, points, 0.0), density)


def test_correlations_count_each_orbit_with_its_multiplicity():
    windows = x3mat.sample_windows(databases.iza("CHA"))
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, windows.n_orbits))
    found = densities.correlations(windows, a, a + b)
    x, y = windows.expand(a).ravel(), windows.expand(a + b).ravel()
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert densities.correlations(windows, a, np.ones_like(a)) == {"spearman": 0.0, "pearson": 0.0}


def test_orbit_mean_inverts_expansion():
    windows = x3mat.sample_windows(databases.iza("CHA"))
    values = np.arange(windows.n_orbits, dtype=float)
    assert np.allclose(densities.orbit_mean(windows, windows.expand(values).ravel()), values)
    points = densities.grid_points(windows)
    first = np.unique(windows.orbit, return_index=True)[1]
    assert np.allclose(points[first] % 1.0 % 1.0, windows.centers % 1.0)


# ------------------------------------------------------------------------------------ files


class Reader(HTMLParser):
    """Collects tags, attributes that load or link something, and the texts of scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.scripts, self.open = [], [], {}, None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data", "poster")]
        self.open = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, data):
        if self.open:
            self.scripts.setdefault(self.open, []).append(data)


def test_page_is_self_contained_and_holds_the_map(site_maps, tmp_path):
    m = site_maps["CAN"]
    page = m.to_html(tmp_path / "map.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert all(link.startswith("data:") for link in reader.links)
    assert "default-src 'none'" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"@@\w+@@", page)
    data = json.loads("".join(reader.scripts["data"]))
    assert data["cell"] == m.crystal.lattice.tolist()
    assert len(data["sites"]) == len(m.sites) == reader.tags.count("tr") - 1
    lines = data["cube"].splitlines()
    shape = [int(line.split()[0]) for line in lines[3:6]]
    values = np.array(" ".join(lines[6 + m.crystal.n_atoms :]).split(), float).reshape(shape)
    assert np.allclose(values[0], values[-1])
    assert np.allclose(values[:, :, 0], values[:, :, -1])
    inner = values[:-1, :-1, :-1]  # the faces are repeated
    assert inner.mean() == pytest.approx(m.grid.mean(), rel=0.01)
    assert f"{m.prediction.value:.3g} ± {m.prediction.std:.2g} g/L" in page
    assert '<html lang="en">' in page


def test_page_escapes_names(site_maps):
    m = site_maps["CAN"]
    crystal = replace(m.crystal, name='<script>alert("x")</script>')
    page = maps._page(replace(m, crystal=crystal))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_page_sets_only_the_digits_of_formulas_low(site_maps):
    m = site_maps["CAN"]
    named = replace(m.prediction, property="CO2 uptake at 77 K and 0.5 bar (sample-N2)")
    page = maps._page(replace(m, prediction=named))
    assert "CO₂ uptake at 77 K and 0.5 bar (sample-N2)" in page
    assert "SiO₂" in page


def test_table_of_sites(site_maps, tmp_path):
    m = site_maps["LTA"]
    rows = list(csv.DictReader(m.to_csv(tmp_path / "s.csv").open(encoding="utf-8")))
    assert len(rows) == len(m.sites)
    assert float(rows[0]["value (g/L)"]) == pytest.approx(m.sites[0].value, rel=1e-5)
    assert {row["kind"] for row in rows} <= {"Interior", "Exterior"}


def test_files_that_cannot_be_written(site_maps, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(x3mat.DataError, match="cannot write there"):
        site_maps["CAN"].save(tmp_path / "file" / "below")


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_page_in_a_browser(site_maps, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page_file = site_maps["CAN"].to_html(tmp_path / "map.html")
    flags = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND", "--use-gl=angle",
             "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # fmt: skip
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=flags)
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        problems, requests = [], []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri(), timeout=60_000)
        page.wait_for_selector("#view canvas")
        before = page.inner_text("#shown")
        page.locator("#level").fill(page.get_attribute("#level", "min"))
        assert page.inner_text("#shown") != before
        assert page.is_hidden("#failed")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert problems == []
    assert requests == [page_file.as_uri()]


# --------------------------------------------------------------------------------- pictures


def test_slice_shows_the_field_and_the_atoms_near_the_plane(site_maps):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    m = site_maps["CAN"]
    figure, ax = plt.subplots()
    image = viz.plot_slice(ax, m.crystal, m.at, height=0.25, slab=1.0)
    plane = m.at(np.stack(np.meshgrid(*[np.linspace(0, 1, 121)] * 2, [0.25], indexing="ij"), -1))
    assert np.allclose(np.ravel(image.get_array()), plane.ravel())
    points = np.concatenate([c.get_offsets() for c in ax.collections if c is not image])
    c = m.crystal.lattice[2, 2]
    near = np.abs((maps.with_faces(m.crystal)[1][:, 2] - 0.25 + 0.5) % 1 - 0.5) * c <= 0.5
    assert len(points) == near.sum() > 0
    plt.close(figure)


def test_isosurfaces_in_three_dimensions(site_maps):
    pytest.importorskip("py3Dmol", reason="py3Dmol is not installed")
    m = site_maps["CAN"]
    values, cube = maps.closed_cube(m.crystal, m.at, 0.7)
    page = viz.field_view(m.crystal, [(m.at, 4.5, "red")])._make_html()
    assert '"isoval": 4.5' in page
    assert cube.splitlines()[4] in page
    assert values.shape == tuple(int(line.split()[0]) for line in cube.splitlines()[3:6])


# ------------------------------------------------------------------------- what the chapter says


@pytest.fixture(scope="module")
def named():
    return results.read("zeolite-n2/maps.json")


@pytest.fixture(scope="module")
def fold():
    return results.read("zeolite-n2/maps-fold-0.json")


def medians(record, radius):
    return {name: abs(found["median"]) for name, found in record["median"][radius].items()}


def test_records_are_of_the_shipped_networks(named, fold):
    ensemble = load_model("zeolite-n2")
    for record in (named, fold):
        assert record["n_members"] == len(ensemble.members) == 5
        assert record["window_radius"] == ensemble.config.radius
        for code, row in record["zeolites"].items():
            assert row["n_held_out"] == len(ensemble.without(code).members) == 1
    chosen = application("zeolite-n2")
    rest = chosen.folds()[0].rest
    assert sorted([*fold["zeolites"], *fold["empty"]]) == sorted(rest)
    assert fold["empty"] == ["LIT"]
    assert fold["n_zeolites"] == 50  # as the heading has it
    for code, row in named["zeolites"].items():
        assert row["uptake_g_L"]["label"] == chosen.labels().n2_g_L[code]
    lta = databases.iza("LTA")
    unseen = ensemble.without("LTA")
    found = unseen.values(unseen.windows(lta)).mean()
    assert found == pytest.approx(named["zeolites"]["LTA"]["uptake_g_L"]["predicted_held_out"],
                                  rel=1e-3)


def test_what_is_said_of_twelve_zeolites(named):
    assert named["n_zeolites"] == 12
    for radius in ("r4", "r3"):
        found = medians(named, radius)
        assert found["untrained"] < found["held_out"] < found["nearest_atom"]
    for radius in ("r6", "r2"):
        found = medians(named, radius)
        assert found["held_out"] < found["untrained"]
    at_3 = {code: row["r3"]["held_out"]["spearman"] for code, row in named["zeolites"].items()}
    assert max(at_3, key=at_3.get) == "TON"
    assert min(at_3, key=at_3.get) == "RHO"
    assert at_3["RHO"] < -0.2 < 0.8 < at_3["TON"]
    kinds = {code: row["strongest"]["kind"] for code, row in named["zeolites"].items()}
    assert (kinds["LTA"], kinds["ASV"]) == ("Exterior", "Interior")  # as in the paper
    rho = named["zeolites"]["RHO"]["strongest"]
    assert (rho["kind"], round(rho["density_g_L"])) == ("Exterior", 0)


def test_what_is_said_of_fifty_zeolites(fold):
    paired = fold["paired"]
    for radius in ("r6", "r4", "r3"):
        assert paired[radius]["untrained"]["interval"][0] > 0
    low, high = paired["r4"]["nearest_atom"]["interval"]
    assert low < 0 < paired["r4"]["nearest_atom"]["median"] < high
    assert all(paired["r4"][name]["n_better"] > 25 for name in paired["r4"])
    assert paired["r6"]["atom_count"]["interval"][1] < 0
    assert paired["r3"]["nearest_atom"]["interval"][1] < 0.1
    assert paired["r3"]["nearest_atom"]["median"] < 0
    assert paired["r2"]["nearest_atom"]["interval"][1] < 0
    assert paired["r2"]["untrained"]["median"] < 0 < paired["r2"]["untrained"]["interval"][1]
    at_4 = [medians(fold, r)["held_out"] for r in ("r2", "r3", "r4", "r6")]
    assert max(at_4) == at_4[2]
    ours, distance, density = zip(*(
        (row["r4"]["held_out"]["spearman"], row["r4"]["nearest_atom"]["spearman"],
         databases.iza(code).density) for code, row in fold["zeolites"].items()
    ), strict=True)  # fmt: skip
    assert stats.spearmanr(density, ours).statistic > 0.3
    assert stats.spearmanr(density, np.subtract(ours, distance)).statistic > 0.3
