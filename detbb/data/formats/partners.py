"""Files that belong together by name: an image and its labels, its mask or its document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from detbb.data.formats.faults import Faults
from detbb.data.images import files_below, list_images, readable_headers

NOT_LABELS = ("classes.txt", "labels.txt", "names.txt", "obj.names.txt", "predefined_classes.txt", "readme.txt")
FEW = 0.1  # if fewer than this share of images have a partner, the folder is probably the wrong one


def listed_images(folder: Path, faults: Faults) -> list[str]:
    """The image files below `folder`; those that are passed over are noted."""
    names, unread = list_images(folder)
    faults.note("image file in a format that is not read (passed over; convert it to JPEG or PNG):", unread)
    return names


def readable_images(folder: Path, faults: Faults) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The image files below `folder`, and (height, width) of those that can be read."""
    names = listed_images(folder, faults)
    headers, bad = readable_headers(folder, names, links=faults.allow_links)
    faults.bad_images("image that cannot be read", bad)
    return names, headers


def check_partners(
    wanted: Mapping[str, str], folder: Path, suffix: str, faults: Faults, *, optional: bool, stems: Iterable[str] = ()
) -> set[str]:
    """The names in `wanted` (image -> name of its partner below `folder`) whose partner is there.

    What is missing on either side is refused, or noted where partners are `optional`. stems: further names without
    suffix that files in `folder` may have.
    """
    there = [n for n in files_below(folder, {suffix}) if PurePosixPath(n).name.lower() not in NOT_LABELS]
    listed = set(there)
    found = {image for image, name in wanted.items() if name in listed or (folder / name).is_file()}
    missing = [image for image in wanted if image not in found]
    known = {*wanted.values(), *(stem + suffix for stem in stems)}
    alone = [name for name in there if name not in known]
    what = f"{suffix[1:]} file"
    if wanted and len(found) < FEW * len(wanted) and (alone or not found):
        holds = f"holds {len(alone)} others: {', '.join(alone[:3])}" if alone else "holds none"
        faults.refuse(
            f"image without a {what} (of {len(wanted)}; looked in {folder.resolve()}, which {holds}):", missing
        )
        return found
    near = {_key(name): name for name in alone}
    renamed = {image: near[_key(image)] for image in missing if _key(image) in near}
    faults.refuse(f"image whose {what} has another name or case:", [f"{i} (there is {n})" for i, n in renamed.items()])
    lost = [image for image in missing if image not in renamed]
    (faults.note if optional else faults.refuse)(f"image without a {what}{' (no objects)' * optional}:", lost)
    faults.repair(f"{what} of no image (left out):", [name for name in alone if name not in renamed.values()])
    return found


def _key(name: str) -> str:
    """The bare name: without folder, endings and case."""
    return PurePosixPath(name).name.split(".")[0].casefold()
