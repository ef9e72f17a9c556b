"""``difa bench``: what plans and methods save here, against Inductor and against others who save the same.

Map of the folder::

    subject         a denoiser and how a sampler calls it
    shapes          built-in ones: published configurations, random weights
    sampling        generations
    settings        what a run measures
    plans           the plan in which every method stands once, and columns of a given plan
    attention_time  the attention modules of a denoiser by themselves, compiled by Inductor
    efficiency      what could be saved, and how much of it is
    steps           difa_fx step by step, its state put back each time
    peers           DiTFastAttn as attention processors
    cache_peers     the caches that come with diffusers
    dynamo          what Dynamo did for a contender
    timing          contenders that take turns
    method_race     single steps: every method
    plan_race       generations: a plan and its peers
    children        compile seconds and memory, each in a process of its own
    measure         one case: all of the above; many cases
    hardware        what it ran on
    records         what was measured; records -> JSON
    report, plots   records -> tables and figures
    command         the command line
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difa_fx.bench.measure import run as run
    from difa_fx.bench.records import Bench as Bench
    from difa_fx.bench.settings import Settings as Settings

_WHERE = {"Bench": "records", "Settings": "settings", "run": "measure"}

__all__ = ["Bench", "Settings", "run"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'difa_fx.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"difa_fx.bench.{_WHERE[name]}"), name)
