"""What a process and all that it started take of the machine, seen from outside (Linux, proc(5))."""

import bisect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """Ids of `root` and of its children, their children and so on, that live now."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = [root] if root in parents else []
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def processor_seconds(pids: Sequence[int]) -> float:
    """Time on all cores of these processes and of those children of theirs that have ended."""
    return sum(sum(map(int, fields[11:15])) for pid in pids if (fields := _stat(pid))) / TICKS


def megabytes(pids: Sequence[int]) -> float:
    """What these processes hold in memory; a page that several share counts once (proportional set size)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@dataclass
class Watched:
    """A command that has ended.

    Attributes:
        began: `time.monotonic()` at its start; it means the same in all processes.
        output: what it wrote to standard output.
        peak: the most MB that it and its children held at once, looked at every quarter of a second.
        times, seconds: when it was looked at, and the processor time that it had used by then.
    """

    began: float
    output: str = ""
    peak: float = 0.0
    times: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def processor_seconds(self, first: float, last: float) -> float:
        """Processor time between two moments of `time.monotonic()`, to a quarter of a second."""
        at = [self.seconds[min(bisect.bisect_left(self.times, moment), len(self.times) - 1)] for moment in (first, last)]
        return at[1] - at[0]


def watched(command: Sequence[str], environment: dict[str, str]) -> Watched:
    """Runs a command to its end; leaves this program with the command's errors where it fails."""
    found = Watched(time.monotonic())
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.25):
            pids = tree(child.pid)
            found.times.append(time.monotonic())
            found.seconds.append(processor_seconds(pids))
            found.peak = max(found.peak, megabytes(pids))

    watcher = threading.Thread(target=look)
    watcher.start()
    found.output, errors = child.communicate()
    over.set()
    watcher.join()
    if child.returncode:
        sys.exit(errors)
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; none where it has ended. The second, its name, may hold anything, brackets too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
