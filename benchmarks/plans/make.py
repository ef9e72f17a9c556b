"""Makes the plan beside it: one that keeps 24 % of the attention's operations of PixArt-Sigma at 2K.

    python benchmarks/plans/make.py

24 % is what DiTFastAttn (arXiv 2406.08552) reports for PixArt-Sigma at 2K with its largest threshold; the plan itself
was not published.  This one is made by a rule (:func:`difa_fx.bench.plans.plan_keeping`), to be timed.
"""

from __future__ import annotations

from pathlib import Path

from difa_fx.bench.plans import plan_keeping
from difa_fx.cost import SiteShape, projection_flops
from difa_fx.plan import Plan

TOKENS, HEADS, WIDTH, LAYERS, STEPS, SHARE = 16384, 16, 72, 28, 20, 0.24
OUTPUT = Path(__file__).parent / "pixart-sigma-2k_20steps_24.json"


def shape() -> SiteShape:
    """A site of PixArt-Sigma at 2K: both halves of guidance, one image."""
    projections = projection_flops(2, TOKENS, HEADS * WIDTH)
    return SiteShape(batch=2, heads=HEADS, tokens=TOKENS, head_dim=WIDTH, projection_flops=projections)


def make() -> Plan:
    """The plan."""
    sites = [f"transformer_blocks.{index}.attn1" for index in range(LAYERS)]
    plan = plan_keeping(SHARE, shape(), sites=sites, steps=STEPS, window=TOKENS // 8, cfg="uncond_first")
    provenance = {
        "made by": "benchmarks/plans/make.py",
        "keeps": f"{SHARE:.0%} of the operations of attention, projections counted",
        "note": "made by a rule to be timed; nothing was calibrated",
    }
    return plan.replace(denoiser="PixArtTransformer2DModel", provenance=provenance)


if __name__ == "__main__":
    make().save(OUTPUT)
