"""The backend: ``torch.compile(model, backend="difa", options={"plan": ...})``.

The story of a compilation, top to bottom::

    Dynamo's graph -> canonicalize -> find_attention -> partition -> rewrite + compile, a piece at a time
                   -> Runner, which Dynamo calls with the graph's inputs at every denoising step

A graph with symbolic shapes is specialised to each set of sizes it meets; each has its own runner and state.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from difa_fx import elsewhere
from difa_fx._torch import (
    WeakIdKeyDictionary,
    apart_from_dynamo,
    breaks_graph,
    cpu_codegen,
    input_sources,
    is_static_input,
    uses_cuda_graphs,
)
from difa_fx.boundary import refuse_collectives, refuse_wrapped, unforeseen_is_typed
from difa_fx.compile import compile_whole, compiler_for
from difa_fx.cuda_graphs import graphs_for
from difa_fx.errors import DifaError, GradError, OptionError, PlanError, SiteError
from difa_fx.hardware import device_of
from difa_fx.options import Options, parse_options
from difa_fx.passes.canonicalize import CanonicalGraph, canonicalize
from difa_fx.passes.find_attention import Attention, AttentionSite, find_attention
from difa_fx.passes.graph_tools import takes_tensors
from difa_fx.passes.inputs import source_name
from difa_fx.passes.partition import partition
from difa_fx.passes.rewrite import check_possible
from difa_fx.passes.window_attention import fitted
from difa_fx.plan import Method, Plan
from difa_fx.registry import Compilation, compilation_for, forget
from difa_fx.runtime import Runner
from difa_fx.schedule import make_schedule


def difa(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.  Registered with torch as the backend ``difa``.

    A fault found here is raised by the returned callable, so that users see the error itself and not Dynamo's
    wrapping of it; nothing runs before.

    Args:
        gm: Dynamo's graph; parameters are placeholders.
        example_inputs: one value a placeholder.
        options: see :class:`difa_fx.options.Options`.
        mode: torch's own, for instance ``reduce-overhead``.
    """
    try:
        parsed = parse_options(options, mode)
        if parsed.plan is None:
            return compile_whole(gm, example_inputs, parsed.compiler, parsed.inductor)
        _refuse_gradients(example_inputs)
        refuse_wrapped(gm, example_inputs)
        refuse_collectives(gm)
        if parsed.compiler == "inductor" and any(_on_cpu(value) for value in example_inputs):
            cpu_codegen()
        if not takes_tensors(example_inputs):
            return compile_whole(gm, example_inputs, parsed.compiler, parsed.inductor)
        return CompiledGraph(gm, example_inputs, options, parsed, mode)
    except DifaError as error:
        return _raiser(error)


difa.reset = forget  # type: ignore[attr-defined]  # torch._dynamo.reset calls it


class CompiledGraph:
    """One Dynamo graph under a plan: a runner for each set of input sizes.

    Dynamo runs it for other denoisers of the class, too, where their options compare equal.  What options say is read
    when a denoiser is seen for the first time, for a dict may have been edited meanwhile.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Mapping[str, Any] | None,
        parsed: Options,
        mode: str | None,
    ) -> None:
        self._gm, self._options, self._mode = gm, options, mode
        self._sources = input_sources(gm)
        self._dynamic = not all(isinstance(value, Tensor) for value in example_inputs)
        self._owner = next((i for i, value in enumerate(example_inputs) if is_static_input(value)), None)
        self._said, self._parsed = _snapshot(options), parsed
        self._breaks = breaks_graph(gm)
        self._compilations = WeakIdKeyDictionary()
        self._first = compilation_for(parsed)
        self._first.broken |= self._breaks
        self._runners: dict[Any, Runner] = {}
        self._lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        """Run the graph; compiles first when its input sizes are new."""
        runner = self.runner_for(args)
        first = not runner.calls
        outputs = runner(*args)
        if first and self._breaks:
            compilation = self._compilation(None if self._owner is None else args[self._owner])
            compilation.between.note(outputs[len(runner.written) :], runner.attention.results)
        for position, value in zip(runner.written, outputs, strict=False):
            args[position].copy_(value)
        return outputs[len(runner.written) :]

    def runner_for(self, args: Sequence[Any]) -> Runner:
        """The runner for the sizes of ``args``, and for what the options of their denoiser said."""
        compilation = self._compilation(None if self._owner is None else args[self._owner])
        key = (id(compilation), _sizes(args) if self._dynamic else None)
        runner = self._runners.get(key)
        if runner is None:
            with self._lock, apart_from_dynamo(), unforeseen_is_typed("compilation of the denoiser"):
                if key not in self._runners:
                    self._runners[key] = runner = make_runner(self._gm, args, self._sources, compilation)
                    if not _may_go_on(runner, compilation):
                        runner.compile()
                runner = self._runners[key]
        return runner

    def _compilation(self, owner: object) -> Compilation:
        """What a denoiser was compiled under: the options as they were when it was seen first.

        Raises:
            OptionError: they were edited since.
        """
        edited = dict(self._options or {}) != self._said
        found = self._first if owner is None else self._compilations.get(owner)  # type: ignore[no-untyped-call]
        if found is None:
            parsed = parse_options(self._options, self._mode) if edited else self._parsed
            found = compilation_for(parsed)
            found.broken |= self._breaks
            self._compilations[owner] = found
        elif edited and found.options != parse_options(self._options, self._mode):
            raise OptionError(
                "the options were edited after this denoiser was compiled with them, and say something else now",
                where="torch.compile(options=...)",
                got=", ".join(sorted(str(key) for key in dict(self._options or {}))),
                allowed="options that stay as they are",
                todo="give each model a dict of its own; to compile this one anew call torch._dynamo.reset() first",
            )
        assert isinstance(found, Compilation)
        return found


def _may_go_on(runner: Runner, compilation: Compilation) -> bool:
    """Whether the call may be of a generation whose guidance has ended, for which there is a runner of its own."""
    batch = runner.attention.inputs.batch
    return batch is not None and any(other.attention.inputs.batch == 2 * batch for other in compilation.runners)


def _snapshot(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What options say now; what they hold may be edited, too."""
    return {key: copy.deepcopy(value) if isinstance(value, dict) else value for key, value in (options or {}).items()}


def make_runner(gm: fx.GraphModule, inputs: Sequence[Any], sources: Sequence[str], compilation: Compilation) -> Runner:
    """All stages of the design, for one graph at one set of shapes.

    Under guidance a generation may end with the conditional half of the batch alone.  So there may be a second runner,
    made when that happens; where the batch has no halves, it is the only one.
    """
    assert compilation.options.plan is not None
    canonical = canonicalize(gm, inputs, sources=sources)
    found = find_attention(canonical, compilation.between.of(inputs, after=len(canonical.sources) - len(inputs)))
    if compilation.broken:
        found = _named_as_in(compilation.options.plan, found)
    make = partial(_runner, canonical, found, inputs, compilation)

    def unguided(**more: Any) -> Runner:
        with apart_from_dynamo():
            return make(compilation.options.plan.without_cfg(), **more)  # type: ignore[union-attr]

    if not compilation.guided or not compilation.options.plan.uses_cfg:
        return make(compilation.options.plan)
    try:
        return make(compilation.options.plan, unguided=unguided)
    except SiteError as error:
        return unguided(only_going_on=error)


def _runner(
    canonical: CanonicalGraph,
    found: Attention,
    inputs: Sequence[Any],
    compilation: Compilation,
    plan: Plan,
    **more: Any,
) -> Runner:
    """The runner of a graph under ``plan``."""
    options = compilation.options
    static = [i for i, fixed in enumerate(canonical.static) if fixed]
    owner_position = next((i for i in static if isinstance(inputs[i], nn.Parameter)), next(iter(static), None))
    sites = tuple(fitted(site, plan.window, calls_per_step=plan.calls_per_step) for site in found.sites)
    attention = replace(found, sites=sites)
    plan = _fitted(plan, attention, compilation)
    _tell_elsewhere(plan, attention, compilation)
    paths = [site.path for site in attention.sites]
    fixed = set(static)
    names = ["" if i in fixed else source_name(source) for i, source in enumerate(canonical.sources)]
    runner = Runner(
        graph=canonical.gm.graph,
        attention=attention,
        partition=partition(canonical, attention),
        schedule=make_schedule(plan, paths),
        later=lambda first: make_schedule(plan.from_step(first), paths),
        compiler=compiler_for(
            attention.sites,
            compiler=options.compiler,
            inductor=options.inductor,
            kernel=options.window_kernel,
            window=plan.window,
            cfg=plan.cfg,
            windows=plan.uses_windows,
        ),
        owner_position=owner_position,
        clocks=compilation,
        strict=options.strict,
        names=names,
        written=canonical.written,
        company=compilation,
        graphs=graphs_for(inputs, static) if uses_cuda_graphs(options.inductor) else None,
        **more,
    )
    compilation.runners.append(runner)
    return runner


def _tell_elsewhere(plan: Plan, attention: Attention, compilation: Compilation) -> None:
    """Say, once, that a plan was calibrated at another resolution or on another device."""
    if compilation.told or not attention.sites or not elsewhere.calibrated_at(plan):
        return
    device = attention.sites[0].outputs[0].meta["val"].device.type
    tokens = {site.path: site.shape.tokens for site in attention.sites}
    differences = (elsewhere.other_tokens(plan, tokens), elsewhere.other_device(plan, device_of(device)))
    compilation.told = any(differences)
    elsewhere.tell(plan, differences)


def _fitted(plan: Plan, attention: Attention, compilation: Compilation) -> Plan:
    """``plan`` checked against the sites of a graph.

    Without ``strict``, what a site cannot do becomes full attention, with one warning a site.

    Raises:
        PlanError: the plan names a site that the graph does not have.
        SiteError: a site cannot do what the plan asks of it.
    """
    paths = [site.path for site in attention.sites]
    compilation.found.update(dict.fromkeys(paths))
    _refuse_single_block(plan, paths)
    if not compilation.broken:
        plan.check_sites(paths)
    for site in attention.sites:
        asked = set(plan.column(site.path)) if site.path in plan.sites else set()
        refused = [method for method in Method if method in asked and method in site.refused]
        if refused and compilation.options.strict:
            check_possible(site, refused[0])
        elif refused:
            plan = _without(plan, site, refused[0])
    return plan


def _named_as_in(plan: Plan, found: Attention) -> Attention:
    """``found`` in one of several graphs, whose paths may begin in the middle of the denoiser, named as in the plan."""

    def name(path: str) -> str:
        whole = [site for site in plan.sites if site == path or site.endswith(f".{path}")]
        return whole[0] if len(whole) == 1 else path

    return replace(found, sites=tuple(replace(site, path=name(site.path)) for site in found.sites))


def _refuse_single_block(plan: Plan, paths: Sequence[str]) -> None:
    """Raise PlanError when what is compiled is one block of the denoiser that the plan is for."""
    whole = [site for site in plan.sites if any(site.endswith(f".{path}") for path in paths)]
    if whole and not set(paths) & set(plan.sites):
        raise PlanError(
            "this compiles one block of the denoiser by itself, and blocks that share a graph cannot be told apart",
            where="torch.compile(backend='difa')",
            got=f"site {paths[0]}, in a plan for {whole[0]} and {len(plan.sites) - 1} others",
            allowed="the whole denoiser in one torch.compile call",
            todo="instead of compile_repeated_blocks call denoiser.compile(backend='difa', options={'plan': ...}) or "
            "difa_fx.attach(pipe, plan): equal layers are compiled once there, too; FSDP's fully_shard makes Dynamo "
            "compile block by block: give each device the whole denoiser and a share of the prompts; so does a forward "
            "that Dynamo cannot trace to its end, such as one that drops padding: TORCH_LOGS=graph_breaks says where",
        )


def _without(plan: Plan, site: AttentionSite, method: Method) -> Plan:
    warnings.warn(
        f"difa_fx runs {site.path} in full at every step: it cannot do {method.value!r}: {site.refused[method]}",
        stacklevel=2,
    )
    index = plan.sites.index(site.path)
    return plan.replace(methods=[[*row[:index], Method.FULL, *row[index + 1 :]] for row in plan.methods])


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    wanting = sum(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    if torch.is_grad_enabled() and wanting:
        raise GradError(
            "gradients are on, and a plan is for inference alone",
            where="torch.compile(backend='difa')",
            got=f"{wanting} inputs or parameters that require gradients",
            allowed="torch.no_grad() or torch.inference_mode() around the call",
            todo="call the compiled denoiser under torch.no_grad(), or model.requires_grad_(False)",
        )


def _on_cpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _raiser(error: DifaError) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise error

    return refuse


def _sizes(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value for value in args)
