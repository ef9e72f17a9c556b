"""A denoiser's graph whose steps can be tried: any method at any site, from that site's input on.

The layers before a site do not change while the site is tried, so a trial starts from a *frontier*: the values and the
state just before the site's region.  :meth:`SearchGraph.advance` runs one site and goes on to the next,
:meth:`SearchGraph.complete` runs what is left in full.  All of it runs on the pieces that a plan would run on; each is
compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from difa_fx._torch import apart_from_dynamo, compile_inductor, input_sources
from difa_fx.clock import Clock
from difa_fx.compile import PieceCompiler
from difa_fx.cost import SiteShape
from difa_fx.errors import CalibrationError
from difa_fx.passes.canonicalize import CanonicalGraph, canonicalize
from difa_fx.passes.find_attention import Attention, AttentionSite, find_attention
from difa_fx.passes.partition import partition
from difa_fx.passes.rewrite import RewriteSettings
from difa_fx.passes.window_attention import fitted
from difa_fx.plan import CFGOrder, Method, Plan
from difa_fx.plan_rules import Window
from difa_fx.program import Call, ProgramBuilder, State
from difa_fx.runtime import Runner
from difa_fx.schedule import FULL, SiteAction, SiteStep, make_schedule, open_step


@dataclass(slots=True)
class Frontier:
    """A call of the denoiser that has come as far as the region of site number ``site``.

    Attributes:
        site: the site that comes next; the number of sites when the call is complete.
        slots: values so far.
        state: outputs and residuals; those of the sites before are this step's.
    """

    site: int
    slots: list[Any]
    state: State


class Driver(Protocol):
    """Decides what the sites do at each step of a generation that it is shown call by call."""

    def step(self, graph: SearchGraph, step: int, args: Sequence[Any]) -> tuple[Any, ...]:
        """Serve call number ``step`` of the denoiser; gives the graph's outputs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How the pieces of a search are made; see :class:`difa_fx.options.Options`."""

    window: Window
    cfg: CFGOrder | None
    compiler: str = "inductor"
    window_kernel: str = "auto"
    inductor: Mapping[str, Any] = field(default_factory=dict)


class SearchGraph:
    """One denoiser graph at one set of shapes.

    Attributes:
        sites: its sites, in the order in which they run; a layer is a site.
        shapes: size of each.
        attention: all that was found.
        candidates: the methods that may be tried.
        window: tokens to either side.
        cfg: the order of the CFG halves.
        work: denoiser calls' worth of regions run so far.
    """

    def __init__(
        self,
        canonical: CanonicalGraph,
        attention: Attention,
        settings: SearchSettings,
        candidates: Sequence[Method],
    ) -> None:
        rewriting = RewriteSettings(
            window=settings.window, second=settings.cfg == "uncond_first", kernel=settings.window_kernel
        )
        attention = replace(attention, sites=tuple(fitted(site, settings.window) for site in attention.sites))
        self.sites: tuple[AttentionSite, ...] = attention.sites
        self.shapes: dict[str, SiteShape] = {site.path: site.shape for site in self.sites}
        self.attention, self.candidates, self.work = attention, tuple(candidates), 0.0
        self.window, self.cfg = settings.window, settings.cfg
        self._graph, self._partition = canonical.gm.graph, partition(canonical, self.sites)
        self._compiler = PieceCompiler(settings.compiler, settings.inductor, rewriting)
        self.builder = ProgramBuilder(self._graph, self._partition, self._compiler)
        parts = self._partition
        numbers = {s.site.path: i for i, s in enumerate(parts.segments) if s.site is not None}
        self._regions = [*(numbers[site.path] for site in self.sites), len(parts.segments)]
        self._calls: dict[tuple[int, SiteStep | None], Call] = {}

    @property
    def cuda(self) -> bool:
        """Whether its values lie on a CUDA device."""
        value = self.sites[0].outputs[0].meta["val"]
        return bool(value.device.type == "cuda")

    def structure(self, number: int) -> str:
        """The signature of a site's region; sites that share it share their pieces."""
        return self._partition.segments[self._regions[number]].signature

    def compile(self) -> None:
        """Compile every piece that a search can need."""
        actions = {FULL} | {SiteAction(m) for m in self.candidates if m.computes}
        actions |= {replace(action, writes_residual=True) for action in actions if action.method.refreshes}
        rows = [{site.path: SiteStep(self._possible(site, action)) for site in self.sites} for action in actions]
        self.builder.compile_rows(sorted(rows, key=str))

    def start(self, args: Sequence[Any], state: State) -> Frontier:
        """A call with the graph's inputs, as far as the first site."""
        frontier = Frontier(0, self.builder.start(args), dict(state))
        self._run(frontier, range(self._regions[0]))
        return frontier

    def advance(self, frontier: Frontier, methods: Sequence[Method]) -> Frontier:
        """The next site does the last of ``methods``, its column so far; ``frontier`` stays as it is."""
        reached = Frontier(frontier.site + 1, list(frontier.slots), dict(frontier.state))
        region = self._regions[frontier.site]
        self.builder.run([self._call(region, self.entry(frontier.site, methods))], reached.slots, reached.state)
        self._run(reached, range(region + 1, self._regions[reached.site]))
        self.work += 1 / len(self.sites)
        return reached

    def complete(self, frontier: Frontier) -> tuple[Any, ...]:
        """The graph's outputs with full attention from the next site on; ``frontier`` stays as it is."""
        rest = Frontier(frontier.site, list(frontier.slots), {})
        self._run(rest, range(self._regions[frontier.site], self._regions[-1]))
        self.work += (len(self.sites) - frontier.site) / len(self.sites)
        return self.builder.collect(rest.slots)

    def outputs(self, frontier: Frontier) -> tuple[Any, ...]:
        """The graph's outputs, once every site has advanced."""
        return self.builder.collect(frontier.slots)

    def runner(self, plan: Plan) -> Runner:
        """What ``plan`` runs on, with the pieces of this search."""
        clock = Clock(plan.steps)
        clock.begin()
        return Runner(
            graph=self._graph,
            attention=self.attention,
            partition=self._partition,
            schedule=make_schedule(plan, [site.path for site in self.sites]),
            compiler=self._compiler,
            owner_position=None,
            clock_of=lambda _: clock,
            strict=True,
        )

    def run_site(self, frontier: Frontier, entry: SiteStep) -> None:
        """Run the next site's region alone and drop what it gives; for timing."""
        self.builder.run([self._call(self._regions[frontier.site], entry)], list(frontier.slots), dict(frontier.state))

    def entry(self, number: int, methods: Sequence[Method]) -> SiteStep:
        """What site ``number`` does under the last of ``methods``, with all kept that a candidate could read later."""
        entry = open_step(methods)
        return replace(entry, action=self._possible(self.sites[number], entry.action))

    def _possible(self, site: AttentionSite, action: SiteAction) -> SiteAction:
        """``action``, or full attention where the site cannot do it; without a residual where none could be read."""
        if action.method not in site.methods:
            return FULL
        windows = any(m.windowed and m in site.methods for m in self.candidates)
        return replace(action, writes_residual=action.writes_residual and windows)

    def _run(self, frontier: Frontier, segments: range) -> None:
        """Run segments, regions among them in full and without a residual."""
        sites = self.builder.partition.segments
        calls = [self._call(i, None if sites[i].site is None else SiteStep(FULL)) for i in segments]
        self.builder.run(calls, frontier.slots, frontier.state)

    def _call(self, segment: int, entry: SiteStep | None) -> Call:
        key = (segment, entry)
        if key not in self._calls:
            self._calls[key] = self.builder.call(segment, entry)
        return self._calls[key]


def main_output(outputs: Sequence[Any]) -> Tensor:
    """The prediction among a graph's outputs: the first floating-point tensor."""
    for value in outputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise CalibrationError("the denoiser's graph yields no tensor to compare", where="calibrate")


Choose = Callable[[Attention, Sequence[Any]], tuple[SearchSettings, Sequence[Method]]]
"""Settles, at a denoiser's first call, how it is searched and with which candidates."""


class Backend:
    """A backend for ``torch.compile`` that shows a driver each call of the denoiser.

    Attributes:
        driver: who decides; replaced between generations.
        steps: calls served in this generation.
        timesteps: what the graph's timestep input was at each call, as far as it has one.
        graph: the denoiser's graph, after its first call.
    """

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self.driver: Driver | None = None
        self.steps = 0
        self.timesteps: list[float | None] = []
        self.graph: SearchGraph | None = None

    def begin(self, driver: Driver) -> None:
        """The next call is the first of a generation that ``driver`` serves."""
        self.driver, self.steps, self.timesteps = driver, 0, []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one Dynamo graph."""
        sources = input_sources(gm)
        own: list[SearchGraph | Callable[..., Any]] = []

        def serve(*args: Any) -> Any:
            if not own:
                with apart_from_dynamo():
                    own.append(self._graph(gm, args, sources))
            graph = own[0]
            return self._serve(graph, args) if isinstance(graph, SearchGraph) else graph(*args)

        return serve

    def _serve(self, graph: SearchGraph, args: Sequence[Any]) -> tuple[Any, ...]:
        assert self.driver is not None
        step, self.steps = self.steps, self.steps + 1
        self.timesteps.append(graph.attention.inputs.time(args))
        with torch.no_grad():
            return self.driver.step(graph, step, args)

    def _graph(
        self, gm: fx.GraphModule, args: Sequence[Any], sources: Sequence[str]
    ) -> SearchGraph | Callable[..., Any]:
        canonical = canonicalize(gm, args, sources=sources)
        attention = find_attention(canonical)
        if not attention.sites:
            return compile_inductor(gm, args, {})
        if self.graph is not None:
            raise CalibrationError(
                "the denoiser runs as more than one graph with attention in it",
                where="calibrate",
                got=f"a second graph, at call {self.steps + 1}",
                allowed="one graph, at one batch size and resolution, from the first step to the last",
                todo="keep batch, resolution and guidance the same throughout, and look for graph breaks with "
                "TORCH_LOGS=graph_breaks",
            )
        self.graph = SearchGraph(canonical, attention, *self._choose(attention, args))
        self.graph.compile()
        return self.graph
