"""Attention that no graph holds: it runs eagerly, where Dynamo broke the denoiser or was told to leave a part alone.

The denoiser runs once more, without Dynamo, and each attention that runs is noted with the module that runs it.  What
no graph had is told with the breaks that are nearest to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from difa_fx._torch import graph_break, noted_operators
from difa_fx.passes.graph_tools import within

aten = torch.ops.aten

_SOFTMAX: Final = (aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True, slots=True)
class Break:
    """Where Dynamo ended a graph.

    Attributes:
        reason: its words.
        places: file and line of each frame of the user's code, the outermost first.
    """

    reason: str
    places: tuple[tuple[str, int], ...]

    @property
    def line(self) -> str:
        """The break in a line."""
        first = self.reason.strip().splitlines()[0] if self.reason.strip() else "a graph break"
        file, number = self.places[-1] if self.places else ("", 0)
        return f"{first} ({file.rpartition('/')[2]}, line {number})" if file else first


def break_of(gm: fx.GraphModule) -> Break | None:
    """The break after a graph; None where the denoiser ends there."""
    reason = graph_break(gm)
    if reason is None:
        return None
    stack = getattr(reason, "user_stack", None) or ()
    return Break(str(reason.reason), tuple((frame.filename, int(frame.lineno or 0)) for frame in stack))


def outside_graphs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: Sequence[str],
    breaks: Sequence[Break],
) -> tuple[tuple[str, str], ...]:
    """Path of each module whose attention runs in no graph, and why.

    Args:
        model: the denoiser.
        args: its inputs, by position.
        kwargs: and by name.
        known: paths of the attentions that graphs hold.
        breaks: where these graphs ended.
    """
    held = {path.partition("@")[0].partition("#")[0] for path in known}
    if "attention" in held:
        return ()  # a graph holds some that it has no name for
    with _noted(model) as ran, torch.no_grad():
        model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # not what was compiled of it
    missing = [path for path in ran if not any(within(path, other) or within(other, path) for other in held)]
    return tuple((path or "attention", _why(ran[path], breaks)) for path in missing)


@contextmanager
def _noted(model: nn.Module) -> Iterator[dict[str, list[nn.Module]]]:
    """Within, the path of each module that runs attention, and the modules around it."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(_entering(stack, path)))
            handles.append(module.register_forward_hook(lambda *_: (stack.pop(), None)[1]))
    found: dict[str, list[nn.Module]] = {}

    def note(operator: Any, args: Sequence[Any]) -> None:
        if "scaled_dot_product" in str(operator) or (operator in _SOFTMAX and _is_square(args[0])):
            found.setdefault(stack[-1][0], [module for _, module in stack])

    try:
        with noted_operators(note):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _entering(stack: list[tuple[str, nn.Module]], path: str) -> Callable[[nn.Module, Any], None]:
    def enter(module: nn.Module, _: Any) -> None:
        stack.append((path, module))

    return enter


def _is_square(scores: object) -> bool:
    """Whether these are scores of tokens among themselves."""
    return isinstance(scores, Tensor) and scores.ndim >= 3 and scores.shape[-1] == scores.shape[-2] > 1


def _why(modules: Sequence[nn.Module], breaks: Sequence[Break]) -> str:
    codes = [_code_of(module) for module in modules]

    def near(found: Break) -> bool:
        file, line = found.places[-1] if found.places else ("", 0)
        return any(file == other and first <= line < last for other, first, last in codes)

    told = list(dict.fromkeys(found.line for found in ([b for b in breaks if near(b)] or breaks)))
    return "it runs outside any graph: " + ("; ".join(told[:3]) or "Dynamo leaves this part alone")


def _code_of(module: nn.Module) -> tuple[str, int, int]:
    """File, first line and the line after the last of a module's forward."""
    try:
        lines, first = inspect.getsourcelines(type(module).forward)
        return inspect.getsourcefile(type(module).forward) or "", first, first + len(lines)
    except (OSError, TypeError):
        return "", 0, 0
