"""What crosses from segment to segment at a step: what is read of each, and what is a half that stands for both.

A trunk has a variant for each combination that a plan asks for.  What it makes for a region that does not run is left
out of it, and the output of a ``+cfg`` step reaches it as a half, which its kernels read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from difa_fx.passes.partition import Partition, Segment
from difa_fx.passes.rewrite import Variant
from difa_fx.schedule import SiteStep


class Crossings:
    """Who reads what in one partition."""

    def __init__(self, partition: Partition) -> None:
        self._segments, self._readers = partition.segments, _readers(partition)
        self._shareable = dict(self._read_by_trunks())

    def variants(self, row: Mapping[str, SiteStep]) -> list[Variant | None]:
        """What a step, site to what it does, asks of each segment; None of one that need not run."""
        entries = [None if s.site is None else row[s.site.path] for s in self._segments]
        runs = [*(entry is None or entry.runs for entry in entries), True]  # the caller takes what the graph returns
        found: list[Variant | None] = []
        for segment, entry, readers in zip(self._segments, entries, self._readers, strict=True):
            if entry is not None:
                found.append(Variant(entry.action) if entry.runs else None)
                continue
            unread = tuple(i for i, those in enumerate(readers) if not any(runs[reader] for reader in those))
            needed = len(unread) < len(segment.outputs)
            found.append(Variant(halves=tuple(self._halves(segment, entries)), unread=unread) if needed else None)
        return found

    def widened(self, index: int) -> tuple[int | None, ...]:
        """For each output of a site the axis of the batch, if something else than a trunk reads it, else None.

        Only a trunk can take a half that stands for both.
        """
        outputs = self._segments[index].outputs
        return tuple(
            None if node in self._shareable else axis for node, axis in zip(outputs, self.axes(index), strict=True)
        )

    def axes(self, index: int) -> tuple[int, ...]:
        """The axis of the batch of each output of a site.  Raises KeyError where the batch is not followed."""
        segment = self._segments[index]
        assert segment.site is not None
        return tuple(segment.site.axes[node] for node in segment.outputs)

    def _read_by_trunks(self) -> Iterator[tuple[fx.Node, int]]:
        """The outputs of sites that only trunks read, and the number of the site's segment."""
        trunks = [*(segment.site is None for segment in self._segments), False]
        for number, (segment, readers) in enumerate(zip(self._segments, self._readers, strict=True)):
            if segment.site is not None:
                for node, those in zip(segment.outputs, readers, strict=True):
                    if all(trunks[reader] for reader in those):
                        yield node, number

    def _halves(self, segment: Segment, entries: Sequence[SiteStep | None]) -> Iterator[tuple[int, int]]:
        """The inputs of a trunk that are halves, and their axes of the batch."""
        for position, node in enumerate(segment.inputs):
            number = self._shareable.get(node)
            entry = None if number is None else entries[number]
            site = None if number is None else self._segments[number].site
            if site is not None and entry is not None and entry.output_half:
                yield position, site.axes[node]


def _readers(partition: Partition) -> list[list[list[int]]]:
    """By segment and output, which segments read it; the number after the last is the caller."""
    segments = partition.segments
    found: dict[fx.Node, list[int]] = {node: [] for segment in segments for node in segment.outputs}
    for number, segment in enumerate(segments):
        for node in found.keys() & segment.inputs:
            found[node].append(number)
        for node in segment.returned:
            found[node].append(len(segments))
    return [[found[node] for node in segment.outputs] for segment in segments]
