"""Scratch arrays that are reused from image to image."""

import threading

import numpy as np

MOST_BYTES = 32 << 20
"""Larger arrays are not kept, so that one large image does not occupy memory forever."""
LINE = 64
"""Bytes of a cache line and of the widest vector register. A vector that crosses a line's border
takes two accesses."""


class Workspace(threading.local):
    """Arrays by name, separate for each thread.

    Allocating them for each image would cost a page fault for every 4 kB.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, size: int, dtype: type) -> np.ndarray:
        """An array [size] that starts on a cache line, with arbitrary contents."""
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
