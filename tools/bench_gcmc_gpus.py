"""GCMC on one and on several GPUs: the same crystals by one process and by N that torchrun starts.

Both runs are `tools/mof_labels.py run` with short chains, in batches of equally many crystals: N
processes simulate two batches each, one process all 2 N of them, as it would with more crystals
than fit into its memory. (One batch that is shared out ends with its slowest chain, on however many
GPUs.) Processes for the energy grids are as many for each GPU. N processes come first: if the
driver keeps compiled kernels, the single process profits.

    speed_up               wall time of the whole commands, with start-up
    speed_up_after_start   of what comes after kernels are compiled; the slowest process counts
    speed_up_of_chains     of the chains alone, likewise

Efficiencies are these over N. Grids of all batches but a process's first are made while chains run.
All rows must be the same; the file states the largest relative difference of any number in them.

Examples
    python tools/mof_labels.py pack --to mofs.npz --limit 2000
    python tools/bench_gcmc_gpus.py --packed mofs.npz
    python tools/bench_gcmc_gpus.py --packed mofs.npz --device cpu --limit 4 --equilibration 10 \\
        --cycles 10 --out /tmp/x.json

Writes data/results/bench/gcmc_gpus.json
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import mof_labels

from x3mat import paths, results
from x3mat.errors import DataError, X3MatError
from x3mat_gcmc import shards

TOLERANCE = 1e-9  # relative; chains that differ at all soon differ by much more
PHASES = {"start_s": "compiled_s", "grids_s": "waited_for_grids_s", "tables_s": "tables_s",
          "chains_s": "chains_s", "averages_s": "averages_s"}  # fmt: skip


def run(processes: int, arguments: Sequence[str]) -> tuple[dict, dict[str, dict]]:
    """Times of a run by so many processes, and its rows by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", str(processes), str(Path(mof_labels.__file__)), "run",
                   *arguments, "--runs", folder]  # fmt: skip
        begun = time.perf_counter()
        code = subprocess.run(command, stdout=sys.stderr).returncode
        wall = time.perf_counter() - begun
        rows = shards.read_rows(Path(folder))
    if code:
        raise DataError("torchrun", f"it ended with {code}", "Its output above tells why.")
    return times(processes, wall, rows), {row["name"]: row for row in rows if "name" in row}


def times(processes: int, wall: float, rows: Sequence[dict]) -> dict:
    """Seconds of a run: in all, and of each process by phases."""
    each: dict[str, dict] = {}
    for batch in (row["batch"] for row in rows if "batch" in row):
        of = each.setdefault(batch["shard"], {
            "shard": batch["shard"], "device": batch["device"], "crystals": 0, "moves": 0,
            "batches": 0, **dict.fromkeys(PHASES, 0.0)})  # fmt: skip
        of["batches"] += 1
        for key in ("crystals", "moves"):
            of[key] += batch[key]
        for ours, theirs in PHASES.items():
            of[ours] = round(of[ours] + batch.get(theirs, 0.0), 3)
    for of in each.values():
        of["after_start_s"] = round(sum(of[key] for key in PHASES) - of["start_s"], 3)
    slowest = {key: max(of[key] for of in each.values()) for key in ("after_start_s", "chains_s")}
    return {"processes": processes, "wall_s": wall, **slowest,
            "each": [each[shard] for shard in sorted(each)]}  # fmt: skip


def numbers(tree: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Everything in a row that is no list or dictionary, with its place."""
    if isinstance(tree, dict | list):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, part in parts:
            yield from numbers(part, f"{place}.{key}" if place else str(key))
    else:
        yield place, tree


def difference(one: dict, two: dict) -> float:
    """Largest relative difference of the numbers in two rows; infinite if other things differ."""
    largest, (a, b) = 0.0, (dict(numbers(row)) for row in (one, two))
    if a.keys() != b.keys():
        return float("inf")
    for key, x in a.items():
        y = b[key]
        if x != y:
            if not all(isinstance(v, int | float) for v in (x, y)):
                return float("inf")
            largest = max(largest, abs(x - y) / max(abs(x), abs(y)))
    return largest


def compare(one: dict[str, dict], several: dict[str, dict]) -> dict:
    """How far rows, by name, of two runs are the same."""
    found = {name: difference(one[name], several[name]) for name in one.keys() & several.keys()}
    worst = max(found, key=found.get, default="")
    return {
        "rows": len(found), "only_in_one": sorted(one.keys() ^ several.keys()),
        "identical": sum(x == 0 for x in found.values()),
        "largest_relative_difference": found.get(worst, 0.0), "worst": worst,
        "same": one.keys() == several.keys() and found.get(worst, 0.0) <= TOLERANCE,
    }  # fmt: skip


def speed(one: dict, several: dict) -> dict:
    """How much faster several processes were, and that over their number."""
    out, keys = {}, {"": "wall_s", "_after_start": "after_start_s", "_of_chains": "chains_s"}
    for name, key in keys.items():
        ratio = one[key] / several[key]
        out |= {f"speed_up{name}": ratio, f"efficiency{name}": ratio / several["processes"]}
    return out


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_set", nargs="?", default="mof-n2", choices=list(mof_labels.PLANS))
    parser.add_argument("--packed", type=Path, required=True, help="by mof_labels.py pack")
    parser.add_argument("--limit", type=int, default=2000, help="crystals (default 2000)")
    parser.add_argument("--processes", type=int, default=2, help="and GPUs (default 2)")
    parser.add_argument("--equilibration", type=int, default=50, help="cycles (default 50)")
    parser.add_argument("--cycles", type=int, default=100, help="sampled (default 100)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=paths.results("bench/gcmc_gpus.json"))
    options = parser.parse_args(argv)
    begun, n = time.perf_counter(), options.processes
    batch, workers = -(-options.limit // (2 * n)), max(1, (os.cpu_count() or 1) // n)
    arguments = [options.data_set, "--packed", str(options.packed), "--device", options.device]
    for key, value in (("limit", options.limit), ("equilibration", options.equilibration),
                       ("cycles", options.cycles), ("batch", batch), ("workers", workers)):
        arguments += [f"--{key}", str(value)]
    try:
        several, rows = run(n, arguments)
        one, expected = run(1, arguments)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = replace(mof_labels.PLANS[options.data_set].passes[0],
                       equilibration=options.equilibration, cycles=options.cycles)  # fmt: skip
    failed = sum("failed" in row for row in expected.values())
    same = compare(expected, rows)
    payload = {
        "data_set": options.data_set, "settings": asdict(settings), "device":
        one["each"][0]["device"], "processes": n, "crystals": len(expected), "failed": failed,
        "chains": (len(expected) - failed) * settings.replicas,
        "moves": sum(of["moves"] for of in one["each"]), "batch": batch, "workers_of_each": workers,
        "one": one, "several": several, **speed(one, several), "comparison": same,
    }  # fmt: skip
    results.write(options.out.absolute(), payload, seed=settings.seed,
                  command=shlex.join(["python", "tools/bench_gcmc_gpus.py", *argv]),
                  wall_s=time.perf_counter() - begun)  # fmt: skip
    print(f"{len(expected)} crystals: {one['wall_s']:.1f} s by 1 process, {several['wall_s']:.1f} s"
          f" by {n}; after the start {payload['speed_up_after_start']:.2f} times as fast, chains"
          f" {payload['speed_up_of_chains']:.2f}; {same['identical']} of {same['rows']} rows are"
          f" identical, largest difference {same['largest_relative_difference']:.1e}")  # fmt: skip
    return int(not same["same"])


if __name__ == "__main__":
    sys.exit(main())
