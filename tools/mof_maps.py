"""Site maps of CO2 and N2 in MOFs beside simulated densities of the mixture.

Test crystals of mof-co2n2 that no network was trained on are drawn at random, among those with at
most MOST_ATOMS atoms and LEAST g/L of CO2. In each the mixture is simulated as for the labels, with
predicted charges, by two halves of chains that share nothing. Their densities, averaged over the
orbits of windows and seen through a Gaussian of 1 Å (x3mat_gcmc.lattice_gas) or averaged over a
ball of 3 Å, are compared with the maps of

    atoms        mof-co2n2, which sees atoms only
    told         mof-co2n2-told, which corrects the lattice gas
    lattice gas  by itself

over all grid points: Pearson's and Spearman's correlation, for each gas. "halves" is that of the
two halves, so of the simulation with itself. A crystal whose file is in the folder is not simulated
again. The record is data/results/mof-co2n2/maps.json.

examples:
  python tools/mof_maps.py --jobs 2
  python tools/mof_maps.py --limit 1 --cycles 50 --folder runs/try --record runs/try/maps.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import gcmc_checks
import numpy as np
from tqdm import tqdm

from x3mat import paths, results
from x3mat.applications import application
from x3mat.errors import X3MatError
from x3mat.predict import Ensemble, load_model
from x3mat_book.densities import correlations, grid_points, orbit_mean, window_average
from x3mat_gcmc import GCMCSettings, gcmc, kernel
from x3mat_gcmc.charges import with_predicted_charges
from x3mat_gcmc.lattice_gas import seen_at
from x3mat_gcmc.system import settings_hash

NAME, GASES = "mof-co2n2", ("CO2", "N2")
NUMBER, MOST_ATOMS, LEAST = 20, 120, 10.0
BALL = 3.0  # Å
SETTINGS = replace(
    gcmc_checks.SETTINGS["co2-n2"], equilibration=500, cycles=1000, replicas=4, density=True
)  # of a half
MAPS = "atoms", "told", "lattice gas"


def chosen(number: int, seed: int = 0) -> list[str]:
    """Names of the crystals, in the order in which they were drawn."""
    app = application(NAME)
    label = app.labels().loc[list(app.folds()[0].halves[1]), GASES[0]]
    small = [name for name in label.index[label >= LEAST]
             if app.crystal(name, symprec=0.0).n_atoms <= MOST_ATOMS]  # fmt: skip
    return np.random.default_rng(seed).permutation(small)[:number].tolist()


def simulated(name: str, settings: GCMCSettings, folder: Path) -> np.ndarray:
    """Densities, (halves, gases, n1, n2, n3), molecules per Å3; kept in a file."""
    file = folder / f"{name}-{settings_hash(settings)}.npz"
    if not file.is_file():
        framework = with_predicted_charges(application(NAME).crystal(name, symprec=0.0))
        halves = gcmc([framework], [settings, replace(settings, seed=settings.seed + 1)])
        for half in halves:
            if isinstance(half, X3MatError):
                raise half
        with results.replacing(file) as out:
            np.savez_compressed(out, density=np.array(
                [[half.density[gas] for gas in GASES] for half in halves], np.float32))  # fmt: skip
    with np.load(file) as found:
        return found["density"].astype(float)


def compared(name: str, density: np.ndarray, models: dict[str, Ensemble]) -> dict:
    """Correlations of the maps of a crystal with its densities, by gas."""
    crystal = application(NAME).crystal(name)
    windows = models["told"].windows(crystal)
    points = grid_points(windows)

    def seen(field: np.ndarray) -> dict[str, np.ndarray]:
        """By the windows."""
        values = {"gaussian": seen_at(crystal.lattice, field, points % 1.0),
                  "ball": window_average(field, crystal.lattice, points, BALL)}  # fmt: skip
        return {kind: orbit_mean(windows, x) for kind, x in values.items()}

    maps = {how: np.mean([member.contributions(windows).double().numpy()
                          for member in model.members], 0) for how, model in models.items()}
    maps["lattice gas"] = windows.told
    row: dict = {"name": name, "n_atoms": crystal.n_atoms, "windows": windows.n_windows}
    for k, gas in enumerate(GASES):
        whole, *halves = (seen(x[k]) for x in (density.mean(0), *density))
        row[gas] = {kind: {
            "halves": correlations(windows, *(half[kind] for half in halves)),
            **{how: correlations(windows, maps[how][:, k], whole[kind]) for how in MAPS}}
            for kind in whole}  # fmt: skip
    return row


def summary(rows: list[dict]) -> dict:
    """Quartiles over the crystals of each correlation, and in how many "told" is the better."""
    out: dict = {}
    for gas in GASES:
        for kind in ("gaussian", "ball"):
            for measure in ("pearson", "spearman"):
                values = {how: np.array([row[gas][kind][how][measure] for row in rows])
                          for how in ("halves", *MAPS)}  # fmt: skip
                out.setdefault(gas, {}).setdefault(kind, {})[measure] = {
                    **{how: np.quantile(x, [0.25, 0.5, 0.75]) for how, x in values.items()},
                    "told_above_atoms": int((values["told"] > values["atoms"]).sum()),
                    "told_above_lattice_gas": int((values["told"] > values["lattice gas"]).sum()),
                }  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=NUMBER, help="crystals (default 20)")
    parser.add_argument("--cycles", type=int, default=SETTINGS.cycles, help="of each chain")
    parser.add_argument("--jobs", type=int, default=1, help="threads of the simulation")
    parser.add_argument("--folder", type=Path, default=Path("runs/mof-maps"),
                        help="of the densities")  # fmt: skip
    parser.add_argument("--record", type=Path, default=paths.results(f"{NAME}/maps.json"))
    args = parser.parse_args(argv)
    begun, settings = time.perf_counter(), replace(SETTINGS, cycles=args.cycles)
    kernel.config.NUMBA_NUM_THREADS = args.jobs
    models = {"atoms": load_model(f"{NAME}:CO2"), "told": load_model(f"{NAME}-told:CO2")}
    rows = []
    for name in tqdm(chosen(args.limit), unit="crystal"):
        rows.append(compared(name, simulated(name, settings, args.folder), models))
    results.write(
        args.record.absolute(),
        {"application": NAME, "gases": GASES, "settings": asdict(settings), "halves": 2,
         "most_atoms": MOST_ATOMS, "least_g_per_L": LEAST, "ball_A": BALL, "n": len(rows),
         "summary": summary(rows), "rows": rows},
        seed=[settings.seed, settings.seed + 1],
        command=shlex.join(["python", "tools/mof_maps.py", *argv]),
        wall_s=time.perf_counter() - begun,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
