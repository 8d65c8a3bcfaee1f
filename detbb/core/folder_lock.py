"""One writer a folder, also on a shared file system and after a kill."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TextIO

from detbb.core.errors import UserError
from detbb.core.files import writing

LOCK_FILE = "run.lock"
WAIT_S = 10.0  # for a process that was told to end, such as the one that torchrun has just replaced
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """The exclusive right to write into a folder, from `take` until the `with` block or the process ends.

    The lock is flock's on `run.lock`: the kernel lets go of it when the process ends, however it ends, and NFS passes
    it on to its server. The file stays; it holds who took it last.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, folder: Path) -> list[str]:
        """Lock `folder`, which exists, unless this has it already; gives a line where nothing can be locked.

        Raises: UserError: another process has it, and still does after `WAIT_S`; or the folder cannot be written.
        """
        if self._file is not None:
            return []
        with writing(folder / LOCK_FILE):
            file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        end = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    file.close()
                    return [
                        f"WARNING: the file system of {folder} knows no locks ({error.strerror}): nothing keeps "
                        "a second run from writing into it"
                    ]
                if time.monotonic() > end:
                    holder = _holder(file)
                    file.close()
                    raise UserError(
                        f"output_dir: '{folder}' is being written by {holder}; wait for it, end it, or give another "
                        "output_dir (nothing was changed)"
                    ) from None
            time.sleep(0.1)
        self._file = file
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with writing(folder / LOCK_FILE):
            file.truncate(0)
            json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": since}, file)
            file.flush()
        return []


def _holder(file: TextIO) -> str:
    """Who says to have the lock; the text is another process's and may be cut or anything."""
    try:
        file.seek(0)
        found: Any = json.load(file)
        return f"process {int(found['process'])} on host {str(found['host'])[:100]!r} since {str(found['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
