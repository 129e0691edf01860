"""The archive of QMOF is downloaded, checked, and becomes the file that x3mat reads."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import qmof_pack
from pymatgen.core import Lattice, Structure

from x3mat import databases
from x3mat.applications import application
from x3mat.errors import DataError


@pytest.fixture
def archive(tmp_path):
    """In the layout of the public one: a table and an archive of CIF files."""
    inner, outer = tmp_path / "relaxed_structures.zip", tmp_path / "web" / "qmof_database.zip"
    outer.parent.mkdir()
    with zipfile.ZipFile(inner, "w") as file:
        for name, a in (("qmof-0001b0d", 5.0), ("qmof-00052d0", 6.0), ("qmof-nosuch", 7.0)):
            crystal = Structure(Lattice.orthorhombic(a, 5, 4), ["Zn", "O"],
                                [[0, 0, 0], [0.5, 0.5, 0.4]])  # fmt: skip
            file.writestr(f"relaxed_structures/{name}.cif", crystal.to(fmt="cif"))
    with zipfile.ZipFile(outer, "w") as file:
        file.write(inner, "qmof_database/relaxed_structures.zip")
        file.writestr("qmof_database/qmof.csv", "qmof_id,name,outputs.pbe.bandgap\n"
                      "qmof-0001b0d,a,1.5\nqmof-00052d0,b,\nqmof-nosuch,c,2\n")  # fmt: skip
    return outer


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(archive, monkeypatch, tmp_path):
    """The archive on a server of this machine, and an empty cache."""
    pytest.importorskip("pooch", reason="downloads need pooch")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=archive.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("X3MAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(qmof_pack, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(qmof_pack, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def test_downloaded_crystals_are_read_again(served, tmp_path, monkeypatch, capsys):
    assert qmof_pack.main(["--out", str(tmp_path)]) == 0
    assert "1 of 18872 crystals" in capsys.readouterr().out  # one has no label, one no place
    assert (tmp_path / "cache" / "qmof_database.zip").is_file()
    monkeypatch.setenv("X3MAT_DATA", str(tmp_path))
    databases._qmof_arrays.cache_clear()
    try:
        assert application("qmof-gap").labels().bandgap_pbe_eV.to_dict() == {"qmof-0001b0d": 1.5}
        crystal = databases.qmof("qmof-0001b0d")
        np.testing.assert_allclose(np.linalg.norm(crystal.lattice, axis=1), [5, 5, 4])
        assert sorted(crystal.species.tolist()) == [8, 30]
        with pytest.raises(DataError, match="no QMOF name"):
            databases.qmof("qmof-00052d0")
    finally:
        databases._qmof_arrays.cache_clear()


def test_a_second_call_needs_no_network(served, tmp_path):
    assert qmof_pack.main(["--out", str(tmp_path)]) == 0
    served.shutdown()
    served.server_close()
    assert qmof_pack.main(["--out", str(tmp_path / "again")]) == 0


def test_another_file_than_expected_is_refused(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(qmof_pack, "SHA256", "0" * 64)
    assert qmof_pack.main(["--out", str(tmp_path)]) == 1
    assert "cannot be downloaded" in capsys.readouterr().err
    assert not (tmp_path / "qmof.npz").exists()


def test_an_archive_at_hand(archive, tmp_path):
    assert qmof_pack.main(["--archive", str(archive), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "qmof.npz") as file:
        assert file["id"].tolist() == ["qmof-0001b0d"]


def test_what_is_no_archive_is_refused(archive, tmp_path, capsys):
    for bad in (tmp_path / "relaxed_structures.zip", tmp_path / "none.zip"):
        assert qmof_pack.main(["--archive", str(bad), "--out", str(tmp_path)]) == 1
        assert "not the archive of QMOF" in capsys.readouterr().err
    with pytest.raises(DataError, match="no crystal such as qmof-other"):
        qmof_pack.pack(archive, tmp_path, {"qmof-other"})
