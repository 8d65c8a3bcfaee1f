"""Image files to arrays: RGB, upright, 8 bits, whatever the file holds, and never more than it may."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from detbb.core.errors import UserError, one_line
from detbb.core.files import REFUSED

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")  # no format that starts a program
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .pnm .jp2 .j2k".split())  # noqa: SIM905
UNREAD_SUFFIXES = frozenset(".heic .heif .avif .jxl .hdr .exr .pfm .psd .svg .tga .dng .cr2 .nef .arw .dcm".split())  # noqa: SIM905
THREADS = 16  # a look at many files waits for the disk or the network most of the time
_NO_RANGE = "32-bit, signed or floating-point pixels, whose range is not known; convert it to 8 or 16 bits, unsigned"
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; `max_pixels` is compared with every header before decoding
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """An image file that cannot be used: the file and why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def name_fault(name: str) -> str | None:
    """Why a file name may not be joined to an image folder, or None. Looks at the text alone."""
    if not name or "\0" in name:
        return "is empty or holds a NUL character"
    if (("/" in name or os.sep != "/") and os.path.isabs(name)) or (".." in name and ".." in Path(name).parts):
        return "leaves the image folder"
    return None


def safe_join(root: str | Path, name: str, *, links: bool = False) -> Path:
    """The path of file `name` below `root`.

    Raises BadImage for names that lead out of `root`: absolute ones, those with `..`, and symbolic links, unless
    `links` are allowed to.
    """
    path = Path(root) / name
    if fault := name_fault(name):
        raise BadImage(path, f"file name {fault}")
    real_root = _real(str(root))
    if not links and not os.path.realpath(path).startswith(real_root.rstrip(os.sep) + os.sep):
        raise BadImage(path, "is a symbolic link that leaves the image folder (data.<name>.allow_links: true lets it)")
    return path


@lru_cache(maxsize=64)
def _real(root: str) -> str:
    return os.path.realpath(root)


def image_header(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file after EXIF rotation, without decoding it. Raises BadImage."""
    with _open(path) as file:
        image = _identify(path, file)
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def read_image(path: str | Path, max_pixels: int) -> np.ndarray:
    """(h, w, 3) uint8 RGB, upright by its EXIF orientation.

    Gray becomes three equal channels, 16 bits are scaled by their range (value / 257), palettes are looked up, CMYK is
    converted, transparency is dropped, of several frames the first is taken. Raises BadImage, for more than
    `max_pixels` from the header alone.
    """
    with _open(path) as file:
        image = _identify(path, file, max_pixels)
        orientation = _orientation(image)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1:
            file.seek(0)
            if (fast := _decode_whole_jpeg(file.read())) is not None:
                return fast
        try:
            image.load()
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            return _rgb(image)
        except Exception as e:  # decoders raise anything on bytes they do not expect
            raise BadImage(path, f"cannot be decoded: {one_line(e, 200)}") from None


def read_index_png(path: str | Path, max_pixels: int) -> np.ndarray:
    """(h, w) uint8 values of a class-index mask: gray values, or palette indices. Raises BadImage."""
    with _open(path) as file:
        image = _identify(path, file, max_pixels)
        if image.mode not in ("L", "P", "1"):
            raise BadImage(path, f"has mode {image.mode}; a mask holds one 8-bit class index a pixel")
        try:
            return np.array(image, dtype=np.uint8)
        except Exception as e:
            raise BadImage(path, f"cannot be decoded: {one_line(e, 200)}") from None


def readable_headers(
    root: Path, names: Iterable[str], *, links: bool = False
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(height, width) by name of the images whose header can be read, and the others with the reason."""

    def look(name: str) -> tuple[int, int] | str:
        try:
            return image_header(safe_join(root, name, links=links))
        except BadImage as error:
            return error.reason

    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        found = dict(zip(names, threads.map(look, names), strict=True))
    bad = [(name, reason) for name, reason in found.items() if isinstance(reason, str)]
    return {name: size for name, size in found.items() if not isinstance(size, str)}, with_reasons(bad)


def with_reasons(found: Iterable[tuple[str, str]]) -> list[str]:
    """`name (reason)`; a reason stands once where several names in a row have it."""
    texts: list[str] = []
    last = ""
    for name, reason in found:
        texts.append(name if reason in ("", last) else f"{name} ({reason})")
        last = reason
    return texts


def read_bytes(path: str | Path) -> bytes:
    """What a regular file holds. Raises UserError."""
    try:
        with _open(path) as file:
            return file.read()
    except BadImage as e:  # nothing that `on_bad_image` passes over
        raise UserError(str(e)) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None


def read_text(path: str | Path) -> str:
    """What a regular file of UTF-8 text holds, without a byte order mark. Raises UserError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: cannot be read: {e}") from None


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the image files below `folder`, sorted, relative to it; and of those in formats that are not read."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    names = files_below(folder, SUFFIXES | UNREAD_SUFFIXES)
    unread = [name for name in names if Path(name).suffix.lower() in UNREAD_SUFFIXES]
    return [name for name in names if Path(name).suffix.lower() in SUFFIXES], unread


def files_below(folder: Path, suffixes: Collection[str]) -> list[str]:
    """Names of the files below `folder` that end in one of these (in any case), sorted, relative to it.

    Folders that are symbolic links out of `folder` are entered, each target once: `safe_join` says what of it is used.
    """
    found: list[Path] = []
    root, seen = Path(folder).resolve(), set[Path]()

    def leads_to_new(link: Path) -> bool:
        target = link.resolve()
        new = target not in seen and not target.is_relative_to(root) and not root.is_relative_to(target)
        seen.add(target)
        return new

    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not (link := Path(at, f)).is_symlink() or leads_to_new(link)]
        found += [Path(at, name) for name in names]
    return sorted(p.relative_to(folder).as_posix() for p in found if p.suffix.lower() in suffixes)


def _open(path: str | Path) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            return open(path, "rb")
    except (OSError, ValueError) as e:
        why = f"cannot be read: {getattr(e, 'strerror', None) or e}"
        if isinstance(e, OSError) and e.errno not in REFUSED:  # `on_bad_image: skip` would leave out sound images
            raise UserError(f"{path}: {why}; this is the machine's fault (too many open files: ulimit -n)") from None
        raise BadImage(path, why) from None
    raise BadImage(path, "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file")


def _identify(path: str | Path, file: BinaryIO, max_pixels: float = math.inf) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        file.seek(0)
        raise BadImage(path, _what_else(file.read(1024))) from None
    except Exception as e:
        raise BadImage(path, f"cannot be decoded: {one_line(e, 200)}") from None
    if image.width * image.height > max_pixels:
        raise BadImage(path, f"has {image.width} x {image.height} pixels, more than max_pixels: {max_pixels}")
    tags = getattr(image, "tag_v2", {})  # of a TIFF: bits a sample, and whether they are unsigned integers (1)
    unsigned = set(tags.get(339, (1,))) == {1} and set(tags.get(258, (8,))) <= {1, 2, 4, 8, 16}
    if not unsigned or image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # 16-bit PGM is `I`, too
        raise BadImage(path, f"holds {_NO_RANGE}")
    return image


def _what_else(start: bytes) -> str:
    """What a file is that is no image, by its first kilobyte."""
    if start[:4] in (b"II*\0", b"MM\0*"):
        return f"is a TIFF of {_NO_RANGE}"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the image itself (git lfs pull)"
    if b"\n" not in start.strip() and Path(start.strip().decode("utf-8", "replace")).suffix.lower() in SUFFIXES:
        return "holds the name of another file: a symbolic link that was copied as text"
    return "is not an image of a known format" if start else "is empty"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 … 8. TIFF is turned by Pillow; a PNG counts only what stands before the pixels."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF; the pixels may be fine
        return 1
    return value if value in _UPRIGHT else 1


def _decode_whole_jpeg(data: bytes) -> np.ndarray | None:
    """OpenCV takes half of Pillow's time, but before version 5 fills in what a cut file lacks: hence the check."""
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error:
        return None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat(((deep + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))
