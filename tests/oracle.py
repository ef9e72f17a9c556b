"""The slow oracle: an uncompiled denoiser under a plan, by the letter of each method's contract.

For a site with projections P, output projection O, full attention A and attention in the window W::

    full      y = O(A(Px)), and r = A(Px) - W(Px) is kept
    window    y = O(W(Px) + r)
    cached    y = the y of the last step that computed one
    ...+cfg   the same for the conditional half of the batch; y and r then serve both halves

Nothing here is quick or small: masks are dense, everything is kept, and the package is never asked.
A site is a module that calls ``F.scaled_dot_product_attention`` once; its forward is replaced for
the length of one call.  A joint attention may give a tuple, the image's y and the text's; its window
cuts image tokens from image tokens alone.

Letters: B batch, H heads, N queries, M keys, D head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

Attend = Callable[..., Tensor]
Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of one call of the denoiser."""


class PlanLike(Protocol):
    """What the oracle reads of a plan; methods may be strings or members of a string enum."""

    sites: Any
    methods: Any
    window: int
    cfg: Any


class OracleError(AssertionError):
    """The model or the plan is not of the kind that the oracle can follow."""


class Oracle:
    """Runs ``model`` under ``plan``; the model is as it was after every call.

    Args:
        text: how many text tokens stand before and after the image's, by site; none where it says nothing.

    Attributes:
        outputs: each site's last y, for the whole batch; a tuple of them where there are several.
        residuals: each site's last r, for the whole batch, in at least float32.
    """

    def __init__(self, model: nn.Module, plan: PlanLike, text: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.model, self.plan, self.text = model, plan, text or {}
        self.outputs: dict[str, Any] = {}
        self.residuals: dict[str, Tensor] = {}

    def __call__(self, step: int, *args: Any, **kwargs: Any) -> Any:
        """What the denoiser gives at ``step`` (from 0) for its own arguments."""
        if not 0 <= step < len(self.plan.methods):
            raise OracleError(f"step {step} of a plan of {len(self.plan.methods)} steps")
        called: list[str] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for path, method in zip(self.plan.sites, self.plan.methods[step], strict=True):
                site = self.model.get_submodule(path)
                forward = self._site(path, method_name(method), site.forward, called)
                stack.enter_context(replaced_forward(site, forward))
            result = self.model(*args, **kwargs)
        if sorted(called) != sorted(self.plan.sites):
            raise OracleError(f"each site must run once in a call, but these ran: {called}")
        return result

    def run(self, calls: Iterable[Call]) -> list[Any]:
        """A whole generation, from a clean start: what the denoiser gives at each step."""
        self.reset()
        return [self(step, *args, **kwargs) for step, (args, kwargs) in enumerate(calls)]

    def reset(self) -> None:
        """Forgets the generation before."""
        self.outputs.clear()
        self.residuals.clear()

    def _site(self, path: str, method: str, forward: Attend, called: list[str]) -> Attend:
        """What stands for the forward of the site at ``path`` while it uses ``method``."""
        kind, _, shared = method.partition("+")
        if kind not in ("full", "window", "cached") or shared not in ("", "cfg"):
            raise OracleError(f"{path}: unknown method {method!r}")

        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(path)
            if kind == "cached":
                return each(torch.clone, self.outputs[path])
            y, r = self._compute(path, kind, bool(shared), forward, args, kwargs)
            self.outputs[path] = each(self._both, y) if shared else y
            if r is not None:
                self.residuals[path] = self._both(r) if shared else r
            return each(torch.clone, self.outputs[path])

        return run

    def _compute(
        self,
        path: str,
        kind: str,
        shared: bool,
        forward: Attend,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> tuple[Any, Tensor | None]:
        """The site's y, and r of a full step; of the conditional half alone if ``shared``."""
        if shared:
            batch = first_tensor(args, kwargs).shape[0]
            args = [self._cond(arg, batch) for arg in args]
            kwargs = {name: self._cond(arg, batch) for name, arg in kwargs.items()}
        made: list[Tensor | None] = []

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
            q, k, v = query, key, value
            full = dense_attention(q, k, v, *rest, **options)
            windowed = dense_attention(
                q, k, v, *rest, **options, window=self.plan.window, text=self.text.get(path, (0, 0))
            )
            if kind == "full":
                made.append(full - windowed)
                return full.to(q.dtype)
            made.append(None)
            r = self.residuals[path]
            r = self._cond(r, r.shape[0]) if shared else r
            if r.shape != windowed.shape:
                raise OracleError(f"{path}: r is {tuple(r.shape)}, W is {tuple(windowed.shape)}")
            return (windowed + r).to(q.dtype)

        with mock.patch.object(nn.functional, "scaled_dot_product_attention", attend):
            y = forward(*args, **kwargs)
        if len(made) != 1:
            raise OracleError(f"{path}: {len(made)} attentions instead of one")
        return y, made[0]

    def _cond(self, value: Any, batch: int) -> Any:
        """The conditional half of ``value`` if it is a tensor [B, ...], or of each in a tuple; else as it is."""
        if isinstance(value, tuple):
            return tuple(self._cond(item, batch) for item in value)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
            return value
        if batch % 2 or self.plan.cfg not in ("cond_first", "uncond_first"):
            raise OracleError(f"no conditional half: batch {batch}, cfg {self.plan.cfg!r}")
        first, second = value.chunk(2)
        return first if self.plan.cfg == "cond_first" else second

    @staticmethod
    def _both(half: Tensor) -> Tensor:
        """One half's result, [B / 2, ...], for both halves, [B, ...]."""
        return torch.cat([half, half])


def dense_attention(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHMD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | None = None,
    text: tuple[int, int] = (0, 0),
) -> Tensor:
    """Attention written out, [B, H, N, D] in at least float32; a row without any key gives zeros.

    Args:
        attn_mask: bool (True: may be seen) or added to the scores; broadcasts to [B, H, N, M].
        window: only keys at most so many tokens away are seen; None: all.
        text: tokens before and after the image's, which see and are seen by all.
    """
    if dropout_p or is_causal:
        raise OracleError("dropout and causal attention are not followed")
    if enable_gqa:
        k_BHMD, v_BHMD = (t.repeat_interleave(q_BHND.shape[1] // t.shape[1], 1) for t in (k_BHMD, v_BHMD))
    dtype = torch.promote_types(q_BHND.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (q_BHND, k_BHMD, v_BHMD))
    scores_BHNM = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores_BHNM = scores_BHNM + attn_mask
    elif attn_mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~attn_mask, -torch.inf)
    if window is not None:
        band_NM = band(scores_BHNM.shape[-2], scores_BHNM.shape[-1], window).to(q.device)
        for at in (slice(0, text[0]), slice(len(band_NM) - text[1], len(band_NM))):
            band_NM[at] = True
            band_NM[:, at] = True
        scores_BHNM = scores_BHNM.masked_fill(~band_NM, -torch.inf)
    unseen = (scores_BHNM == -torch.inf).all(-1, keepdim=True)
    return scores_BHNM.softmax(-1).masked_fill(unseen, 0.0) @ v


def band(queries: int, keys: int, window: int) -> Tensor:
    """Bool [N, M]: whether key j is at most ``window`` tokens from query i."""
    distance_NM = torch.arange(queries)[:, None] - torch.arange(keys)[None, :]
    return distance_NM.abs() <= window


def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value``, or every tensor of it, changed."""
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)


def method_name(method: Any) -> str:
    """The name of a method that is given as a string or as a member of an enum of strings."""
    return str(getattr(method, "value", method))


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor among a module's arguments: for a site its hidden states, [B, ...]."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise OracleError("a site was called without a tensor")


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` instead of its own, hooks included, until the block ends."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
