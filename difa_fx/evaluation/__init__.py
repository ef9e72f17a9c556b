"""Images made, judged and prepared.

Where things are::

    generate_images   samples -> a folder of PNGs and the record of how they were made       generate.py, records.py
    evaluate          folders -> Evaluation: FID, Inception Score, CLIP score, distances     evaluator.py
      -> inputs       folders -> items: an image, its partner, its prompt                    inputs.py, images.py
      -> measures     a batch of items -> rows of numbers, an image each                     measures.py, networks.py
      -> shards       rows on disk, a file a batch                                           shards.py
      -> scores       all rows, in order -> one number a metric                              scores.py
    prepare_imagenet, prepare_coco    real images to compare with                            prepare.py
    difa evaluate, difa prepare       the command line                                       command.py

Names are loaded when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difa_fx.evaluation.evaluator import evaluate as evaluate
    from difa_fx.evaluation.generate import generate_images as generate_images
    from difa_fx.evaluation.prepare import prepare_coco as prepare_coco
    from difa_fx.evaluation.prepare import prepare_imagenet as prepare_imagenet
    from difa_fx.evaluation.scores import Evaluation as Evaluation

_WHERE = {
    "Evaluation": "scores",
    "evaluate": "evaluator",
    "generate_images": "generate",
    "prepare_coco": "prepare",
    "prepare_imagenet": "prepare",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'difa_fx.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"difa_fx.evaluation.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
