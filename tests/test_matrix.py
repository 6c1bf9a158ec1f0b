"""The runner of the tests on every release: which releases it finds, and what it writes."""

import subprocess

import pytest
from conftest import ROOT, import_file

matrix = import_file(ROOT / "tests" / "matrix.py")
RELEASES = {"4.30": "4.30.2", "4.44": "4.44.2", "5.9": "5.9.0", "5.10": "5.10.4"}


def test_the_last_patch_of_each_minor_is_found(monkeypatch):
    offered = "5.11.0rc1, 5.10.4, 5.10.1, 5.9.0, 4.44.10, 4.44.9, 4.30.2, 4.30.0, 4.29.2, 0.1"
    output = f"transformers (5.10.4)\nAvailable versions: {offered}\n  INSTALLED: 5.9.0\n"
    monkeypatch.setattr(matrix.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess(_, 0, output))
    found = matrix.find_releases()
    assert list(found.items()) == [("4.30", "4.30.2"), ("4.44", "4.44.10"), ("5.9", "5.9.0"), ("5.10", "5.10.4")]


def test_names_of_releases(capsys):
    rows = matrix.resolve(["4.44", "4.30.0", "newest", "tomorrow"], RELEASES)
    assert rows == {"4.44.2": "4.44.2", "4.30.0": "4.30.0", "5.10.4": "5.10.4", "tomorrow": "5.10.4"}
    assert "newest: transformers 5.10.4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no transformers 4.29"):
        matrix.resolve(["4.29"], RELEASES)


def test_every_mark_is_read():
    """A release whose mark is written otherwise would not get the whole suite."""
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path.name != "test_matrix.py"]
    marks = sum(path.read_text(encoding="utf-8").count("mark.needs_transformers") for path in files)
    assert len(matrix.marks()) == marks > 20


def test_core_files_are_there():
    assert [file for file in matrix.CORE if not (ROOT / "tests" / f"test_{file}.py").exists()] == []


def test_pages_get_the_table_and_its_line(tmp_path, monkeypatch):
    counts = {"passed": 40, "failed": 0, "not offered": 3, "skipped": 1}
    results = {"4.30.2": ("whole", counts, []), "tomorrow": ("core", {**counts, "failed": 2}, ["a", "b"])}
    for page in matrix.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(matrix, "begins", lambda: "")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    matrix.write_pages(results, RELEASES, 61.2)
    for page in matrix.PAGES:
        assert "4 releases, 4.30.2 to 5.10.4<!-- end" in (tmp_path / page).read_text(encoding="utf-8")
    text = (tmp_path / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert "| 4.30.2 | whole | 40 | 0 | 3 | 1 |\n| tomorrow | core | 40 | **2** | 3 | 1 |\n" in text
