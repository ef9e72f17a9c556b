"""The benchmark command runs to its end at a tiny size; no time decides anything here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parent.parent / "benchmarks" / "compiler.py"


@pytest.mark.slow
def test_the_compiler_benchmark_runs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_compiler", COMMAND)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_compiler"] = module
    spec.loader.exec_module(module)
    output = tmp_path / "result.json"
    tiny = ["--layers", "2", "--size", "8", "--digits", "2", "--repeats", "1", "--cold-repeats", "1"]
    module.main([*tiny, "--parts", "cold", "overhead", "dispatch", "-o", str(output)])
    result = json.loads(output.read_text())
    assert result["cold"]["pieces"] > 3
    assert result["overhead"]["ratio"] > 0
    assert result["dispatch"]["pieces"] == 5
    assert "| cold |" in output.with_suffix(".md").read_text()
