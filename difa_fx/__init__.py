"""difa_fx: a ``torch.compile`` backend that runs diffusion models under an attention plan.

::

    model = torch.compile(model, backend="difa", options={"plan": "plan.json"})

Names are loaded when they are first used, so that importing the package is cheap and plans can be read
without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difa_fx.backend import difa as difa
    from difa_fx.calibration import calibrate as calibrate
    from difa_fx.elsewhere import PlanWarning as PlanWarning
    from difa_fx.errors import DifaError as DifaError
    from difa_fx.evaluation import evaluate as evaluate
    from difa_fx.evaluation import generate_images as generate_images
    from difa_fx.inspection import inspect as inspect
    from difa_fx.pipelines import attach as attach
    from difa_fx.pipelines import detach as detach
    from difa_fx.plan import Method as Method
    from difa_fx.plan import Plan as Plan
    from difa_fx.session import reset as reset
    from difa_fx.session import stats as stats

__version__ = "0.1.0"

_WHERE = {
    "DifaError": "errors",
    "Method": "plan",
    "Plan": "plan",
    "PlanWarning": "elsewhere",
    "attach": "pipelines",
    "calibrate": "calibration",
    "detach": "pipelines",
    "difa": "backend",
    "evaluate": "evaluation",
    "generate_images": "evaluation",
    "inspect": "inspection",
    "reset": "session",
    "stats": "session",
}

__all__ = sorted([*_WHERE, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'difa_fx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"difa_fx.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
