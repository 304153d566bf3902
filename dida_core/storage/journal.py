"""
The journal of a run: every metric and event, one line of JSON each, appended and never changed.

It is the truth about a run; tables and pictures are made from it. A checksum in each line reveals damage,
such as a line that a crash has cut off.
"""

import errno
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

from .files import is_plain, refuse_links, sync_dir

Event = dict[str, Any]


class Journal:
    """A journal that is written to, and what was in it."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Open a journal. What a crash has left of a last line is removed."""
        self.path = Path(path)
        refuse_links(self.path)
        content = self.path.read_bytes() if self.path.is_file() else b""
        events = [from_line(line) for line in content.splitlines(keepends=True)]
        self.num_damaged = events.count(None)
        self.events: list[Event] = [event for event in events if event is not None]
        self.contradictions: list[str] = []
        self._known = {_identity(event): _content(event) for event in self.events}
        binary = getattr(os, "O_BINARY", 0)  # Windows would write other line ends
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
        sync_dir(self.path.parent)
        if content and not content.endswith(b"\n"):
            os.ftruncate(self._file, content.rfind(b"\n") + 1)

    def write(self, event: Event) -> bool:
        """
        Append an event, unless it is one of a step or epoch that is there already, as happens after a crash.

        :return: whether it was appended; one that differs is, and counts as a contradiction
        :raises OSError: if it cannot be written, such as on a full disk; the journal is as it was before
        """
        identity, line = _identity(event), to_line(event)
        if identity is not None and identity in self._known:
            if self._known[identity] == _content(event):
                return False
            self.contradictions.append(f"{identity[0]} {identity[1]}")
        written = os.write(self._file, line)  # one call: a kill leaves all of it or its beginning
        if written < len(line):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._known[identity] = _content(event)
        return True

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        """End writing."""
        self.sync()
        os.close(self._file)


def read_journal(path: str | os.PathLike, without: str = "") -> list[Event]:
    """
    Return all events of a journal, in order, without lines that are cut off or damaged.

    :param without: a kind of events that is left out, but for the last line: most lines are steps
    """
    path, left_out = Path(path), f'{{"event": "{without}"'.encode()
    lines = path.read_bytes().splitlines(keepends=True) if is_plain(path) else []
    wanted = [line for line in lines[:-1] if not line.startswith(left_out)] if without else lines[:-1]
    events = [from_line(line) for line in [*wanted, *lines[-1:]]]
    return [event for event in events if event is not None]


def to_line(event: Event) -> bytes:
    """Return plain data as a line that reveals damage."""
    text = _text(event)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def from_line(line: bytes) -> Event | None:
    """Return what to_line was given, or None if the line is damaged."""
    head, separator, tail = line.rpartition(b', "crc": "')
    if not separator or not line.endswith(b'"}\n') or tail[:-3] != f"{zlib.crc32(head + b'}'):08x}".encode():
        return None
    try:  # whoever has made it can give anything a checksum
        return {
            key: float(value["@float"]) if isinstance(value, dict) and value.keys() == {"@float"} else value
            for key, value in json.loads(head + b"}").items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _text(event: Event) -> str:
    odd = {
        key: value for key, value in event.items() if isinstance(value, float) and not math.isfinite(value)
    }
    # JSON has no NaN.
    return json.dumps(event | {key: {"@float": repr(float(odd[key]))} for key in odd}, allow_nan=False)


def _identity(event: Event) -> tuple[str, int] | None:
    kind = event.get("event")
    return (kind, event[kind]) if kind in ("step", "epoch") and isinstance(event.get(kind), int) else None


def _content(event: Event) -> str:
    return _text({key: event[key] for key in sorted(event) if key not in ("time", "seconds")})
