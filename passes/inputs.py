"""What the denoiser's inputs mean: which is the latents, which the timestep, and how many samples there are.

Read off names, shapes and dtypes of the placeholders; parameters and buffers are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


@dataclass(frozen=True, slots=True)
class DenoiserInputs:
    """Positions among the placeholders, and the batch.

    Attributes:
        latents: position of the noisy sample, or None.
        timestep: position of the step's time, a scalar or one value a sample; or None.
        batch: first size of the latents, or None.
    """

    latents: int | None
    timestep: int | None
    batch: int | None

    def time(self, args: Sequence[Any]) -> float | None:
        """The timestep among the arguments of a call; None where the graph has none."""
        if self.timestep is None:
            return None
        value = args[self.timestep]
        return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def denoiser_inputs(canonical: CanonicalGraph) -> DenoiserInputs:
    """Find the latents and the timestep among the inputs of a denoiser's graph."""
    nodes = placeholders(canonical.gm.graph)
    dynamic = [i for i, is_static in enumerate(canonical.static) if not is_static]
    names = [source_name(source) for source in canonical.sources]
    latents = _latents(canonical, nodes, names, dynamic)
    batch = int(nodes[latents].meta["val"].shape[0]) if latents is not None else None
    return DenoiserInputs(latents, _timestep(nodes, names, dynamic, batch), batch)


def source_name(source: str) -> str:
    """The user's name for an input, from Dynamo's: ``L['timestep']`` is ``timestep``, ``L['args'][0]`` ``args[0]``."""
    quoted = re.findall(r"\['([^']+)'\]", source)
    words = quoted or _IDENTIFIER.findall(source.removeprefix("l_"))
    index = re.search(r"\[\d+\]$", source)
    return str(words[-1]).strip("_") + (index.group() if index else "") if words else source


def _latents(canonical: CanonicalGraph, nodes: list[fx.Node], names: list[str], dynamic: list[int]) -> int | None:
    outputs = [v for v in output_values(canonical.gm.graph) if isinstance(v, fx.Node) and tensor_of(v) is not None]
    shapes = [tuple(v.meta["val"].shape) for v in outputs]

    def rank(position: int) -> tuple[int, int, int]:
        shape = tuple(nodes[position].meta["val"].shape)
        alike = any(
            len(shape) == len(s) and shape[0] == s[0] and sum(a != b for a, b in zip(shape, s, strict=True)) <= 1
            for s in shapes
        )
        named = names[position] in _LATENT_NAMES
        return (-int(alike), -int(named), position)

    candidates = []
    for position in dynamic:
        value = tensor_of(nodes[position])
        if value is not None and value.is_floating_point() and value.ndim >= 3:
            candidates.append(position)
    return min(candidates, key=rank, default=None)


def _timestep(nodes: list[fx.Node], names: list[str], dynamic: list[int], batch: int | None) -> int | None:
    fitting = []
    for position in dynamic:
        value = tensor_of(nodes[position])
        if value is not None and not value.is_complex() and value.ndim <= 1 and value.numel() in (1, batch):
            fitting.append(position)
    for name in _TIMESTEP_NAMES:
        named = [position for position in fitting if names[position] == name]
        if named:
            return named[0]
    others = [p for p in fitting if not _LABEL.search(names[p])]
    if len(others) == 1:
        return others[0]
    floating = [p for p in others if nodes[p].meta["val"].is_floating_point()]
    return floating[0] if len(floating) == 1 else None
