"""A denoiser's graph whose steps can be tried: any method at any site, from that site's input on.

The layers before a site do not change while the site is tried, so a trial starts from a *frontier*: the values and the
state just before the site's region.  :meth:`SearchGraph.advance` runs one site and goes on to the next,
:meth:`SearchGraph.complete` runs what is left in full.  All of it runs on the pieces that a plan would run on; each is
compiled once.  Where a step is two calls of the denoiser, one for each half of guidance, both are tried together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from difa_fx._torch import apart_from_dynamo, input_sources
from difa_fx.boundary import refuse_wrapped, unforeseen_is_typed
from difa_fx.clock import Clock
from difa_fx.compile import compile_whole, compiler_for
from difa_fx.cost import SiteShape
from difa_fx.errors import CalibrationError
from difa_fx.passes.canonicalize import CanonicalGraph, canonicalize
from difa_fx.passes.find_attention import Attention, AttentionSite, find_attention
from difa_fx.passes.graph_tools import placeholders, takes_tensors
from difa_fx.passes.partition import partition
from difa_fx.passes.window_attention import fitted
from difa_fx.plan import CFGOrder, Method, Plan
from difa_fx.plan_words import Window, calls_per_step
from difa_fx.program import Call, ProgramBuilder, State
from difa_fx.runner_context import OneClock
from difa_fx.runtime import Runner
from difa_fx.schedule import FULL, SiteAction, SiteStep, make_schedule, open_calls, open_step, without_residuals
from difa_fx.step_calls import TwoCalls


@dataclass(slots=True)
class Frontier:
    """A call of the denoiser that has come as far as the region of site number ``site``.

    Attributes:
        site: the site that comes next; the number of sites when the call is complete.
        slots: values so far, of each of the step's calls.
        state: outputs and residuals; those of the sites before are this step's.
    """

    site: int
    slots: list[list[Any]]
    state: State


class Driver(Protocol):
    """Decides what the sites do at each step of a generation that it is shown call by call."""

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Serve step number ``step``: the graph's inputs in each of its calls; gives the graph's outputs in each."""
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
        calls_per_step: two where the halves are calls of their own.
        work: denoiser calls' worth of regions run so far.
    """

    def __init__(
        self,
        canonical: CanonicalGraph,
        attention: Attention,
        settings: SearchSettings,
        candidates: Sequence[Method],
    ) -> None:
        self.calls_per_step = calls_per_step(settings.cfg)
        sites = [fitted(s, settings.window, calls_per_step=self.calls_per_step) for s in attention.sites]
        attention = replace(attention, sites=tuple(sites))
        self.sites: tuple[AttentionSite, ...] = attention.sites
        self.shapes: dict[str, SiteShape] = {site.path: site.shape for site in self.sites}
        self.attention, self.candidates, self.work = attention, tuple(candidates), 0.0
        self.window, self.cfg = settings.window, settings.cfg
        self._graph, self._partition = canonical.gm.graph, partition(canonical, attention)
        self._compiler = compiler_for(
            self.sites,
            compiler=settings.compiler,
            inductor=settings.inductor,
            kernel=settings.window_kernel,
            window=settings.window,
            cfg=settings.cfg,
            windows=any(method.windowed for method in self.candidates),
        )
        self.builder = ProgramBuilder(self._graph, self._partition, self._compiler)
        parts = self._partition
        numbers = {s.site.path: i for i, s in enumerate(parts.segments) if s.site is not None}
        self._regions = [*(numbers[site.path] for site in self.sites), len(parts.segments)]
        self._calls: dict[tuple[int, SiteStep | None], Call] = {}

    @property
    def latents_shape(self) -> list[int] | None:
        """Sizes of the latents, the batch among them; None where no input is known to be they."""
        position = self.attention.inputs.latents
        return None if position is None else list(placeholders(self._graph)[position].meta["val"].shape)

    @property
    def device(self) -> str:
        """The kind of device that its values lie on."""
        return str(self.sites[0].outputs[0].meta["val"].device.type)

    @property
    def cuda(self) -> bool:
        """Whether its values lie on a CUDA device."""
        return self.device == "cuda"

    def structure(self, number: int) -> str:
        """The signature of a site's region; sites that share it share their pieces."""
        return self._partition.segments[self._regions[number]].signature

    def compile(self) -> None:
        """Compile every piece that a search can need."""
        methods = {m if self.calls_per_step == 1 else m.alone for m in self.candidates if m.computes}
        actions = {FULL} | {SiteAction(m) for m in methods}
        actions |= {replace(action, writes_residual=True) for action in actions if action.method.refreshes}
        rows = [{site.path: self._possible(site, SiteStep(action)) for site in self.sites} for action in actions]
        self.builder.compile_rows(sorted(rows, key=str))

    def start(self, calls: Sequence[Sequence[Any]], state: State) -> Frontier:
        """A step with the graph's inputs in each of its calls, as far as the first site."""
        frontier = Frontier(0, [self.builder.start(args) for args in calls], dict(state))
        self._run(frontier, range(self._regions[0]))
        return frontier

    def advance(self, frontier: Frontier, methods: Sequence[Method]) -> Frontier:
        """The next site does the last of ``methods``, its column so far; ``frontier`` stays as it is."""
        reached = Frontier(frontier.site + 1, [list(slots) for slots in frontier.slots], dict(frontier.state))
        region = self._regions[frontier.site]
        for slots, entry in zip(reached.slots, self.entries(frontier.site, methods), strict=True):
            self.builder.run([self._call(region, entry)], slots, reached.state)
        self._run(reached, range(region + 1, self._regions[reached.site]))
        self.work += len(frontier.slots) / len(self.sites)
        return reached

    def complete(self, frontier: Frontier) -> list[tuple[Any, ...]]:
        """The graph's outputs with full attention from the next site on; ``frontier`` stays as it is."""
        rest = Frontier(frontier.site, [list(slots) for slots in frontier.slots], {})
        self._run(rest, range(self._regions[frontier.site], self._regions[-1]))
        self.work += len(rest.slots) * (len(self.sites) - frontier.site) / len(self.sites)
        return self.outputs(rest)

    def outputs(self, frontier: Frontier) -> list[tuple[Any, ...]]:
        """The graph's outputs in each call, once every site has advanced."""
        return [self.builder.collect(slots) for slots in frontier.slots]

    def runner(self, plan: Plan, clock: Clock) -> Runner:
        """What ``plan`` runs on, with the pieces of this search, in the generations that ``clock`` counts."""
        return Runner(
            graph=self._graph,
            attention=self.attention,
            partition=self._partition,
            schedule=make_schedule(plan, [site.path for site in self.sites]),
            compiler=self._compiler,
            owner_position=None,
            clocks=OneClock(clock),
            strict=True,
        )

    def run_site(self, frontier: Frontier, entries: Sequence[SiteStep]) -> None:
        """Run the next site's region alone, in each call, and drop what it gives; for timing."""
        state = dict(frontier.state)
        for slots, entry in zip(frontier.slots, entries, strict=True):
            self.builder.run([self._call(self._regions[frontier.site], entry)], list(slots), state)

    def entries(self, number: int, methods: Sequence[Method]) -> tuple[SiteStep, ...]:
        """What site ``number`` does, call by call, under the last of ``methods``; all a candidate may read is kept."""
        opened = open_step(methods) if self.calls_per_step == 1 else open_calls(methods)
        return tuple(self._possible(self.sites[number], entry) for entry in opened)

    def timed_entries(self, number: int) -> dict[str, tuple[SiteStep, ...]]:
        """What to time at site ``number``: every method, and with ``->r`` where it hands out a residual too."""
        entries = {Method.FULL.value: (SiteStep(FULL),) * self.calls_per_step}
        for method in (Method.FULL, *self.candidates):
            if method in self.sites[number].refused or not method.computes:
                continue
            opened = self.entries(number, [Method.FULL, method])
            writes = any(entry.action.writes_residual for entry in opened)
            entries[method.value + ("->r" if writes else "")] = opened
            if writes:
                entries[method.value] = tuple(map(without_residuals, opened))
        return entries

    def _possible(self, site: AttentionSite, entry: SiteStep) -> SiteStep:
        """``entry``, or full attention where the site cannot do it; without a residual where none could be read."""
        if entry.action.method not in site.methods:
            return replace(entry, action=FULL)
        windows = any(m.windowed and m in site.methods for m in self.candidates)
        return entry if windows else without_residuals(entry)

    def _run(self, frontier: Frontier, segments: range) -> None:
        """Run segments, regions among them in full and without a residual."""
        sites = self.builder.partition.segments
        calls = [self._call(i, None if sites[i].site is None else SiteStep(FULL)) for i in segments]
        for slots in frontier.slots:
            self.builder.run(calls, slots, frontier.state)

    def _call(self, segment: int, entry: SiteStep | None) -> Call:
        key = (segment, entry)
        if key not in self._calls:
            self._calls[key] = self.builder.call(segment, entry)
        return self._calls[key]


def main_output(outputs: Sequence[Sequence[Any]]) -> Tensor:
    """The prediction among a graph's outputs, the first floating-point tensor; of two calls, as one batch."""
    found = [next((v for v in out if isinstance(v, Tensor) and v.is_floating_point()), None) for out in outputs]
    tensors = [value for value in found if value is not None]
    if tensors:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    raise CalibrationError("the denoiser's graph yields no tensor to compare", where="calibrate")


Choose = Callable[[Attention, Sequence[Any]], tuple[SearchSettings, Sequence[Method]]]
"""Settles, at a denoiser's first call, how it is searched and with which candidates."""

Watch = Callable[[Attention, Sequence[Any], Sequence[Any]], None]
"""Is shown the first two calls of a denoiser that was taken to be called once a step."""


class Backend:
    """A backend for ``torch.compile`` that shows a driver each step of the denoiser.

    Attributes:
        driver: who decides; replaced between generations.
        calls: calls served in this generation.
        timesteps: what the graph's timestep input was at each step, as far as it has one.
        graph: the denoiser's graph, after its first call.
    """

    def __init__(
        self,
        choose: Choose,
        watch: Watch | None = None,
        *,
        compiler: str = "inductor",
        inductor: Mapping[str, Any] | None = None,
    ) -> None:
        self._choose, self._watch = choose, watch
        self._compiler, self._inductor = compiler, inductor or {}
        self._pairs = TwoCalls()
        self._before: Sequence[Any] = ()
        self.driver: Driver | None = None
        self.calls = 0
        self.timesteps: list[float | None] = []
        self.graph: SearchGraph | None = None

    def begin(self, driver: Driver) -> None:
        """The next call is the first of a generation that ``driver`` serves."""
        self.driver, self.calls, self.timesteps = driver, 0, []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one Dynamo graph."""
        sources = input_sources(gm)
        own: list[SearchGraph | Callable[..., Any]] = []

        def serve(*args: Any) -> Any:
            if not own:
                refuse_wrapped(gm, args)
                with apart_from_dynamo(), unforeseen_is_typed("calibrate"):
                    own.append(self._graph(gm, args, sources))
            graph = own[0]
            return self._serve(graph, args) if isinstance(graph, SearchGraph) else graph(*args)

        return serve

    def _serve(self, graph: SearchGraph, args: Sequence[Any]) -> tuple[Any, ...]:
        step, call = divmod(self.calls, graph.calls_per_step)
        self.calls += 1
        if call == 0:
            self.timesteps.append(graph.attention.inputs.time(args))
        driver = self.driver
        assert driver is not None

        def run(calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
            return driver.step(graph, step, calls)

        with torch.no_grad():
            if call == 1:
                return self._pairs.second(args, run)
            if graph.calls_per_step == 2:
                return self._pairs.first(args, lambda args: graph.complete(graph.start((args,), {}))[0], run)
            if self._watch is not None and step == 0:
                self._before = args
            elif self._watch is not None:
                self._watch(graph.attention, self._before, args)
                self._before, self._watch = (), None
            return run((args,))[0]

    def _graph(
        self, gm: fx.GraphModule, args: Sequence[Any], sources: Sequence[str]
    ) -> SearchGraph | Callable[..., Any]:
        if not takes_tensors(args):
            return compile_whole(gm, args, self._compiler, self._inductor)
        canonical = canonicalize(gm, args, sources=sources)
        attention = find_attention(canonical)
        if canonical.written and attention.sites:
            raise CalibrationError(
                "the denoiser writes to its inputs, and a trial would run on what the one before wrote",
                where="calibrate",
                got=", ".join(sources[position] for position in canonical.written),
                allowed="a denoiser whose forward only reads, or a plan made by hand",
                todo="look for graph breaks with TORCH_LOGS=graph_breaks: it may write to what it made before one",
            )
        if not attention.sites:
            return compile_whole(gm, args, self._compiler, self._inductor)
        if self.graph is not None:
            raise CalibrationError(
                "the denoiser runs as more than one graph with attention in it",
                where="calibrate",
                got=f"a second graph, at call {self.calls + 1}",
                allowed="one graph, at one batch size and resolution, from the first step to the last",
                todo="keep batch, resolution and guidance the same throughout, and look for graph breaks with "
                "TORCH_LOGS=graph_breaks",
            )
        self.graph = SearchGraph(canonical, attention, *self._choose(attention, args))
        self.graph.compile()
        return self.graph
