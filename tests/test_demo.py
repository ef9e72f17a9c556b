"""The demo runs to its end, and shows what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import demo
import pytest


def test_the_demo_ends_with_a_table_a_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--images", "1", "--repeats", "1", "--compiler", "eager", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in ("seconds per generation", "speed-up", "FLOPs kept", "compile seconds", "SSIM", "read right"):
        assert row in printed
    assert (tmp_path / "demo.png").stat().st_size > 1000
    result = json.loads((tmp_path / "demo.json").read_text())
    assert 0 < result["plan"]["flops_kept_with_projections"] < 1
    assert result["plan"]["ssim"] > 0.8
