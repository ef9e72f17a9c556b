"""The benchmark commands run to their ends at a tiny size; no time decides anything here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_commands import command


@pytest.mark.slow
@pytest.mark.thorough
def test_the_compiler_benchmark_runs(tmp_path: Path) -> None:
    module = command("compiler")
    output = tmp_path / "result.json"
    tiny = ["--layers", "1", "--size", "8", "--digits", "2", "--repeats", "1", "--cold-repeats", "1"]
    module.main([*tiny, "--parts", "cold", "dispatch", "-o", str(output)])
    result = json.loads(output.read_text())
    assert result["cold"]["pieces"] >= 3
    assert result["dispatch"]["pieces"] == 3
    assert "| cold |" in output.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_window_benchmark_runs(tmp_path: Path) -> None:
    module = command("windows")
    tiny = ["--sizes", "6", "--images", "2", "--steps", "3", "--every", "3", "--compiler", "eager"]
    box, band = module.main([*tiny, "-o", str(tmp_path / "windows")])
    assert (box["axes"], band["axes"]) == (2, 1)
    assert abs(box["pairs"] / band["pairs"] - 1) < 0.02
    assert 0 < box["relative_l1"] < 1
    assert "| 6x6 of 32x32 | 2 |" in (tmp_path / "windows.md").read_text()


@pytest.mark.slow
def test_the_allocator_benchmark_runs(tmp_path: Path) -> None:
    module = command("allocator")
    rows = module.main(["--tiny", "--tokens", "64", "--rounds", "1", "--processes", "1", "-o", str(tmp_path / "found")])
    assert [row["allocator"] for row in rows] == ["as it is", "keeps memory"]
    assert rows[0]["to as it is"] == {"inductor": 1.0, "difa": 1.0} and rows[1]["ratio"] > 0
    assert json.loads((tmp_path / "found.json").read_text())["kept"]["MALLOC_MMAP_MAX_"] == "0"
    assert "| 64 | keeps memory |" in (tmp_path / "found.md").read_text()
