"""autocast: its casts as operations of the graph.

Autocast acts between the operations that a pre-dispatch graph shows and the kernels, so the graph does not show what it
does: a product of float32 tensors may be one of bfloat16.  What it does is found out by running each operation on fake
tensors, and written down; from here on autocast is off, at compilation and at every call::

    y = linear(x, w)    under autocast    ->    x16, w16 = to(x, bfloat16), to(w, bfloat16);  y = linear(x16, w16)

A trace leaves ``_enter_autocast`` and ``_exit_autocast`` where the denoiser had them; before the first, what the caller
has set is in force.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from difa_fx._torch import TorchDispatchMode, has_autocast_kernel, is_composite
from difa_fx.errors import GraphError
from difa_fx.passes.graph_tools import described, evaluate, module_path, spelled, traced_from

aten = torch.ops.aten

Casts = tuple[tuple[int, torch.dtype], ...]
"""Which of the tensors that an operation reads are cast, and to what."""


def is_autocast(node: fx.Node, which: str = "") -> bool:
    """Whether a node enters or exits autocast; ``which``: "enter" or "exit"."""
    name = getattr(node.target, "__name__", "")
    return name in ((f"_{which}_autocast",) if which else ("_enter_autocast", "_exit_autocast"))


@functools.cache
def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def _state() -> tuple[tuple[bool, torch.dtype], ...]:
    """What is in force, for each kind of device."""
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _device_types())


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within, autocast is off."""
    with contextlib.ExitStack() as stack:
        for kind in _device_types():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def spell_out_autocast(graph: fx.Graph) -> None:
    """Write down what autocast does in ``graph``, as it is now and as the graph sets it.  Edits ``graph``.

    Raises:
        GraphError: autocast acts inside an operation, and not on what it reads.
    """
    entered: dict[fx.Node, torch.autocast] = {}
    known: dict[Any, Casts] = {}
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    try:
        for node in list(graph.nodes):
            if is_autocast(node, "enter"):
                entered[node] = torch.autocast(*node.args)
                entered[node].__enter__()  # type: ignore[no-untyped-call]
            elif is_autocast(node, "exit"):
                entered.pop(node.args[0]).__exit__(None, None, None)
            elif isinstance(node.target, torch._ops.OpOverload) and any(on for on, _ in _state()):
                _spell_out(node, known, made)
    finally:
        for context in reversed(entered.values()):
            context.__exit__(None, None, None)
    for node in reversed(list(graph.nodes)):
        if is_autocast(node):
            graph.erase_node(node)


def _spell_out(node: fx.Node, known: dict[Any, Casts], made: dict[tuple[fx.Node, torch.dtype], fx.Node]) -> None:
    read = list(dict.fromkeys(node.all_input_nodes))
    if not any(_is_floating(source.meta.get("val")) for source in read):
        return
    known_as = {source: f"{i} {described(source.meta.get('val'))}" for i, source in enumerate(read)}
    key = (node.target, _state(), spelled(node, known_as.__getitem__))
    if key not in known:
        known[key] = _casts_of(node, read)
    for position, dtype in known[key]:
        source = read[position]
        if (source, dtype) not in made:
            with node.graph.inserting_before(node), without_autocast():
                cast = node.graph.call_function(aten.to.dtype, (source, dtype))
                evaluate(cast)
            cast.meta |= traced_from(node)
            made[source, dtype] = cast
        node.replace_input_with(source, made[source, dtype])


def _casts_of(node: fx.Node, read: Sequence[fx.Node]) -> Casts:
    """What autocast casts of the tensors that ``node`` reads."""
    values = [source.meta["val"] for source in read]
    devices = {value.device.type for value in values if isinstance(value, Tensor)}
    whole = has_autocast_kernel(node.target, devices)
    if not whole and not is_composite(node.target):
        return ()
    result, copies = _run(node, read, values)
    if not copies:
        return ()
    casts = tuple((at, dtype) for at, dtype in dict(copies).items() if at is not None) if whole else ()
    cast = list(values)
    for position, dtype in casts:
        cast[position] = values[position].to(dtype)
    _, inside = _run(node, read, cast)
    with without_autocast():
        ours, expected = _run(node, read, cast)
    if inside != expected or _dtypes(ours) != _dtypes(result):
        raise GraphError(
            "autocast acts inside an operation, where a plan cannot write it down",
            where=f"{node.target} in {module_path(node) or 'the denoiser'}",
            got=f"{[str(value.dtype) for value in values]}, and {_dtypes(result)} from it",
            allowed="autocast that casts what an operation reads",
            todo="cast the denoiser itself (model.to(torch.bfloat16)) and call it without autocast",
        )
    return casts


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is cast: the position among ``values``, or None for something else, and the dtype."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._positions = {id(value): i for i, value in enumerate(values)}
        self.found: list[tuple[int | None, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a cast, and go on."""
        if func is aten._to_copy.default and kwargs and kwargs.get("dtype") is not None:
            self.found.append((self._positions.get(id(args[0])), kwargs["dtype"]))
        return func(*args, **(kwargs or {}))


def _run(node: fx.Node, read: Sequence[fx.Node], values: Sequence[Any]) -> tuple[Any, list[Any]]:
    """What ``node`` yields for fakes in place of what it reads, and the casts on the way."""
    known = dict(zip(read, values, strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    copies = _Copies(values)
    assert callable(node.target)
    with torch.no_grad(), copies:
        return node.target(*args, **kwargs), copies.found


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _dtypes(result: Any) -> list[str]:
    values = result if isinstance(result, (tuple, list)) else [result]
    return [str(value.dtype) for value in values if isinstance(value, Tensor)]
