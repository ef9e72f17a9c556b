"""What runs eagerly, operator by operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, note: Callable[[Any, Sequence[Any]], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func, args)
        return result


def noted_operators(note: Callable[[Any, Sequence[Any]], object]) -> contextlib.AbstractContextManager[object]:
    """Within, ``note`` is called with each operator that ran and its arguments.  Wraps ``TorchDispatchMode``."""
    return _Noting(note)
