"""Every kind of image file becomes upright 8-bit RGB, or a BadImage that says why."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detbb.data import images
from detbb.data.images import BadImage, image_header, list_images, read_image, readable_headers, safe_join

LIMIT = 10_000_000
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)  # (h, w, RGB)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def smooth(h: int = 64, w: int = 96) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, (x + y) * 255 // (w + h)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_lossless_formats_give_the_pixels_in_rgb_order(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", PIXELS, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_image(path, LIMIT), PIXELS)
    assert image_header(path) == (7, 5)


def test_both_jpeg_decoders_give_the_same_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", smooth(), quality=80)
    fast = read_image(path, LIMIT)
    trailing = tmp_path / "b.jpg"
    trailing.write_bytes(path.read_bytes() + b"garbage")  # no end marker at the end: the careful decoder
    assert np.array_equal(read_image(trailing, LIMIT), fast)
    assert np.abs(fast.astype(int) - smooth()).max() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied_to_pixels_and_header(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", smooth(), exif=exif, **options)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert np.array_equal(read_image(path, LIMIT), expected)
    assert image_header(path) == expected.shape[:2] == ((96, 64) if orientation >= 5 else (64, 96))
    if suffix == "jpg":
        assert np.array_equal(expected, cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def test_gray_palette_alpha_and_bitmaps_become_rgb(tmp_path: Path) -> None:
    gray = PIXELS[..., 0]
    assert np.array_equal(read_image(save(tmp_path / "l.png", gray), LIMIT), np.stack([gray] * 3, axis=2))
    alpha = np.dstack([PIXELS, gray])
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", alpha), LIMIT), PIXELS)
    palette = Image.fromarray(gray % 3, mode=None).convert("L")
    palette = palette.convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png")
    assert (
        read_image(tmp_path / "p.png", LIMIT)[0, 0].tolist()
        == np.eye(3, dtype=int)[gray[0, 0] % 3].__mul__(255).tolist()
    )
    bits = save(tmp_path / "1.png", (gray > 127).astype(np.uint8) * 255, mode="1")
    assert np.array_equal(read_image(bits, LIMIT)[..., 0] > 127, gray > 127)


def test_16_bit_images_are_scaled_by_their_range(tmp_path: Path) -> None:
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        cv2.imwrite(str(tmp_path / name), deep)
        values = read_image(tmp_path / name, LIMIT)[..., 1].astype(float)
        assert np.abs(values - deep / 257).max() <= 0.5, name
    colour = np.stack([deep, deep[::-1], deep.T], axis=2)
    cv2.imwrite(str(tmp_path / "c.png"), colour[..., ::-1])
    assert np.abs(read_image(tmp_path / "c.png", LIMIT).astype(float) - colour / 257).max() <= 1


def test_cmyk_jpeg_shows_its_colours(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", smooth(), mode="CMYK", quality=95)
    assert np.abs(read_image(path, LIMIT).astype(int) - smooth()).mean() < 8


def test_unusable_files_are_bad_images_with_a_reason(tmp_path: Path) -> None:
    jpeg = save(tmp_path / "good.jpg", smooth()).read_bytes()
    png = save(tmp_path / "good.png", smooth()).read_bytes()
    files = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"hello world, this is no image", "not an image"),
        "headless.jpg": (jpeg[: len(jpeg) // 4], "(?i)truncated"),
        "cut.jpg": (jpeg[:-40], "(?i)truncated"),
        "cut.png": (png[: len(png) // 2], "decoded"),
        "flipped.png": (png[:90] + bytes([png[90] ^ 255]) + png[91:], "decoded"),
        "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadImage, match=reason) as error:
            read_image(tmp_path / name, LIMIT)
        assert name in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    for name, reason in {"folder.jpg": "folder", "fifo.jpg": "regular", "absent.jpg": "No such file"}.items():
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name, LIMIT)
        with pytest.raises(BadImage, match=reason):
            image_header(tmp_path / name)


def test_headers_of_a_set_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(8, timeout=10)
    monkeypatch.setattr(images, "image_header", lambda path: (together.wait(), (1, 2))[1])
    assert readable_headers(tmp_path, iter("abcdefgh")) == (dict.fromkeys("abcdefgh", (1, 2)), [])


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "really_png.jpg"
    Image.fromarray(PIXELS).save(path, format="PNG")
    assert np.array_equal(read_image(path, LIMIT), PIXELS)


def test_the_pixel_limit_holds_before_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.zeros((2000, 3000), np.uint8))
    huge = tmp_path / "huge.png"  # a header of 10^9 pixels and nothing behind it
    data = bytearray(path.read_bytes())
    data[16:24] = (40_000).to_bytes(4, "big") + (25_000).to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    huge.write_bytes(bytes(data))
    for file in (path, huge):
        with pytest.raises(BadImage, match=r"max_pixels|limit"):
            read_image(file, 5_999_999)
    assert read_image(path, 6_000_000).shape == (2000, 3000, 3)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside.png", "a/../../outside.png", "", "a\0b.png", "link.png", "linked/a.png"]
)
def test_file_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    save(tmp_path / "outside.png", PIXELS)
    (tmp_path / "other").mkdir()
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(BadImage, match=r"leaves|NUL"):
        safe_join(root, name)


def test_linked_folders_are_entered_once_and_never_in_a_circle(tmp_path: Path) -> None:
    root, store = tmp_path / "images", tmp_path / "store"
    for folder in (root, store, store / "more"):
        folder.mkdir()
    for file in (root / "a.png", store / "b.png", store / "more" / "c.png"):
        Image.new("RGB", (4, 4)).save(file)
    (root / "linked").symlink_to(store)
    (root / "again").symlink_to(root)
    (store / "more" / "back").symlink_to(store)
    names, _ = list_images(root)
    assert names == ["a.png", "linked/b.png", "linked/more/c.png"]
    sizes, bad = readable_headers(root, names, links=False)
    assert list(sizes) == ["a.png"] and len(bad) == 2 and "allow_links" in bad[0]
    assert list(readable_headers(root, names, links=True)[0]) == names


def test_links_inside_the_folder_and_a_linked_folder_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    save(root / "a.png", PIXELS)
    (root / "same.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(root)
    for folder in (root, tmp_path / "alias"):
        assert np.array_equal(read_image(safe_join(folder, "same.png"), LIMIT), PIXELS)
    save(root / "ünï ☃.png", PIXELS)
    assert list_images(root) == (["a.png", "same.png", "ünï ☃.png"], [])


def test_max_pixels_may_be_above_the_limit_of_pillow(tmp_path: Path) -> None:
    Image.new("1", (14_000, 14_300)).save(tmp_path / "large.png")  # 200 megapixels
    assert image_header(tmp_path / "large.png") == (14_300, 14_000)
    with pytest.raises(BadImage, match="14000 x 14300 pixels, more than max_pixels: 10000000"):
        read_image(tmp_path / "large.png", LIMIT)
