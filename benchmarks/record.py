"""What every file in benchmarks/results begins with: how it was made, on what, with which versions."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perpixel.plan import this_machine

RESULTS = Path(__file__).parent / "results"


def write(name: str, content: Mapping[str, Any], packages: Sequence[str] = ("torch",), device: str = "cpu") -> None:
    """Writes benchmarks/results/NAME.json: command, machine and versions of `packages` and perpixel, then `content`."""
    header = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if device == "cuda" else this_machine().words,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in (*packages, "perpixel")}},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**header, **content}, indent=1) + "\n")
