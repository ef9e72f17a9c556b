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
        self._segments = partition.segments
        self._makers = {node: i for i, segment in enumerate(partition.segments) for node in segment.outputs}
        self._readers = _readers(partition)

    def variants(self, row: Mapping[str, SiteStep]) -> list[Variant | None]:
        """What a step, site to what it does, asks of each segment; None of one that need not run."""
        entries = [None if s.site is None else row[s.site.path] for s in self._segments]
        runs = [*(entry is None or entry.runs for entry in entries), True]  # the caller takes what the graph returns
        return [
            self._of_trunk(segment, readers, runs, entries)
            if entry is None
            else Variant(entry.action)
            if entry.runs
            else None
            for segment, entry, readers in zip(self._segments, entries, self._readers, strict=True)
        ]

    def widened(self, index: int) -> tuple[int | None, ...]:
        """For each output of a site the axis of the batch, if something else than a trunk reads it, else None.

        Only a trunk can take a half that stands for both.
        """
        last = len(self._segments)
        trunks = [
            all(reader < last and self._segments[reader].site is None for reader in readers)
            for readers in self._readers[index]
        ]
        return tuple(None if inner else axis for inner, axis in zip(trunks, self.axes(index), strict=True))

    def axes(self, index: int) -> tuple[int, ...]:
        """The axis of the batch of each output of a site.  Raises KeyError where the batch is not followed."""
        segment = self._segments[index]
        assert segment.site is not None
        return tuple(segment.site.axes[node] for node in segment.outputs)

    def _of_trunk(
        self,
        segment: Segment,
        readers: Sequence[Sequence[int]],
        runs: Sequence[bool],
        entries: Sequence[SiteStep | None],
    ) -> Variant | None:
        unread = tuple(i for i, those in enumerate(readers) if not any(runs[reader] for reader in those))
        if len(unread) == len(segment.outputs):
            return None
        return Variant(halves=tuple(self._halves(segment, entries)), unread=unread)

    def _halves(self, segment: Segment, entries: Sequence[SiteStep | None]) -> Iterator[tuple[int, int]]:
        """The inputs of a trunk that are halves, and their axes of the batch."""
        for position, node in enumerate(segment.inputs):
            maker = self._makers.get(node)
            entry = None if maker is None else entries[maker]
            if maker is None or entry is None or not entry.output_half:
                continue
            number = self._segments[maker].outputs.index(node)
            if self.widened(maker)[number] is None:
                yield position, self.axes(maker)[number]


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
