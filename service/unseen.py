"""No other process may look into this one: it holds tokens and the guards, and what it starts reads hostile files as the same user."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_DUMPABLE = 4


def hide() -> None:
    """From now on /proc shows neither memory nor environment nor descriptors of this process but to root's capabilities, and it leaves no core file.

    What it starts can be seen into again, as after every exec. Elsewhere than on Linux nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
