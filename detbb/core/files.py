"""Files that are whole or not there, and tensors read without running code."""

from __future__ import annotations

import errno
import os
import pickle
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from detbb.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
MAX_ENTRIES = 1_000_000  # of all containers in a file of tensors


class BadFile(ValueError):
    """A file that cannot be used: truncated, altered, foreign, or not what it should be. Says which and why."""


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, verify: Callable[[Path], object] | None = None
) -> None:
    """Make `path` hold what `write` writes, or leave it as it was.

    Temporary file beside it, flush, fsync, `verify`, replace, fsync of the folder: at every moment a kill leaves the
    old file or the new one. Raises: UserError: `path` cannot be written, or the disk is full; OSError: anything else.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if verify is not None:
                verify(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            tidy([temporary])
            raise


def make_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make `folder` hold what `fill(path)` writes, unless it is there. It appears whole or not at all.

    Of several processes that make it at once, the first one's stays.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        fill(unfinished)
        os.rename(unfinished, folder)
        sync_folder(folder.parent)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tidy(files: Iterable[Path]) -> list[str]:
    """Remove files that nobody needs; a line for each that cannot be removed, which is no reason to end a run."""
    lines = []
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            lines.append(f"WARNING: cannot remove {file} ({error.strerror}); it is not needed any more")
    return lines


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"disk full: cannot write {path} ({error.strerror}); what was there is intact") from error
        if error.errno in REFUSED:
            raise UserError(f"cannot write {path} ({error.strerror})") from error
        raise


def check_folder(folder: Path) -> None:
    """Try to write where `folder` is or will be, before hours of work rely on it; leaves nothing. Raises: UserError."""
    with writing(folder):
        place = folder
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output file before the work for it. Raises: UserError: it exists already, or cannot be written."""
    with writing(path):
        if path.exists() and not overwrite:
            raise UserError(f"-o {path}: exists already; name another file, or --overwrite (nothing was changed)")
        if path.is_dir():
            raise UserError(f"-o {path}: is a folder; name a file")
    check_folder(path.parent)


def remove_leftovers(run: Path) -> list[str]:
    """Remove what `write_atomically` and `link_atomically` leave in a run folder when they are killed; as `tidy`."""
    own = (".config.yaml.*", ".freeze.json.*", ".metrics.jsonl.*", ".nonfinite_step_*")
    patterns = (*own, "checkpoints/.*.pt.*", "eval/step_*/*/.*", "tb/.events.*")
    return tidy(temporary for pattern in patterns for temporary in run.glob(f"{pattern}.tmp"))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # shares that sync files alone
            raise
    finally:
        os.close(descriptor)


def link_atomically(target: Path, link: Path) -> None:
    """Make `link` the same file as `target` (a hard link; a copy where the file system has none)."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        write_atomically(link, lambda file: file.write(target.read_bytes()))
        return
    os.replace(temporary, link)
    tidy([temporary])  # where the two were one file already, replacing does nothing
    sync_folder(link.parent)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` of tensors and plain containers, atomically, and read back to compare checksums.

    Tensors are written as the CPU's, wherever they are, so that any machine can read them.
    """
    content = _on_cpu(content)

    def write(file: BinaryIO) -> None:
        writer = _RememberError(file)
        try:
            torch.save(content, cast(BinaryIO, writer))
        except RuntimeError as error:  # torch hides the operating system's error behind one of its own
            raise (writer.error or error) from error

    write_atomically(path, write, verify=check_archive)


def _on_cpu(value: Any) -> Any:
    """The same containers with every tensor on the CPU; those that are there already are not copied."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, list | tuple) else value


def load_tensors(path: Path) -> Any:
    """What `save_tensors` or `torch.save` wrote, on the CPU. No code of the file runs.

    Raises: BadFile: missing, truncated, altered, compressed, with objects other than tensors and plain containers.
    """
    if not path.is_file():
        raise BadFile(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    try:
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"
        if archive or zipfile.is_zipfile(path):  # a file that only one of the two takes for an archive fails the check
            check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(path, content)
        return content
    except BadFile:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of torch's text is advice to switch this check off
        why = f" ({what[1]})" if what else ", or is not a PyTorch file"
        raise BadFile(f"{path}: holds objects other than tensors{why}") from error
    except Exception as error:  # torch's reader raises anything on bytes that it does not expect
        raise BadFile(f"{path}: cannot be read ({type(error).__name__}: {_first_line(error)})") from error


def check_archive(path: Path) -> None:
    """Refuse an archive that is not exactly what torch writes: compressed or overlapping records, wrong checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if min((e.header_offset for e in entries), default=0) != 0:
                raise BadFile(f"{path}: has something before its first record, which PyTorch never writes")
            if len({e.filename for e in entries}) < len(entries):
                raise BadFile(f"{path}: holds two records of one name, which PyTorch never writes")
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise BadFile(f"{path}: holds compressed records, which PyTorch never writes")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise BadFile(f"{path}: claims more data than the file holds")
            if (broken := archive.testzip()) is not None:
                raise BadFile(f"{path}: record {broken} does not match its checksum; the file was altered or cut")
    except BadFile:
        raise
    except Exception as error:  # zipfile, too, raises anything on bytes that it does not expect
        raise BadFile(f"{path}: not a whole PyTorch file ({_first_line(error)})") from error


def view_of(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of which storage a tensor is; the same for tied tensors, also on the meta device."""
    place = tensor.untyped_storage()._cdata
    return place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that claim more bytes than are stored, and a million entries: both could take any memory.

    Tied tensors count once. A list within many lists counts in each, since who goes through them meets it in each.
    """
    claimed: dict[tuple[Any, ...], int] = {}
    stored: dict[int, int] = {}
    entries, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple):
            entries += len(value)
            if entries > MAX_ENTRIES:
                raise BadFile(f"{path}: holds more than {MAX_ENTRIES:,} entries, which no file of detbb does")
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor):
            claim = value.numel() * value.element_size()
            real = value.layout == torch.strided and value.device.type == "cpu"  # `meta`: without values
            if not real or claim > value.untyped_storage().nbytes():
                raise BadFile(f"{path}: a tensor of shape {tuple(value.shape)} has fewer bytes stored than it claims")
            claimed[view_of(value)] = claim
            stored[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    if sum(claimed.values()) > sum(stored.values()):
        raise BadFile(f"{path}: its tensors overlap: fewer bytes are stored than they claim together")


class _RememberError:
    """A file for torch.save that keeps the first OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _first_line(error: BaseException) -> str:
    return (str(error).split("\n", 1)[0] or type(error).__name__)[:200]
