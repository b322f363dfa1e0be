"""The public names of `import perpixel`."""

import subprocess
import sys

import pytest

import perpixel


def test_a_name_shared_by_a_function_and_its_file_always_means_the_function():
    """However often it is used, and after the file has been imported: a fresh process, because imports last."""
    uses = [f"assert callable(perpixel.{name})" for name in ("train", "evaluate", "check", "train")]
    files = [f"from perpixel.{name} import {name}; assert perpixel.{name} is {name}" for name in ("check", "evaluate", "train")]
    subprocess.run([sys.executable, "-c", "; ".join(["import perpixel", *uses, *files, *uses])], check=True)


def test_every_public_name_loads():
    assert all(callable(getattr(perpixel, name)) for name in perpixel.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = perpixel.trian
