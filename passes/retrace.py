"""retrace: Dynamo's graph as ATen, with each kind of operation traced once.

A denoiser repeats its layers, and with them its operations.  One of each kind is traced, on inputs of its own, and
copied to where the others stand::

    y = linear(x, w0, b0) ... z = linear(y, w1, b1)     ->     aten.linear is traced once and copied twice

What a trace yields is compared with what Dynamo found out (``meta["example_value"]``).  A write in place becomes a
new value (:mod:`difa_fx.passes.overwriting`).  Graphs in which more than the edges matters (writes to memory that has
other names, autocast, subgraphs, symbolic sizes) are left to a trace of the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, fx

from difa_fx._torch import FakeTensor, FakeTensorMode, fake_like, mode_of
from difa_fx.passes.graph_tools import is_write, placeholders, traced_from
from difa_fx.passes.kinds import Body, Kinds, UnfitError, Value, described, flat, mapped
from difa_fx.passes.overwriting import Memory, overwritten

_IDLE: Final = ("_log_api_usage_once",)
"""What a graph calls for nothing that can be seen in it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    """An operation of Dynamo's graph: its kind, and the tensors that it reads and yields, these structured alike."""

    node: fx.Node
    writes: bool
    kind: int
    read: Sequence[Value]
    result: Any


@dataclass(slots=True)
class _Reading:
    """Dynamo's graph, read in order.

    Attributes:
        values: what each node's name stands for; after a write, the new value.
        pure: kinds of the operations that write nothing.
        writes: kinds of those that do.
        memory: who shares memory.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any] = field(default_factory=dict)
    pure: Kinds = field(default_factory=Kinds)
    writes: Kinds = field(default_factory=Kinds)
    memory: Memory | None = None

    def operations(self) -> Iterator[_Operation]:
        """The operations in order."""
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output") or getattr(node.target, "__name__", "") in _IDLE:
                continue
            if node.op not in ("call_function", "call_method") or node.target is getattr:
                raise UnfitError  # it does not act through its result alone
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
            if node.target is operator.getitem and isinstance(args[0], tuple):
                self.values[node] = args[0][args[1]]
            else:
                yield self._written(node, args, kwargs) if is_write(node) else self._called(node, args, kwargs)

    def _called(self, node: fx.Node, args: Any, kwargs: Any) -> _Operation:
        result = self.values[node] = _values(node.meta.get("example_value"))
        read = _once((args, kwargs))
        return _Operation(node, False, self.pure.number(node.op, node.target, (args, kwargs), read), read, result)

    def _written(self, node: fx.Node, args: Any, kwargs: Any) -> _Operation:
        """A write, whose target's name stands for its result from here on."""
        if self.memory is None:
            self.memory = Memory(self.graph)
        target, before = node.args[0], args[0]
        if not isinstance(target, fx.Node) or not isinstance(before, Value) or not self.memory.is_private(node):
            raise UnfitError
        read = _once((args, kwargs))
        kind = self.writes.number("call_function", overwritten(node.target), (args, kwargs), read)
        result = self.values[node] = self.values[target] = Value(before.fake)
        return _Operation(node, True, kind, read, result)


def retrace(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule | None:
    """Functional pre-dispatch ATen graph of ``gm``; None where only a trace of the whole will do.

    Args:
        gm: what Dynamo handed over; parameters are placeholders.
        fakes: fake tensors, one a placeholder.
    """
    reading = _Reading(gm.graph)
    try:
        for node, fake in zip(placeholders(gm.graph), fakes, strict=True):
            reading.values[node] = _values(fake)
        return _assembled(reading, list(reading.operations()), mode_of(fakes))
    except UnfitError:
        return None


def _assembled(reading: _Reading, operations: Sequence[_Operation], mode: FakeTensorMode) -> fx.GraphModule:
    """The new graph: traced kinds, copied to where their operations stand."""
    traced, pure = reading.pure.traced(mode)
    bodies: dict[bool, Sequence[Body]] = {False: pure}
    if reading.writes.results:
        exported, bodies[True] = reading.writes.functionalized(mode)
        for constant in exported.graph.find_nodes(op="get_attr"):
            name = f"{constant.target}_of_writes"
            traced.register_buffer(name, getattr(exported, constant.target))
            constant.target = name
    graph, values = fx.Graph(), reading.values
    for node in placeholders(reading.graph):
        value = values[node]
        value.node = graph.placeholder(node.name)
        value.node.meta["val"] = value.fake
    for operation in operations:
        _copy(operation, graph, bodies[operation.writes][operation.kind], mode)
    results = reading.graph.output_node().args[0]
    graph.output(fx.node.map_arg(results, lambda n: mapped(values[n], lambda value: value.node)))
    graph.lint()
    return fx.GraphModule(traced, graph)


def _copy(operation: _Operation, graph: fx.Graph, body: Body, mode: FakeTensorMode) -> None:
    """Copy a kind's body to where ``operation`` stands, and give its results their nodes."""
    copied = {node: value.node for node, value in zip(body.inputs, operation.read, strict=True)}
    meta = traced_from(operation.node)
    for node in body.nodes:
        made = copied[node] = graph.node_copy(node, copied.__getitem__)
        made.meta = {**meta, "val": mapped(node.meta.get("val"), lambda fake: fake_like(fake, mode), Tensor)}
    results = list(flat(operation.result))
    if len(results) != len(body.result):
        raise UnfitError
    for value, node in zip(results, body.result, strict=True):
        if described(node.meta["val"]) != described(value.fake):
            raise UnfitError
        value.node = copied[node]


def _once(arguments: Any) -> list[Value]:
    """The values in ``arguments``, each once."""
    return list({id(value): value for value in flat(arguments)}.values())


def _values(found: Any) -> Any:
    """A result as values, structured alike."""
    if isinstance(found, FakeTensor):
        described(found)
        return Value(found)
    if isinstance(found, (tuple, list)):
        return tuple(None if item is None else _values(item) for item in found)
    raise UnfitError
