"""Fake tensors, and graphs traced on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.multiprocessing.reductions import StorageWeakRef


def new_fake_mode() -> FakeTensorMode:
    """A mode for fake tensors beside real constants.

    It has a shape environment, though all shapes are static: Inductor's cache on disk does not work without one.
    """
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_inputs(inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """``inputs`` with every tensor replaced by a fake of the same static shape, stride, dtype and device.

    Wraps ``FakeTensorMode.from_tensor``, which takes a millisecond, for those that are more than that.
    """
    plain = (Tensor, torch.nn.Parameter)

    def fake(value: Tensor) -> Tensor:
        simple = type(value) in plain and value.layout is torch.strided and not value.storage_offset()
        if simple and not (value.is_quantized or value.is_conj() or value.is_neg()):
            return fake_like(value, mode)
        return mode.from_tensor(value, static_shapes=True)

    return [fake(value) if isinstance(value, Tensor) else value for value in inputs]


def fake_like(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A new fake of the same shape, strides, dtype and device.  Wraps ``FakeTensor``."""
    shape_alone = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(mode, shape_alone, value.device)


def mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """The mode of the first fake among ``values``."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def memory_of(value: Tensor) -> StorageWeakRef:
    """What tensors have in common that lie in the same memory.  Wraps ``StorageWeakRef``."""
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def trace_functional(gm: torch.fx.GraphModule, fakes: Sequence[Any]) -> torch.fx.GraphModule | None:
    """Pre-dispatch ATen graph of ``gm``; None where it writes in place.

    Composites such as linear and scaled_dot_product_attention stay whole, and so does autocast: what ``gm`` enters and
    exits is in the graph, and was in force.  Wraps ``make_fx``.
    """
    with torch.no_grad(), torch.fx.traceback.preserve_node_meta(), mode_of(fakes):
        run = torch.fx.Interpreter(_autocasting(gm)).run
        traced = make_fx(run, pre_dispatch=True, decomposition_table=_SPELLED_OUT)(*fakes)
    return None if any(writes(node) for node in traced.graph.nodes) else traced


def export_functional(gm: torch.fx.GraphModule, fakes: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[str]]:
    """The same for a ``gm`` that writes in place: functionalised, and the inputs that it writes to.

    Placeholders are ``gm``'s, after any parameter or buffer that ``gm`` itself owns.  Traces twice.  Wraps
    ``aot_export_module``.
    """
    with torch.no_grad(), torch.fx.traceback.preserve_node_meta(), mode_of(fakes):
        exported, signature = aot_export_module(
            _autocasting(gm), list(fakes), trace_joint=False, pre_dispatch=True, decompositions=_SPELLED_OUT
        )
    assert isinstance(exported, torch.fx.GraphModule)
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    return exported, written


def _autocasting(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``gm`` with autocast entered as users do, which a pre-dispatch trace both obeys and notes.

    ``_enter_autocast``, which Dynamo puts in its graph, is noted alone.
    """
    users_form = {torch.amp.autocast_mode._enter_autocast: _enter, torch.amp.autocast_mode._exit_autocast: _exit}
    if not any(node.target in users_form for node in gm.graph.nodes):
        return gm
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.target = users_form.get(node.target, node.target)
    return torch.fx.GraphModule(gm, graph)


def _enter(*settings: Any) -> torch.autocast:
    context = torch.autocast(*settings)
    context.__enter__()  # type: ignore[no-untyped-call]
    return context


def _exit(context: torch.autocast) -> None:
    context.__exit__(None, None, None)


def _einsum(equation: str, operands: Sequence[Tensor], *, path: Any = None) -> Any:
    return torch.ops.aten.einsum.default.decompose(equation, operands, path=path)


_SPELLED_OUT = {torch.ops.aten.einsum.default: _einsum}
"""Operations that hide what they do in a string; eager runs just what they are spelled out to."""


def writes(node: torch.fx.Node) -> bool:
    """Whether an operation writes to what it reads."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def trace_aten(gm: torch.fx.GraphModule, fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """``gm`` with the Python functions in it inlined to pre-dispatch ATen.  Wraps ``make_fx``."""
    mode = mode_of(fakes)
    with torch.no_grad(), mode:
        return make_fx(gm, pre_dispatch=True)(*fakes)


def propagate(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What ``gm`` yields for fake ``inputs``, as fakes; wraps ``FakeTensorProp``."""
    mode = mode_of(inputs)
    with torch.no_grad():
        return tuple(FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs))


def has_autocast_kernel(operation: Any, devices: Iterable[str]) -> bool:
    """Whether autocast does something of its own at an operation on one of these kinds of device.

    Wraps ``_dispatch_has_kernel_for_dispatch_key``.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has_kernel(operation.name(), f"Autocast{kind.upper()}") for kind in devices)


def is_composite(operation: Any) -> bool:
    """Whether an operation is made of others, at which autocast may do something."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"))
