"""A denoiser that Dynamo breaks where text is counted: latents by name, text known across the break, one clock."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import relative
from oracle import Oracle
from torch import Tensor, nn

import difa_fx
from difa_fx.plan import Plan

WIDTH, TEXT, SIDE = 16, 7, 8


class Attention(nn.Module):
    """Plain self-attention [B, N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Lumina(nn.Module):
    """As the original code of Lumina-Image-2.0: text is counted, refined, and written in front of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.cap, self.fin = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.text_refiner, self.noise_refiner, self.layer = Attention(), Attention(), Attention()

    def forward(self, x: Tensor, t: Tensor, cap_feats: Tensor, cap_mask: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        cap = self.cap(cap_feats)
        count = max(cap_mask.sum(1).tolist())  # the graph breaks here
        image = self.inp(x.flatten(2).transpose(1, 2)) + t.view(-1)[:, None, None]
        image = image + self.noise_refiner(image)
        text = cap + self.text_refiner(cap)
        joint = torch.zeros(batch, count + height * width, WIDTH)
        for sample in range(batch):
            joint[sample, :count] = text[sample, :count]
            joint[sample, count:] = image[sample]
        torch._dynamo.graph_break()
        joint = joint + self.layer(joint)
        return self.fin(joint[:, count:]).transpose(1, 2).reshape(batch, channels, height, width)


def made() -> Lumina:
    torch.manual_seed(0)
    return Lumina().eval()


def inputs(time: Tensor) -> tuple[Tensor, ...]:
    """Guided: the same latents twice."""
    latents = torch.randn(1, 4, SIDE, SIDE).repeat(2, 1, 1, 1)
    torch.manual_seed(1)
    return latents, time, torch.randn(2, TEXT, WIDTH), torch.ones(2, TEXT, dtype=torch.bool)


@pytest.mark.parametrize("time", [torch.full((2,), 0.5), torch.full((2, 1), 0.5)])
def test_latents_and_timestep_go_by_name(time: Tensor) -> None:
    reports = difa_fx.inspect(made(), *inputs(time))
    assert [report.latents for report in reports] == [None, "x", "joint"]
    assert [report.timestep for report in reports] == [None, "t", None]
    sites = {site.path: (site.kind, len(site.methods)) for report in reports for site in report.sites}
    assert sites == {"noise_refiner": ("self", 5), "layer": ("joint", 5)}
    assert [path for report in reports for path, _ in report.rejected] == ["text_refiner"]


METHODS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached"]


@pytest.mark.parametrize("columns", [False, True])
@torch.no_grad()
def test_it_agrees_with_the_oracle(columns: bool) -> None:
    model = made()
    sites = ("noise_refiner", "layer")
    plan = Plan(steps=len(METHODS), sites=sites, methods=[[m] * 2 for m in METHODS], window=5, cfg="cond_first")
    times = [torch.full((2, 1) if columns else (2,), 0.9 - 0.1 * step) for step in range(plan.steps)]
    calls = [(inputs(time), {}) for time in times]
    expected = Oracle(model, plan, {"layer": (TEXT, 0)}).run(calls)
    compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "aot_eager"})
    difa_fx.reset(compiled)
    for step, ((args, _), want) in enumerate(zip(calls, expected, strict=True)):
        assert relative(compiled(*args), want) < 1e-5, f"step {step}: {METHODS[step]}"
