"""Pictures: predictions drawn on images, ground truth beside prediction, precision over recall."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from detbb.metrics.evaluators import full_mask
from detbb.structures.batch import ImageSize
from detbb.structures.predictions import Predictions

Colour = tuple[int, int, int]  # RGB, 0 … 255

_FIRST_COLOURS = ("e6194b", "3cb44b", "4d7cff", "f58231", "b143e0", "00b8c4", "e8c500", "f032e6", "84c225", "9a6324")
_SKELETON = (  # COCO's 17 keypoints, 0-based
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)
_SMALLEST_SIDE = 400  # longest side of a drawing, at least: labels are legible from here on


def class_colour(label: int) -> Colour:
    """RGB of a class, the same in every picture."""
    if label < len(_FIRST_COLOURS):
        return ImageColor.getrgb(f"#{_FIRST_COLOURS[label]}")[:3]
    hue = label * 222.492 % 360  # golden angle: neighbours are far apart
    return ImageColor.getrgb(f"hsv({hue:.1f}, {(95, 60, 80)[label % 3]}%, {(90, 95, 70)[label % 3]}%)")[:3]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def draw_predictions(
    image: np.ndarray,
    predictions: Predictions,
    classes: Sequence[str],
    *,
    threshold: float = 0.5,
    fit: tuple[int, int] | None = None,
) -> np.ndarray:
    """The image with boxes, masks, keypoints, labels, values, or a semantic overlay and legend: (H', W', 3) uint8 RGB.

    `image` is (H, W, 3) uint8 RGB and `predictions` are in its pixels, on the CPU; masks are probabilities in the
    boxes, or (n, H, W) bool. Without scores (ground truth) everything is drawn, else what reaches `threshold`.
    fit: (height, width) to fill; None: small images are enlarged 2 to 4 times, so that labels can be read.
    """
    height, width = image.shape[:2]
    least = min(4, -(-_SMALLEST_SIDE // max(height, width)))
    scale = min(fit[0] / height, fit[1] / width) if fit is not None else least
    hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    canvas = Image.fromarray(image)
    if scale != 1:
        canvas = canvas.resize(hw[::-1], Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    pixels = pil_to_tensor(canvas)  # (3, H', W')
    if predictions.semantic is not None:
        return _with_legend(pixels, _resized(predictions.semantic, hw), classes)
    numbers = predictions.probabilities if predictions.values is None else predictions.values
    if numbers is not None:
        return _with_image_labels(canvas, numbers.numpy(), classes, threshold)
    return _with_objects(pixels, predictions.to_original(ImageSize((height, width), hw)), classes, threshold)


def _with_objects(pixels: Tensor, shown: Predictions, classes: Sequence[str], threshold: float) -> np.ndarray:
    """Least certain objects first, so that the best lie on top; masks below all boxes."""
    assert shown.boxes is not None and shown.labels is not None
    hw, masks = (pixels.shape[1], pixels.shape[2]), shown.masks
    line, font = max(2, round(0.003 * max(hw))), _font(max(11, round(0.017 * max(hw))))
    scores = torch.full((len(shown.boxes),), torch.inf) if shown.scores is None else shown.scores
    order = scores.argsort(stable=True)
    kept = order[scores[order] >= threshold]
    boxes, labels = shown.boxes[kept], shown.labels[kept].tolist()
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2])
    colours = [class_colour(label) for label in labels]
    if masks is not None:
        for row, colour in zip(kept.tolist(), colours, strict=True):
            whole = masks.dtype == torch.bool
            mask = _resized(masks[row], hw) if whole else torch.from_numpy(full_mask(masks[row], shown.boxes[row], hw))
            pixels = draw_segmentation_masks(pixels, mask, alpha=0.45, colors=colour)
    if len(kept):
        rim = boxes + boxes.new_tensor([-1, -1, 1, 1])  # seen on any background
        pixels = draw_bounding_boxes(pixels, rim, colors="black", width=line + 2)
        pixels = draw_bounding_boxes(pixels, boxes, colors=colours, width=line)
    if shown.keypoints is not None:
        for points, colour in zip(shown.keypoints[kept], colours, strict=True):  # (K, 3) each
            places, seen = points[None, :, :2], points[None, :, 2] > 0
            skeleton = list(_SKELETON) if len(points) == 17 else None
            pixels = draw_keypoints(pixels, places, skeleton, "white", radius=2 * line, width=line, visibility=seen)
            pixels = draw_keypoints(pixels, places, colors=colour, radius=round(1.4 * line), visibility=seen)
    texts = [classes[label] for label in labels]
    if shown.scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores[kept].tolist(), strict=True)]
    tags = [_tag(text, colour, font) for text, colour in zip(texts, colours, strict=True)]
    canvas = to_pil_image(pixels)
    _place(canvas, list(zip(tags, boxes.tolist(), strict=True))[::-1])
    if len(scores) > len(kept) == 0:
        canvas.paste(_tag(f"none ≥ {threshold:g} (best {scores.max():.4f})", (90, 90, 90), font), (4, 4))
    return np.asarray(canvas)


def _tag(text: str, colour: Colour, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The text on its colour."""
    pad = round(font.size / 5) + 1
    tag = Image.new("RGB", (round(font.getlength(text)) + 2 * pad, round(font.size * 5 / 6) + 2 * pad), colour)
    light = np.dot((0.299, 0.587, 0.114), colour) > 140
    ImageDraw.Draw(tag).text((pad, tag.height / 2), text, "black" if light else "white", font, anchor="lm")
    return tag


def _place(canvas: Image.Image, tags: Sequence[tuple[Image.Image, list[float]]]) -> None:
    """Paste each tag above its xyxy box, else inside, else below it; left out if it would hide another."""
    taken: list[tuple[int, int, int, int]] = []
    for tag, (x1, y1, _, y2) in tags:
        x = max(0, min(round(x1), canvas.width - tag.width))
        for y in map(round, (y1 - tag.height, y1, y2 - tag.height, y2)):
            free = all(x >= c or x + tag.width <= a or y >= d or y + tag.height <= b for a, b, c, d in taken)
            if free and 0 <= y <= canvas.height - tag.height:
                canvas.paste(tag, (x, y))
                taken.append((x, y, x + tag.width, y + tag.height))
                break


def _with_legend(pixels: Tensor, semantic: Tensor, classes: Sequence[str]) -> np.ndarray:
    """The overlay, and below it a legend of the classes that are there, largest first; 255 stays uncovered."""
    present, counts = semantic[semantic < len(classes)].unique(return_counts=True)
    labels = present[counts.argsort(descending=True, stable=True)].tolist()
    for label in labels:
        pixels = draw_segmentation_masks(pixels, semantic == label, alpha=0.55, colors=class_colour(label))
    overlay = to_pil_image(pixels)
    font = _font(max(12, round(max(overlay.size) / 45)))
    legend = _in_rows([_tag(classes[n], class_colour(n), font) for n in labels], width=overlay.width, gap=4)
    page = ImageOps.expand(overlay, (0, 0, 0, legend.height), "white")
    page.paste(legend, (0, overlay.height))
    return np.asarray(page)


def _with_image_labels(
    canvas: Image.Image, numbers: np.ndarray, classes: Sequence[str], threshold: float
) -> np.ndarray:
    """The classes whose probability or value reaches the threshold, or the best one, in the upper left corner."""
    font = _font(max(13, round(max(canvas.size) / 40)))
    order = np.argsort(-numbers, kind="stable").tolist()
    y = 4
    for label in order[: max(1, np.count_nonzero(numbers >= threshold))]:
        tag = _tag(f"{classes[label]} {numbers[label]:.2f}", class_colour(label), font)
        canvas.paste(tag, (4, y))
        y += tag.height + 4
    return np.asarray(canvas)


def _resized(labels: Tensor, hw: tuple[int, int]) -> Tensor:
    """Nearest neighbour of an (H, W) label map or bool mask."""
    return resize(labels[None].byte(), list(hw), InterpolationMode.NEAREST)[0].to(labels.dtype)


def _in_rows(tiles: Sequence[Image.Image], *, width: int, gap: int) -> Image.Image:
    """A white page with the tiles in rows that are filled like lines of text; wider than `width` only for one tile."""
    places, x, y, row = [], gap, gap, 0
    for tile in tiles:
        if x > gap and x + tile.width + gap > width:
            x, y, row = gap, y + row + gap, 0
        places.append((x, y))
        x, row = x + tile.width + gap, max(row, tile.height)
    right = max((x + tile.width for (x, _), tile in zip(places, tiles, strict=True)), default=0)
    page = Image.new("RGB", (right + gap, y + row + gap), "white")
    for place, tile in zip(places, tiles, strict=True):
        page.paste(tile, place)
    return page


def samples_grid(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], title: str) -> np.ndarray:
    """Pairs of ground truth (left) and prediction (right) in rows that are filled like lines of text: (H, W, 3) uint8.

    pairs: caption, and the two pictures; pictures of one height leave no holes.
    """
    gap, head, caption, tiles = 12, 44, 30, []
    for name, truth, predicted in pairs:
        right = truth.shape[1] + gap
        tile = Image.new("RGB", (right + predicted.shape[1], caption + max(len(truth), len(predicted))), "white")
        for x, text, picture in ((0, f"ground truth · {name}", truth), (right, "prediction", predicted)):
            while len(text) > 14 and _font(14).getlength(text) > picture.shape[1]:
                text = text[:-2] + "…"
            ImageDraw.Draw(tile).text((x, caption / 2), text, (70, 70, 70), _font(14), anchor="lm")
            tile.paste(Image.fromarray(picture), (x, caption))
        tiles.append(tile)
    page = ImageOps.expand(_in_rows(tiles, width=2000, gap=gap), (0, head - gap, 0, 0), "white")
    ImageDraw.Draw(page).text((gap, head / 2), title, "black", _font(22), anchor="lm")
    return np.asarray(page)


def pr_curves(curves: dict[str, Any], title: str) -> np.ndarray:
    """Precision over recall, a panel for each kind (`bbox`, `segm`, …): (H, W, 3) uint8 RGB.

    curves: an evaluator's `curves()`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, precision in curves["precision"].items():
        kind, line = name.split("/", 1)
        panels.setdefault(kind, {})[line] = precision
    figure = Figure(figsize=(6.6 * len(panels), 5.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    for number, (kind, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        single = [name for name in lines if not name.startswith("all classes, ")]
        for name, precision in lines.items():
            label = f"{name} ({precision.mean():.2f})"
            style: dict[str, Any] = {"color": "black", "ls": "-" if name.endswith("0.50") else "--", "lw": 2.4}
            if name in single:
                style = {"color": np.array(class_colour(single.index(name))) / 255, "lw": 1.4, "zorder": 1}
                if len(single) > 12:
                    label, style = "", style | {"lw": 0.6, "alpha": 0.45}
            elif len(single) == 1:
                label = label.replace("all classes", single[0])
            if name not in single or len(single) > 1 or len(lines) == 1:  # the mean of one class is itself
                axes.plot(curves["recall"], precision, label=label, **style)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        count = f"{len(single)} classes" if len(single) != 1 else "1 class"
        axes.set_title(f"{kind}: {count} at {'OKS' if kind == 'keypoints' else 'IoU'} 0.50 (mean precision)")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
