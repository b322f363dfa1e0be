"""Threads that share one piece of work. The compiled loops release Python's lock, so plain Python threads run them side by side.

numba's own parallel loops are not used: their thread pools abort the process when two Python threads enter them at once (workqueue) or
after a fork (OpenMP), and both happen beside PyTorch.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

# Gives the processor to whoever waits for it; compiled code, also from the cache, finds it by this name.
if sys.platform == "win32":
    _YIELD = ctypes.windll.kernel32.SwitchToThread
else:
    _YIELD = ctypes.CDLL(None).sched_yield
binding.add_symbol("perpixel_yield", ctypes.cast(_YIELD, ctypes.c_void_p).value)
_give_way = types.ExternalFunction("perpixel_yield", types.int32())


def team_size(threads: int | None) -> int:
    """How many threads to use: as asked, else as many as processors are ours and NUMBA_NUM_THREADS allows, at most 16."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; give a number of at least 1, or None for all processors")
        return threads
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("NUMBA_NUM_THREADS", "")
    return max(1, min(available, int(asked) if asked.isdigit() else available, 16))


def in_team(work: Callable[[int, int], object], size: int) -> list[Any]:
    """work(number, team) in `size` threads, this one included, that run at the same time; their results by number.

    All have started before the first begins, so that they can wait for one another. Where the system starts no more threads the team is
    smaller than asked.
    """
    begin = threading.Event()
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def member(number: int) -> None:
        begin.wait()
        try:
            results[number] = work(number, len(others) + 1)
        except BaseException as failure:
            failures.append(failure)

    others: list[threading.Thread] = []
    for number in range(1, size):
        thread = threading.Thread(target=member, args=(number,), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            break
        others.append(thread)
    begin.set()
    member(0)
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]
    return results[: len(others) + 1]


def gate() -> NDArray[np.int64]:
    """What `wait` counts in: arrivals, and how often the gate has opened, on cache lines of their own."""
    return np.zeros(24, np.int64)


@intrinsic
def _added(typing: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to an int64 that threads share; its value before. Adding 0 reads it."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]])
        return builder.atomic_rmw("add", place, values[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), code


@njit(cache=True, nogil=True)
def share(first, last, number, team):  # type: ignore[no-untyped-def]
    """The part of first..last that falls to a member of the team."""
    size = last - first
    return first + size * number // team, first + size * (number + 1) // team


@njit(cache=True, nogil=True)
def wait(opened, team):  # type: ignore[no-untyped-def]
    """Return when all of the team have come here."""
    if team == 1:
        return
    before = _added(opened, 16, 0)
    if _added(opened, 0, 1) == team - 1:
        _added(opened, 0, -team)
        _added(opened, 16, 1)
        return
    turns = 0
    while _added(opened, 16, 0) == before:
        turns += 1
        if turns > 1000:  # some microseconds: whoever is late may need this very processor
            _give_way()
