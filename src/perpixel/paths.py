"""Paths that a person gives, looked at before PyTorch is loaded: that takes seconds, and a slip of the hand is told at once."""

import os
from pathlib import Path

from perpixel.data.layouts import refuse_missing
from perpixel.weight_files import is_pickled, no_weights

BUNDLE = ".safetensors"
WRITTEN = "A bundle is written by `perpixel train` as RUN/best.safetensors."
PATTERN = set("*?[")


def refuse_paths(command: str, bundle: Path, *others: Path | str | None) -> None:
    """ValueError where the bundle and a later path are swapped, or one of them is no bundle or not there. Patterns pass."""
    later = [str(other) for other in others if other is not None]
    found = next((other for other in later if other.endswith(BUNDLE)), None)
    if found is not None and bundle.suffix != BUNDLE:
        rest = " ".join([str(bundle), *(other for other in later if other != found)][:3])
        raise ValueError(
            f"{bundle} is no bundle and {found} may be one: swapped? The bundle comes first: perpixel {command} {found} {rest}"
        )
    refuse_no_bundle(bundle)
    refuse_missing(*(Path(path) for path in later if not PATTERN & set(path)))


def refuse_no_bundle(path: Path) -> None:
    """ValueError where no file is, or one that can't be read or begins as no bundle does; a pickle is refused, never executed."""
    if os.path.isdir(path) or not os.path.exists(path):  # False where the name is too long, which `Path` takes for an error
        what = "a folder" if os.path.isdir(path) else "no such file"
        raise ValueError(f"{path}: {what}. {WRITTEN}")
    try:
        why = "it looks like a pickle, which perpixel never executes" if is_pickled(path) else no_weights(path)
    except PermissionError:
        raise ValueError(f"{path}: no permission to read it; change its mode (chmod u+r) or its owner") from None
    if why:
        raise ValueError(f"{path}: not a bundle: {why}. {WRITTEN}")
