"""Memory to work in, kept from image to image."""

import threading

import numpy as np

MOST_BYTES = 32 << 20
"""Of an array that is kept: a process does not hold forever what its largest image took."""
LINE = 64
"""Bytes of a line of the processor's cache, and of its widest registers: a vector that lies across
two lines takes two accesses."""


class Workspace(threading.local):
    """Arrays by name, of each thread its own: allocating them anew takes a fresh page of the system
    for each 4 kB."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, size: int, dtype: type) -> np.ndarray:
        """An array [size] that holds whatever it held before and starts with a line."""
        array = self._arrays.get(name)
        assert array is None or array.dtype == dtype, name
        if array is None or len(array) < size:
            array = _aligned(size, np.dtype(dtype))
            if array.nbytes <= MOST_BYTES:
                self._arrays[name] = array
        return array[:size]


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    memory = np.empty(size * dtype.itemsize + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size * dtype.itemsize].view(dtype)
