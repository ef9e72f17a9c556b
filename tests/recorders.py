"""A stand-in for CUDA's recorder, on any device: strict about what a CUDA graph may and may not count on.

It writes down every operation of a call with the tensors it reads and makes.  A recording computes nothing: what it
yields is poisoned until the first replay.  A replay does the operations again, into the same tensors, and poisons all
that other graphs have made and nothing holds now: as if the one pool had given that memory away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A graph reads an address, whatever becomes of the tensor that lay there.
        args, kwargs = tree_map(self._fixed, (args, kwargs or {}))
        made = func(*args, **kwargs)
        self.done.append((func, args, kwargs, made))
        self._made |= {id(value) for value in tensors(made)}
        return made

    def _fixed(self, value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and id(value) not in self._made else value

    def replay(self) -> None:
        for func, args, kwargs, made in self.done:
            for old, new in zip(tensors(made), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def read(self) -> set[int]:
        return {memory(t) for _, args, kwargs, _ in self.done for t in tensors((args, kwargs))}

    def poison(self, alive: set[int]) -> None:
        own = {id(t): t for *_, made in self.done for t in tensors(made)}
        outside = {memory(t) for _, args, kwargs, _ in self.done for t in tensors((args, kwargs)) if id(t) not in own}
        for value in own.values():
            if value.is_floating_point() and memory(value) not in alive | outside:
                value.fill_(float("nan"))


class FakeRecorder:
    """Records on any device.

    Args:
        alive: the tensors that are held now.
    """

    def __init__(self, alive: Callable[[], Iterable[Tensor]]) -> None:
        self._alive, self._logs = alive, list[_Log]()

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        log = _Log()
        before = self._held()
        with log:
            result = run()
        log.poison(before)
        self._logs.append(log)

        def replay() -> None:
            alive = self._held() | log.read()
            for other in self._logs:
                if other is not log:
                    other.poison(alive)
            log.replay()

        return replay, result

    def unowned(self, value: Tensor) -> Tensor:
        return value

    def _held(self) -> set[int]:
        return {memory(value) for value in self._alive()}


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
