"""Calls of a denoiser in which no site of its plan ran: full attention that nobody asked for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from difa_fx import registry
from difa_fx._torch import compile_limits
from difa_fx.errors import AttachError, PlanError
from difa_fx.runtime import served


class Watched:
    """A denoiser's compiled call, with an error where its plan is gone round.

    Args:
        compiled: what ``nn.Module.compile`` made.
        denoiser: the module.
        strict: whether it is an error, or a warning.
    """

    def __init__(self, compiled: Callable[..., Any], denoiser: nn.Module, *, strict: bool) -> None:
        functools.update_wrapper(self, compiled, updated=())
        self._compiled, self._denoiser, self._strict = compiled, denoiser, strict
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser.

        Raises:
            PlanError: no site of the plan ran.
            AttachError: it was spread over devices since it was attached.
        """
        if getattr(self._denoiser, "_parallel_config", None) is not None:
            raise AttachError(
                "the denoiser was spread over devices (enable_parallelism) after it was attached",
                where=type(self._denoiser).__name__,
                got=type(self._denoiser._parallel_config).__name__,
                allowed="one whole denoiser on each device",
                todo="give each device the whole denoiser and a share of the prompts",
            )
        before = served.calls
        try:
            result = self._compiled(*args, **kwargs)
        except PlanError as error:
            causes = list(causes_of(self._denoiser, sure=True))
            if causes:
                raise self._error(causes) from error
            raise
        if served.calls != before:
            self._warned = False
        elif registry.plans(self._denoiser) or self._strict:
            self._tell()
        return result

    def _error(self, causes: list[str]) -> PlanError:
        return PlanError(
            "no site of the plan runs in this denoiser: all attention would be computed in full",
            where=type(self._denoiser).__name__,
            got="; ".join(causes),
            allowed="a denoiser that Dynamo compiles as a whole",
            todo="remove what stands between its layers, and call torch._dynamo.reset(); or call difa_fx.detach(pipe) "
            "to go on without a plan",
        )

    def _tell(self) -> None:
        error = self._error(list(causes_of(self._denoiser)))
        if self._strict:
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(f"difa_fx runs full attention: {error}", stacklevel=4)


def causes_of(denoiser: nn.Module, *, sure: bool = False) -> Iterator[str]:
    """What may keep Dynamo from compiling ``denoiser`` as a whole; ``sure``: only what can be seen on it."""
    inner = [(name, module) for name, module in denoiser.named_modules() if name]
    offloaded = [name for name, module in inner if hasattr(module, "_hf_hook")]
    if offloaded:
        yield (
            f"hooks of accelerate on {len(offloaded)} of its submodules (sequential offload), first on {offloaded[0]}: "
            "Dynamo compiles module by module"
        )
    hooked = {name: _hook_names(module) for name, module in inner if hasattr(module, "_diffusers_hook")}
    if hooked:
        name, hooks = next(iter(hooked.items()))
        yield (
            f"hooks of diffusers ({', '.join(hooks) or 'unknown'}) on {len(hooked)} of its submodules, first on "
            f"{name}: group offload, layerwise casting or another cache"
        )
    if sure:
        return
    limit, suppressed = compile_limits()
    if suppressed:
        yield "torch._dynamo.config.suppress_errors is on, and hides why Dynamo could not compile it"
    if not offloaded and not hooked:
        yield (
            f"Dynamo may have given up after compiling it torch._dynamo.config.recompile_limit = {limit} times: raise "
            "that, or compile with dynamic=True (TORCH_LOGS=recompiles says why); or torch.compiler.disable or "
            "set_stance('force_eager') is in force"
        )


def _hook_names(module: nn.Module) -> list[str]:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return [str(name) for name in hooks]
