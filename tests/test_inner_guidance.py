"""Guidance that the denoiser makes itself: the two halves begin where it doubles its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import relative
from oracle import Oracle
from torch import Tensor, nn

import difa_fx
from difa_fx.plan import Plan

WIDTH, TOKENS = 16, 32
SITES = ("blocks.0", "blocks.1")
METHODS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg"]


class Attention(nn.Module):
    """Self-attention [B, N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """What runs on the doubled batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.y = nn.Linear(WIDTH, WIDTH), nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def net(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        """The prediction for a batch of both halves."""
        x = self.proj(x + timestep[:, None, None]) + self.y(y)[:, None]
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (WIDTH,)))
        return x


def guided(out: Tensor) -> Tensor:
    """Both halves' predictions as one."""
    cond, uncond = out.chunk(2)
    return uncond + 4 * (cond - uncond)


class Halved(Net):
    """``forward_with_cfg`` of facebookresearch/DiT and its kin: a doubled batch of which the first half counts."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        made = guided(self.net(torch.cat([half, half], dim=0), timestep, y))
        return torch.cat([made, made])


class Doubled(Net):
    """``cfg_scale`` of stable-audio-tools: a batch that is doubled inside; in three ways."""

    way = "cat"

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        twice = {
            "cat": lambda: torch.cat([x, x]),
            "repeat": lambda: x.repeat(2, 1, 1),
            "expand": lambda: torch.cat([x] * 2),
        }
        labels = torch.cat([y, torch.zeros_like(y)])
        return guided(self.net(twice[self.way](), torch.cat([timestep] * 2), labels))


class Embedded(Net):
    """``cfg_infer`` of F5-TTS: each half is embedded by itself."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        both = [self.proj(x + timestep[:, None, None]) + self.y(labels)[:, None] for labels in (y, torch.zeros_like(y))]
        h = torch.cat(both, dim=0)
        for block in self.blocks:
            h = h + block(F.layer_norm(h, (WIDTH,)))
        return guided(h)


def made(name: str) -> tuple[nn.Module, int]:
    """The denoiser and the batch that it is called with."""
    if name == "halved":
        return Halved().eval(), 2
    model = Embedded() if name == "embedded" else Doubled()
    model.way = name
    return model.eval(), 1


def calls(batch: int, steps: int = len(METHODS)) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    torch.manual_seed(1)
    labels = torch.tensor([3, 0][:batch])
    times = [torch.full((batch,), 0.9 - 0.1 * step) for step in range(steps)]
    return [((torch.randn(batch, TOKENS, WIDTH), time, labels), {}) for time in times]


NAMES = ["halved", "cat", "expand", "repeat", "embedded"]


@pytest.mark.parametrize("name", NAMES)
def test_all_methods_are_possible(name: str) -> None:
    model, batch = made(name)
    (report,) = difa_fx.inspect(model, *calls(batch, 1)[0][0])
    assert {site.path: site.refused for site in report.sites} == dict.fromkeys(SITES, ())


@pytest.mark.parametrize("order", ["cond_first", "uncond_first"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_they_agree_with_the_oracle(name: str, order: Any) -> None:
    model, batch = made(name)
    plan = Plan(steps=len(METHODS), sites=SITES, methods=[[m] * 2 for m in METHODS], window=4, cfg=order)
    shown = calls(batch)
    expected = Oracle(model, plan).run(shown)
    compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "aot_eager"})
    difa_fx.reset(compiled)
    for step, ((args, _), want) in enumerate(zip(shown, expected, strict=True)):
        assert relative(compiled(*args), want) < 1e-5, f"step {step}: {METHODS[step]}"


@pytest.mark.parametrize("cfg", ["cond_first", "auto"])
def test_calibration_takes_the_order_that_it_is_told(cfg: str, tmp_path: Path) -> None:
    model, batch = made("cat")

    def sample(model: nn.Module, _: Any) -> Tensor:
        return [model(*args) for args, _ in calls(batch)][-1]

    plan = difa_fx.calibrate(
        model,
        [0],
        num_inference_steps=len(METHODS),
        threshold=10.0,
        candidates=["full+cfg"],
        sampler=sample,
        cfg=cfg,
        window=4,
        compiler="eager",
        verify=0,
        cache_dir=tmp_path,
        progress=False,
    )
    assert plan.cfg == (None if cfg == "auto" else cfg)
    assert plan.uses_cfg == (cfg != "auto")


def test_what_is_doubled_along_another_axis_begins_nothing() -> None:
    class Rotary(Net):
        def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
            return self.net(torch.cat([x[..., :8], x[..., :8]], dim=-1), timestep, y)

    (report,) = difa_fx.inspect(Rotary().eval(), *calls(1, 1)[0][0])
    assert all("has no two halves" in dict(site.refused)["full+cfg"] for site in report.sites)
