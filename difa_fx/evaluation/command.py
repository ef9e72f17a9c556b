"""``difa evaluate`` and ``difa prepare``: the command lines of this package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from difa_fx.errors import EvaluationError, OptionError
from difa_fx.plan_io import write_text
from difa_fx.targets import called, count, is_function


def add_parser(commands: Any) -> None:
    """Add ``evaluate`` and ``prepare`` to the command line."""
    _add_evaluate(commands)
    prepare = commands.add_parser("prepare", help="choose real images and captions to evaluate with")
    kinds = prepare.add_subparsers(required=True, metavar="KIND")
    imagenet = kinds.add_parser("imagenet", help="from a folder of images, such as ImageNet's val or train")
    imagenet.add_argument("source", type=Path, help="the folder; folders in it are looked through")
    imagenet.set_defaults(run=run_imagenet)
    coco = kinds.add_parser("coco", help="captions and images of COCO 2014")
    coco.add_argument("captions", type=Path, help="captions_val2014.json")
    coco.add_argument("images", type=Path, help="the folder of the images, such as val2014")
    coco.set_defaults(run=run_coco)
    for parser in (imagenet, coco):
        parser.add_argument("-o", "--output", type=Path, required=True, help="the folder that the images go to")
        parser.add_argument("--count", type=count, required=True, help="how many images")
        parser.add_argument("--size", type=count, required=True, help="pixels a side: scaled, and cut to the middle")
        parser.add_argument("--seed", type=int, default=0, help="another one chooses others (default %(default)s)")


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="FID, Inception Score, CLIP score, and distances to the uncompressed images",
        description="Under `torchrun --nproc-per-node=N -m difa_fx evaluate ...` the processes share the images.",
    )
    parser.add_argument("folder", type=Path, help="the images that are judged")
    parser.add_argument("--real", type=Path, help="real images, for FID")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="for the CLIP score: a text file with one prompt a line, or a JSON list, or an images.json "
        "(default: the samples in the folder's own images.json, if they are texts)",
    )
    parser.add_argument("--uncompressed", type=Path, help="the images of the same seeds without compression")
    parser.add_argument("--metrics", nargs="+", help="which ones (default: all that can be had)")
    parser.add_argument("--features", help="module:function that returns a network to use instead of Inception")
    parser.add_argument("--clip", help="name or folder of a CLIP model, or module:function that returns a score")
    parser.add_argument("--perceptual", help="module:function that returns a distance to use instead of LPIPS")
    parser.add_argument("--batch-size", type=count, default=32, help="images at once (default %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--checkpoint", type=Path, help="a folder for what was measured; go on there after a kill")
    parser.add_argument("--seed", type=int, default=0, help="of Inception Score's shuffle (default %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON, too")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(arguments: argparse.Namespace) -> str:
    """Evaluate as ``arguments`` say; what to print."""
    from difa_fx.evaluation.evaluator import evaluate
    from difa_fx.workers import launched_by_torchrun

    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise OptionError(
            "the folder of the result does not exist", where="--output", got=str(arguments.output), todo="make it first"
        )
    own_clip = arguments.clip is not None and is_function(arguments.clip)
    with launched_by_torchrun() as leads:
        found = evaluate(
            arguments.folder,
            real=arguments.real,
            prompts=None if arguments.prompts is None else read_prompts(arguments.prompts),
            uncompressed=arguments.uncompressed,
            metrics=arguments.metrics,
            features=_made_by(arguments.features),
            clip=_made_by(arguments.clip) if own_clip else arguments.clip,
            perceptual=_made_by(arguments.perceptual),
            batch_size=arguments.batch_size,
            device=arguments.device,
            checkpoint=arguments.checkpoint,
            seed=arguments.seed,
        ).as_dict()
        if not leads:
            return ""
        if arguments.output is not None:
            folders = {name: getattr(arguments, name) for name in ("folder", "real", "uncompressed")}
            inputs = {name: None if path is None else str(path) for name, path in folders.items()}
            write_text(arguments.output, json.dumps(inputs | found, indent=1) + "\n")
    return _table(str(arguments.folder), found)


def run_imagenet(arguments: argparse.Namespace) -> str:
    """Choose images as ``arguments`` say; what to print."""
    from difa_fx.evaluation.prepare import prepare_imagenet

    settings = {"count": arguments.count, "size": arguments.size, "seed": arguments.seed}
    return f"{prepare_imagenet(arguments.source, arguments.output, **settings)}: {arguments.count} images"


def run_coco(arguments: argparse.Namespace) -> str:
    """Choose captions and images as ``arguments`` say; what to print."""
    from difa_fx.evaluation.prepare import CAPTIONS, prepare_coco

    settings = {"count": arguments.count, "size": arguments.size, "seed": arguments.seed}
    folder = prepare_coco(arguments.captions, arguments.images, arguments.output, **settings)
    return f"{folder}: {arguments.count} images, their captions in {CAPTIONS}"


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one a line, or in a JSON list or the record of a folder of images.

    Raises:
        EvaluationError: the file cannot be read, or holds something else.
    """
    from difa_fx.evaluation.records import read_json

    if path.suffix.lower() != ".json":
        try:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(
                "the prompts cannot be read", where=str(path), got=str(error), todo="give UTF-8 text, one prompt a line"
            ) from error
    content = read_json(path)
    prompts = content.get("samples") if isinstance(content, dict) else content
    if not (isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)):
        raise EvaluationError(
            "the file holds no prompts",
            where=str(path),
            allowed='a JSON list of texts, or an object with such a list as "samples"',
            todo="give one prompt an image",
        )
    return prompts


def _made_by(target: str | None) -> Any:
    """What the user's function ``module:function`` returns."""
    if target is None:
        return None
    if not is_function(target):
        raise OptionError(
            "the network cannot be loaded",
            where=target,
            got="no function",
            allowed="module:function, importable from here",
            todo="name a function that takes nothing and returns the network",
        )
    return called(target, "the network")


def _table(folder: str, found: dict[str, Any]) -> str:
    """The result for people: a line a metric, and what was left out."""
    values = {name: value for name, value in found.items() if value is not None and name not in ("images", "skipped")}
    width = max((len(name) for name in [*values, *found["skipped"]]), default=0)
    lines = [f"{folder}: {found['images']} images"]
    lines += [f"{name:<{width}}  {_text(value)}" for name, value in values.items()]
    lines += [f"{name:<{width}}  left out: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(lines)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
