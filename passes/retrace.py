"""retrace: Dynamo's graph as ATen, with each kind of operation traced once.

A denoiser repeats its layers, and with them its operations.  One of each kind is traced, on inputs of its own, and
copied to where the others stand::

    y = linear(x, w0, b0) ... z = linear(y, w1, b1)     ->     aten.linear is traced once and copied twice

Operations are of one kind if target, constants, and the shape, strides, dtype and device of every tensor are the same.
What a trace yields is compared with what Dynamo found out (``meta["example_value"]``).  Graphs in which more than the
edges matters (writes in place, autocast, subgraphs, symbolic sizes) are left to a trace of the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from difa_fx._torch import FakeTensor, FakeTensorMode, fake_like, mode_of, trace_functional
from difa_fx.passes.graph_tools import ancestors, is_write, output_values, placeholders, traced_from

_CONSTANTS: Final = (bool, int, float, complex, str, type(None), type(...))
_TORCH_CONSTANTS: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format)

_IDLE: Final = ("_log_api_usage_once",)
"""What a graph calls for nothing that can be seen in it."""


class _UnfitError(Exception):
    """The graph cannot be traced operation by operation."""


@dataclass(slots=True, eq=False)
class _Value:
    """A tensor: as Dynamo or a trace knows it, and its node in the new graph once that is there."""

    fake: Tensor
    node: fx.Node | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    """An operation of Dynamo's graph: its kind, and the tensors that it reads and yields, these structured alike."""

    node: fx.Node
    kind: int
    read: Sequence[_Value]
    result: Any


@dataclass(frozen=True, slots=True, eq=False)
class _Body:
    """One kind, traced: its placeholders, what it computes in order, and its result's nodes, flat."""

    inputs: Sequence[fx.Node]
    nodes: Sequence[fx.Node]
    result: Sequence[fx.Node]


@dataclass(slots=True)
class _Kinds:
    """A torch-level graph that calls one operation of each kind on placeholders of its own."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[list[fx.Node]] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)

    def number(self, node: fx.Node, args: Any, kwargs: Any, read: Sequence[_Value]) -> int:
        """The kind of ``node``; its arguments hold values of ``read`` where they held nodes."""
        position = {id(value): i for i, value in enumerate(read)}
        spelled = _spelled((args, kwargs), lambda value: position[id(value)])
        key = (node.op, node.target, spelled, tuple(_described(value.fake) for value in read))
        kind = self._numbers.setdefault(key, len(self.results))
        if kind == len(self.results):
            made = [self.graph.placeholder(f"kind{kind}_{i}") for i in range(len(read))]
            for placeholder, value in zip(made, read, strict=True):
                placeholder.meta["val"] = value.fake
            own = _mapped((args, kwargs), lambda value: made[position[id(value)]])
            self.inputs.append(made)
            self.results.append(self.graph.create_node(node.op, node.target, *own))
        return kind


def retrace(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule | None:
    """Functional pre-dispatch ATen graph of ``gm``; None where only a trace of the whole will do.

    Args:
        gm: what Dynamo handed over; parameters are placeholders.
        fakes: fake tensors, one a placeholder.
    """
    values: dict[fx.Node, Any] = {}
    kinds = _Kinds()
    try:
        for node, fake in zip(placeholders(gm.graph), fakes, strict=True):
            values[node] = _values(fake)
        operations = list(_operations(gm.graph, values, kinds))
        return _assembled(gm.graph, values, operations, kinds, mode_of(fakes))
    except _UnfitError:
        return None


def _operations(graph: fx.Graph, values: dict[fx.Node, Any], kinds: _Kinds) -> Iterator[_Operation]:
    """The operations in order; ``values`` gets their results, and ``kinds`` their kinds."""
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or getattr(node.target, "__name__", "") in _IDLE:
            continue
        _refuse_effects(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.target is operator.getitem and isinstance(args[0], tuple):
            values[node] = args[0][args[1]]
            continue
        values[node] = _values(node.meta.get("example_value"))
        read = list({id(value): value for value in _flat((args, kwargs))}.values())
        yield _Operation(node, kinds.number(node, args, kwargs, read), read, values[node])


def _refuse_effects(node: fx.Node) -> None:
    """Raise _UnfitError on what does not act through its result alone."""
    if node.op not in ("call_function", "call_method") or is_write(node) or node.target is getattr:
        raise _UnfitError


def _assembled(
    old: fx.Graph,
    values: Mapping[fx.Node, Any],
    operations: Sequence[_Operation],
    kinds: _Kinds,
    mode: FakeTensorMode,
) -> fx.GraphModule:
    """The new graph: traced kinds, copied to where their operations stand."""
    kinds.graph.output(tuple(kinds.results))
    inputs = [fake_like(node.meta["val"], mode) for node in placeholders(kinds.graph)]
    traced = trace_functional(fx.GraphModule(torch.nn.Module(), kinds.graph), inputs) if inputs else None
    if traced is None:
        raise _UnfitError
    bodies = _bodies(traced.graph, kinds)
    graph = fx.Graph()
    for node in placeholders(old):
        value = values[node]
        value.node = graph.placeholder(node.name)
        value.node.meta["val"] = value.fake
    for operation in operations:
        _copy(operation, graph, bodies[operation.kind], mode)
    outputs = fx.node.map_arg(old.output_node().args[0], lambda n: _mapped(values[n], lambda value: value.node))
    graph.output(outputs)
    graph.lint()
    return fx.GraphModule(traced, graph)


def _bodies(graph: fx.Graph, kinds: _Kinds) -> list[_Body]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = iter(placeholders(graph))
    bodies = []
    for result, read in zip(output_values(graph), kinds.inputs, strict=True):
        nodes = list(_flat(result, fx.Node))
        needed = sorted(ancestors(nodes), key=order.__getitem__)
        own = [next(inputs) for _ in read]
        bodies.append(_Body(own, [node for node in needed if node.op != "placeholder"], nodes))
    return bodies


def _copy(operation: _Operation, graph: fx.Graph, body: _Body, mode: FakeTensorMode) -> None:
    """Copy a kind's body to where ``operation`` stands, and give its results their nodes."""
    copied = {node: value.node for node, value in zip(body.inputs, operation.read, strict=True)}
    meta = traced_from(operation.node)
    for node in body.nodes:
        made = copied[node] = graph.node_copy(node, copied.__getitem__)
        made.meta = {**meta, "val": _mapped(node.meta.get("val"), lambda fake: fake_like(fake, mode), Tensor)}
    results = list(_flat(operation.result))
    if len(results) != len(body.result):
        raise _UnfitError
    for value, node in zip(results, body.result, strict=True):
        if _described(node.meta["val"]) != _described(value.fake):
            raise _UnfitError
        value.node = copied[node]


def _values(found: Any) -> Any:
    """A result as values, structured alike."""
    if isinstance(found, FakeTensor):
        _described(found)
        return _Value(found)
    if isinstance(found, (tuple, list)):
        return tuple(None if item is None else _values(item) for item in found)
    raise _UnfitError


def _described(value: Tensor) -> tuple[Any, ...]:
    plain = type(value) is FakeTensor and value.layout is torch.strided and not value.is_conj() and not value.is_neg()
    if not plain or not all(type(size) is int for size in (*value.shape, *value.stride())):
        raise _UnfitError
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _spelled(value: Any, name: Callable[[_Value], int]) -> Any:
    """What tells arguments apart."""
    if isinstance(value, _Value):
        return name(value)
    if isinstance(value, (list, tuple)):
        return tuple(_spelled(item, name) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _spelled(item, name)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", _spelled((value.start, value.stop, value.step), name)
    if type(value) in _CONSTANTS or isinstance(value, _TORCH_CONSTANTS):
        return type(value).__name__, repr(value)
    raise _UnfitError


def _mapped(value: Any, change: Callable[[Any], Any], kind: type = _Value) -> Any:
    """``value`` with every part of ``kind`` changed."""
    return fx.node.map_aggregate(value, lambda part: change(part) if isinstance(part, kind) else part)


def _flat(value: Any, kind: type = _Value) -> Iterator[Any]:
    """The parts of ``value`` that are of ``kind``, in order."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item, kind)
    elif isinstance(value, Mapping):
        yield from _flat(list(value.values()), kind)
    elif isinstance(value, slice):
        yield from _flat((value.start, value.stop, value.step), kind)
