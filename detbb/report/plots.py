"""Pictures: predictions drawn on images, ground truth beside prediction, precision over recall."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

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
    longest_side: int | None = None,
) -> np.ndarray:
    """The image with boxes, masks, keypoints, labels, values, or a semantic overlay and legend: (H', W', 3) uint8 RGB.

    `image` is (H, W, 3) uint8 RGB and `predictions` are in its pixels, on the CPU; masks are probabilities in the
    boxes, or (n, H, W) bool. Without scores (ground truth) everything is drawn, else what reaches `threshold`. Small
    images are enlarged 2 to 4 times so that labels can be read; large ones shrink to `longest_side`, if it is given.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    scale = float(min(4, -(-_SMALLEST_SIDE // longest)))
    if longest_side is not None:
        scale = min(scale, longest_side / longest)
    hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    canvas = Image.fromarray(image)
    if scale != 1:
        canvas = canvas.resize(hw[::-1], Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    shown = Predictions(predictions.boxes, predictions.scores, predictions.labels, keypoints=predictions.keypoints)
    shown = shown.to_original(ImageSize((height, width), hw))
    shown.masks = predictions.masks
    if predictions.semantic is not None:
        return _with_legend(canvas, predictions.semantic.numpy(), classes)
    said = predictions.probabilities if predictions.values is None else predictions.values
    if said is not None:
        return _with_image_labels(canvas, said.numpy(), classes, threshold)
    return _with_objects(canvas, shown, classes, threshold)


def _with_objects(canvas: Image.Image, shown: Predictions, classes: Sequence[str], threshold: float) -> np.ndarray:
    """Least certain objects first, so that the best lie on top; masks below all boxes."""
    assert shown.boxes is not None and shown.labels is not None
    unit = max(canvas.size) / 1000
    line, font = max(2, round(3 * unit)), _font(max(11, round(17 * unit)))
    hw = (canvas.height, canvas.width)
    count = len(shown.boxes)
    kept = [i for i in range(count) if shown.scores is None or shown.scores[i] >= threshold]
    kept = sorted(kept, key=lambda i: float(shown.scores[i]) if shown.scores is not None else 0.0)
    if shown.masks is not None:
        pixels = np.asarray(canvas).astype(np.float32)
        for i in kept:
            whole = shown.masks.dtype == torch.bool
            mask = _resized(shown.masks[i].numpy(), hw) if whole else full_mask(shown.masks[i], shown.boxes[i], hw)
            pixels[mask] = 0.55 * pixels[mask] + 0.45 * np.array(class_colour(int(shown.labels[i])))
        canvas = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for i in kept:
        x1, y1, x2, y2 = shown.boxes[i].tolist()
        x2, y2 = max(x1, x2), max(y1, y2)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)  # seen on any background
        draw.rectangle((x1, y1, x2, y2), outline=class_colour(int(shown.labels[i])), width=line)
        if shown.keypoints is not None:
            _draw_keypoints(draw, shown.keypoints[i].numpy(), line)
    tags = []
    for i in reversed(kept):
        label = int(shown.labels[i])
        text = classes[label] if shown.scores is None else f"{classes[label]} {shown.scores[i]:.2f}"
        tags.append((shown.boxes[i].tolist(), text, class_colour(label)))
    _draw_tags(draw, tags, font)
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


def _draw_keypoints(draw: ImageDraw.ImageDraw, points: np.ndarray, line: int) -> None:
    """Dots with a rim, and COCO's skeleton for its 17 points; a point with a third value of 0 or less is absent."""
    if len(points) == 17:
        for a, b in _SKELETON:
            if points[a, 2] > 0 and points[b, 2] > 0:
                draw.line([*points[a, :2], *points[b, :2]], fill=(255, 255, 255), width=line)
    radius = line * 1.4
    for number, (x, y, visible) in enumerate(points.tolist()):
        if visible > 0:
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=class_colour(number), outline="white", width=max(1, line // 2))


def _with_legend(canvas: Image.Image, semantic: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The overlay, and below it a legend of the classes that are there, largest first; 255 stays uncovered."""
    pixels = np.asarray(canvas).astype(np.float32)
    labels = _resized(semantic, (canvas.height, canvas.width))
    present, counts = np.unique(labels[labels < len(classes)], return_counts=True)
    present = present[np.argsort(-counts, kind="stable")]
    for label in present:
        where = labels == label
        pixels[where] = 0.45 * pixels[where] + 0.55 * np.array(class_colour(int(label)))
    overlay = Image.fromarray(pixels.round().astype(np.uint8))
    font = _font(max(12, round(max(canvas.size) / 45)))
    row, gap = round(font.size * 1.6), round(font.size / 2)
    x, y = 0.0, 0
    places = []
    for label in present:
        text = classes[label]
        width = row + font.getlength(text) + gap
        if x > 0 and x + width > canvas.width:
            x, y = 0.0, y + row
        places.append((x + gap / 2, y, int(label), text))
        x += width
    page = Image.new("RGB", (canvas.width, canvas.height + y + row + gap), "white")
    page.paste(overlay, (0, 0))
    draw = ImageDraw.Draw(page)
    for x, y, label, text in places:
        top = canvas.height + gap / 2 + y
        draw.rectangle((x, top + row * 0.2, x + row * 0.6, top + row * 0.8), fill=class_colour(label))
        draw.text((x + row * 0.8, top + row / 2), text, fill="black", font=font, anchor="lm")
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
    """Rows of ground truth (left) and prediction (right), two rows' worth side by side: (H, W, 3) uint8 RGB.

    pairs: caption, and the two pictures.
    """
    gap, head, caption = 12, 44, 30
    columns = 2 if len(pairs) > 3 else 1
    half = max(max(a.shape[1], b.shape[1]) for _, a, b in pairs)
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    heights = [max(max(a.shape[0], b.shape[0]) for _, a, b in row) + caption for row in rows]
    cell = 2 * half + gap
    page = Image.new("RGB", (columns * (cell + 2 * gap), head + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, head / 2), title, fill="black", font=_font(22), anchor="lm")
    y = head
    for row, height in zip(rows, heights, strict=True):
        for column, (name, truth, predicted) in enumerate(row):
            x = gap + column * (cell + 2 * gap)
            for offset, text, picture in ((0, "ground truth", truth), (half + gap, "prediction", predicted)):
                text = f"{text} · {name}" if offset == 0 else text
                while len(text) > 14 and _font(14).getlength(text) > half:
                    text = text[:-2] + "…"
                draw.text((x + offset, y + caption / 2), text, fill=(70, 70, 70), font=_font(14), anchor="lm")
                page.paste(Image.fromarray(picture), (x + offset, y + caption))
        y += height + gap
    return np.asarray(page)


def pr_curves(curves: dict[str, Any], title: str) -> np.ndarray:
    """Precision over recall, a panel for each kind (`bbox`, `segm`, …): (H, W, 3) uint8 RGB.

    curves: an evaluator's `curves()`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(name.split("/", 1)[0] for name in curves["precision"]))
    figure = Figure(figsize=(8.2 * len(kinds), 5.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    for axes, kind in zip(np.ravel(figure.subplots(1, len(kinds), squeeze=False)), kinds, strict=True):
        lines = {n.split("/", 1)[1]: p for n, p in curves["precision"].items() if n.split("/", 1)[0] == kind}
        means = [name for name in lines if name.startswith("all classes, ")]
        single = [name for name in lines if name not in means]
        for label, name in enumerate(single):
            colour = np.array(class_colour(label)) / 255
            few = len(single) <= 12
            style = {"lw": 1.4, "label": f"{name} ({lines[name].mean():.2f})"} if few else {"lw": 0.6, "alpha": 0.45}
            axes.plot(curves["recall"], lines[name], color=colour, **style)
        for name, dashes in zip(means, ("-", "--"), strict=False):
            axes.plot(curves["recall"], lines[name], "k", ls=dashes, lw=2.4, label=f"{name} ({lines[name].mean():.2f})")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        measure = "OKS" if kind == "keypoints" else "IoU"
        axes.set_title(f"{kind}: {len(single)} classes at {measure} 0.50 (mean precision)")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
