"""Progress, speed and remaining time of long work, on the console."""

import threading
import time

from selfray.console import Console


class Pace:
    """Counts finished images and shows the progress. Thread-safe."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        """`done` images were finished by an earlier start; they do not count for the speed."""
        self._console = console
        self._title = title
        self._total = total
        self._before = self._done = done
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            speed = (self._done - self._before) / max(now - self._started, 1e-6)
            left = (self._total - self._done) / max(speed, 1e-6)
            self._console.live(
                f"{self._title}: {self._done:,} of {self._total:,} images, {speed:,.0f} images/s, "
                f"{clock(left)} left"
            )


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
