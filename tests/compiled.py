"""Run a test case's denoiser through the backend, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from models import Case, tensor_of
from torch import Tensor

import difa_fx
from difa_fx import registry
from difa_fx.plan import Plan
from difa_fx.runtime import Runner

Call = tuple[tuple[Any, ...], dict[str, Any]]


def make_plan(case: Case, rows: Sequence[Sequence[str] | str], **settings: Any) -> Plan:
    """A plan for ``case``; a row that is one method gives it to every site."""
    methods = [[row] * len(case.sites) if isinstance(row, str) else list(row) for row in rows]
    settings = {"window": 8, "cfg": case.cfg_order, **settings}
    return Plan(steps=len(methods), sites=case.sites, methods=methods, **settings)


def compiled(case: Case, plan: object = None, compiler: str = "eager", **options: Any) -> Any:
    """The denoiser of ``case`` under ``plan``."""
    settings = {"compiler": compiler, **options} | ({} if plan is None else {"plan": plan})
    return torch.compile(case.model, backend="difa", options=settings, dynamic=False)


def run(model: Any, calls: Sequence[Call]) -> list[Tensor]:
    """One generation: the outputs, step by step."""
    difa_fx.reset(model)
    return [tensor_of(model(*args, **kwargs)).clone() for args, kwargs in calls]


def runner(model: Any) -> Runner:
    """The only runner of a compiled denoiser."""
    (found,) = registry.runners(model)
    return found


def same_input(calls: Sequence[Call]) -> list[Call]:
    """The first call's arguments at every step."""
    return [calls[0]] * len(calls)
