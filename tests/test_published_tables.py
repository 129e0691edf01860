"""Published uptakes become the tables that applications read, if their checksums are right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import published_tables
import pytest

from x3mat.applications import application
from x3mat.errors import DataError

pytest.importorskip("openpyxl", reason="the authors' files are workbooks: pip install openpyxl")
APP = application("mof-ch4n2")
COLUMNS = list(APP.source["columns"].values())


@pytest.fixture
def table(monkeypatch):
    """Random uptakes of the application's crystals, and the checksums that they have."""
    fold = APP.folds()[0]
    names = pd.Index(sorted({*fold.train, *fold.rest}), name=APP.source["name"])
    values = np.random.default_rng(0).random((len(names), len(COLUMNS)))
    table = pd.DataFrame(values, names, COLUMNS)
    monkeypatch.setitem(
        published_tables.CHECKSUMS, APP.name, published_tables.checksums(table))
    return table


def workbook(table, path):
    """Like the authors': further columns, crystals and sheets, rows in an order of their own."""
    more = table.iloc[:2].rename(lambda name: f"{name}-other")
    rows = pd.concat([table, more]).sample(frac=1, random_state=0).reset_index()
    with pd.ExcelWriter(path) as file:
        pd.DataFrame({"about": ["uptakes"]}).to_excel(file, sheet_name="about", index=False)
        rows.assign(density=1.0).to_excel(file, sheet_name="data", index=False)
    return path


def test_a_workbook_becomes_the_table_of_labels(table, tmp_path, monkeypatch, capsys):
    path = workbook(table, tmp_path / "rawdata.xlsx")
    fetched = []
    monkeypatch.setattr(
        published_tables, "fetch", lambda url, name: fetched.append((url, name)) or path)
    out = tmp_path / "mydata"
    assert published_tables.main([APP.name, "--out", str(out)]) == 0
    [(url, name)] = fetched
    assert url == published_tables.URLS[APP.name] + "rawdata.xlsx"
    assert name == "mof-ch4n2-rawdata.xlsx"
    assert f"{len(table)} crystals" in capsys.readouterr().out
    monkeypatch.setenv("X3MAT_DATA", str(out))
    labels = APP.labels()
    assert sorted(labels.index) == sorted(table.index)
    np.testing.assert_allclose(labels.loc[table.index, "CH4"], table[COLUMNS[0]])


def changed(table, what):
    if what == "a value":
        table.iloc[7, 1] += 0.1
    elif what == "the unit":
        table[COLUMNS[0]] *= 22.4
    elif what == "the order":
        table[COLUMNS[0]] = table[COLUMNS[0]].to_numpy()[::-1]
    elif what == "a gap":
        table.iloc[3, 0] = np.nan
    elif what == "a column":
        return table.drop(columns=COLUMNS[1])
    else:
        return table.drop(index=table.index[5])
    return table


@pytest.mark.parametrize(("what", "cause"), [
    *((what, "is not what our models learned")
      for what in ("a value", "the unit", "the order", "a gap")),
    ("a column", "no sheet has the columns"), ("a crystal", "1 crystals are missing")])  # fmt: skip
def test_another_table_is_refused(table, tmp_path, capsys, what, cause):
    path = workbook(changed(table, what), tmp_path / "rawdata.xlsx")
    out = tmp_path / "mydata"
    assert published_tables.main([APP.name, "--file", str(path), "--out", str(out)]) == 1
    assert cause in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_what_is_no_workbook_is_refused(table, tmp_path):
    with pytest.raises(DataError, match="it is not a workbook"):
        published_tables.read(tmp_path / "nothing.xlsx", APP)
    path = tmp_path / "rawdata.xlsx"
    path.write_text("REFCODE,uptake\n")
    with pytest.raises(DataError, match="it is not a workbook"):
        published_tables.read(path, APP)


def test_rounding_does_not_change_checksums(table):
    found = published_tables.checksums(table.round(8))
    for column, sums in published_tables.CHECKSUMS[APP.name].items():
        np.testing.assert_allclose(found[column], sums, atol=1e-5)


@pytest.mark.parametrize("name", list(published_tables.URLS))
def test_checksums_are_those_of_the_tables_that_were_learned(name):
    app = application(name)
    try:
        labels = app.labels()
    except DataError as error:
        pytest.skip(f"labels of others are not shipped: {error}")
    fold = app.folds()[0]
    table = labels.loc[sorted({*fold.train, *fold.rest})].rename(columns=app.source["columns"])
    assert published_tables.checksums(table) == published_tables.CHECKSUMS[name]
