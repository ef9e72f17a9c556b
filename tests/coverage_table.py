"""The table in ``docs/coverage.md``: what difa_fx finds in each denoiser of the tests.

    python tests/coverage_table.py    # writes it anew

:mod:`test_zoo` checks every row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from models import Case

import difa_fx
from difa_fx.inspection import GraphReport

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
BEGIN, END = "<!-- table: python tests/coverage_table.py -->", "<!-- end of table -->"
HEAD = (
    "| denoiser | sites found / expected | kind | unique blocks | methods | left alone, and why |\n"
    "|---|---|---|---|---|---|"
)


def row(found: Case, graphs: Sequence[GraphReport]) -> str:
    """The row of a denoiser."""
    sites = [site for graph in graphs for site in graph.sites]
    expected = sum(site.path in found.sites for site in sites)
    kinds = sorted({site.kind for site in sites})
    methods = " ".join(dict.fromkeys(method for site in sites for method in site.methods))
    limits = dict.fromkeys(f"{method}: {why}" for site in sites for method, why in site.refused if "+" not in method)
    if any(method == "full+cfg" for site in sites for method, _ in site.refused):
        limits["no half of the batch at some sites: it is put together sample by sample"] = None
    reasons: dict[str, int] = {}
    for graph in graphs:
        for _, why in graph.rejected:
            reasons[why] = reasons.get(why, 0) + 1
    left = [f"{count} x {why}" for why, count in reasons.items()] + list(limits)
    name = f"`{found.name}`" + (f" ({len(graphs)} graphs)" if len(graphs) > 1 else "")
    blocks = max((graph.unique_blocks for graph in graphs if graph.sites), default=0)
    cells = [name, f"{expected} / {len(found.sites)}", ", ".join(kinds), str(blocks), methods, "; ".join(left)]
    return "| " + " | ".join(cell or "-" for cell in cells) + " |"


def inspected(found: Case) -> tuple[GraphReport, ...]:
    """What is found in a denoiser."""
    ((args, kwargs),) = found.generation(1)
    return difa_fx.inspect(found.model, *args, **kwargs)


def main() -> None:
    """Write the table into the page."""
    sys.path.append(str(PAGE.parent.parent / "examples"))
    from zoo import ZOO, zoo_case

    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    rows = []
    with torch.no_grad():
        for name in ZOO:
            found = zoo_case(name)
            rows.append(row(found, inspected(found)))
            sys.stderr.write(f"{rows[-1]}\n")
    PAGE.write_text(f"{before}{BEGIN}\n{HEAD}\n" + "\n".join(rows) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
