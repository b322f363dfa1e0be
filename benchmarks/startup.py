"""How long perpixel takes until it does anything; writes benchmarks/results/speed-startup.json and fails where it is too long.

python benchmarks/startup.py [--repeats 10]

New processes, in turns; the median of each; what is allowed is compared with the processor's time, as other work on the machine is not
perpixel's. Files are compiled, as after the first call of an installed program. A bare interpreter
stands beside them, and is part of them.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

from record import write

# What -> the interpreter's arguments, and the most seconds that are allowed.
CALLS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": (["-c", "pass"], None),
    "import perpixel": (["-c", "import perpixel"], 0.1),
    "perpixel --help": (["-m", "perpixel", "--help"], 0.3),
}


def seconds(words: list[str]) -> tuple[float, float]:
    """Of one call: on the wall, and of the processor."""
    # Where an installation may not write, nothing would stay compiled and each call would compile anew.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in CALLS}
    for number in range(given.repeats + 1):
        for name, (words, _) in CALLS.items():
            found = seconds(words)
            if number:  # the first compiles
                taken[name].append(found)
    rows = []
    for name, (_, limit) in CALLS.items():
        wall, processor = (statistics.median(values) for values in zip(*taken[name], strict=True))
        rows.append({"what": name, "seconds": round(wall, 3), "processor_seconds": round(processor, 3), "limit": limit})
        sys.stdout.write(f"{rows[-1]}\n")
    write("speed-startup", {"repeats": given.repeats, "rows": rows}, packages=("typer", "rich"))
    if any(row["limit"] and row["processor_seconds"] > row["limit"] for row in rows):
        sys.exit("slower than is allowed")


if __name__ == "__main__":
    main()
