"""Which cases every run of the tests has, and which only a thorough one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(names: Iterable[Any], *, core: Collection[Any]) -> list[Any]:
    """``names`` for ``pytest.mark.parametrize``; those that are not in ``core`` are marked thorough."""
    names = list(names)
    assert set(core) <= set(names)
    return [pytest.param(name, marks=() if name in core else pytest.mark.thorough) for name in names]
