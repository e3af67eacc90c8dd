"""Captures the warnings of OpenCV's libjpeg and libpng while they decode.

They print warnings such as "Corrupt JPEG data: ..." straight to C's stderr, and OpenCV offers no
way to stop them or to read them.
"""

import ctypes
import os
import sys
import threading

import cv2
import numpy as np


class _CodecMessages:
    """Points C's stderr at a memory stream while a decoder runs, on glibc. Costs about 2 us.

    What other threads print through C's stdio in that time is lost. Python's sys.stderr,
    faulthandler and std::cerr are not affected, as they would be by redirecting the file
    descriptor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0  # threads of this process that are decoding
        self._libc: ctypes.CDLL | None = None
        self._is_set_up = False
        self._previous_level = 0

    def imdecode(
        self, encoded: np.ndarray, flags: int = cv2.IMREAD_COLOR_RGB
    ) -> tuple[np.ndarray | None, str]:
        """Decode the uint8 [n] bytes of an image with OpenCV.

        Returns uint8 [H, W, 3] pixels, or None if OpenCV cannot read them, and the text that was
        printed. If several threads decode at a time, the last to finish gets the text of all.
        """
        pixels = None
        self._enter()
        try:
            pixels = cv2.imdecode(encoded, flags)
        except cv2.error:
            pass  # None, as for bytes that OpenCV cannot read
        finally:
            printed = self._leave()
        return pixels, printed

    def _set_up(self) -> None:
        self._is_set_up = True
        if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
            return
        try:
            os.confstr("CS_GNU_LIBC_VERSION")
        except (ValueError, OSError):
            return  # musl's stderr is a constant; writing to it would crash.
        self._libc = ctypes.CDLL(None)
        self._libc.open_memstream.restype = ctypes.c_void_p
        self._text, self._length = ctypes.c_void_p(), ctypes.c_size_t()
        self._stderr = ctypes.c_void_p.in_dll(self._libc, "stderr")
        self._real = self._stderr.value
        self._stream = ctypes.c_void_p(
            self._libc.open_memstream(ctypes.byref(self._text), ctypes.byref(self._length))
        )
        os.register_at_fork(after_in_child=self._reset_after_fork)

    def _reset_after_fork(self) -> None:
        # Threads that were decoding in the parent do not exist in the child.
        self._lock = threading.Lock()
        self._depth = 0
        self._stderr.value = self._real

    def _enter(self) -> None:
        with self._lock:
            if not self._is_set_up:
                self._set_up()
            self._depth += 1
            if self._depth == 1:
                self._previous_level = cv2.utils.logging.setLogLevel(0)  # silent
                if self._libc is not None:
                    self._real = self._stderr.value
                    self._stderr.value = self._stream.value

    def _leave(self) -> str:
        with self._lock:
            self._depth -= 1
            if self._depth > 0:
                return ""
            cv2.utils.logging.setLogLevel(self._previous_level)
            if self._libc is None:
                return ""
            self._stderr.value = self._real
            self._libc.fflush(self._stream)
            if self._length.value == 0:
                return ""
            text = ctypes.string_at(self._text.value or 0, self._length.value)
            self._libc.fseek(self._stream, 0, 0)
            self._libc.fflush(self._stream)
            return text.decode(errors="replace").strip()


codec_messages = _CodecMessages()
