"""The comparison with the peer, at tiny sizes and for X(3)mat alone."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from types import SimpleNamespace

import bench
import bench_ablation
import bench_database
import bench_ddp
import pytest
import torch
from small_models import write

from x3mat import results
from x3mat.applications import application
from x3mat.training import train_config


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    path, printed = tmp_path_factory.mktemp("bench") / "quick.json", io.StringIO()
    threads = torch.get_num_threads()
    with redirect_stdout(printed):
        bench.main(["--quick", "--no-peer", "--device", "cpu", "--threads", "1", "--json",
                    "--out", str(path)])  # fmt: skip
    assert torch.get_num_threads() == threads
    found = json.loads(path.read_text())
    assert json.loads(printed.getvalue()) == found["comparison"]
    return found


def numbers(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for value in tree:
            yield from numbers(value)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield tree


def test_everything_was_measured(found):
    assert found["complete"]
    assert found["skipped"] == []
    assert {(m["graphs"], m["pass"]) for m in found["measurements"]} == {
        (g, p) for g in ("random", "zeolites") for p in ("fwd", "fwd+bwd")
    }
    assert [(c["model"], c["pass"]) for c in found["counts"]] == [
        ("x3mat", "fwd"), ("x3mat", "fwd+bwd")
    ]  # fmt: skip
    assert {"command", "versions", "hardware"} <= found["provenance"].keys()


def test_numbers_are_positive(found):
    parts = [found[key] for key in
             ("graphs", "limits", "comparison", "measurements", "counts", "profiles")]  # fmt: skip
    values = list(numbers(parts))
    assert len(values) > 100
    assert all(math.isfinite(v) and v > 0 for v in values)


def test_shares_add_up(found):
    (profile,) = found["profiles"]
    assert sum(profile["share_of_kind"].values()) == pytest.approx(1, abs=1e-3)
    shares = [row["share"] for row in profile["top"]]
    assert shares == sorted(shares, reverse=True)


def test_no_ratio_without_the_peer(found):
    assert not found["peer"]["measured"]
    assert found["peer"]["reason"] == "--no-peer"
    for row in found["comparison"]:
        assert row["peer"] is None
        assert not [key for key in row if key.startswith(("ratio", "peer_"))]


def test_ratios_where_both_were_measured():
    def measured(model, mode, ms, kind="random"):
        return {"graphs": kind, "model": model, "l_max": 4, "pass": "fwd+bwd", "mode": mode,
                "ms": ms, "windows": 100, "peak_gib": 10 * ms}  # fmt: skip

    rows = bench.compare({"peer": {"measured": True}, "measurements": [
        measured("x3mat", "eager", 0.4), measured("x3mat", "graph", 0.2),
        measured("uma", "eager", 1.0), measured("uma", "graph", 0.8),
        measured("x3mat+1", "graph", 0.25), measured("x3mat", "graph", 0.3, "zeolites"),
    ]}, bench.Sizes())  # fmt: skip
    assert rows[0] == {
        "peer": bench.PEER, "graphs": "random", "lmax": 4, "channels": 64, "layers": 4,
        "windows": 100, "ms_fwd_bwd": 0.2, "mode_fwd_bwd": "graph", "ms_fwd_bwd_eager": 0.4,
        "ms_fwd_bwd_graph": 0.2, "peer_windows": 100, "peer_ms_fwd_bwd": 1.0,
        "ms_fwd_bwd_one_layer_more": 0.25, "peer_ms_fwd_bwd_graph": 0.8,
        "ratio_fwd_bwd": 5.0, "ratio_fwd_bwd_graph": 4.0, "ratio_fwd_bwd_one_layer_more": 4.0,
        "peak_gib": 2.0, "peak_gib_eager": 4.0, "peak_gib_graph": 2.0, "peer_peak_gib": 10.0,
    }  # fmt: skip
    assert not [key for key in rows[1] if key.startswith(("ratio", "peer_"))]


def test_time_of_kernels_that_overlap_counts_once():
    def event(start, end, kind=torch.autograd.DeviceType.CUDA):
        return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=kind)

    host = event(0, 100, torch.autograd.DeviceType.CPU)
    events = [event(20, 30), event(0, 10), host, event(5, 12), event(21, 22)]
    assert bench.occupied(events) == pytest.approx(22e-3)


def test_bytes_of_operations():
    a, b = torch.zeros(3, 5), torch.ones(5)
    with bench.ByteCounter() as counter:
        y = (a + b.expand(3, 5)).t()  # 15 + 5 read, 15 written; the views move nothing
        y.mul_(2.0)  # 15 read, 15 written
    assert dict(counter.by_operation) == {"add": 4 * 35, "mul_": 4 * 30}


def test_first_windows():
    graph = bench.random_windows(5, 8, 4, seed=0)
    part = bench.first(graph, 2)
    assert part.n_windows == 2
    assert torch.equal(part.positions, graph.positions[:16])
    assert int(part.src.max()) < 16
    assert len(part.src) == int((graph.window[graph.dst] < 2).sum())


def test_lack_of_memory_is_found_behind_other_errors():
    follow_up = RuntimeError("capture failed")
    follow_up.__context__ = torch.OutOfMemoryError("full")
    assert bench._out_of_memory(follow_up)
    assert not bench._out_of_memory(RuntimeError("other"))


def test_what_the_chapter_says_of_speed():
    """Rows of the results are those that it takes them for, and what it says without a number."""
    found, *before, six, qmof, cpu = (results.read(f"bench/{name}.json") for name in (
        "h200", "h200-1", "h200-2", "h200-lmax6", "h200-qmof", "cpu"))  # fmt: skip
    cases = [(r["graphs"], r["lmax"]) for r in found["comparison"]]
    assert cases == [(g, n) for n in (4, 2, 3) for g in ("random", "zeolites")]
    for earlier in before:
        assert [(r["graphs"], r["lmax"]) for r in earlier["comparison"]] == cases
    assert [(r["graphs"], r["lmax"]) for f in (six, qmof) for r in f["comparison"]] == [
        ("random", 6), ("qmof", 4)]  # fmt: skip
    early = results.read("bench/h100.json")["comparison"][0]  # "there only an earlier version"
    assert (early["graphs"], early["lmax"]) == ("random", 4)
    step = found["counts"][3]
    assert (step["model"], step["l_max"], step["pass"]) == ("x3mat", 4, "fwd+bwd")
    for model in ("uma", "x3mat_plain", "x3mat"):  # "a seventh of the time or less"
        row = next(c for c in found["counts"] if (c["model"], c["l_max"], c["pass"])
                   == (model, 4, "fwd+bwd"))  # fmt: skip
        assert row["ms_at_tf32_peak"] < row["ms"] / 7
    row = found["comparison"][0]  # the goals that are said to be reached
    assert row["mode_fwd"] == row["mode_fwd_bwd"] == "graph"
    assert row["ms_fwd"] < 0.08
    assert row["ms_fwd_bwd"] < 0.2
    assert row["peak_gib_lean"] < 4
    shortest = min(r["comparison"][0]["peer_ms_fwd_bwd"] for r in (found, *before))
    assert round(shortest / row["ms_fwd_bwd"], 1) == 5.2
    assert all(r["ratio_fwd_bwd"] > 5 for f in (found, six, qmof) for r in f["comparison"])
    passes = [r["ratio_iza_pass"] for r in found["comparison"] if r["graphs"] == "zeolites"]
    assert len(passes) == 3
    assert min(passes) > 50
    lean = {m["mode"]: m for m in found["measurements"]
            if (m["model"], m["graphs"]) == ("x3mat_lean", "random")}  # fmt: skip
    assert row["peak_gib_lean"] == lean["eager"]["peak_gib"]
    assert row["ms_fwd_bwd_lean"] == lean["eager"]["ms"]
    assert any(s["model"] == "uma" and s["mode"] == "graph" for s in found["skipped"])
    for kind, ends in (("random", (1.5, 2.3)), ("zeolites", (2.2, 2.7))):
        ratios = [r[k] for r in cpu["comparison"] for k in ("ratio_fwd", "ratio_fwd_bwd")
                  if r["graphs"] == kind]  # fmt: skip
        assert len(ratios) == 6
        assert (round(min(ratios), 1), round(max(ratios), 1)) == ends
    peer = {c["pass"]: c["ms"] for c in cpu["counts"] if (c["model"], c["l_max"]) == ("uma", 4)}
    for count in cpu["counts"]:  # "even without any loss"
        if (count["model"], count["l_max"]) == ("x3mat", 4):
            least = (count["gflop_per_window"] / cpu["limits"]["measured_tflops"]
                     + 1e3 * count["gb_per_window"] / cpu["limits"]["measured_gb_per_s"])
            assert 2.5 < peer[count["pass"]] / least < 3.5


def test_what_the_chapter_says_of_ideas():
    """Each row is the one that it is taken for, all are slower, and the list is in order."""
    rows = results.read("bench/ablation.json")["rows"]
    assert [row["without"] for row in rows] == [
        "all", *bench_ablation.IDEAS, "CUDA graphs", "TF32", "kernels", "all again"]
    by_name = {row["without"]: row["slower"] for row in rows}
    assert abs(by_name["all"]) < 0.01
    named = ["kernels", "CUDA graphs", "TF32", "fused norms", "harmonics of D",
             "products with elements", "fused gates", "early", "second stream", "sums as products",
             "transposed"]  # fmt: skip
    slower = [by_name[name] for name in named]
    assert slower == sorted(slower, reverse=True)
    assert slower[-1] > 3 * abs(by_name["all"])
    found = results.read("bench/ablation.json")
    for row in [*rows, found["kinds"]]:  # the same network: only the rounding of TF32 differs
        assert row["deviation"] < 0.03
    assert found["kinds"]["slower"] > 0.05
    assert found["zeolites"]["windows"] == 10 * bench.EACH == 100  # "ten of each of ten"


def test_what_the_chapter_says_of_a_database():
    found, before = (results.read(f"bench/{name}.json") for name in ("database", "database-0"))
    assert found["complete"]
    assert found["crystals"] == found["predicted_with_warm_up"] == 12_020
    assert list(found["failed"]) == ["CrystalError"]
    same = ("source", "model", "members", "processes")
    assert [found[key] for key in same] == [before[key] for key in same]
    assert "H200" in found["provenance"]["hardware"]
    assert before["crystals_per_s"] < found["crystals_per_s"] / 3


def test_windows_in_parts_give_the_same():
    """What is measured where memory is short is the same network."""
    sizes = bench.Sizes(channels=8, layers=2, m_max=1, heads=2, radial_functions=8, radial_hidden=8)
    graph = bench.random_windows(5, 8, 4, seed=0)
    whole, parts = (bench.OurNetwork(sizes, 1, way) for way in ("x3mat", "x3mat_lean"))
    y, z = (network(5, *network.pack(graph)) for network in (whole, parts))
    assert torch.allclose(y, z, atol=1e-5)
    grads = [torch.autograd.grad(x.sum(), network.model.head[0].weight)[0]
             for network, x in ((whole, y), (parts, z))]  # fmt: skip
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("idea", bench_ablation.IDEAS)
def test_ideas_can_be_removed(idea):
    """What the ablation replaces stands in the kernels, and what is left is a program."""
    source = bench_ablation.without(idea)
    assert source != bench_ablation.KERNELS.read_text(encoding="utf-8")
    compile(source, idea, "exec")


def test_scaling_from_rows():
    def row(devices, batch, rate, mae):
        return {"devices": devices, "batch": batch, "crystals_per_s": rate, "train_mae": mae}

    found = bench_ddp.efficiencies([
        row(1, 4, 10.0, [2.0, 1.0]), row(2, 8, 19.0, [2.0, 1.2]), row(2, 4, 16.0, [2.0, 1.1]),
    ])  # fmt: skip
    assert found == pytest.approx({"fixed": 0.8, "weak": 0.95, "loss_difference": 0.1})
    assert bench_ddp.efficiencies([row(1, 4, 10.0, [1.0])]) == {}


def test_a_database_is_timed(tmp_path):
    model = write(tmp_path / "model" / "0.pt")
    bench_database.main(["iza", "--model", str(model), "--device", "cpu", "--limit", "5",
                         "--warm-up", "2", "--out", str(tmp_path / "x.json")])  # fmt: skip
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["crystals"], found["timed"], found["complete"]) == (5, 3, True)
    hours = found["hours_for_a_million"]
    assert hours["1"] == pytest.approx(1e6 / found["crystals_per_s"] / 3600)
    assert hours["64"] == pytest.approx(hours["1"] / 64)


@pytest.mark.parametrize("name", ["ddp-0", "ddp-1", "ddp-2", "ddp-3", "ddp"])
def test_what_the_chapter_says_of_two_gpus(name):
    """Its rows are those that it takes them for, with the settings of the shipped networks."""
    found = results.read(f"bench/{name}.json")
    assert found["provenance"]["hardware"].endswith("2 x NVIDIA H200")
    for kind, app in (("qmof", "qmof-gap"), ("zeolites", "zeolite-n2")):
        config, (one, *two) = train_config(application(app)), found[kind]["rows"]
        assert bool(two) == (name in ("ddp-3", "ddp") or kind == "qmof")
        batch = config.crystals_per_step
        assert (one["devices"], one["batch"]) == (1, batch)
        assert [(r["devices"], r["batch"]) for r in two] == [(2, 2 * batch), (2, batch)][: len(two)]
        assert found[kind]["windows_per_crystal"] == config.windows_per_crystal
        assert found[kind]["model"] == {**vars(config.model)}
        rates = [row["crystals_per_s"] for row in (one, *two)]
        if two:
            assert found[kind]["weak"] == pytest.approx(rates[1] / rates[0] / 2)
        assert one["busy"] == pytest.approx(one["kernels_ms"] / one["step_ms"])
    early = name in ("ddp-0", "ddp-1")  # "the first two had epochs of"
    assert found["qmof"]["rows"][0]["crystals"] == 2048 * (4 if early else 6)


def test_two_gpus_reach_the_goal():
    """Both kinds, after three changes, and with faster kernels, too."""
    *files, last = (results.read(f"bench/ddp{suffix}.json") for suffix in (
        "-0", "-1", "-2", "-3", ""))  # fmt: skip
    for kind in ("qmof", "zeolites"):
        assert min(file[kind]["weak"] for file in (files[-1], last)) > 0.9
        for a, b in zip(files[-1][kind]["rows"][:2], last[kind]["rows"][:2], strict=True):
            assert b["step_ms"] < 0.93 * a["step_ms"]  # "one GPU gains from them, and two as much"
    weak = [found["qmof"]["weak"] for found in files]
    assert weak == sorted(weak)
    kernels = [found["zeolites"]["rows"][0]["kernels_ms"] for found in files[:2]]
    assert kernels[0] == pytest.approx(kernels[1], rel=0.01)  # "the same time in both"
    chance = [abs(a["step_ms"] - b["step_ms"]) for kind in ("qmof", "zeolites") for a, b in
              zip(*(found[kind]["rows"][:1] for found in files[:2]), strict=True)]  # fmt: skip
    assert max(chance) == chance[1]  # "up to"
    two = [found["qmof"]["rows"][1]["step_ms"] for found in files]
    assert two[0] - two[-1] > 1.5 * max(chance)  # "can be told apart"
    one, _, shared = files[2]["qmof"]["rows"]
    assert 0.75 < shared["step_ms"] / one["step_ms"] < 0.9  # "too little work ... to gain much"
