"""Threads that share one piece of work. The compiled loops release Python's lock, so plain Python threads run them side by side.

numba's own parallel loops are not used: their thread pools abort the process when two Python threads enter them at once (workqueue) or
after a fork (OpenMP), and both happen beside PyTorch.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def team_size(threads: int | None) -> int:
    """How many threads to use: as asked, else as many as processors are ours and numba's setting allows, at most 16."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; give a number of at least 1, or None for all processors")
        return threads
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("NUMBA_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return max(1, min(available, int(asked) if asked.isdigit() else available, 16))


def bands(size: int, threads: int) -> list[tuple[int, int]]:
    """`size` things in at most `threads` runs of about equal length: (first, one past the last) of each, none empty."""
    count = max(1, min(threads, size))
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all calls, the first made in this thread and the others each in one of its own; an exception is raised here."""
    if len(calls) < 2:
        return [call() for call in calls]
    with ThreadPoolExecutor(len(calls) - 1) as pool:
        others = [pool.submit(call) for call in calls[1:]]
        return [calls[0](), *(other.result() for other in others)]
