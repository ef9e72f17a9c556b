"""Evaluation, told from top to bottom: what is asked, what can be had, what is measured, what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from difa_fx.errors import EvaluationError, MetricUnavailableError, OptionError, nearest
from difa_fx.evaluation.images import Folder, read_images, size_of
from difa_fx.evaluation.inputs import Inputs, Item, read_inputs
from difa_fx.evaluation.measures import Batch, Measure, measures_for
from difa_fx.evaluation.processes import wait_for_all, workers_here
from difa_fx.evaluation.scores import METRICS, SPLITS, Evaluation, Rows, fid, inception_score, of_sums
from difa_fx.evaluation.shards import Shards, batches, open_shards
from difa_fx.plan_io import FrozenDict
from difa_fx.workers import Workers


def evaluate(
    folder: Folder,
    *,
    real: Folder | None = None,
    prompts: Sequence[str] | None = None,
    uncompressed: Folder | None = None,
    metrics: Sequence[str] | None = None,
    features: nn.Module | None = None,
    clip: Any = None,
    perceptual: Callable[..., Any] | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    checkpoint: Folder | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Judge a folder of images, of one size, in the order of their names.

    FID alone proves no fidelity: it can improve while images drift.  Give ``uncompressed``, too.

    What a batch shows is written to disk at once.  With ``checkpoint``, the same call goes on there after a kill and
    gives the same numbers to the last bit, and the real images are measured once for many evaluations.  Where a process
    group is set up, as under ``torchrun``, the processes share the batches; all of them get the result.

    Args:
        folder: the images that are judged (PNG or JPEG, in the folder itself).
        real: a folder of real images, for FID.
        prompts: a text an image, for the CLIP score; None takes the samples of the folder's ``images.json`` if they
            are texts.
        uncompressed: a folder of the same file names, made from the same seeds without compression, for PSNR, SSIM,
            LPIPS and relative L1.
        metrics: some of ``fid``, ``inception_score``, ``clip_score``, ``psnr``, ``ssim``, ``lpips``, ``relative_l1``;
            None: all that can be had, with the reasons for the others in ``Evaluation.skipped``.
        features: a network ``[B, 3, H, W]`` uint8 to ``[B, F]`` instead of Inception, used for FID, and as logits for
            Inception Score; or one that returns the pair of features ``[B, F]`` and logits ``[B, K]``.
        clip: name or folder of a CLIP model (default ``openai/clip-vit-base-patch16``), or anything that is called
            with images ``[B, 3, H, W]`` uint8 and B prompts and returns B scores, or their mean, as a metric of
            torchmetrics does.
        perceptual: in place of LPIPS, anything that is called with images and uncompressed images ``[B, 3, H, W]`` in
            [0, 1] and returns B distances, or their mean.
        batch_size: images that a network sees at once.
        device: where networks run; None: CUDA if there is one.  Networks given are moved there, in evaluation mode.
        checkpoint: a folder for what was measured; None: a temporary one.  A network is known there by its class and
            weights, and one without weights by what it makes of noise.
        seed: Inception Score shuffles the images before it parts them.
        progress: show bars.

    Raises:
        MetricUnavailableError: a metric was asked for by name, and its network or package is not here.
        EvaluationError: folders do not fit together, an image cannot be read, or a network gives no finite numbers.
        OptionError: an unknown metric, or a setting that is none.
        PlanFileError: a file cannot be written.
    """
    _check(metrics, batch_size)
    inputs = read_inputs(folder, real=real, prompts=prompts, uncompressed=uncompressed)
    wanted, skipped = _wanted(metrics, inputs)
    place, size = _device(device), size_of(inputs.items[0].image.path)

    def measure_for(metric: str) -> Measure:
        return measures_for(metric, features=features, clip=clip, perceptual=perceptual, device=place, size=size)

    workers = workers_here()
    measures, missing = _agreed(wanted, measure_for, workers, strict=metrics is not None)
    with open_shards(checkpoint, workers) as shards, torch.no_grad():
        show = progress and workers.leads
        for name, items, looks in _passes(inputs, measures):
            _measure(name, batches(items, batch_size), looks, shards, workers, place, show)
        wait_for_all(workers)
        found = _result(inputs, measures, skipped | missing, shards, batch_size, seed) if workers.leads else None
        found = workers.same(found)
    assert found is not None
    return found


def _check(metrics: Sequence[str] | None, batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError("batch_size is no whole number from 1 up", where="batch_size", got=batch_size, todo="mend it")
    names = [metrics] if isinstance(metrics, str) else list(metrics or ())
    unknown = [name for name in names if name not in METRICS]
    if unknown or isinstance(metrics, str):
        close = nearest(str((unknown or names)[0]), METRICS)
        raise OptionError(
            "metrics is no list of metrics that are known",
            where="metrics",
            got=metrics,
            allowed=list(METRICS),
            todo=f"did you mean {close}?" if close else "use those names",
        )


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise OptionError(
            "there is no such device",
            where="device",
            got=device,
            allowed="cpu, cuda, cuda:1, ...",
            todo="mend the name",
        ) from error


def _wanted(metrics: Sequence[str] | None, inputs: Inputs) -> tuple[list[str], dict[str, str]]:
    """The metrics that the inputs allow, and why not the others.

    Raises:
        EvaluationError: a metric was named, and the inputs do not allow it.
    """
    reasons = {name: _lacks(name, inputs) for name in METRICS if metrics is None or name in metrics}
    if metrics is not None and any(reasons.values()):
        name, reason = next((name, reason) for name, reason in reasons.items() if reason)
        todo = "give what it needs, or leave it out"
        raise EvaluationError(f"{name} cannot be computed: {reason}", where="metrics", got=list(metrics), todo=todo)
    skipped = {name: reason for name, reason in reasons.items() if reason}
    return [name for name, reason in reasons.items() if not reason], skipped


def _lacks(metric: str, inputs: Inputs) -> str | None:
    given = {"real": inputs.real is not None, "prompts": inputs.has_prompts, "uncompressed": inputs.has_pairs}
    need = METRICS[metric]
    if need is not None and not given[need]:
        return f"{need} was not given"
    count = len(inputs.items)
    if metric == "fid" and (count < 2 or len(inputs.real or ()) < 2):
        return "a covariance needs 2 images or more on either side"
    if metric == "inception_score" and count < 2 * SPLITS:
        return f"{count} images in {SPLITS} parts are less than 2 a part, and one image alone always scores 1"
    return None


def _agreed(
    wanted: Sequence[str], measure_for: Callable[[str], Measure], workers: Workers, *, strict: bool
) -> tuple[dict[str, Measure], dict[str, str]]:
    """A measure for each metric that can be had, and why not the others: as the first process found, on all of them.

    Raises:
        MetricUnavailableError: one was asked for by name and cannot be had, or the first process alone has it.
    """
    measures, missing = _loaded(wanted, measure_for, strict=strict) if workers.leads else ({}, {})
    missing = workers.same(missing)
    if not workers.leads:
        measures, _ = _loaded([name for name in wanted if name not in missing], measure_for, strict=True)
    # A digest may differ between kinds of device; rows are found by the first process's.
    names = workers.same({name: measure.identity for name, measure in measures.items()})
    return {
        metric: Measure(measure.name, names[metric], measure.look, measure.pairs, measure.texts)
        for metric, measure in measures.items()
    }, missing


def _loaded(
    wanted: Sequence[str], measure_for: Callable[[str], Measure], *, strict: bool
) -> tuple[dict[str, Measure], dict[str, str]]:
    found = {metric: _tried(measure_for, metric, strict=strict) for metric in wanted}
    measures = {metric: measure for metric, measure in found.items() if isinstance(measure, Measure)}
    return measures, {metric: reason for metric, reason in found.items() if isinstance(reason, str)}


def _tried(measure_for: Callable[[str], Measure], metric: str, *, strict: bool) -> Measure | str:
    """The measure of a metric, or why it cannot be had."""
    try:
        return measure_for(metric)
    except MetricUnavailableError as error:
        if strict:
            raise
        return " ".join(f"{error.what} ({error.got}); {error.todo}".split())  # on one line


def _passes(inputs: Inputs, measures: Mapping[str, Measure]) -> Iterator[tuple[str, Sequence[Item], Sequence[Measure]]]:
    """What is read once from beginning to end: its name, its items, and the measures that look at them."""
    if measures:
        yield "images", inputs.items, list({measure.identity: measure for measure in measures.values()}.values())
    if "fid" in measures and inputs.real is not None:
        yield "real images", inputs.real, [measures["fid"]]


def _measure(
    name: str,
    parts: Sequence[Sequence[Item]],
    measures: Sequence[Measure],
    shards: Shards,
    workers: Workers,
    device: torch.device,
    show: bool,
) -> None:
    """Look at this process's share of the batches, as far as nobody did before."""
    own = parts[workers.rank :: workers.size]
    for items in tqdm(own, desc=f"measure {name}", unit="batch", disable=not show):
        missing = [(m, path) for m in measures if not (path := shards.path(m, items)).exists()]
        if missing:
            batch = _batch(items, device, pairs=any(measure.pairs for measure, _ in missing))
            for measure, path in missing:
                shards.keep(path, measure.look(batch))


def _batch(items: Sequence[Item], device: torch.device, *, pairs: bool) -> Batch:
    images = read_images([item.image.path for item in items])
    prompts = tuple(item.prompt for item in items if item.prompt is not None) or None
    if not pairs:
        return Batch(images.to(device), None, prompts)
    uncompressed = read_images([item.uncompressed.path for item in items if item.uncompressed is not None])
    if uncompressed.shape != images.shape:
        raise EvaluationError(
            "images and their uncompressed partners differ in size",
            where=str(items[0].image.path),
            got=f"{list(images.shape[2:])} and {list(uncompressed.shape[2:])} pixels",
            todo="generate both with the same settings",
        )
    return Batch(images.to(device), uncompressed.to(device), prompts)


def _result(
    inputs: Inputs, measures: Mapping[str, Measure], skipped: Mapping[str, str], shards: Shards, size: int, seed: int
) -> Evaluation:
    """One number a metric, from all rows in order."""

    def rows(metric: str, items: Sequence[Item]) -> Iterator[Rows]:
        return (shards.read(shards.path(measures[metric], part)) for part in batches(items, size))

    found: dict[str, Any] = {}
    for metric in measures:
        if metric == "fid":
            assert inputs.real is not None
            real = (batch["features"] for batch in rows(metric, inputs.real))
            found["fid"] = fid(real, (batch["features"] for batch in rows(metric, inputs.items)))
            found["real_images"] = len(inputs.real)
        elif metric == "inception_score":
            logits = (batch.get("logits", batch["features"]) for batch in rows(metric, inputs.items))
            found["inception_score"], found["inception_score_std"] = inception_score(logits, seed=seed)
        else:
            found[metric] = of_sums(metric, rows(metric, inputs.items))
    ordered = {name: skipped[name] for name in METRICS if name in skipped}
    return Evaluation(len(inputs.items), skipped=FrozenDict(ordered), **found)
