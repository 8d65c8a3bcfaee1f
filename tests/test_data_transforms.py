"""Boxes, masks, keypoints and pixels stay on each other through resizing and augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
from datasets import box, read, shapes_source
from pycocotools import mask as coco_mask

from detbb.config.schema import DataConfig
from detbb.core.errors import UserError
from detbb.data.formats import read_split
from detbb.data.loader import SampleReader
from detbb.data.sampler import hash_seed
from detbb.data.transforms import _KEEP_SIZE, Sample, Transform, rasterize, resize
from detbb.structures.annotations import Annotations, Segments, rle_fits

NEEDS = frozenset({"boxes", "masks", "keypoints"})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    data = read_split(shapes_source(tmp_path_factory.mktemp("shapes"), train=40), "train", "shapes")
    assert data is not None
    return data


def source(augment: Any, size: tuple[int, int] = (128, 128)) -> DataConfig:
    return DataConfig(image_size=list(size), augment=augment)


@pytest.mark.parametrize(
    ("hw", "size", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((400, 1000), (800, 1333), (533, 1333)),
        ((100, 100), (800, 1333), (800, 800)),
        ((1, 5000), (100, 200), (1, 200)),
    ],
)
def test_short_side_grows_until_the_long_side_is_full(hw: tuple, size: tuple, expected: tuple) -> None:
    assert Transform(source("none", size), train=True).size(hw, 0) == expected
    assert Transform(source("default", size), train=False).size(hw, 1) == expected


def test_default_draws_the_short_side_from_its_range() -> None:
    sides = [Transform(source("default", (100, 1000)), train=True).size((50, 80), seed)[0] for seed in range(200)]
    assert min(sides) >= 80 and max(sides) <= 100 and len(set(sides)) == 21


AUGMENTS = {
    "default": "default",
    "none": "none",
    "mirror": [{"type": "HorizontalFlip", "p": 1}],
    "upside down": [{"type": "VerticalFlip", "p": 1}],
    "half turn": [{"type": "HorizontalFlip", "p": 1}, {"type": "VerticalFlip", "p": 1}],
    "quarter turns": [
        {"type": "OneOf", "p": 1, "transforms": [{"type": "Transpose", "p": 1}, {"type": "RandomRotate90", "p": 1}]}
    ],
    "crop": [{"type": "RandomCrop", "height": 90, "width": 70, "p": 1}, {"type": "ColorJitter"}],
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_boxes_masks_keypoints_and_pixels_stay_together(shapes: Annotations, name: str) -> None:
    reader = SampleReader(shapes, source(AUGMENTS[name]), train=True, needs=NEEDS)
    objects = 0
    for index in range(len(shapes)):
        image, target = reader.read(index, epoch=index)
        assert target.masks is not None and target.keypoints is not None
        assert target.masks.shape[1:] == image.shape[1:] == target.size.hw and image.dtype.itemsize == 1
        assert len(target.boxes) == len(target.labels) == len(target.masks) == len(target.keypoints)
        h, w = target.size.hw
        for box_, mask, points in zip(target.boxes, target.masks, target.keypoints, strict=True):
            x1, y1, x2, y2 = box_.tolist()
            assert 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h
            ys, xs = np.nonzero(mask.numpy())
            if len(xs):
                off = np.array([xs.min() - x1, ys.min() - y1, x2 - xs.max() - 1, y2 - ys.max() - 1])
                assert off.min() >= -1.5 and (
                    name == "crop" or off.max() <= 1.5
                )  # a cropped shape may not fill its box
            shown = points[points[:, 2] == 2]
            assert ((shown[:, 0] >= x1 - 1.5) & (shown[:, 0] <= x2 + 1.5) & (shown[:, 1] >= y1 - 1.5)).all()
            if name in ("default", "none", "mirror") and (points[:, 2] == 2).all():
                top, right, bottom, left = points[:, :2].tolist()
                assert top[1] == points[:, 1].min() and bottom[1] == points[:, 1].max()
                assert left[0] == points[:, 0].min() and right[0] == points[:, 0].max()
            objects += 1
    assert objects > 50


def test_left_and_right_swap_only_when_the_image_is_mirrored() -> None:
    points = np.array([[[10, 20, 2], [30, 20, 1], [20, 25, 2]]], dtype=np.float32)  # left, right, nose
    sample = Sample(
        np.zeros((40, 60, 3), np.uint8), np.array([[5.0, 5, 35, 35]]), np.zeros(1, np.int64), keypoints=points
    )

    def moved(*types: str) -> list:
        augment = [{"type": t, "p": 1} for t in types]
        result = Transform(source(augment, (40, 60)), train=True, flip_pairs=[(0, 1)])(sample, 5)
        assert result.keypoints is not None
        return result.keypoints[0].tolist()

    assert moved("HorizontalFlip") == [[30, 20, 1], [50, 20, 2], [40, 25, 2]]
    assert moved("VerticalFlip") == [[30, 20, 1], [10, 20, 2], [20, 15, 2]]
    assert moved("HorizontalFlip", "VerticalFlip") == [[50, 20, 2], [30, 20, 1], [40, 15, 2]]
    assert moved("Transpose") == [[20, 30, 1], [20, 10, 2], [25, 20, 2]]
    crop = [{"type": "Crop", "x_min": 25, "y_min": 0, "x_max": 60, "y_max": 40, "p": 1}]
    result = Transform(source(crop, (40, 60)), train=True, flip_pairs=[(0, 1)])(sample, 5)
    assert result.keypoints is not None and result.keypoints[0, :, 2].tolist() == [0, 1, 0]  # outside: absent
    assert np.allclose(result.boxes, [[0, 5, 10, 35]], atol=1e-4)


def test_transforms_of_a_list_draw_independently() -> None:
    """albumentations' set_random_seed() starts every transform with the same numbers: both flips, or none."""
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    sample = Sample(image, np.zeros((0, 4)), np.zeros(0, np.int64))
    transform = Transform(source([{"type": "HorizontalFlip"}, {"type": "VerticalFlip"}], (40, 60)), train=True)
    variants = {"same": image, "h": image[:, ::-1], "v": image[::-1], "hv": image[::-1, ::-1]}
    results = [transform(sample, hash_seed(seed)).image for seed in range(80)]
    counts = {name: sum(np.array_equal(r, v) for r in results) for name, v in variants.items()}
    assert sum(counts.values()) == 80 and min(counts.values()) >= 8
    assert all(np.array_equal(transform(sample, hash_seed(seed)).image, results[seed]) for seed in (79, 3, 41))


def test_polygons_fill_as_in_coco_and_rle_survives_resizing() -> None:
    polygon = [5.0, 5, 60, 9, 50, 70, 8, 44]
    code = coco_mask.merge(coco_mask.frPyObjects([polygon], 80, 100))
    truth = coco_mask.decode(code)
    uncompressed = {"size": [80, 100], "counts": [100 * 40, 80, 80 * 49]}
    segments = Segments(
        [([[polygon], {"size": [80, 100], "counts": code["counts"].decode()}, uncompressed, None], None)]
    )
    same = rasterize(segments, np.arange(4), (80, 100), (80, 100))
    assert np.array_equal(same[0], truth) and np.array_equal(same[1], truth) and not same[3].any()
    assert same[2].sum() == 80 and same[2][:, 50].all()
    half = rasterize(segments, np.arange(2), (80, 100), (40, 50))
    overlap = (half[0] & half[1]).sum() / (half[0] | half[1]).sum()
    assert overlap > 0.95 and abs(half[0].sum() - truth.sum() / 4) < 25
    assert segments.coco(0) == [polygon] and segments.rle(0) is None and segments.rle(1) is not None


def test_run_lengths_are_valid_exactly_if_they_cover_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        h, w = rng.integers(1, 60, 2).tolist()
        mask = np.asfortranarray(rng.random((h, w)) < rng.choice([0, 0.02, 0.5, 1]), dtype=np.uint8)
        code = coco_mask.encode(mask)["counts"].decode()
        assert rle_fits({"size": [h, w], "counts": code}, h, w)
        assert not rle_fits({"size": [h, w + 1], "counts": code}, h, w + 1)
        at = int(rng.integers(len(code)))
        for other in (code[:at] + chr(48 + int(rng.integers(64))) + code[at + 1 :], code[:at] + code[at + 1 :]):
            if rle_fits({"size": [h, w], "counts": other}, h, w):  # then it can be decoded, and written again
                decoded = coco_mask.decode({"size": [h, w], "counts": other.encode()})
                assert decoded.shape == (h, w) and decoded.max() <= 1


def test_resizing_moves_boxes_and_keypoints_with_the_pixels() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[5:10, 10:30] = 255
    points = np.array([[[10, 5, 2]]], dtype=np.float32)
    sample = resize(
        Sample(image, np.array([[10.0, 5, 30, 10]]), np.zeros(1, np.int64), keypoints=points, semantic=image[..., 0]),
        (40, 60),
    )
    assert (
        sample.boxes.tolist() == [[15, 10, 45, 20]]
        and sample.keypoints is not None
        and sample.keypoints.ravel().tolist() == [15, 10, 2]
    )
    assert sample.semantic is not None and sample.semantic[10:20, 15:45].all() and sample.semantic.sum() == 300 * 255
    assert sample.image[11:19, 16:44].min() > 200 and sample.image[:8].max() == 0


def test_crowds_and_slivers_are_dropped_but_crowd_classes_count(tmp_path: Path) -> None:
    data = read(
        tmp_path, [box(1, 7, [1, 1, 10, 10]), box(2, 7, [0, 0, 9, 9], 90, iscrowd=1), box(3, 7, [39.99, 1, 30, 10])]
    )
    image, target = SampleReader(data, source("none", (60, 90)), train=True).read(0)
    assert target.boxes.tolist() == [[2, 2, 22, 22]] and target.labels.tolist() == [0]
    assert target.image_labels.tolist() == [True, True] and target.masks is None and target.keypoints is None
    assert tuple(target.size) == ((60, 80), (30, 40)) and target.image_id == 7 and tuple(image.shape) == (3, 60, 80)
    _, empty = SampleReader(data, source("default", (60, 90)), train=True).read(2)
    assert empty.boxes.shape == (0, 4) and not empty.image_labels.any()


def test_a_size_that_disagrees_with_the_file_is_refused(tmp_path: Path) -> None:
    data = read(tmp_path, [])
    data.sizes[0] = (31, 40)
    with pytest.raises(UserError, match=r"b\.png: is 40 x 30, its annotations say 40 x 31"):
        SampleReader(data, source("none"), train=True).read(0)


def test_borders_added_by_a_transform_are_ignored_in_masks() -> None:
    augment = [{"type": "PadIfNeeded", "min_height": 60, "min_width": 90, "p": 1}]
    transform = Transform(source(augment, (40, 60)), train=True, semantic=True)
    sample = Sample(
        np.zeros((40, 60, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64), semantic=np.ones((40, 60), np.uint8)
    )
    semantic = transform(sample, 0).semantic
    assert semantic is not None and (semantic == 1).sum() == 40 * 60 and (semantic == 255).sum() == 60 * 90 - 40 * 60


BAD = {
    "name": ([{"type": "HorizontalFlop"}], r"augment\[0\]: 'HorizontalFlop' is not known.*'HorizontalFlip'"),
    "argument": ([{"type": "RandomCrop", "hieght": 3, "width": 3}], r"augment\[0\] \(RandomCrop\): 'hieght'.*'height'"),
    "value": ([{"type": "HorizontalFlip", "p": "often"}], r"augment\[0\] \(HorizontalFlip\).*p"),
    "inner": ([{"type": "OneOf", "transforms": [{"type": "Blurr"}]}], r"augment\[0\]\.transforms\[0\]: 'Blurr'"),
    "dtype": ([{"type": "Normalize"}], r"augment\[0\]: Normalize does not give a uint8"),
    "tensor": ([{"type": "ToTensorV2"}], r"augment\[0\]"),
    "unlikely": (
        [{"type": "Blur"}, {"type": "RandomCrop", "height": 900, "width": 9, "p": 0.01}],
        r"augment\[1\]: RandomCrop",
    ),
    "no type": ([{"type": "OneOf", "transforms": [{"name": "Blur"}]}], r"augment\[0\]\.transforms\[0\]: .*type"),
}


@pytest.mark.parametrize("fault", BAD)
def test_augmentations_that_cannot_work_are_refused_at_start(fault: str) -> None:
    augment, message = BAD[fault]
    with pytest.raises(UserError, match=message) as error:
        Transform(source(augment, (80, 100)), train=True)
    assert "\n" not in str(error.value)


def test_transforms_said_to_keep_the_size_do(recwarn: pytest.WarningsRecorder) -> None:
    """Where they do not, every process has to read the images of all to know the padding."""
    sample = Sample(np.zeros((60, 90, 3), np.uint8), np.array([[5.0, 5, 40, 30]]), np.zeros(1, np.int64))
    more = {"GridDropout": {"ratio": 0.5}, "XYMasking": {"num_masks_x": 1, "mask_x_length": 9}}
    for name in _KEEP_SIZE:
        transform = Transform(source([{"type": name, "p": 1, **more.get(name, {})}], (60, 90)), train=True)
        assert not transform.changes_size, name
        assert {transform(sample, seed).image.shape for seed in range(20)} == {(60, 90, 3)}, name
    cropped = {"Rotate": "crop_border", "Affine": "fit_output", "Perspective": "fit_output"}
    for spec in (*({"type": n, k: True} for n, k in cropped.items()), {"type": "Perspective", "keep_size": False}):
        assert Transform(source([spec], (60, 90)), train=True).changes_size, spec


def test_albumentations_is_the_release_that_was_checked() -> None:
    assert A.__version__.startswith("2.0.")
