"""What the denoiser's inputs mean: which is the latents, which the timestep, and how many samples there are.

Read off names, shapes and dtypes of the placeholders; parameters and buffers are left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from difa_fx.passes.canonicalize import CanonicalGraph
from difa_fx.passes.graph_tools import output_values, placeholders, tensor_of

_TIMESTEP_NAMES = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "sigma",
    "sigmas",
    "noise_level",
    "c_noise",
)
_LATENT_NAMES = ("hidden_states", "sample", "latents", "latent_model_input", "x", "img", "z")
_LABEL = re.compile(r"label|class|guidance|style|^y$")
_CONDITION = re.compile(r"encoder|context|text|txt|prompt|^cap$|^cap_|caption|cond|embed|mask")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


@dataclass(frozen=True, slots=True)
class DenoiserInputs:
    """Positions among the placeholders, and the batch.

    Attributes:
        latents: position of the noisy sample, or None.
        timestep: position of the step's time, a scalar, one value a sample, or one a frame or token; or None.
        batch: first size of the latents, or None.
        others: positions of further noisy samples, where a denoiser has several: sound beside a video.
        doubled: whether the denoiser itself makes the two halves of guidance from the latents.
        made: whether another graph of the denoiser made the latents from what is given, and from text perhaps.
    """

    latents: int | None
    timestep: int | None
    batch: int | None
    others: tuple[int, ...] = ()
    made: bool = False
    doubled: bool = False

    @property
    def given(self) -> tuple[int, ...]:
        """Positions of the noisy samples that the caller gives: under guidance each has two equal halves."""
        return () if self.made or self.doubled else self.samples

    @property
    def samples(self) -> tuple[int, ...]:
        """Positions of all noisy samples; the latents are the first."""
        return () if self.latents is None else (self.latents, *self.others)

    def time(self, args: Sequence[Any]) -> float | None:
        """The timestep among the arguments of a call; None where the graph has none.

        Where frames or tokens have their own, it is the last one's: what is given, and clean, comes first.
        """
        if self.timestep is None:
            return None
        value = args[self.timestep]
        return float(value.reshape(-1)[-1]) if isinstance(value, Tensor) else float(value)


def denoiser_inputs(canonical: CanonicalGraph, made: Mapping[int, bool] | None = None) -> DenoiserInputs:
    """Find the latents and the timestep among the inputs of a denoiser's graph.

    Args:
        canonical: the graph.
        made: positions of inputs that another graph of the denoiser made, and whether from the latents.
    """
    made = made or {}
    nodes = placeholders(canonical.gm.graph)
    dynamic = [i for i, is_static in enumerate(canonical.static) if not is_static]
    names = [source_name(source) for source in canonical.sources]
    given = [position for position in dynamic if position not in made]
    noisy = [position for position in dynamic if made.get(position, not is_condition(names[position]))]
    # What is called a condition is one, unless nothing else can be the latents of a denoiser that is one graph.
    latents = _latents(canonical, nodes, names, noisy)
    if latents is None and not made and _timestep(nodes, names, given, None, None) is not None:
        latents = _latents(canonical, nodes, names, dynamic)
    batch = int(nodes[latents].meta["val"].shape[0]) if latents is not None else None
    others = () if latents is None else _others(canonical, nodes, names, noisy, latents)
    return DenoiserInputs(latents, _timestep(nodes, names, given, batch, latents), batch, others, latents in made)


def is_condition(name: str) -> bool:
    """Whether an input is called what conditions are: text, an image to start from, a mask."""
    return bool(_CONDITION.search(name))


def source_name(source: str) -> str:
    """The user's name for an input, from Dynamo's: ``L['timestep']`` is ``timestep``, ``L['args'][0]`` ``args[0]``."""
    quoted = re.findall(r"\['([^']+)'\]", source)
    words = quoted or _IDENTIFIER.findall(source.removeprefix("l_"))
    index = re.search(r"\[\d+\]$", source)
    return str(words[-1]).strip("_") + (index.group() if index else "") if words else source


def _latents(canonical: CanonicalGraph, nodes: list[fx.Node], names: list[str], dynamic: list[int]) -> int | None:
    results = output_values(canonical.gm.graph)[len(canonical.written) :]
    outputs = [v for v in results if isinstance(v, fx.Node) and tensor_of(v) is not None]
    shapes = [tuple(v.meta["val"].shape) for v in outputs]

    def alike(shape: tuple[int, ...]) -> bool:
        return any(
            len(shape) == len(s) and shape[0] == s[0] and sum(a != b for a, b in zip(shape, s, strict=True)) <= 1
            for s in shapes
        )

    def classified(shape: tuple[int, ...]) -> bool:
        """Whether an output has one axis more, behind the batch: a score for each token of a codebook."""
        return any(shape == (*s[:axis], *s[axis + 1 :]) for s in shapes for axis in range(1, len(s)))

    def rank(position: int) -> tuple[bool, bool, int]:
        value = nodes[position].meta["val"]
        fits = (alike if value.is_floating_point() else classified)(tuple(value.shape))
        return (names[position] not in _LATENT_NAMES, not fits, position)

    candidates = []
    for position in dynamic:
        value = tensor_of(nodes[position])
        if value is None:
            continue
        tokens = value.dtype in (torch.int32, torch.int64) and value.ndim >= 2 and classified(tuple(value.shape))
        if tokens or (value.is_floating_point() and value.ndim >= 3):
            candidates.append(position)
    return min(candidates, key=rank, default=None)


def _others(
    canonical: CanonicalGraph, nodes: list[fx.Node], names: list[str], dynamic: list[int], latents: int
) -> tuple[int, ...]:
    """Each result but the first that has the shape of an input, other than the latents and no condition: that input."""
    batch = nodes[latents].meta["val"].shape[0]
    found: list[int] = []
    for result in output_values(canonical.gm.graph)[len(canonical.written) + 1 :]:
        value = tensor_of(result) if isinstance(result, fx.Node) else None
        if value is None or value.ndim < 3 or value.shape[0] != batch or not value.is_floating_point():
            continue
        for position in dynamic:
            given = tensor_of(nodes[position])
            known = position == latents or position in found or is_condition(names[position])
            if given is not None and given.shape == value.shape and given.is_floating_point() and not known:
                found.append(position)
                break
    return tuple(found)


def _timestep(
    nodes: list[fx.Node], names: list[str], dynamic: list[int], batch: int | None, latents: int | None
) -> int | None:
    fitting, many = [], []
    for position in dynamic:
        value = tensor_of(nodes[position])
        if value is None or value.is_complex():
            continue
        known = batch is None and names[position] in _TIMESTEP_NAMES
        column = value.ndim == 2 and value.shape[1] == 1 and value.shape[0] in (1, batch)
        if column or (value.ndim <= 1 and (value.numel() in (1, batch) or known)):
            fitting.append(position)
        elif latents is not None and _is_spread(value, tensor_of(nodes[latents])):
            many.append(position)
    for name, few in itertools.product(_TIMESTEP_NAMES, (fitting, many)):
        named = [position for position in few if names[position] == name]
        if named:
            return named[0]
    others = [p for p in fitting if not _LABEL.search(names[p])]
    if len(others) == 1:
        return others[0]
    floating = [p for p in others if nodes[p].meta["val"].is_floating_point()]
    return floating[0] if len(floating) == 1 else None


def _is_spread(value: Tensor, latents: Tensor | None) -> bool:
    """Whether ``value`` has one number a frame of a video, or a token, which an embedding of the timestep has not."""
    if latents is None or value.ndim < 2 or latents.ndim not in (3, 5):
        return False
    batch, *sizes = value.shape
    count = max(sizes)
    if batch not in (1, latents.shape[0]) or value.numel() != batch * count:
        return False
    given = latents.shape
    return count == given[1] if len(given) == 3 else count in given[1:3] or math.prod(given[2:]) % count == 0
