"""TensorBoard's event files, rewritten so that a resumed run holds every step once."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from detbb.core.files import write_atomically


def keep_events(folder: Path, wanted: Callable[[str, int], bool]) -> None:
    """Drop the records of other (tag, step) from the event files in `folder`, and a last one that a kill cut short."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        records = list(_records(data))
        kept = [record for record, tags, step in records if all(wanted(tag, step) for tag in tags)]
        if sum(map(len, kept)) == len(data):
            continue
        if any(tags for _, tags, _ in records) and len(kept) > 1:  # the first only says that this is an event file
            write_atomically(path, lambda file, kept=kept: file.write(b"".join(kept)))  # type: ignore[misc]
        else:
            path.unlink()


def _records(data: bytes) -> Iterator[tuple[bytes, list[str], int]]:
    """Each whole record with its tags and step: length, its checksum, an Event, its checksum."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    start = 0
    while start + 16 <= len(data):
        length, checksum = struct.unpack_from("<QI", data, start)
        end = start + 16 + length
        if end > len(data) or checksum != masked_crc32c(data[start : start + 8]):
            return
        try:
            event = Event.FromString(data[start + 12 : end - 4])
        except DecodeError:
            return
        yield data[start:end], [value.tag for value in event.summary.value], event.step
        start = end
