"""Formats sizes, durations and tuples for messages, and suggests the nearest name for a typo."""

import difflib
from collections.abc import Iterable, Sequence


def size(count: int) -> str:
    """A number of bytes in a decimal unit, such as `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.1f} TB"


def clock(seconds: float) -> str:
    """A duration as `h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain(values: Sequence[float]) -> str:
    """Numbers as `(0.485, 0.456, 0.406)`."""
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append to a message, such as `; did you mean --batch-size?`; empty if no known word
    is similar."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
