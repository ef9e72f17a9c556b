"""Writes in place, where nothing but an edge is lost when a new tensor is made instead.

``y = x; y[i] = v`` writes to memory that other tensors may share.  Where no other name of that memory is read
afterwards, it is the same as a new value that takes x's place from there on::

    out = empty_like(q)                          out = empty_like(q)
    setitem(out, evens, a)             ->        out1 = overwritten(out, evens, a)
    setitem(out, odds, b)                        out2 = overwritten(out1, odds, b)
    out.type_as(q)                               out2.type_as(q)
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from difa_fx._torch import memory_of


class Memory:
    """Who shares memory with whom in Dynamo's graph, by its fake tensors (``meta["example_value"]``)."""

    def __init__(self, graph: fx.Graph) -> None:
        self._place = {node: i for i, node in enumerate(graph.nodes)}
        self._sharing: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for memory in _memory(node):
                self._sharing[memory].append(node)

    def is_private(self, write: fx.Node) -> bool:
        """Whether what ``write`` writes to is read, from there on, by the name that it is written to alone.

        It is not if the memory is that of an input, or if what is written lies in it.
        """
        target, *rest = write.all_input_nodes
        if target is not write.args[0] or len(own := list(_memory(target))) != 1:
            return False
        sharing = self._sharing[own[0]]
        if any(node.op == "placeholder" or node in rest for node in sharing):
            return False
        earlier = (node for node in sharing if node is not target and self._place[node] < self._place[write])
        return not any(self._place[user] > self._place[write] for node in earlier for user in node.users)


def _memory(node: fx.Node) -> Iterator[Any]:
    """The memory of each tensor that a node yields."""
    value = node.meta.get("example_value")
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(part, Tensor):
            yield memory_of(part)


@functools.cache
def overwritten(write: Callable[..., Any] | str) -> Callable[..., Tensor]:
    """A function that yields what ``write``, a function or the name of a method, would make of its first argument."""

    def made(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = x.clone()
        if isinstance(write, str):
            getattr(copy, write)(*args, **kwargs)
        else:
            write(copy, *args, **kwargs)
        return copy

    return made
