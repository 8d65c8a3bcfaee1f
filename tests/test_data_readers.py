"""What each format's files become, and what of them is repaired or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import box, read, shapes_config, shapes_source, shapes_split, write_coco
from PIL import Image

from detbb.config.schema import DataConfig, SplitConfig
from detbb.core.errors import UserError
from detbb.data.formats import read_split
from detbb.data.formats.base import Request
from detbb.data.formats.coco import flip_pairs, read_coco
from detbb.data.formats.semantic import read_mask
from detbb.structures.annotations import Annotations

GOOD = [box(5, 7, [1, 2, 10, 20]), box(6, 0, [0, 0, 5, 5], 90), box(9, 7, [3.5, 4.25, 6, 7], 90, iscrowd=1)]


def equal(a: Annotations, b: Annotations) -> None:
    assert a.classes == b.classes and list(a.file_names) == list(b.file_names)
    for field in ("sizes", "first", "boxes_xywh", "labels", "crowd", "areas"):
        assert np.allclose(getattr(a, field), getattr(b, field), atol=1e-9), field


def test_coco_keeps_id_gaps_crowds_and_empty_images(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD)
    assert data.classes == ("car", "zebra") and data.category_ids.tolist() == [3, 90]
    assert data.image_ids.tolist() == [7, 0, 900] and data.sizes.tolist() == [[30, 40], [50, 20], [32, 32]]
    assert data.first.tolist() == [0, 2, 3, 3] and len(data) == 3
    assert data.labels.tolist() == [0, 1, 1] and data.crowd.tolist() == [False, True, False]
    assert data.boxes_xywh[1].tolist() == [3.5, 4.25, 6, 7] and data.object_ids.tolist() == [5, 9, 6]
    assert data.faults == () and data.path(1) == tmp_path / "images" / "a.png"


def test_repairs_are_made_and_counted(tmp_path: Path) -> None:
    bare = {"image_id": 0, "category_id": 3, "bbox": [1, 1, 4, 5]}  # no id, area, iscrowd
    zero_height, outside = box(-21, 7, [1, 1, 5, 0]), box(22, 7, [100, 1, 5, 5])
    data = read(
        tmp_path,
        [box(0, 7, [1, 1, 2, 2]), box(8, 7, [2, 2, 2, 2]), box(8, 0, [3, 3, 2, 2]), bare, zero_height, outside],
    )
    assert len(data.labels) == 4 and data.areas.tolist() == [4, 4, 4, 20]
    assert len(set(data.object_ids.tolist())) == 4 and 0 not in data.object_ids and 8 in data.object_ids
    counts = {f.kind.split(" ")[0]: (f.count, f.repaired) for f in data.faults}
    assert counts == {"box": (1, True), "missing": (1, True), "annotation": (4, True)} and len(data.faults) == 5


def test_missing_image_sizes_come_from_the_upright_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_coco(tmp_path, [])
    Image.fromarray(np.zeros((10, 30, 3), np.uint8)).save(tmp_path / "images" / "t.jpg", exif=exif)
    path = write_coco(tmp_path, [], images=[{"id": 1, "file_name": "t.jpg"}])
    assert read_coco(Request(tmp_path / "images", path)).sizes.tolist() == [[30, 10]]


NAN, INF = float("nan"), float("inf")
# tests/support/planted.py holds the faults that people make; these are of files that nobody wrote by hand.
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "huge box": ([box(54, 7, [0, 0, 1e200, 1e200]) | {"area": None}], {}, "beyond 1e9.*54"),
    "rle without size": ([box(55, 7, [0, 0, 3, 3], segmentation={"size": None, "counts": "0"})], {}, "run lengths.*55"),
    "rle of a number": ([box(56, 7, [0, 0, 3, 3], segmentation={"size": 5, "counts": "0"})], {}, "run lengths.*56"),
    "rle with a surrogate": (
        [box(57, 7, [0, 0, 3, 3], segmentation={"size": [30, 40], "counts": "\ud800"})],
        {},
        "not a COCO file",
    ),
    "surrogate name": ([], {"images": [{"id": 1, "file_name": "\ud800.png", "width": 1, "height": 1}]}, "not a COCO"),
    "surrogate class": ([], {"categories": [{"id": 1, "name": "\ud800"}]}, "not a COCO file"),
    "negative image id": ([], {"images": [{"id": -1, "file_name": "a.png"}]}, r">= 0.*images\[0\]"),
    "negative category id": ([], {"categories": [{"id": -1, "name": "x"}]}, r">= 0.*categories\[0\]"),
    "huge id": ([box(2**63 - 1, 7, [0, 0, 3, 3])], {}, r"annotations\[0\]"),
    "list": ([], {"images": {}}, "array"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_repaired_is_refused_with_file_and_id(tmp_path: Path, fault: str) -> None:
    annotations, changes, message = REFUSED[fault]
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, annotations, **changes)
    assert "annotations.json" in str(error.value) and "\n" not in str(error.value)


def test_all_bad_boxes_are_refused_at_once_with_ten_ids(tmp_path: Path) -> None:
    wrong = [box(100 + k, 7, [0, 0, -1, 1]) for k in range(12)] + [box(200, 7, [NAN, 0, 1, 1])]
    with pytest.raises(UserError, match=r"1 x box that is not finite.* 200.*12 x box of negative.* 109, …"):
        read(tmp_path, wrong)


@pytest.mark.parametrize("text", ["null", '{"images": 1e999}', "\0\1\2"])
def test_text_that_is_no_coco_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="not a COCO file"):
        read_coco(Request(tmp_path, tmp_path / "x.json"))


def test_image_level_files_give_boxes_around_whole_images(tmp_path: Path) -> None:
    data = read(
        tmp_path,
        [{"id": k + 1, "image_id": i, "category_id": c} for k, (i, c) in enumerate([(7, 3), (7, 90), (900, 3)])],
    )
    assert data.boxes_xywh.tolist() == [[0, 0, 40, 30], [0, 0, 40, 30], [0, 0, 32, 32]] and data.has("labels")


def test_a_class_list_selects_and_orders(tmp_path: Path) -> None:
    path = write_coco(tmp_path, GOOD)
    data = read_coco(Request(tmp_path / "images", path, classes=("zebra",)))
    assert data.classes == ("zebra",) and data.category_ids.tolist() == [90] and data.labels.tolist() == [0, 0]
    with pytest.raises(UserError, match=r"'zebr' is not known.*did you mean 'zebra'"):
        read_coco(Request(tmp_path / "images", path, classes=("zebr",)))


def test_val_follows_the_order_of_train_no_other_classes(tmp_path: Path) -> None:
    for name in ("train", "val", "other"):
        (tmp_path / name).mkdir()
    write_coco(tmp_path / "train", GOOD)
    write_coco(
        tmp_path / "val",
        [box(1, 7, [0, 0, 3, 3], 1)],
        categories=[{"id": 1, "name": "zebra"}, {"id": 2, "name": "car"}],
    )
    write_coco(tmp_path / "other", [], categories=[{"id": 1, "name": "zebra"}, {"id": 2, "name": "cat"}])
    splits = {
        n: SplitConfig(images=str(tmp_path / n / "images"), annotations=str(tmp_path / n / "annotations.json"))
        for n in ("train", "val", "other")
    }
    val = read_split(DataConfig(train=splits["train"], val=splits["val"]), "val", "mine")
    assert (
        val is not None
        and val.classes == ("car", "zebra")
        and val.category_ids.tolist() == [2, 1]
        and val.labels.tolist() == [1]
    )
    with pytest.raises(UserError, match=r"data\.mine\.val: .* 1 x class that the training split lacks: cat$"):
        read_split(DataConfig(train=splits["train"], val=splits["other"]), "val", "mine")
    assert read_split(DataConfig(train=splits["train"]), "val", "mine") is None


def test_keypoints_follow_the_category_and_pair_left_with_right(tmp_path: Path) -> None:
    categories = [{"id": 3, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"]}]
    points = [1, 2, 2, 3, 4, 1, 0, 0, 0]
    data = read(tmp_path, [box(1, 7, [0, 0, 9, 9], keypoints=points), box(2, 7, [0, 0, 9, 9])], categories=categories)
    assert data.keypoints is not None and data.keypoints[0].ravel().tolist() == points and not data.keypoints[1].any()
    assert data.keypoint_names == ("nose", "left_eye", "right_eye") and data.flip_pairs == ((1, 2),)
    assert flip_pairs(["brightness", "lefteye", "tail", "righteye"]) == ((1, 3),)
    assert flip_pairs(["Left_eye", "R_ear", "Right_eye", "nose", "L_ear", "hip.l", "hip.r"]) == ((0, 2), (1, 4), (5, 6))
    assert flip_pairs(["l", "tail", "collar", "corral"]) == ()
    with pytest.raises(UserError, match=r"keypoints that are not 3.* 1$"):
        read(tmp_path, [box(1, 7, [0, 0, 9, 9], keypoints=[1, 2])], categories=categories)
    with pytest.raises(UserError, match=r"keypoints that are not 3.* 1$"):  # finite, but not as float32
        read(tmp_path, [box(1, 7, [0, 0, 9, 9], keypoints=[1e300, *points[1:]])], categories=categories)


def as_voc(data: Annotations, folder: Path) -> Path:
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for i, name in enumerate(data.file_names):
        h, w = data.sizes[i]
        objects = ""
        for k in range(*data.first[i : i + 2]):
            x, y, bw, bh = data.boxes_xywh[k]
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + bw}</xmax><ymax>{y + bh}</ymax>"
            head = f"<name>{data.classes[data.labels[k]]}</name><difficult>{int(data.crowd[k])}</difficult>"
            objects += f"<object>{head}<bndbox>{corners}</bndbox></object>"
        xml = f"<annotation><size><width>{w}</width><height>{h}</height><depth>3</depth></size>{objects}</annotation>"
        (folder / "Annotations" / f"{Path(name).stem}.xml").write_text(xml)
    listing = folder / "ImageSets" / "Main" / "train.txt"
    listing.write_text("".join(f"{Path(n).stem}  1\n" for n in data.file_names))
    return listing


def as_yolo(data: Annotations, folder: Path) -> None:
    folder.mkdir()
    for i, name in enumerate(data.file_names):
        h, w = data.sizes[i]
        rows = [(data.labels[k], data.boxes_xywh[k]) for k in range(*data.first[i : i + 2])]
        text = "".join(
            f"{c} {(x + bw / 2) / w:.17g} {(y + bh / 2) / h:.17g} {bw / w:.17g} {bh / h:.17g}\n"
            for c, (x, y, bw, bh) in rows
        )
        if text:
            (folder / name).with_suffix(".txt").write_text(text)


def test_voc_reads_the_same_content_as_coco(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD)
    listing = as_voc(data, tmp_path / "voc")
    source = DataConfig(format="voc", train=SplitConfig(images=str(tmp_path / "images"), annotations=str(listing)))
    voc = read_split(source, "train", "voc")
    assert voc is not None and voc.image_ids.tolist() == [1, 2, 3]
    equal(voc, data)
    source.classes = ["zebra"]
    chosen = read_split(source, "train", "voc")
    assert chosen is not None and chosen.labels.tolist() == [0, 0]
    source.classes = ["zebra", "lion"]
    with pytest.raises(UserError, match="'lion' is not known; valid are car, zebra"):
        read_split(source, "train", "voc")


def test_yolo_reads_the_same_content_as_coco_and_polygons(tmp_path: Path) -> None:
    for item in (data := GOOD[:2]):
        item["iscrowd"] = 0
    coco = read(tmp_path, data)
    order = [1, 0, 2]  # sorted by file name
    as_yolo(coco, tmp_path / "labels")
    (tmp_path / "names.yaml").write_text("names: {0: car, 1: zebra}")
    split = SplitConfig(images=str(tmp_path / "images"), annotations=str(tmp_path / "labels"))
    yolo = read_split(DataConfig(format="yolo", train=split, classes=str(tmp_path / "names.yaml")), "train", "y")
    assert yolo is not None and list(yolo.file_names) == ["a.png", "b.png", "c.png"] and yolo.classes == coco.classes
    for new, old in enumerate(order):
        assert np.allclose(yolo.boxes_xywh[yolo.rows(new)], coco.boxes_xywh[coco.rows(old)], atol=1e-9)
        assert np.array_equal(yolo.labels[yolo.rows(new)], coco.labels[coco.rows(old)])
    (tmp_path / "labels" / "c.txt").write_text("1 0.25 0.25 0.75 0.25 0.5 1\n")
    polygons = read_split(DataConfig(format="yolo", train=split, classes=["car", "zebra"]), "train", "y")
    assert polygons is not None and polygons.segments is not None
    assert polygons.areas[-1] == 16 * 24 / 2 and polygons.areas[0] == np.prod(polygons.boxes_xywh[0, 2:])
    assert polygons.boxes_xywh[-1].tolist() == [8, 8, 16, 24] and polygons.segments.polygons(2)[0].tolist() == [
        [8, 8],
        [24, 8],
        [16, 32],
    ]
    (tmp_path / "labels" / "c.txt").write_text("0 a b c d")
    with pytest.raises(UserError, match="line 1"):
        read_split(DataConfig(format="yolo", train=split, classes=["car", "zebra"]), "train", "y")


def read_lines(folder: Path, *lines: str, **options: Any) -> Annotations:
    """The labels of image b.png (40 x 30) as YOLO."""
    read(folder, GOOD)
    (folder / "labels").mkdir()
    (folder / "labels" / "b.txt").write_text("\n".join(lines))
    split = SplitConfig(images=str(folder / "images"), annotations=str(folder / "labels"))
    data = read_split(DataConfig(format="yolo", train=split, **{"classes": ["car", "zebra"], **options}), "train", "y")
    assert data is not None
    return data


def test_yolo_named_keypoints_come_in_pixels_beside_their_box(tmp_path: Path) -> None:
    lines = ("1 0.5 0.5 0.4 0.2 0.4 0.5 2 0 0 0", "0 0.5 0.5 0.5 0.5 0.25 0.75 1 0.5 0.5 2", "0 0.5 0.5 1 1")
    data = read_lines(tmp_path, *lines, keypoints=["left_eye", "right_eye"])
    assert (
        data.keypoints is not None and data.keypoint_names == ("left_eye", "right_eye") and data.flip_pairs == ((0, 1),)
    )
    assert data.boxes_xywh.tolist() == [[12, 12, 16, 6], [10, 7.5, 20, 15], [0, 0, 40, 30]] and not data.has("masks")
    expected = [[[16, 15, 2], [0, 0, 0]], [[10, 22.5, 1], [20, 15, 2]], [[0, 0, 0], [0, 0, 0]]]
    assert data.keypoints.tolist() == expected and data.areas.tolist() == [96, 300, 1200]


def test_yolo_data_file_of_ultralytics_names_the_keypoints(tmp_path: Path) -> None:
    names = tmp_path / "data.yaml"
    names.write_text("names: {0: car, 1: zebra}\nkpt_shape: [2, 2]\nflip_idx: [1, 0]\n")
    data = read_lines(tmp_path, "1 0.5 0.5 0.4 0.2 0.4 0.5 0 0", classes=str(names))
    assert data.keypoints is not None and data.keypoints.tolist() == [[[16, 15, 2], [0, 0, 0]]]
    assert data.keypoint_names == ("0", "1") and data.flip_pairs == ((0, 1),)


def test_yolo_oriented_boxes_and_unnamed_keypoints_keep_boxes(tmp_path: Path) -> None:
    oriented = read_lines(tmp_path / "a", "0 0.5 0 1 0.5 0.5 1 0 0.5", "0 .25 .5 .5 .5 .5 .75 .25 .75")
    assert oriented.boxes_xywh.tolist() == [[0, 0, 40, 30], [10, 15, 10, 7.5]] and oriented.has("masks")
    pose = read_lines(tmp_path / "b", *["0 0.5 0.5 0.5 0.5 0.25 0.75 1 0.5 0.5 2"] * 2)
    assert pose.boxes_xywh.tolist() == [[10, 7.5, 20, 15]] * 2 and not pose.has("keypoints") and len(pose.notes) == 2
    polygons = read_lines(tmp_path / "c", *["0 0.5 0.5 0.5 0.5 0.25 0.75 0.5 0.5"] * 2, keypoints=[])
    assert polygons.boxes_xywh.tolist() == [[10, 15, 10, 7.5]] * 2 and polygons.has("masks")


def semantic_source(folder: Path, values: list[int], classes: Any, **more: Any) -> DataConfig:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    mask = np.resize(np.array(values, dtype=np.uint8), (6, 8))
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / "images" / "a.jpg")
    palette = Image.fromarray(mask)
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    palette.save(folder / "masks" / "a.png")
    split = SplitConfig(images=str(folder / "images"), annotations=str(folder / "masks"))
    return DataConfig(format="semantic", train=split, classes=classes, **more)


def test_ids_do_not_shift_when_a_file_turns_bad(tmp_path: Path) -> None:
    coco = read(tmp_path, GOOD)
    as_yolo(coco, tmp_path / "labels")
    split = SplitConfig(images=str(tmp_path / "images"), annotations=str(tmp_path / "labels"))
    masks = semantic_source(tmp_path / "sem", [1], ["a", "b"], on_bad_image="skip")
    yolo = DataConfig(format="yolo", train=split, classes=["car", "zebra"], on_bad_image="skip")
    for source in (yolo, masks):
        assert source.train is not None
        before = read_split(source, "train", "x")
        folder = Path(source.train.images or "")
        first = sorted(folder.iterdir())[0]
        (folder / "0.png").write_bytes(b"")
        after = read_split(source, "train", "x")
        (folder / "0.png").unlink()
        assert before is not None and after is not None and first.name != "0.png"
        assert (after.image_ids == before.image_ids + 1).all() and list(after.file_names) == list(before.file_names)


def test_a_name_of_several_files_is_refused_and_may_hold_spaces(tmp_path: Path) -> None:
    data = read(tmp_path, GOOD)
    listing = as_voc(data, tmp_path / "voc")
    images, xml = tmp_path / "images", tmp_path / "voc" / "Annotations"
    (images / "a.png").rename(images / "a b.png")
    (xml / "a.xml").rename(xml / "a b.xml")
    listing.write_text("b  1\na b\nc -1\n")
    source = DataConfig(format="voc", train=SplitConfig(images=str(images), annotations=str(listing)))
    found = read_split(source, "train", "voc")
    assert found is not None and list(found.file_names) == ["b.png", "a b.png", "c.png"]
    (images / "more").mkdir()
    (images / "more" / "c.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"name that several image files have: c$"):
        read_split(source, "train", "voc")


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "xml", "classes"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    data, fifo = read(tmp_path, GOOD), tmp_path / "fifo.json"
    path = {"yolo": tmp_path / "labels" / "a.txt", "xml": tmp_path / "voc" / "Annotations" / "a.xml"}.get(kind, fifo)
    listing = as_voc(data, tmp_path / "voc")
    as_yolo(data, tmp_path / "labels")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    annotations = {"yolo": tmp_path / "labels", "xml": listing, "classes": tmp_path / "labels"}.get(kind, fifo)
    if kind == "voc":
        (tmp_path / "Annotations").mkdir()
    split = SplitConfig(images=str(tmp_path / "images"), annotations=str(annotations))
    source = DataConfig(format={"xml": "voc", "classes": "yolo"}.get(kind, kind), train=split)  # type: ignore[arg-type]
    if source.format == "yolo":
        source.classes = str(fifo) if kind == "classes" else ["car", "zebra"]
    with pytest.raises(UserError, match=rf"{path.name}: is not a regular file"):
        read_split(source, "train", "x")


def test_semantic_values_become_contiguous_labels(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"11": "b", "0": "void", "200": "c", "3": "a"}')
    data = read_split(semantic_source(tmp_path, [0, 3, 11, 200, 255], str(tmp_path / "classes.json")), "train", "s")
    assert (
        data is not None and data.classes == ("void", "a", "b", "c") and data.category_ids.tolist() == [0, 3, 11, 200]
    )
    assert read_mask(data, 0).ravel()[:5].tolist() == [0, 1, 2, 3, 255]
    ignoring = read_split(
        semantic_source(tmp_path, [0, 3, 11], str(tmp_path / "classes.json"), ignore_index=0), "train", "s"
    )
    assert (
        ignoring is not None
        and ignoring.classes == ("a", "b", "c")
        and read_mask(ignoring, 0).ravel()[:3].tolist() == [255, 0, 1]
    )
    unknown = read_split(semantic_source(tmp_path, [3, 77], str(tmp_path / "classes.json")), "train", "s")
    assert unknown is not None
    with pytest.raises(UserError, match=r"a\.png.*\[77\]"):
        read_mask(unknown, 0)
    os.remove(tmp_path / "masks" / "a.png")
    source = semantic_source(tmp_path, [3], str(tmp_path / "classes.json"))
    os.remove(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"without a png file .*: a\.jpg"):
        read_split(source, "train", "s")


@pytest.mark.parametrize("classes", [[], ["a", "a"], {"x": "a"}, {-1: "a"}, [1], {256: "a"}])
def test_unusable_class_lists_are_refused(tmp_path: Path, classes: Any) -> None:
    (tmp_path / "names.json").write_text(json.dumps(classes))
    for given in (None, "absent classes.txt", str(tmp_path / "names.json")):
        with pytest.raises(UserError, match=r"class(es| names)"):
            read_split(semantic_source(tmp_path, [0], given), "train", "s")


def test_shapes_are_made_once_and_read_as_coco_and_semantic_too(tmp_path: Path) -> None:
    config = shapes_config(tmp_path)
    train, val = shapes_split(config), shapes_split(config, "val")
    folder = tmp_path / "train_26"
    first = {p: p.read_bytes() for p in sorted(folder.rglob("*.*"))}
    made = folder.stat().st_mtime_ns
    assert shapes_split(config).classes == ("circle", "rectangle", "triangle") and folder.stat().st_mtime_ns == made
    again = shapes_split(shapes_config(tmp_path / "again"))
    assert {p.name: p.read_bytes() for p in sorted((tmp_path / "again" / "train_26").rglob("*.*"))} == {
        p.name: b for p, b in first.items()
    }
    equal(train, again)
    assert not np.array_equal(train.boxes_xywh[:5], val.boxes_xywh[:5])
    counts = np.diff(train.first)
    assert counts.min() == 0 and counts.max() >= 4 and train.flip_pairs == ((1, 3),) and not train.faults
    split = SplitConfig(images=str(folder / "images"), annotations=str(folder / "masks"))
    masks = read_split(DataConfig(format="semantic", train=split, classes=str(folder / "classes.json")), "train", "m")
    assert masks is not None and masks.classes == ("background", *train.classes)
    seen = set(np.unique(np.concatenate([read_mask(masks, i).ravel() for i in range(len(masks))])))
    assert seen == {0, 1, 2, 3}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_foreign_folder_is_not_taken_for_generated_shapes(tmp_path: Path) -> None:
    (tmp_path / "train_26").mkdir()
    (tmp_path / "train_26" / "annotations.json").write_text(json.dumps({"info": {"description": "mine"}}))
    with pytest.raises(UserError, match="remove it"):
        read_split(shapes_source(tmp_path), "train", "shapes")


def test_annotations_are_arrays_alone(tmp_path: Path) -> None:
    """A worker that only reads arrays writes no reference counts, so pages stay shared."""
    data = shapes_split(shapes_config(tmp_path))
    assert data.segments is not None
    for holder in (data.file_names, data.segments):
        for value in vars(holder).values():
            assert isinstance(value, np.ndarray) or type(value).__name__ == "PackedStrings"


def test_real_coco_reads_as_pycocotools_does(data_folder: Callable[[str], Path]) -> None:
    from pycocotools.coco import COCO

    root = data_folder("coco-tiny")
    for split in ("train", "val"):
        data = read_coco(Request(root / split, root / "annotations" / f"instances_{split}.json"))
        coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        assert len(data) == 80 and len(data.classes) == 80 and data.segments is not None
        for i, image_id in enumerate(data.image_ids.tolist()):
            truth = [a for a in coco.imgToAnns[image_id] if min(a["bbox"][2:]) > 0]
            assert [a["id"] for a in truth] == data.object_ids[data.rows(i)].tolist()
            assert [a["bbox"] for a in truth] == data.boxes_xywh[data.rows(i)].tolist()
            assert [bool(a["iscrowd"]) for a in truth] == data.crowd[data.rows(i)].tolist()


def everything(data: Annotations) -> dict[str, Any]:
    masks = [data.segments.coco(row) for row in range(len(data.labels))] if data.segments is not None else []
    arrays = {n: v.tolist() for n, v in vars(data).items() if isinstance(v, np.ndarray)}
    return arrays | {"files": list(data.file_names), "masks": masks, "faults": data.faults}


def test_a_file_read_in_runs_is_the_file_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polygon, square = [1.5, 2, 9, 2, 9, 12.25], {"size": [30, 40], "counts": [600, 5, 595]}
    shapes: list[Any] = [[polygon], None, square, [polygon, polygon[::-1]], [], [polygon[:4]], [polygon]]
    rows = [box(20 - k, 7 * (k % 2), [k, 1, 5, 5.5], segmentation=s) for k, s in enumerate(shapes)]
    rows[2]["image_id"] = 7
    wrong = [
        box(30, 7, [1, 1, 2, 2], segmentation=[[1, 2, 3]]),
        box(31, 7, [1, 1, 2, 2], segmentation=square | {"size": [1, 1]}),
    ]
    at_once = everything(read(tmp_path, rows))
    monkeypatch.setattr("detbb.data.formats.coco_json.AT_ONCE", 2)
    assert everything(read(tmp_path, rows)) == at_once and len(at_once["masks"]) == 7
    with pytest.raises(UserError, match=r"2 x segmentation with an odd .* annotation ids 30, 31"):
        read(tmp_path, [*rows, *wrong])
    with pytest.raises(UserError, match=r"Expected `array` of length 4, got 3 - at `\$\.annotations\[6\]\.bbox`"):
        read(tmp_path, [*rows[:6], rows[6] | {"bbox": [1, 2, 3]}])
    with pytest.raises(UserError, match=r"1 x box that is not finite .* annotation ids 99"):
        read(tmp_path, [*rows, box(99, 7, [1, float("nan"), 2, 2])])
