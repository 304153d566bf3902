"""
Contains the journal of a run: every metric and event, one line of JSON each, appended and never changed.

It is the truth about a run; tables and pictures are made from it. A line that was cut off by a crash, or damaged later,
is noticed by its checksum.
"""

import errno
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

from ..files import sync_dir

Event = dict[str, Any]


class Journal:
    """Appends to a journal, and knows what is in it already."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens a journal for writing. The rest of a last line that a crash cut off is removed."""
        self.path = Path(path)
        events, self.num_damaged, whole_bytes = _read(self.path)
        self.events: list[Event] = events  # what was in it when it was opened
        self._known = {_identity(event): _content(event) for event in events if _identity(event) is not None}
        self.contradictions: list[str] = []
        binary = getattr(os, "O_BINARY", 0)  # Windows would write other line ends
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
        sync_dir(self.path.parent)
        if os.fstat(self._file).st_size > whole_bytes:
            os.ftruncate(self._file, whole_bytes)

    def write(self, event: Event) -> bool:
        """
        Appends an event. One of a step or epoch that is there already, as happens after a crash, is compared: it
        is appended only if it is another.

        :return: whether it was new
        :raises OSError: if it cannot be written, such as on a full disk; the journal is as it was before
        """
        identity = _identity(event)
        if identity is not None and identity in self._known:
            if self._known[identity] == _content(event):
                return False
            self.contradictions.append(f"{identity[0]} {identity[1]}")
        line = _line(event)
        written = os.write(
            self._file, line
        )  # one call, so the line is whole or, after a kill or power cut, cut off
        if written < len(line):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if identity is not None:
            self._known[identity] = _content(event)
        return True

    def sync(self) -> None:
        """Makes what was written survive a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        """Ends writing."""
        self.sync()
        os.close(self._file)


def read_journal(path: str | os.PathLike) -> list[Event]:
    """All events of a journal, in order, without lines that are cut off or damaged."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[Event], int, int]:
    """The events, the number of lines that are damaged or cut off, and the bytes of all lines that have an end."""
    if not path.is_file():
        return [], 0, 0
    content = path.read_bytes()
    whole_bytes = content.rfind(b"\n") + 1
    events = [_parse(line) for line in content.splitlines(keepends=True)]
    return [event for event in events if event is not None], events.count(None), whole_bytes


def _text(event: Event) -> str:
    # JSON has no NaN.
    plain = {key: {"@float": repr(float(value))} if _is_odd(value) else value for key, value in event.items()}
    return json.dumps(plain, allow_nan=False)


def _line(event: Event) -> bytes:
    text = _text(event)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def _parse(line: bytes) -> Event | None:
    head, separator, tail = line.rpartition(b', "crc": "')
    if not separator or not line.endswith(b'"}\n') or tail[:-3] != f"{zlib.crc32(head + b'}'):08x}".encode():
        return None
    event = json.loads(head + b"}")
    return {key: _plain(value) for key, value in event.items()}


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _plain(value: Any) -> Any:
    return float(value["@float"]) if isinstance(value, dict) and set(value) == {"@float"} else value


def _identity(event: Event) -> tuple[str, int] | None:
    for kind in ("step", "epoch"):
        if event.get("event") == kind:
            return kind, event[kind]
    return None


def _content(event: Event) -> str:
    return _text({key: event[key] for key in sorted(event) if key not in ("time", "seconds")})
