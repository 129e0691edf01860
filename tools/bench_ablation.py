"""What each idea behind x3mat.kernels saves: the time of a step without it, one at a time.

An idea is removed by editing the source of x3mat/kernels.py; what is to be replaced stands below,
word for word, so that this fails if the kernels have moved on. The network and its outputs stay
the same, which is checked. Measured as tools/bench.py does: random windows of 40 atoms, forward,
and forward and backward, as CUDA graphs, medians. The unchanged kernels are measured first
and last. "kinds", that pairs of atoms recur, is measured on windows of zeolites, with and without.

Examples
    python tools/bench_ablation.py
    python tools/bench_ablation.py --only early transposed --out /tmp/ablation.json

Writes data/results/bench/ablation.json
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import bench
import torch
from tqdm import tqdm

from x3mat import databases, paths, results
from x3mat.errors import DataError

KERNELS = Path(results.__file__).with_name("kernels.py")
IDEAS = {  # what each is, and what stands in the source, and what would stand there without it
    "early": ("rows of the next edge asked for before those of one are used", [
        ("""\
    rows = rows_of(x, kind_of(kind, e, k < stop), k < stop, n_edges, L, M, C)
    while k < stop:
        k += 1
""", """    while k < stop:
        rows = rows_of(x, kind_of(kind, e, k < stop), k < stop, n_edges, L, M, C)
        k += 1
"""),
        ("""\
        after = rows_of(x, kind_of(kind, e, k < stop), k < stop, n_edges, L, M, C)
        acc = turned_back(acc, at, rows, w, L, M, stored)
        rows = after
""", """        acc = turned_back(acc, at, rows, w, L, M, stored)
"""),
    ]),
    "transposed": ("transposed copies of weights for the gradient of a product's input", [
        ("w.T.contiguous().T", "w"),
    ]),
    "sums as products": ("sums over edges and nodes as products with ones", [
        ("edges.one @ b[0]", "b[0].sum(0)"),
        ("one @ grad_z, grad.T @ hidden, one @ grad",
         "grad_z.sum(0), grad.T @ hidden, grad.sum(0)"),
        ("one @ grad_gates, grad_expand, grad_contract, one @ grad[0]",
         "grad_gates.sum(0), grad_expand, grad_contract, grad[0].sum(0)"),
        ("one @ grad_h[0, :, s.channels :]", "grad_h[0, :, s.channels :].sum(0)"),
        ("one[: s.receivers] @ grad[0]", "grad[0].sum(0)"),
        ("(x.new_ones(len(parts)) @ parts.flatten(1))", "parts.flatten(1).sum(0)"),
        ("(h.new_ones(len(parts)) @ parts.flatten(1))", "parts.flatten(1).sum(0)"),
    ]),
    "second stream": ("gradients of weights on a second stream, for which nothing waits", [
        ("return torch.cuda.Stream(device) if device.type == \"cuda\" else None", "return None"),
    ]),
    "fused norms": ("an equivariant layer norm, and the sum of gradients at it, as one kernel", [
        ("return Norm.apply(x, module.scalars.weight, module.scalars.bias, gamma, module.eps)",
         "return x, module(x.transpose(0, 1)).transpose(0, 1).contiguous()"),
    ]),
    "fused gates": ("a feed-forward layer with its gates as one kernel, without autograd", [
        ("""\
    expand = f.expand.weight if a.l_out else y.new_empty(0, *f.contract.weight.shape[:0:-1])
    return FeedForward.apply(x, y, degrees[: len(x)], f.gates.weight, f.gates.bias, expand,
                             f.contract.weight, f.contract.bias)
""", """    return (x + f(y.transpose(0, 1)).transpose(0, 1)).contiguous()
"""),
    ]),
    "products with elements": ("a radial network's sum over elements and basis as one product", [
        ("""\
    inputs.scatter_(1, ends + one, 1.0)
""", """    inputs.ends = ends + one
"""),
        ("""\
    x = packed.inputs @ first
""", """    x = packed.inputs @ first
    for ends in packed.inputs.ends.T:
        x = x + first.index_select(0, ends)
"""),
        ("""\
    return packed.inputs.T @ grad_x, grad_z""", """    of_first = packed.inputs.T @ grad_x
    for ends in packed.inputs.ends.T:
        of_first.index_add_(0, ends, grad_x)
    return of_first, grad_z"""),
    ]),
    "harmonics of D": ("the embedding in one kernel, with harmonics from the Wigner matrices", [
        ("""\
    x = Embed.apply(edges.element @ model.embedding, packed, (c.l_max, c.m_max), *radial,
                    weight * scale[:, None], bias * scale)
""", """    x = model._embed(edges, n_windows).transpose(0, 1).contiguous()
"""),
    ]),
}  # fmt: skip


def without(idea: str | None) -> str:
    """The source of x3mat/kernels.py without an idea.

    Raises a DataError if what it replaces is not there exactly once.
    """
    source = KERNELS.read_text(encoding="utf-8")
    for old, new in IDEAS[idea][1] if idea else ():
        if source.count(old) != 1:
            raise DataError(KERNELS.name, f"what stands for the idea {idea!r} is not there once: "
                            f"{old.strip()[:60]!r}", "Bring tools/bench_ablation.py up to date.")
        source = source.replace(old, new)
    return source


def module(idea: str | None, folder: Path):
    """The kernels without an idea, as a module; of a file, since Triton reads its source."""
    path = folder / f"kernels_without_{(idea or 'nothing').replace(' ', '_')}.py"
    path.write_text(without(idea), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def measured(graph, clock: bench.Clock, kernels, way: str = "x3mat", replay: bool = True) -> dict:
    """ms per window, forward and with backward, and the contributions."""
    network = bench.OurNetwork(bench.Sizes(), 4, way).to(graph.positions.device)
    network.model._kernels = lambda positions: kernels
    out = {"output": bench._silent(network, graph.n_windows, network.pack(graph))}
    for name, backward in (("ms_fwd", False), ("ms_fwd_bwd", True)):
        found = bench.measure(network, graph, backward, replay, clock)
        out |= {name: found["ms"], f"{name}_min": found["ms_min"], f"{name}_max": found["ms_max"]}
    return out


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(IDEAS), default=list(IDEAS))
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the windows")
    parser.add_argument("--out", type=Path, default=paths.results("bench/ablation.json"))
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    began, clock = time.perf_counter(), bench.Clock("cuda", 3, options.repeats)
    graph = bench.random_windows(options.windows, 40, 20, options.seed).to("cuda")
    torch.set_float32_matmul_precision("high")
    rows, exact = [], None
    with tempfile.TemporaryDirectory() as folder:
        whole = module(None, Path(folder))
        cases = [("all", None, {}), *((idea, idea, {}) for idea in options.only),
                 ("CUDA graphs", None, {"replay": False}), ("TF32", None, {}),
                 ("kernels", None, {"way": "x3mat_plain"}), ("all again", None, {})]  # fmt: skip
        for name, idea, how in tqdm(cases):
            torch.set_float32_matmul_precision("highest" if name == "TF32" else "high")
            found = measured(graph, clock, module(idea, Path(folder)) if idea else whole, **how)
            y = found.pop("output").double()
            exact = exact if rows else y
            deviation = float((y - exact).abs().max() / exact.std())
            rows.append({"without": name, "what": IDEAS[idea][0] if idea else name,
                         "deviation": deviation, **found})  # fmt: skip
            tqdm.write(f"{name}: {found['ms_fwd']:.4f}, {found['ms_fwd_bwd']:.4f} ms, {deviation}")
        torch.set_float32_matmul_precision("high")
        real = bench.crystal_windows(databases.iza_codes(), databases.iza, 6.0, 5.0,
                                     options.windows, options.seed).to("cuda")  # fmt: skip
        told, row = (measured(g, clock, whole) for g in (real, replace(real, kind=None)))
        y, exact = row.pop("output").double(), told.pop("output").double()
        kinds = {"without": "kinds", "what": "what depends on distance and elements alone computed"
                 " once for all pairs of a kind", "deviation":
                 float((y - exact).abs().max() / exact.std()), **row, "with": told,
                 "slower": row["ms_fwd_bwd"] / told["ms_fwd_bwd"] - 1}  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    base = sum(r["ms_fwd_bwd"] for r in (rows[0], rows[-1])) / 2
    for row in rows:
        row["slower"] = row["ms_fwd_bwd"] / base - 1
    found = {"device": torch.cuda.get_device_name(), "sizes": vars(bench.Sizes()), "l_max": 4,
             "graphs": bench.described(graph), "repeats": options.repeats, "rows": rows,
             "kinds": kinds, "zeolites": bench.described(real),
             "triton": metadata.version("triton")}
    results.write(options.out, bench.rounded(found), seed=options.seed,
                  wall_s=time.perf_counter() - began,
                  command=shlex.join(["python", "tools/bench_ablation.py", *argv]))  # fmt: skip


if __name__ == "__main__":
    main()
