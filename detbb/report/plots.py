"""Pictures: predictions drawn on images, ground truth beside prediction, precision over recall."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
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
        return tuple(bytes.fromhex(_FIRST_COLOURS[label]))  # type: ignore[return-value]
    hue = label * 0.61803398875 % 1  # golden ratio: neighbours are far apart
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.95, 0.6, 0.8)[label % 3], (0.9, 0.95, 0.7)[label % 3])
    return int(255 * red), int(255 * green), int(255 * blue)


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
    if fit is None:
        scale = float(min(4, -(-_SMALLEST_SIDE // max(height, width))))
    else:
        scale = min(fit[0] / height, fit[1] / width)
    hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    canvas = Image.fromarray(image)
    if scale != 1:
        canvas = canvas.resize(hw[::-1], Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)  # (3, H', W')
    if predictions.semantic is not None:
        return _with_legend(pixels, _resized(predictions.semantic.numpy(), hw), classes)
    numbers = predictions.probabilities if predictions.values is None else predictions.values
    if numbers is not None:
        return _with_image_labels(canvas, numbers.numpy(), classes, threshold)
    shown = replace(predictions, semantic=None).to_original(ImageSize((height, width), hw))
    return _with_objects(pixels, shown, classes, threshold)


def _with_objects(pixels: Tensor, shown: Predictions, classes: Sequence[str], threshold: float) -> np.ndarray:
    """Least certain objects first, so that the best lie on top; masks below all boxes."""
    assert shown.boxes is not None and shown.labels is not None
    hw, scores, masks = (pixels.shape[1], pixels.shape[2]), shown.scores, shown.masks
    line, font = max(2, round(0.003 * max(hw))), _font(max(11, round(0.017 * max(hw))))
    if scores is None:
        kept = torch.arange(len(shown.boxes))
    else:
        order = scores.argsort(stable=True)
        kept = order[scores[order] >= threshold]
    boxes, labels = shown.boxes[kept], shown.labels[kept].tolist()
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2])
    colours = [class_colour(label) for label in labels]
    if masks is not None:
        for row, colour in zip(kept.tolist(), colours, strict=True):
            whole = masks.dtype == torch.bool
            mask = _resized(masks[row].numpy(), hw) if whole else full_mask(masks[row], shown.boxes[row], hw)
            pixels = draw_segmentation_masks(pixels, torch.from_numpy(mask), alpha=0.45, colors=colour)
    if len(kept):
        rim = boxes + boxes.new_tensor([-1, -1, 1, 1])  # seen on any background
        pixels = draw_bounding_boxes(pixels, rim, colors="black", width=line + 2)
        pixels = draw_bounding_boxes(pixels, boxes, colors=colours, width=line)
    if shown.keypoints is not None:
        for points, colour in zip(shown.keypoints[kept][:, None], colours, strict=True):  # (1, K, 3) each
            pixels = _with_keypoints(pixels, points, colour, line)
    canvas = to_pil_image(pixels)
    texts = [classes[label] for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores[kept].tolist(), strict=True)]
    tags = list(zip(boxes.tolist(), texts, colours, strict=True))[::-1]
    if scores is not None and len(scores) > len(kept) == 0:
        tags = [([4.0] * 4, f"none ≥ {threshold:g} (best {scores.max():.4f})", (90, 90, 90))]
    _draw_tags(ImageDraw.Draw(canvas), tags, font)
    return np.asarray(canvas)


def _draw_tags(draw: ImageDraw.ImageDraw, tags: Sequence[tuple[list[float], str, Colour]], font: Any) -> None:
    """A text on its colour at each xyxy box: above, else inside, else below it; left out if it would hide another."""
    pad = font.size // 5 + 1
    height, (canvas_width, canvas_height) = font.size + 2 * pad - font.size // 6, draw.im.size
    taken: list[tuple[float, float, float, float]] = []
    for (x1, y1, _, y2), text, colour in tags:
        width = font.getlength(text) + 2 * pad
        x = max(0.0, min(x1, canvas_width - width))
        for y in (y1 - height, y1, y2 - height, y2):
            free = all(x >= c or x + width <= a or y >= d or y + height <= b for a, b, c, d in taken)
            if free and 0 <= y <= canvas_height - height:
                taken.append((x, y, x + width, y + height))
                draw.rectangle(taken[-1], fill=colour)
                light = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True)) > 140
                ink = "black" if light else "white"
                draw.text((x + pad, y + height / 2), text, fill=ink, font=font, anchor="lm")
                break


def _with_keypoints(pixels: Tensor, points: Tensor, colour: Colour, line: int) -> Tensor:
    """(1, K, 3) points as dots with a white rim, and COCO's skeleton for its 17; a third value of 0 or less: absent."""
    skeleton = list(_SKELETON) if points.shape[1] == 17 else None
    places, seen = points[..., :2], points[..., 2] > 0
    pixels = draw_keypoints(pixels, places, skeleton, "white", radius=2 * line, width=line, visibility=seen)
    return draw_keypoints(pixels, places, colors=colour, radius=round(1.4 * line), visibility=seen)


def _with_legend(pixels: Tensor, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The overlay, and below it a legend of the classes that are there, largest first; 255 stays uncovered."""
    present, counts = np.unique(labels[labels < len(classes)], return_counts=True)
    present = present[np.argsort(-counts, kind="stable")].tolist()
    for label in present:
        mask = torch.from_numpy(labels == label)
        pixels = draw_segmentation_masks(pixels, mask, alpha=0.55, colors=class_colour(label))
    overlay = to_pil_image(pixels)
    font = _font(max(12, round(max(overlay.size) / 45)))
    row, gap = round(font.size * 1.6), round(font.size / 2)
    places, x, y = [], 0.0, 0
    for label in present:
        width = row + font.getlength(classes[label]) + gap
        if x > 0 and x + width > overlay.width:
            x, y = 0.0, y + row
        places.append((x + gap / 2, overlay.height + gap / 2 + y, label))
        x += width
    page = Image.new("RGB", (overlay.width, overlay.height + y + row + gap), "white")
    page.paste(overlay, (0, 0))
    draw = ImageDraw.Draw(page)
    for x, top, label in places:
        draw.rectangle((x, top + row * 0.2, x + row * 0.6, top + row * 0.8), fill=class_colour(label))
        draw.text((x + row * 0.8, top + row / 2), classes[label], fill="black", font=font, anchor="lm")
    return np.asarray(page)


def _with_image_labels(
    canvas: Image.Image, numbers: np.ndarray, classes: Sequence[str], threshold: float
) -> np.ndarray:
    """The classes whose probability or value reaches the threshold, or the best one, in the upper left corner."""
    font = _font(max(13, round(max(canvas.size) / 40)))
    order = [int(label) for label in np.argsort(-numbers, kind="stable")]
    chosen = [label for label in order if numbers[label] >= threshold] or order[:1]
    rows = [4 + row * font.size * 1.7 for row in range(len(chosen))]
    tags = [
        ([4.0, y, 4.0, y], f"{classes[label]} {numbers[label]:.2f}", class_colour(label))
        for y, label in zip(rows, chosen, strict=True)
    ]
    _draw_tags(ImageDraw.Draw(canvas), tags, font)
    return np.asarray(canvas)


def _resized(labels: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour of a label map or bool mask."""
    if labels.shape == hw:
        return labels
    resized = Image.fromarray(labels.astype(np.uint8)).resize(hw[::-1], Image.Resampling.NEAREST)
    return np.asarray(resized).astype(labels.dtype)


def samples_grid(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], title: str) -> np.ndarray:
    """Pairs of ground truth (left) and prediction (right) in rows that are filled like lines of text: (H, W, 3) uint8.

    pairs: caption, and the two pictures; pictures of one height leave no holes.
    """
    gap, head, caption, room = 12, 44, 30, 2000
    places, x, y, height = [], gap, head, 0
    for name, truth, predicted in pairs:
        width = truth.shape[1] + gap + predicted.shape[1]
        if x > gap and x + width + gap > room:
            x, y, height = gap, y + height + gap, 0
        places.append((x, y, f"ground truth · {name}", truth))
        places.append((x + truth.shape[1] + gap, y, "prediction", predicted))
        x, height = x + width + 2 * gap, max(height, caption + max(truth.shape[0], predicted.shape[0]))
    right = max(x + picture.shape[1] for x, _, _, picture in places) + gap
    page = Image.new("RGB", (right, y + height + gap), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, head / 2), title, fill="black", font=_font(22), anchor="lm")
    for x, y, text, picture in places:
        while len(text) > 14 and _font(14).getlength(text) > picture.shape[1]:
            text = text[:-2] + "…"
        draw.text((x, y + caption / 2), text, fill=(70, 70, 70), font=_font(14), anchor="lm")
        page.paste(Image.fromarray(picture), (x, y + caption))
    return np.asarray(page)


def pr_curves(curves: dict[str, Any], title: str) -> np.ndarray:
    """Precision over recall, a panel for each kind (`bbox`, `segm`, …): (H, W, 3) uint8 RGB.

    curves: an evaluator's `curves()`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(name.split("/", 1)[0] for name in curves["precision"]))
    figure = Figure(figsize=(6.6 * len(kinds), 5.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    for axes, kind in zip(np.ravel(figure.subplots(1, len(kinds), squeeze=False)), kinds, strict=True):
        lines = {n.split("/", 1)[1]: p for n, p in curves["precision"].items() if n.split("/", 1)[0] == kind}
        means = [name for name in lines if name.startswith("all classes, ")]
        single = [name for name in lines if name not in means]
        many = len(single) > 12
        for label, name in enumerate(single if len(single) > 1 or not means else ()):  # the mean of one is itself
            style = {"lw": 0.6, "alpha": 0.45} if many else {"lw": 1.4, "label": f"{name} ({lines[name].mean():.2f})"}
            axes.plot(curves["recall"], lines[name], color=np.array(class_colour(label)) / 255, **style)
        for name, dashes in zip(means, ("-", "--"), strict=False):
            shown = name if len(single) != 1 else name.replace("all classes", single[0])
            axes.plot(
                curves["recall"], lines[name], "k", ls=dashes, lw=2.4, label=f"{shown} ({lines[name].mean():.2f})"
            )
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        measure, count = "OKS" if kind == "keypoints" else "IoU", f"{len(single)} class{'es'[: 2 * (len(single) != 1)]}"
        axes.set_title(f"{kind}: {count} at {measure} 0.50 (mean precision)")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
