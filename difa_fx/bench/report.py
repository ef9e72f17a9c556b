"""A record as markdown tables.  Every ratio says what it is a ratio to; brackets hold the range of single rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from difa_fx.bench.records import ALLOCATED, RESERVED, Bench, Case, Compiled, Race, Row
from difa_fx.bench.timing import Spread
from difa_fx.hardware import machine_line

NOTES: Final = """\
Every contender runs once in each round, in rotating order; a time is the median of the rounds, a ratio the median of
each round's ratio, with the least and the largest in brackets.

- **step**: milliseconds of a step, which is one call of the denoiser, or two where guidance is two calls.
- **speed-up over Inductor**: uncompressed Inductor's step of the same round over the row's.
- **operations kept**: the attention's matrix products and its projections, as a share of uncompressed attention's.
- **ideal**: the step if time went with those operations: Inductor's step, less the part left out of the attention's
  time. That time is the attention modules' (projections, attention, output projection), compiled by Inductor by
  themselves and run in the same rounds, on CUDA as a CUDA graph if short.
- **saving efficiency**: (full - row) / (full - ideal). `Inductor` takes uncompressed Inductor's step for full,
  `difa full` difa_fx's own step with full attention at every site.
- **residual**: a step that also writes the residual, over the same step without.
- **state**: what is kept between calls, at most; of a single step what it finds kept.
- **relative L1**: of the last output to that of uncompressed Inductor. Weights are random: it only shows that the
  numbers belong together.
- **graphs / breaks / given up**: what Dynamo compiled in the first generation, how often it broke a graph, and how
  often it stopped compiling a frame because that had been compiled too often.
"""


def markdown(bench: Bench) -> str:
    """The whole record as markdown."""
    hardware, versions = bench.hardware, bench.versions
    device = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed")
    lines = ["# difa bench", "", f"{device}{machine_line(hardware)}; {packages}.", "", NOTES]
    for case in bench.cases:
        lines += _case(case)
    return "\n".join(lines).rstrip() + "\n"


def _case(case: Case) -> Iterable[str]:
    yield from (f"## {case.title}", "")
    if case.methods is not None:
        yield f"Single steps, the method at all {case.sites} sites, window +-{case.window}. {_attention(case.methods)}"
        yield from ("", *_race(case.methods), "")
    if case.generation is not None:
        yield f"Generations of {case.generation.steps} steps under {case.plan}. {_attention(case.generation)}"
        yield from ("", *_race(case.generation), "")
    if case.compiled:
        yield "Compilation and memory, each in a process of its own: seconds of the first call, less a later one's."
        yield from ("", *_compiled(case.compiled), "")
    if case.left_out:
        yield "Left out:"
        yield from ("", *(f"- {name}: {reason}" for name, reason in case.left_out.items()), "")


def _attention(race: Race) -> str:
    return (
        f"{race.rounds} rounds. Attention by itself: {_ms(race.attention_seconds)} ms a step, "
        f"{race.attention_share.median:.0%} of Inductor's."
    )


def _race(race: Race) -> list[str]:
    shown = [(title, [cell(row) for row in race.rows]) for title, cell in _COLUMNS.items()]
    shown = [(title, cells) for title, cells in shown if any(cells)]
    return table(
        ["", *(title for title, _ in shown)],
        [[row.label, *(cells[i] for _, cells in shown)] for i, row in enumerate(race.rows)],
    )


def _compiled(rows: Sequence[Compiled]) -> list[str]:
    titles = ["", "cold, s", "to Inductor's cold", "warm, s", "to Inductor's warm", "peak memory, MiB"]
    cells = [
        [
            row.name,
            _seconds(row.cold_seconds),
            _ratio(row.cold_to_inductor),
            _seconds(row.warm_seconds),
            _ratio(row.warm_to_inductor),
            f"{row.peak_bytes / 2**20:.0f}",
        ]
        for row in rows
    ]
    lines = table(titles, cells)
    held = (
        ""
        if rows[0].peak_of in (ALLOCATED, RESERVED)
        else " It holds Python, torch, the weights and what compilation left."
    )
    return [*lines, "", f"Peak memory: {rows[0].peak_of}, in the warm process.{held}"]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _ms(value: Spread) -> str:
    return f"{1000 * value.median:.4g}"


def _seconds(value: Spread | None) -> str:
    return "" if value is None else f"{value.median:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(value: Spread | None) -> str:
    if value is None:
        return ""
    return f"{value.median:.2f} ({value.least:.2f} - {value.largest:.2f})"


def _dynamo(row: Row) -> str:
    if row.graphs is None:
        return ""
    return f"{row.graphs} / {row.graph_breaks} / {row.gave_up}"


_COLUMNS: Final[Mapping[str, Callable[[Row], str]]] = {
    "step, ms": lambda row: _ms(row.seconds),
    "steps a second": lambda row: f"{1 / row.seconds.median:.3g}",
    "speed-up over Inductor": lambda row: _ratio(row.speedup),
    "operations kept": lambda row: _percent(row.kept),
    "ideal, ms": lambda row: "" if row.ideal_seconds is None else f"{1000 * row.ideal_seconds:.4g}",
    "saving efficiency (Inductor)": lambda row: _ratio(row.efficiency),
    "saving efficiency (difa full)": lambda row: _ratio(row.efficiency_of_full),
    "residual, to the step without": lambda row: _ratio(row.to_full),
    "state, MiB": lambda row: "" if row.state_bytes is None else f"{row.state_bytes / 2**20:.3g}",
    "relative L1 to Inductor": lambda row: "" if row.relative_l1 is None else f"{row.relative_l1:.2g}",
    "graphs / breaks / given up": _dynamo,
}
"""Title to cell; a column without a single cell is left out."""
