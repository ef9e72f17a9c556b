"""One generation, again and again alike: a pipeline or a user's sampler, seeded, its denoiser shown to a backend."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.device_time import timed
from difa_fx.errors import CalibrationError, OptionError
from difa_fx.pipelines import is_attached, parts_of
from difa_fx.search import Backend, Driver

_RESULTS = ("images", "frames", "sample", "audios")


@dataclass(slots=True)
class Generation:
    """A generation that can be run with any driver.

    Attributes:
        denoiser: the module that is shown to the backend.
        sample: runs it once.
        seed: torch's generators are set to it before each run, and put back after.
        about: what the result depends on, for a fingerprint.
        scheduler: class name of the pipeline's; None for a sampler.
        seconds: how long the last run took.
    """

    denoiser: nn.Module
    sample: Callable[[], Any]
    seed: int
    about: Mapping[str, Any]
    scheduler: str | None = None
    seconds: float = field(default=0.0, init=False)

    def describe(self) -> dict[str, Any]:
        """What the result depends on beside the denoiser."""
        return dict(self.about)

    @contextlib.contextmanager
    def compiled(self, backend: Backend) -> Iterator[None]:
        """Within, the denoiser is compiled with ``backend``."""
        before = self.denoiser._compiled_call_impl
        torch._dynamo.reset()
        self.denoiser.compile(backend=backend, dynamic=False)
        try:
            yield
        finally:
            self.denoiser._compiled_call_impl = before
            torch._dynamo.reset()

    def run(self, backend: Backend, driver: Driver) -> Any:
        """Run once with ``driver``; gives what the sampler gives."""
        backend.begin(driver)
        results: list[Any] = []
        cuda = next(iter(self.denoiser.parameters()), torch.empty(0)).is_cuda
        with torch.random.fork_rng(enabled=True), torch.no_grad():
            torch.manual_seed(self.seed)
            self.seconds = timed(lambda: results.append(self.sample()), cuda)
        return results[0]


def generation_of(
    target: Any,
    samples: Sequence[tuple[int, Any]],
    *,
    steps: int,
    seed: int,
    sampler: Callable[[nn.Module, Sequence[Any]], Any] | None,
    kwargs: Mapping[str, Any],
) -> Generation:
    """The generation of ``samples``, each with its number among all, by a pipeline or by ``sampler``.

    Raises:
        CalibrationError: a bare denoiser came without a sampler, or the pipeline is attached.
        OptionError: the pipeline does not take one of ``kwargs``.
        AttachError: the target is neither a module nor a pipeline.
    """
    values = [value for _, value in samples]
    if isinstance(target, nn.Module):
        if sampler is None:
            raise CalibrationError(
                "a bare denoiser came without a sampler",
                where="calibrate(sampler=...)",
                got=type(target).__name__,
                allowed="a function sampler(model, samples) that runs one generation",
                todo="pass sampler=, or a diffusers pipeline in place of the denoiser",
            )
        denoiser = getattr(target, "_orig_mod", target)
        known = {"sampler": f"{sampler.__module__}.{getattr(sampler, '__qualname__', sampler)}"}
        return Generation(denoiser, lambda: sampler(denoiser, values), seed, known)
    denoiser, scheduler = parts_of(target)
    if is_attached(target):
        raise CalibrationError(
            "the pipeline is attached to a plan",
            where="calibrate",
            got=type(target).__name__,
            todo="call difa_fx.detach(pipe) first",
        )
    settings = _accepted(target, {"num_inference_steps": steps, **kwargs}, len(values))
    numbers = [number for number, _ in samples]
    takes_generator = "generator" in inspect.signature(target.__call__).parameters

    def sample() -> Any:
        noise = [torch.Generator().manual_seed(seed * 100_003 + number) for number in numbers]
        return target(values, **settings, **({"generator": noise} if takes_generator else {}))

    config = {name: value for name, value in dict(getattr(scheduler, "config", {})).items() if name[:1] != "_"}
    about: dict[str, Any] = {
        "pipeline": type(target).__name__,
        "scheduler": [type(scheduler).__name__, config],
        "call": dict(kwargs),
    }
    return Generation(denoiser, sample, seed, about, type(scheduler).__name__)


def _accepted(pipe: Any, settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    parameters = inspect.signature(pipe.__call__).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in settings if name not in parameters and not anything]
    if unknown:
        raise OptionError(
            "the pipeline does not take this argument",
            where=f"{type(pipe).__name__}.__call__",
            got=unknown,
            allowed=[name for name in parameters if name != "self"],
            todo="leave it out",
        )
    negative = settings.get("negative_prompt")
    return {**settings, "negative_prompt": [negative] * count} if isinstance(negative, str) else dict(settings)


def final_tensor(result: Any) -> Tensor | None:
    """What a sampler made, as one tensor; None when it made nothing that is like one."""
    for name in _RESULTS:
        result = getattr(result, name, result)
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], (Tensor, tuple, list)):
        result = result[0]
    if isinstance(result, (list, tuple)) and result and hasattr(result[0], "size") and hasattr(result[0], "getdata"):
        import numpy as np

        result = np.stack([np.asarray(image) for image in result])
    if hasattr(result, "__array__") or isinstance(result, Tensor):
        return torch.as_tensor(result).detach().to("cpu", torch.float32)
    return None


def drift(result: Any, reference: Any) -> float | None:
    """Relative L2 distance of a result from the uncompressed one; None when they are no tensors."""
    own, other = final_tensor(result), final_tensor(reference)
    if own is None or other is None or own.shape != other.shape:
        return None
    return float((own - other).norm() / other.norm().clamp(min=1e-12))
