"""What a run measures, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import torch

from difa_fx._torch import inductor_mode, uses_cuda_graphs
from difa_fx.compile import COMPILERS
from difa_fx.errors import OptionError
from difa_fx.plan import Method, Plan

EIGHTH: Final = "n/8"
"""A window of an eighth of the image's tokens to either side, as in the paper."""

PEERS: Final = (
    "hooked",
    "hooked+compile",
    "fbcache",
    "fbcache+compile",
    "pab",
    "pab+compile",
    "fastercache",
    "fastercache+compile",
)

FIRST_BLOCK_THRESHOLD: Final = 0.05
"""diffusers' default: how far the first block's output may move for the other blocks to be left out."""

SETTLED: Final = 3
"""Calls, or of difa_fx generations, that CUDA graphs need: kernels are warmed up, then recorded, then replayed."""

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A built-in denoiser at one size, in words that JSON has.

    Attributes:
        shape: name of the built-in denoiser.
        layers: transformer layers; None as published.
        batch: what the denoiser is called with, both halves of guidance together; None for one image.
        tokens: image (or video) tokens; None as published.
        dtype: of weights and activations.
        device: where.
        tiny: very narrow, with few tokens, for tests.
        seed: of the weights and inputs.
    """

    shape: str
    layers: int | None = None
    batch: int | None = None
    tokens: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    tiny: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        choice("--dtype", self.dtype, DTYPES)
        for name in ("layers", "batch", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is too small", where=f"--{name}", got=value, allowed="1 or more")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise OptionError(
                "there is no CUDA device", where="--device", got=self.device, allowed="cpu", todo="leave --device out"
            )

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured at every size.

    Attributes:
        methods: applied at every site of a step by themselves; those that a denoiser cannot do are left out.
        plan: measured over whole generations, or None.
        columns: the plan's columns that a denoiser with fewer sites takes, in order.
        steps: steps of a generation; None as in the plan.
        peers: whom the plan is measured against.
        first_block_threshold: of FirstBlockCache. With random weights its own default may never be met, or always.
        rounds: turns of every contender; None for 5 on CPU and 20 on CUDA.
        warmup: turns before them.
        eager: whether the uncompiled denoiser takes part.
        max_autotune: whether Inductor with ``mode="max-autotune"`` takes part.
        processes: pairs of processes, cold and warm, that measure compilation and memory; 0 leaves them out.
        compiler: ``inductor``, or ``aot_eager`` or ``eager`` to test.
        mode: torch's own, of Inductor and of difa_fx alike.
        progress: whether to show progress bars.
    """

    methods: tuple[str, ...] = tuple(method.value for method in Method)
    plan: Plan | None = None
    columns: tuple[int, ...] | None = None
    steps: int | None = None
    peers: tuple[str, ...] = ()
    first_block_threshold: float = FIRST_BLOCK_THRESHOLD
    rounds: int | None = None
    warmup: int = 1
    eager: bool = True
    max_autotune: bool = False
    processes: int = 1
    compiler: str = "inductor"
    mode: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for method in self.methods:
            choice("--methods", method, tuple(known.value for known in Method))
        for peer in self.peers:
            choice("--peers", peer, PEERS)
        choice("--compiler", self.compiler, COMPILERS)
        _check_mode(self.mode)
        if self.peers and self.plan is None:
            raise OptionError(
                "peers run whole generations, and there is no plan to compare them with",
                where="--peers",
                got=self.peers,
                allowed="--peers with --plan",
                todo="give a plan, or leave --peers out",
            )
        for name, least in (("rounds", 1), ("warmup", 1), ("processes", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(
                    f"{name} is too small", where=f"--{name}", got=value, allowed=f"{least} or more", todo="raise it"
                )

    @property
    def baselines(self) -> tuple[str, ...]:
        """The contenders that compress nothing."""
        return ("eager",) * self.eager + ("inductor",) + ("max-autotune",) * self.max_autotune

    def rounds_on(self, size: Size) -> int:
        """Turns of every contender."""
        return self.rounds or (20 if size.cuda else 5)

    def warmup_on(self, size: Size) -> int:
        """Turns before them."""
        return max(self.warmup, self.settled_after(size))

    def settled_after(self, size: Size) -> int:
        """How often something runs until it runs as it will: more than once with CUDA graphs."""
        return SETTLED if size.cuda and uses_graphs(self.mode) else 1

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; of the plan what it is for people."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return found | {"plan": None if self.plan is None else str(self.plan)}


def uses_graphs(mode: str | None) -> bool:
    """Whether torch's ``mode`` stands for CUDA graphs, among other things."""
    return uses_cuda_graphs(inductor_mode(mode))


def without_graphs(mode: str | None) -> str | None:
    """``mode`` without CUDA graphs."""
    if not uses_graphs(mode):
        return mode
    return "max-autotune-no-cudagraphs" if mode == "max-autotune" else None


def _check_mode(mode: str | None) -> None:
    try:
        inductor_mode(mode)
    except RuntimeError as error:
        raise OptionError("unknown mode", where="--mode", got=mode, todo=str(error)) from None


def size_json(size: Size) -> dict[str, Any]:
    """A size as plain JSON values."""
    return asdict(size)


def choice(where: str, value: object, allowed: Any) -> None:
    """Raise OptionError when ``value`` is not one of ``allowed``."""
    if value not in allowed:
        raise OptionError("unknown value", where=where, got=value, allowed=list(allowed), todo="use one of these")
