"""DiTFastAttn the usual way: attention processors that keep a residual and an output, driven from outside.

This is how the method's authors and xDiT do it: each attention module of the denoiser gets a processor of its own,
which is told before every call what to do.  It is no straw man: its window is cut to tiles too (SDPA on slices of the
keys on CPU, flex_attention compiled by itself on CUDA), and it keeps what a later step reads and no more.  It runs
eagerly, or under ``torch.compile``, which sees processors whose attributes change from step to step.

Letters: B batch, H heads, N tokens (image and text together), D head width, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from difa_fx.attention import covers, window_attention, window_residual, window_tensors
from difa_fx.bench.sampling import Denoiser
from difa_fx.bench.subject import Subject
from difa_fx.block_masks import block_mask
from difa_fx.errors import BenchmarkError
from difa_fx.plan import Method, Plan, Window
from difa_fx.plan_words import window_follows


class Projections(Protocol):
    """What differs between attention modules: the way from their inputs to q, k and v, and from the result out."""

    def project(self, attn: Any, x_BNE: Tensor, text_BNE: Tensor | None, rotary: Any) -> tuple[Tensor, ...]:
        """q, k and v, each [B, H, N, D]."""
        ...

    def merge(self, attn: Any, out_BNE: Tensor, image: int, text: int) -> Any:
        """What the module yields; ``image`` and ``text`` are the tokens of its inputs."""
        ...


class SelfProjections:
    """``Attention`` of DiT and PixArt."""

    def project(self, attn: Any, x_BNE: Tensor, text_BNE: Tensor | None, rotary: Any) -> tuple[Tensor, ...]:
        """q, k and v of the image."""
        return _heads(attn, x_BNE, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))

    def merge(self, attn: Any, out_BNE: Tensor, image: int, text: int) -> Any:
        """The output projection."""
        return attn.to_out[1](attn.to_out[0](out_BNE))


class JointProjections:
    """``Attention`` of Stable Diffusion 3: text behind the image."""

    def project(self, attn: Any, x_BNE: Tensor, text_BNE: Tensor | None, rotary: Any) -> tuple[Tensor, ...]:
        """q, k and v of image and text."""
        image = _heads(attn, x_BNE, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if text_BNE is None:
            return image
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = _heads(attn, text_BNE, layers, (attn.norm_added_q, attn.norm_added_k))
        return tuple(torch.cat(pair, 2) for pair in zip(image, text, strict=True))

    def merge(self, attn: Any, out_BNE: Tensor, image: int, text: int) -> Any:
        """The output projections of both."""
        own = attn.to_out[1](attn.to_out[0](out_BNE[:, :image]))
        if not text:
            return own
        other = out_BNE[:, image:]
        return own, other if attn.context_pre_only else attn.to_add_out(other)


class FluxProjections:
    """``FluxAttention``: text before the image, as an input of its own or in one sequence already."""

    def project(self, attn: Any, x_BNE: Tensor, text_BNE: Tensor | None, rotary: Any) -> tuple[Tensor, ...]:
        """q, k and v of text and image, turned by their positions."""
        from diffusers.models.embeddings import apply_rotary_emb

        q, k, v = _heads(attn, x_BNE, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if text_BNE is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = _heads(attn, text_BNE, layers, (attn.norm_added_q, attn.norm_added_k))
            q, k, v = (torch.cat(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        turn: Any = apply_rotary_emb
        return turn(q, rotary, sequence_dim=2), turn(k, rotary, sequence_dim=2), v

    def merge(self, attn: Any, out_BNE: Tensor, image: int, text: int) -> Any:
        """The output projections of both; a single block's is not in the module."""
        if not text:
            return out_BNE
        own = attn.to_out[1](attn.to_out[0](out_BNE[:, text:].contiguous()))
        return own, attn.to_add_out(out_BNE[:, :text].contiguous())


class WanProjections:
    """``WanAttention`` among a video's tokens: q and k are normalised over all heads."""

    def project(self, attn: Any, x_BNE: Tensor, text_BNE: Tensor | None, rotary: Any) -> tuple[Tensor, ...]:
        """q, k and v, turned by their positions."""
        q, k, v = attn.norm_q(attn.to_q(x_BNE)), attn.norm_k(attn.to_k(x_BNE)), attn.to_v(x_BNE)
        q, k, v = (x.view(*x.shape[:2], attn.heads, -1) for x in (q, k, v))
        q, k = _turned(q, *rotary), _turned(k, *rotary)
        return tuple(x.transpose(1, 2) for x in (q, k, v))

    def merge(self, attn: Any, out_BNE: Tensor, image: int, text: int) -> Any:
        """The output projection."""
        return attn.to_out[1](attn.to_out[0](out_BNE))


def _heads(attn: Any, x_BNE: Tensor, layers: Sequence[Any], norms: Sequence[Any]) -> tuple[Tensor, ...]:
    q, k, v = (layer(x_BNE).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers)
    norm_q, norm_k = norms
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _turned(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channels, as Wan has it."""
    one, other = x_BNHD.view(*x_BNHD.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((one * cos - other * sin, one * sin + other * cos), -1).flatten(-2).type_as(x_BNHD)


def _projections_of(module: nn.Module) -> Projections:
    kinds: dict[str, type[FluxProjections | WanProjections]] = {
        "FluxAttention": FluxProjections,
        "WanAttention": WanProjections,
    }
    name = type(module).__name__
    if name in kinds:
        return kinds[name]()
    if name == "Attention":
        joint = getattr(module, "added_kv_proj_dim", None) is not None
        return JointProjections() if joint else SelfProjections()
    raise BenchmarkError(
        "there is no processor for this attention module", got=name, allowed=["Attention", *kinds], todo="leave it out"
    )


class WindowKernel:
    """Attention within a window beside full attention: SDPA on slices of the keys, or compiled flex_attention on CUDA.

    Args:
        tokens: of the image.
        window: tokens to either side, or a box.
        text: text tokens before and after the image's.
        like: a tensor of the denoiser's dtype and device.
    """

    def __init__(self, tokens: int, window: Window, text: tuple[int, int], like: Tensor) -> None:
        self.grid, self.size = ((tokens,), (window,)) if isinstance(window, int) else (window.grid, window.size)
        self.text = text
        self.flex: Callable[..., Any] | None = None
        if like.is_cuda and not covers(self.grid, self.size):
            from torch.nn.attention.flex_attention import flex_attention

            lists = window_tensors("flex", grid=self.grid, size=self.size, text=text, like=like)
            self.mask = block_mask(self.grid, self.size, text, lists)
            self.flex = torch.compile(flex_attention, dynamic=False)
        else:
            self.constants = window_tensors("sdpa", grid=self.grid, size=self.size, text=text, like=like)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, residual_BNHD: Tensor | None) -> Tensor:
        """Attention within the window plus the residual, [B, N, H, D]."""
        if self.flex is not None:
            out: Tensor = self.flex(q, k, v, block_mask=self.mask).transpose(1, 2)
            return out if residual_BNHD is None else out + residual_BNHD
        settings: dict[str, Any] = {"grid": self.grid, "size": self.size, "text": self.text}
        return window_attention(q, k, v, None, *self.constants, residual_BNHD=residual_BNHD, **settings).transpose(1, 2)

    def missed(self, full_BHND: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention minus attention within the window, [B, N, H, D]."""
        if self.flex is not None:
            return full_BHND.transpose(1, 2) - self.attend(q, k, v, None)
        settings: dict[str, Any] = {"grid": self.grid, "size": self.size, "text": self.text}
        return window_residual(full_BHND, q, k, v, None, *self.constants, **settings)


@dataclass(slots=True)
class Memory:
    """What one call of a step (of two, where guidance is two calls) left of a site."""

    output: Any = None
    residual: Tensor | None = None


class PlannedProcessor:
    """The attention processor of one site.

    Attributes, set before each call of the denoiser:
        method: what it does now.
        keeps: whether its output is read by the next call or step.
        refreshes: whether it must leave a residual.
        memory: what it reads and leaves.
    """

    def __init__(self, projections: Projections, kernel: WindowKernel, *, second: bool) -> None:
        self.projections, self.kernel, self.second = projections, kernel, second
        self.method, self.keeps, self.refreshes = "full", False, False
        self.memory = Memory()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Any:
        """Attention as the plan has it.  Arguments are diffusers'."""
        assert attention_mask is None, "no built-in denoiser masks its self-attention"
        if self.method == "cached":
            return self.memory.output
        shares = self.method.endswith("+cfg")
        x, text = hidden_states, encoder_hidden_states
        if shares:
            x, text = self._half(x), None if text is None else self._half(text)
        q, k, v = self.projections.project(attn, x, text, rotary_emb)
        out_BNHD = self._attend(q, k, v)
        count = 0 if text is None else text.shape[1]
        made = self.projections.merge(attn, out_BNHD.flatten(2), x.shape[1], count)
        if shares:
            made = tuple(_twice(t) for t in made) if isinstance(made, tuple) else _twice(made)
        self.memory.output = made if self.keeps else None
        return made

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.method.startswith("window"):
            residual = self.memory.residual
            assert residual is not None
            if residual.shape[0] == 2 * q.shape[0]:
                residual = self._half(residual)
            elif 2 * residual.shape[0] == q.shape[0]:
                residual = _twice(residual)
            return self.kernel.attend(q, k, v, residual)
        full_BHND = scaled_dot_product_attention(q, k, v)
        if self.refreshes:
            self.memory.residual = self.kernel.missed(full_BHND, q, k, v)
        return full_BHND.transpose(1, 2)

    def _half(self, x: Tensor) -> Tensor:
        return x.chunk(2)[1 if self.second else 0]


def _twice(half: Tensor) -> Tensor:
    return torch.cat((half, half))


class HookedPlan:
    """A denoiser whose attention processors follow a plan; call by call told by :meth:`tell`.

    Args:
        subject: how the denoiser is called.
        model: the denoiser; its processors are replaced.
        plan: the plan.
    """

    def __init__(self, subject: Subject, model: nn.Module, plan: Plan) -> None:
        assert subject.size.tokens is not None
        self.plan, self.calls = plan, subject.calls_per_step
        kernel = WindowKernel(subject.size.tokens, plan.window, subject.text, subject.noise)
        self._sites: list[tuple[tuple[Method, ...], PlannedProcessor, list[Memory]]] = []
        for site in plan.sites:
            module: Any = model.get_submodule(site)
            processor = PlannedProcessor(_projections_of(module), kernel, second=plan.cfg == "uncond_first")
            module.set_processor(processor)
            self._sites.append((plan.column(site), processor, [Memory() for _ in range(self.calls)]))

    def begin(self) -> None:
        """Forget the generation before."""
        for _, _, memories in self._sites:
            for memory in memories:
                memory.output = memory.residual = None

    def tell(self, step: int, call: int, timestep: int) -> None:
        """Set every processor for ``call`` of ``step``."""
        for methods, processor, memories in self._sites:
            method = methods[step]
            cached_next = step + 1 < len(methods) and methods[step + 1] is Method.CACHED
            if self.calls == 1:
                self._set(processor, memories[0], method.value, cached_next, window_follows(methods, step))
            elif call == 0:
                keeps = cached_next or method.shares_cfg
                self._set(processor, memories[0], method.alone.value, keeps, window_follows(methods, step))
            elif method.shares_cfg:
                self._take(processor, memories, method)
            else:
                own = [Method.CACHED if m is Method.WINDOW_CFG else m for m in methods]
                self._set(processor, memories[1], method.value, cached_next, window_follows(own, step))

    @staticmethod
    def _set(processor: PlannedProcessor, memory: Memory, method: str, keeps: bool, refreshes: bool) -> None:
        processor.memory, processor.method = memory, method
        processor.keeps, processor.refreshes = keeps, refreshes

    def _take(self, processor: PlannedProcessor, memories: Sequence[Memory], method: Method) -> None:
        """The step's second call uses what the first computed."""
        first, second = memories
        second.output = first.output
        if method is Method.FULL_CFG:
            second.residual = first.residual
        self._set(processor, second, "cached", True, False)

    def state_bytes(self) -> int:
        """Bytes that are kept now."""
        held = []
        for _, _, memories in self._sites:
            for memory in memories:
                outputs = memory.output if isinstance(memory.output, tuple) else (memory.output,)
                held += [value for value in (*outputs, memory.residual) if isinstance(value, Tensor)]
        unique = {value.data_ptr(): math.prod(value.shape) * value.element_size() for value in held}
        return sum(unique.values())


def hooked(subject: Subject, model: nn.Module, plan: Plan, compiled: Callable[[nn.Module], Any] | None) -> Denoiser:
    """``model`` under ``plan`` by processors; eagerly, or as ``compiled`` compiles it."""
    planned = HookedPlan(subject, model, plan)
    run: Any = model if compiled is None else compiled(model)
    return Denoiser(run, planned.begin, planned.tell, planned.state_bytes)
