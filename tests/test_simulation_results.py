"""What the chapter on simulation says of the results."""

from __future__ import annotations

from itertools import pairwise

import pytest

from x3mat import results


@pytest.fixture(scope="module")
def cold():
    found = results.read("gcmc/n2-77k.json")
    assert (found["settings"]["temperature"], found["settings"]["start"]) == (77.0, "both")
    return {row["name"]: row for row in found["rows"]}


def test_reference_still_rises_in_lta(cold):
    quarters = cold["iza:LTA"]["reference_quarters_mol_per_kg"]
    assert all(b > a for a, b in pairwise(quarters))
    n2 = cold["iza:LTA"]["loadings"]["N2"]
    assert n2["mol_per_kg"] > quarters[-1] > n2["reference_mol_per_kg"]


def test_two_starts_do_not_bracket_asv(cold):
    n2 = cold["iza:ASV"]["loadings"]["N2"]
    assert max(n2["chains_mol_per_kg"]) < n2["reference_mol_per_kg"]


def test_chains_from_full_hold_more():
    for check in ("n2-77k", "mof-n2"):
        for row in results.read(f"gcmc/{check}.json")["rows"]:
            empty, full = row["loadings"]["N2"]["chains_mol_per_kg"]
            assert full > 0.99 * empty


def test_worst_of_the_mixture_bind_co2_strongly():
    rows = results.read("gcmc/co2-n2-all.json")["rows"]
    co2 = {row["name"]: row["loadings"]["CO2"] for row in rows}
    heats = sorted(x["heat_kJ_per_mol"] for x in co2.values())
    worst = max(co2.values(), key=lambda x: abs(x["relative_deviation"]))
    assert worst["heat_kJ_per_mol"] > heats[len(heats) // 2]
