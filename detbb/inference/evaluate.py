"""Evaluation of every branch over its split, in one backbone pass a data source, on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detbb.checkpoint.content import add_inherited_heads, open_checkpoint, restore_detector, stored_config
from detbb.config.loading import config_to_dict
from detbb.config.schema import Config
from detbb.core.console import warn
from detbb.core.errors import UserError, unknown_name
from detbb.core.files import check_folder, write_atomically
from detbb.core.machine import cores
from detbb.data.formats import read_split
from detbb.data.formats.semantic import read_mask
from detbb.data.images import BadImage, read_image
from detbb.data.loader import eval_loader
from detbb.data.sample import SampleReader
from detbb.data.transforms import rasterize
from detbb.data.workers import worker_failures
from detbb.detector import Detector
from detbb.distributed.collectives import (
    all_gather_objects,
    from_rank0,
    gather_objects,
    raise_on_all_ranks,
    rank,
    world_size,
)
from detbb.distributed.processes import processes
from detbb.heads.base import Head
from detbb.heads.loading import load_config
from detbb.metrics.evaluators import CocoEvaluator
from detbb.report import plots
from detbb.structures.annotations import Annotations
from detbb.structures.batch import ImageSize, collate
from detbb.structures.class_list import ClassList
from detbb.structures.predictions import Predictions

SAMPLE_HW = (320, 570)  # what a picture in samples.png fills


def evaluate_detector(
    detector: Detector,
    annotations: Mapping[str, Annotations],
    *,
    config: Config,
    output_dir: Path | None,
    weights: str,
    step: int | None = None,
    stop: Callable[[], object] = lambda: False,
) -> dict[str, float]:
    """Metrics as `<head>/<kind>/<metric>`, the same on every rank and for any number of them; every rank calls it.

    detector: in eval mode already; neither it nor any random state is changed. annotations: of the heads to evaluate,
    by name; heads with the same `data` share one pass. Rank 0 writes `output_dir/<head>/{results.json, metrics.json,
    pr_curves.png, samples.png}`. step: what the pictures are titled with. stop: asked at every batch; if it says so on
    any rank, nothing is written and the result is empty.
    """
    at = "" if step is None else f", step {step}"
    draws = config.log.images if output_dir is not None else 0
    branches = {name: _Branch(detector, name, a, config, draws) for name, a in annotations.items()}
    sources: dict[str, list[_Branch]] = {}
    for name, branch in branches.items():
        sources.setdefault(config.heads[name].data, []).append(branch)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed when it starts
        if not _all_finish(lambda: all(_run(detector, s, group, config, stop) for s, group in sources.items())):
            return {}
    everyone = gather_objects({n: (b.evaluator.state(), b.samples) for n, b in branches.items()})
    metrics: dict[str, float] = {}
    with raise_on_all_ranks():
        for name, branch in branches.items() if everyone else ():
            shares = [states[name] for states in everyone]
            results = sorted((entry for state, _ in shares for entry in state), key=lambda entry: entry["image_id"])
            own = branch.evaluator.summarize(results)
            metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
            if output_dir is not None:
                write_json(output_dir / name / "results.json", results)
                write_json(output_dir / name / "metrics.json", {"weights": weights, **own})
                branch.samples = sorted((s for _, samples in shares for s in samples), key=lambda s: s[0])
                measured = f", {main} {own[main]:.1f}" if (main := branch.main_metric) in own else ""
                branch.write_pictures(output_dir / name, f"{name}{at}, {weights} weights{measured}")
    return from_rank0(metrics)


def _all_finish(work: Callable[[], bool]) -> bool:
    """Whether `work()` is true on every rank. An error on one rank is raised on all, so that none waits for it."""
    finished, error = False, None
    with raise_on_all_ranks():
        try:
            finished = work()
        except FloatingPointError as e:
            error = e
    outcomes = all_gather_objects((finished, error and str(error)))
    if texts := [text for _, text in outcomes if text]:
        raise error or FloatingPointError(texts[0])
    return all(done for done, _ in outcomes)


class _Branch:
    """One head's evaluator and pictures over its split."""

    def __init__(self, detector: Detector, name: str, annotations: Annotations, config: Config, draws: int) -> None:
        self.name, self.annotations = name, annotations
        head = cast(Head, detector.heads[name])
        self._needs, self.main_metric = head.needs, head.main_metric
        self.evaluator = head.evaluator(annotations, engine=config.eval.engine)
        if isinstance(self.evaluator, CocoEvaluator):
            self.evaluator.max_detections = config.eval.max_detections
        self._threshold: float = config.heads[name].threshold
        source = config.data[config.heads[name].data]
        self._max_pixels, self._skips = source.max_pixels, source.on_bad_image == "skip"
        shown = np.unique(np.linspace(0, len(annotations) - 1, min(draws, len(annotations))).astype(int)).tolist()
        self._shown = {int(annotations.image_ids[index]): index for index in shown}
        self.samples: list[tuple[int, tuple[str, np.ndarray, np.ndarray]]] = []  # image index; caption, two pictures

    def take(self, image_id: int, predictions: Predictions) -> None:
        """`predictions` in original pixels, on the CPU."""
        try:
            self.evaluator.add(image_id, predictions)
        except BadImage as error:  # the mask that holds the truth
            if not self._skips:
                raise
            warn(f"WARNING: left out of the evaluation: {error}")
            return
        if image_id not in self._shown:
            return
        index, classes = self._shown[image_id], self.annotations.classes
        try:
            image = read_image(self.annotations.path(index), self._max_pixels)
        except BadImage:
            return
        truth = ground_truth(self.annotations, index, like=predictions)
        draw = partial(plots.draw_predictions, threshold=self._threshold, fit=SAMPLE_HW)
        left, right = draw(image, truth, classes), draw(image, predictions, classes)
        self.samples.append((index, (self.annotations.file_names[index], left, right)))

    def write_pictures(self, folder: Path, title: str) -> None:
        if self.samples:
            least = "" if self._needs == "semantic" else f", score {self._threshold:g} or more"
            write_png(folder / "samples.png", plots.samples_grid([s for _, s in self.samples], title + least))
        if (curves := self.evaluator.curves()) is not None:
            write_png(folder / "pr_curves.png", plots.pr_curves(curves, title))


def _run(
    detector: Detector, source: str, branches: Sequence[_Branch], config: Config, stop: Callable[[], object]
) -> bool:
    """Predict this rank's share of one data source for all its branches; False if `stop` ended it early."""
    device = next(detector.parameters()).device
    loader = eval_loader(
        branches[0].annotations,
        config.data[source],
        batch_size=config.eval.batch_size,
        workers=config.train.workers,
        rank=rank(),
        world_size=world_size(),
    )
    with closing(iter(loader)) as batches:
        for batch in batches:
            for line in batch.bad_images:
                warn(f"WARNING: evaluated as a black image: {line}")
            if stop():
                return False
            predicted = detector.predict(batch.images.to(device), batch.sizes, heads=[b.name for b in branches])
            for branch in branches:
                for target, predictions in zip(batch.targets, predicted[branch.name], strict=True):
                    branch.take(target.image_id, predictions.to_original(target.size).map(Tensor.cpu))
    return True


def try_evaluation(detector: Detector, annotations: Mapping[str, Annotations], *, config: Config) -> list[str]:
    """Let every head decode and evaluate noise in place of its split's first image, so that nothing fails hours later.

    detector: as in `evaluate_detector`; annotations: of the heads to try. Gives lines about `eval.best`. Raises:
    UserError: `eval.best` is no metric of its head; whatever a head raises, with a note of what was tried.
    """
    lines = []
    for name, split in annotations.items():
        try:
            branch = _Branch(detector, name, split, config, draws=0)
            with torch.random.fork_rng(devices=[]), suppress(FloatingPointError, BadImage):  # training may mend the one
                metrics = _metrics_of_noise(detector, branch, config)
                lines += _check_best(config.eval.best or "", branch, metrics)
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"heads.{name}: forward, decode and evaluator were tried on one image before the first step")
            raise
    return lines


def _metrics_of_noise(detector: Detector, branch: _Branch, config: Config) -> dict[str, float]:
    reader = SampleReader(branch.annotations, config.data[config.heads[branch.name].data], train=False)
    height, width = branch.annotations.sizes[0].tolist()
    size = ImageSize(reader.transform.size((height, width)), (height, width))
    noise = torch.randint(256, (3, *size.hw), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = collate([noise], [], "").images.to(next(detector.parameters()).device)
    (predictions,) = detector.predict(images, [size], heads=[branch.name])[branch.name]
    branch.evaluator.add(int(branch.annotations.image_ids[0]), predictions.to_original(size).map(Tensor.cpu))
    return branch.evaluator.summarize(branch.evaluator.state())


def _check_best(best: str, branch: _Branch, metrics: Mapping[str, float]) -> list[str]:
    """Refuse an `eval.best` that is no metric of its head; a line where one image's metrics may not be all."""
    head, _, metric = best.partition("/")
    if head != branch.name or metric in metrics or branch.main_metric not in metrics:
        return []
    endings = [f"-{name}" for name in branch.annotations.classes]
    stems = {m.removesuffix(end) for m in metrics for end in endings if m.endswith(end)}
    if any(f"{stem}{end}" == metric for stem in stems for end in endings):  # a class that the image lacks
        return []
    error = unknown_name("eval.best", best, [f"{head}/{m}" for m in metrics])
    if type(branch.evaluator).__module__.startswith("detbb."):
        raise error
    return [f"WARNING: {error}, as one image shows"]


def ground_truth(annotations: Annotations, index: int, *, like: Predictions) -> Predictions:
    """An image's annotations without crowds, in original pixels, in the fields that `like` has; masks are bool."""
    if like.semantic is not None:
        return Predictions(semantic=torch.from_numpy(read_mask(annotations, index)))
    if like.probabilities is not None:
        present = torch.zeros(len(annotations.classes))
        present[annotations.labels[annotations.rows(index)]] = 1
        return Predictions(probabilities=present)
    rows, boxes = annotations.objects(index)
    labels = torch.from_numpy(annotations.labels[rows].astype(np.int64))
    truth = Predictions(torch.from_numpy(boxes.astype(np.float32)), labels=labels)
    if like.masks is not None and annotations.segments is not None:
        hw = tuple(annotations.sizes[index].tolist())
        truth.masks = torch.from_numpy(rasterize(annotations.segments, rows, hw, hw).astype(bool))
    if like.keypoints is not None and annotations.keypoints is not None:
        truth.keypoints = torch.from_numpy(annotations.keypoints[rows].astype(np.float32))
    return truth


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """A mapping, or a list with one entry a line and sorted keys: the same content gives the same bytes."""
    if isinstance(content, Mapping):
        text = json.dumps(content, allow_nan=False, indent=1)
    else:
        lines = ",\n".join(json.dumps(entry, sort_keys=True, allow_nan=False) for entry in content)
        text = f"[\n{lines}\n]"
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def write_png(path: Path, image: np.ndarray) -> None:
    write_atomically(path, lambda file: Image.fromarray(image).save(file, format="PNG"))


def evaluate(
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    heads: Sequence[str] | None = None,
    split: str = "val",
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of a checkpoint's branches as `<head>/<kind>/<metric>`, exactly as training logs them.

        ap = detbb.evaluate("best.pt")["objects/bbox/AP"]

    config: a file whose data and settings replace the stored ones. heads: all that have the split, or these. With
    `eval.weights: both`, those of the raw weights come as `model:<head>/…` (files: in `<output_dir>_model`).

    Raises: UserError: the checkpoint, config, data or names cannot be used.
    """
    content = open_checkpoint(checkpoint)
    settings = _settings(content, config, overrides)
    settings.train.workers = min(settings.train.workers, cores())  # a file does not choose how many processes start
    if unknown := [name for name in heads or () if name not in settings.heads]:
        raise unknown_name("--head", unknown[0], settings.heads)
    if output_dir is not None:
        check_folder(Path(output_dir))
    with processes(settings) as device, worker_failures():
        data = _read(content, settings, heads, split, may_write=config is not None)
        if settings.eval.weights == "both":
            kinds = ["ema", "model"]
        else:
            kinds = [settings.eval.weights or ("model" if content["ema"] is None else "ema")]
        metrics: dict[str, float] = {}
        for weights in kinds:
            detector = restore_detector(content | {"config": config_to_dict(settings)}, weights=weights).to(device)
            extra = weights != kinds[0]
            folder = None if output_dir is None else Path(f"{output_dir}_{weights}" if extra else output_dir)
            found = evaluate_detector(
                detector, data, config=settings, output_dir=folder, weights=weights, step=content["step"]
            )
            metrics |= {f"{weights}:{name}" if extra else name: value for name, value in found.items()}
    return metrics


def _settings(content: dict[str, Any], config: str | Path | None, overrides: Sequence[str]) -> Config:
    """The stored config, or that of a file with the checkpoint's other heads added."""
    if config is None:
        return stored_config(content, overrides=overrides)
    settings = load_config(config, overrides, world_size=1)  # nothing is trained: any batch size will do
    for name in settings.heads:
        if name not in content["classes"]:
            raise unknown_name(f"{config}: heads of this checkpoint", name, content["classes"])
    add_inherited_heads(settings, content)
    return settings


def _read(
    content: dict[str, Any], settings: Config, heads: Sequence[str] | None, split: str, *, may_write: bool
) -> dict[str, Annotations]:
    """The split of every head to evaluate, with the checkpoint's classes; each source is read once.

    may_write: a set that is generated on first use may be, where the user's own file and not the checkpoint's names it.
    """
    chosen: dict[str, Annotations] = {}
    with raise_on_all_ranks(rank0_first=True):
        read: dict[tuple[str, tuple[str, ...]], Annotations | None] = {}
        for name in settings.heads if heads is None else heads:
            source = settings.heads[name].data
            classes = ClassList.of(content["classes"][name]).names
            if (source, classes) not in read:
                read[source, classes] = read_split(
                    settings.data[source],
                    split,
                    source,
                    classes=classes,
                    may_write=may_write and name not in settings.inherited_heads,
                )
            annotations = read[source, classes]
            if annotations is not None:
                chosen[name] = annotations
            elif heads is not None:
                raise UserError(f"--head {name}: data.{source} has no {split!r} split")
        if not chosen:
            raise UserError(f"--split {split}: no head of this checkpoint has data for it")
    return chosen
