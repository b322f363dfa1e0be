"""The arrows of docs/design.md: which part of the house may import which."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(find_spec("perpixel").origin).parent

# Part -> the parts it may import. A part may always import itself.
ARROWS = {
    "data": set(),
    "models": {"weight_files"},
    "weight_files": set(),
    "metrics": set(),
    "losses": set(),
    "recipe": set(),
    "refinement": set(),
    "tiling": {"models"},
    "paths": {"data", "weight_files"},
    "bundle": {"models", "data", "paths", "refinement"},
    "optimisation": {"models", "recipe"},
    "check": {"check_report", "data"},
    "check_report": {"check"},
    "plan": {"check", "losses", "models", "optimisation", "recipe", "weight_files"},
    "weighting": {"check", "losses"},
    "scores": {"metrics"},
    "score_tables": {"evaluate", "metrics"},
    "blockwise": {"data", "losses", "metrics", "scores", "segmenter", "streaming"},
    "evaluate": {"blockwise", "bundle", "data", "metrics", "models", "score_tables", "scores", "segmenter", "tiling"},
    "refine": {"data", "refinement"},
    "search": {"bundle", "data", "metrics", "refinement", "tiling"},
    "tune": {"bundle", "data", "metrics", "refinement", "search"},
    "certify": {"bundle", "data", "models", "tiling"},
    "augmented": {"tiling"},
    "streaming": {"augmented", "bundle", "data", "tiling"},
    "budget": {"data", "models", "tiling"},
    "segmenter": {"augmented", "budget", "bundle", "data", "models", "streaming", "tiling"},
    "predict": {"budget", "bundle", "data", "models", "segmenter", "streaming", "tiling"},
    "progress": {"data", "evaluate", "recipe"},
    "calibrate": {"bundle", "evaluate", "metrics", "scores"},
    "compare": {"metrics", "scores"},
    "compare_page": {"compare", "data", "metrics"},
    "report": {"blockwise", "bundle", "data", "evaluate", "metrics", "plan", "predict", "recipe", "scores", "segmenter", "streaming"},
    "run": {
        "bundle",
        "calibrate",
        "check",
        "data",
        "evaluate",
        "losses",
        "models",
        "optimisation",
        "progress",
        "recipe",
        "report",
        "scores",
        "weighting",
    },
    "train": {"bundle", "check", "data", "optimisation", "plan", "progress", "recipe", "run"},
    "demo": {"check", "data", "evaluate", "predict", "train"},
    "cli": {
        "budget",
        "calibrate",
        "certify",
        "check",
        "compare",
        "compare_page",
        "data",
        "demo",
        "evaluate",
        "models",
        "paths",
        "predict",
        "recipe",
        "refine",
        "report",
        "scores",
        "train",
        "tune",
    },
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("perpixel.")}
    return found


def parts() -> list[tuple[str, Path]]:
    return sorted(
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), path) for path in SOURCE.rglob("*.py") if not path.name.startswith("__")
    )


@pytest.mark.parametrize(("part", "path"), parts(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_each_file_imports_only_what_its_part_of_the_house_may(part, path):
    assert imports_of(path) <= ARROWS[part] | {part}


@pytest.mark.parametrize(("part", "path"), parts(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_no_file_is_longer_than_450_lines(part, path):
    assert len(path.read_text("utf-8").splitlines()) <= 450


def test_importing_perpixel_and_showing_help_load_neither_torch_nor_timm():
    script = "import sys, perpixel, perpixel.cli; print([m for m in ('torch', 'timm', 'numpy', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("predict no.safetensors a.png", "no.safetensors: no such file"),
        ("evaluate no.safetensors images", "no.safetensors: no such file"),
        ("certify no.safetensors", "no.safetensors: no such file"),
        ("predict page.safetensors page.safetensors", "page.safetensors: not a bundle: it holds a web page"),
        ("train no-images", "no-images: there is no such file"),
        ("train . --set train.stepz=3", "did you mean 'steps'"),
        ("train . --recipe no_recipe", "no_recipe"),
        ("train . --fast", "none is given"),
        ("train . --steps 3 --minutes 1", "give one of them"),
    ],
)
def test_a_slip_of_the_hand_is_told_without_loading_torch(words, told, tmp_path):
    (tmp_path / "page.safetensors").write_text("<html>")
    script = "import sys; from perpixel.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script, *words.split()], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (said.returncode, said.stdout.strip()) == (2, "False")
    assert told in said.stderr
