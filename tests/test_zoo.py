"""Real denoisers, untouched: what is found in each, and that every method keeps its contract there.

The properties have the numbers of :mod:`test_properties`.  Each denoiser is traced once and compiled under several
plans, and all of them are read off these runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import coverage_table
import pytest
import torch
from compiled import compiled, make_plan, run, same_input
from drawn_plans import plans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Case, relative, tensor_of
from oracle import Oracle
from thorough import cases
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from zoo import NO_SITES, ORACLE, ZOO, refused, text_of, zoo_case

import difa_fx
from difa_fx import registry
from difa_fx.backend import difa
from difa_fx.inspection import GraphReport, report
from difa_fx.plan import Plan
from difa_fx.runtime import Runner

TIGHT = 5e-5
"""float32 and a few layers: what reordering sums may change, relative to the largest output."""

SAME = ["full", "window", "cached", "full", "cached", "window"]
SAME_CFG = ["full", "window", "cached", "full+cfg", "window+cfg", "cached", "window", "cached", "full"]
MIXED = ["full", "window", "cached", "full", "cached", "cached", "window"]
MIXED_CFG = [
    "full",
    "window+cfg",
    "cached",
    "full+cfg",
    "window",
    "cached",
    "window+cfg",
    "full",
    "cached",
    "window+cfg",
]


THOROUGH = (
    *("pixart_sigma", "sd35", "flux2", "chroma", "auraflow", "cogview4", "qwen_image", "hunyuan_dit", "lumina_next"),
    *("z_image", "cogvideox", "cogvideox_rotary", "allegro", "hunyuan_video", "stable_audio"),
    *("ltx2", "cosmos", "cosmos2", "wan_i2v", "wan_ti2v", "skyreels", "wan_vace", "consisid", "easyanimate"),
    *("chronoedit", "stable_audio3", "ace_step", "longcat_audio", "kandinsky6", "sana_video", "anyflow", "helios"),
    *("motif_video", "svd", "animatediff", "text_to_video", "i2vgen"),
    *("stdit", "stdit_fused", "stdit_ragged", "timm_bmm", "timm_bmm_bias", "timm_baddbmm", "timm_matmul_bias"),
    *("timm_matmul_scores", "timm_matmul_divide", "timm_einsum_folded", "timm_sdpa_bias", "opaque_sage_hnd"),
    *("joint_source_last", "joint_projections_first", "joint_shared_first", "mha_tokens_first", "gqa_expand"),
    *("hidream", "kandinsky5", "bria", "bria_fibo", "cogview3plus", "hunyuan_image", "omnigen", "prx", "krea2"),
    *("ideogram4", "joy_image", "ovis_image", "flux3", "flux3_given"),
    *("sdxl", "ddpm_unet", "kandinsky3", "dreamlite", "amused"),
)
"""Denoisers whose traps others have, too."""

DRAWN = ("sd3", "wan", "unet")
"""Joint attention, rotary embeddings over frames, and attention inside a convolution net."""


class Traced:
    """A denoiser that Dynamo traces once, run under one plan after another."""

    def __init__(self, found: Case) -> None:
        self.graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []
        self.plan: Plan | None = None
        self._options: dict[str, Any] = {}
        self._plans = 0
        self.model = torch.compile(found.model, backend=self, dynamic=False)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo calls with each graph."""
        self.graphs.append((gm, inputs))
        made: dict[int, Callable[..., Any]] = {}

        def serve(*args: Any) -> Any:
            if not self._options:
                return gm(*args)
            if self._plans not in made:
                made[self._plans] = difa(gm, inputs, options=self._options)
            return made[self._plans](*args)

        return serve

    def under(self, plan: Plan) -> Any:
        """The denoiser under ``plan``."""
        self._plans += 1
        self.plan, self._options = plan, {"plan": plan, "compiler": "eager"}
        return self.model

    def reports(self) -> tuple[GraphReport, ...]:
        """What was found in each graph."""
        return tuple(report(gm, inputs) for gm, inputs in self.graphs)

    def runners(self) -> list[Runner]:
        """The runners under the last plan, of graphs with sites: one, or two where the first call fills a cache."""
        assert self.plan is not None
        return [r for r in registry.runners(self.model) if r.stats.sites and r.schedule.calls == self.plan.steps]


def rows_for(found: Case, rows: list[str], cfg_rows: list[str]) -> list[list[str]]:
    """``rows`` for every site; a site that cannot do a method is full at that step."""
    wanted = cfg_rows if found.cfg_order else rows
    return [["full" if method in refused(found.name, site) else method for site in found.sites] for method in wanted]


@pytest.mark.parametrize("name", cases(ZOO, core=set(ZOO) - set(THOROUGH)))
def test_a_denoiser(name: str) -> None:
    found = zoo_case(name)
    traced = Traced(found)
    ((args, kwargs),) = found.generation(1)
    plain = tensor_of(traced.model(*args, **kwargs))
    assert relative(plain, tensor_of(found.model(*args, **kwargs))) < TIGHT
    every_site_is_found(found, traced.reports())
    if name in NO_SITES:
        return
    a_window_over_all_tokens_and_full_attention_are_the_denoiser(found, traced)
    the_same_input_again_is_full(found, traced)
    if name in ORACLE:
        every_transition_agrees_with_the_oracle(found, traced)


def every_site_is_found(found: Case, graphs: Sequence[GraphReport]) -> None:
    """And can do what makes sense there."""
    sites = {site.path: site for graph in graphs for site in graph.sites}
    assert tuple(sites) == found.sites
    rejected = dict(pair for graph in graphs for pair in graph.rejected)
    assert tuple(rejected) == found.rejected
    assert all(rejected.values())
    for path, site in sites.items():
        assert {method for method, _ in site.refused} == refused(found.name, path), path
        assert site.kind == ("joint" if path in text_of(found.name) else "self"), path
    assert coverage_table.row(found, graphs) in coverage_table.PAGE.read_text(encoding="utf-8").splitlines()


def a_window_over_all_tokens_and_full_attention_are_the_denoiser(found: Case, traced: Traced) -> None:
    """Properties 1, 5 and 6.

    A window over all tokens is full attention on *other* latents than those of the full step before it: on equal ones
    the residual would make up for whatever the window lacks, a layout that is read wrongly among it.
    """
    rows = [rows_for(found, [method], [method])[0] for method in ("full", "window", "full")]
    model = traced.under(make_plan(found, rows, window=found.tokens))
    calls = found.generation(3)
    moving = [[v for v in tree_leaves(call) if isinstance(v, torch.Tensor)] for call in calls]
    assert not any(all(map(torch.equal, one, other)) for one, other in itertools.pairwise(moving))
    for step, (output, (args, kwargs)) in enumerate(zip(run(model, calls), calls, strict=True)):
        assert relative(output, tensor_of(found.model(*args, **kwargs))) < TIGHT, f"step {step}"
    pieces = [runner.stats.pieces for runner in traced.runners()]
    run(model, calls)
    assert [runner.stats.pieces for runner in traced.runners()] == pieces


def the_same_input_again_is_full(found: Case, traced: Traced) -> None:
    """Properties 2, 3, 4 and 8."""
    rows = rows_for(found, SAME, SAME_CFG)
    model = traced.under(make_plan(found, rows, window=3))
    calls = same_input(found.generation(len(rows), same_halves=True))
    args, kwargs = calls[0]
    expected = tensor_of(found.model(*args, **kwargs))
    difa_fx.reset(model)
    held = []
    for step, (args, kwargs) in enumerate(calls):
        assert relative(tensor_of(model(*args, **kwargs)), expected) < TIGHT, f"step {step}: {rows[step][0]}"
        clock = traced.runners()[0].sessions[0].clock
        clock.expected = (clock.timestep,) * len(rows)
        held.append(sum(runner.stats.state_bytes for runner in traced.runners()))
    assert tuple(held) == traced.runners()[0].stats.predicted_state_bytes
    assert max(held) > 0
    assert held[-1] == 0


def every_transition_agrees_with_the_oracle(found: Case, traced: Traced) -> None:
    """Property 7; a window that is cut must make a difference, too."""
    plan = make_plan(found, rows_for(found, MIXED, MIXED_CFG), window=5)
    calls = found.generation(plan.steps)
    got = run(traced.under(plan), calls)
    expected = Oracle(found.model, plan, text_of(found.name)).run(calls)
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step}"
    assert relative(got[1], _uncompressed(found, calls[1])) > 1e-4


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        *((f"masked_{how}", "masked_sdpa") for how in ("fill", "fill_inf", "where", "where_tensor")),
        *((f"channels_first_{how}", "channels_first_sdpa") for how in ("einsum", "bmm", "function")),
    ],
)
def test_7_spelled_out_attention_agrees_with_the_oracle_of_its_twin(name: str, twin: str) -> None:
    found, other = zoo_case(name), zoo_case(twin)
    other.model.load_state_dict(found.model.state_dict())
    plan = make_plan(found, rows_for(found, MIXED, MIXED_CFG), window=5)
    calls = found.generation(plan.steps)
    got = run(torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "aot_eager"}), calls)
    for step, (ours, theirs) in enumerate(zip(got, Oracle(other.model, plan).run(calls), strict=True)):
        assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step}"


@pytest.mark.parametrize("name", cases(DRAWN, core={"sd3"}))
def test_7_random_plans_agree_with_the_oracle(name: str) -> None:
    found = zoo_case(name)
    traced = Traced(found)

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(plan=plans(found), seed=st.integers(0, 9))
    def agrees(plan: Plan, seed: int) -> None:
        calls = found.generation(plan.steps, seed=seed)
        got = run(traced.under(plan), calls)
        expected = Oracle(found.model, plan, text_of(name)).run(calls)
        for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step} of {plan.methods}"

    agrees()


@pytest.mark.parametrize("name", cases(("skyreels_forcing", "wan_ti2v", "cosmos2", "anyflow"), core=()))
def test_where_frames_have_times_a_generation_begins_by_itself(name: str) -> None:
    found = zoo_case(name)
    model = compiled(found, make_plan(found, ["full", "cached", "window", "full"]))
    calls = found.generation(4, related=True)
    first = [tensor_of(model(*args, **kwargs)).clone() for args, kwargs in [*calls, *calls[:2], *calls]]
    assert all(torch.equal(first[step], first[step + 6]) for step in range(4))


def _uncompressed(found: Case, call: Any) -> Tensor:
    args, kwargs = call
    return tensor_of(found.model(*args, **kwargs))
