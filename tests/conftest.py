"""Shared by all tests: the marker for real data, a small data set, a run on it."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

# A model and a plan so small that a step takes milliseconds.
TINY = (
    "model.name=unet",
    "model.encoder=plain",
    "model.options={width: 4}",
    "train.crop=[64, 64]",
    "train.batch=4",
    "train.precision=32-true",
    "train.validations=2",
)


def pytest_collection_modifyitems(config, items):
    if (SHARED / "data").is_dir():
        return
    away = [item for item in items if item.get_closest_marker("shared_data")]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if not item.get_closest_marker("shared_data")]


def pytest_report_header():
    where = SHARED / "data"
    return f"real data: {where}" if where.is_dir() else f"real data: none at {where}, so the tests marked shared_data are deselected"


@pytest.fixture(scope="session")
def shared():
    """The folder with `data` and `weights`; only for tests marked shared_data."""
    return SHARED


@pytest.fixture(scope="session")
def tiny_settings():
    return TINY


@pytest.fixture(scope="session")
def sample_set(tmp_path_factory):
    """Eight training and four validation scenes of 64x96 pixels; tests that change files copy it first."""
    from perpixel.data.samples import write_samples

    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, train=8, val=4, height=64, width=96)
    return folder


@pytest.fixture(scope="session")
def run(sample_set, tmp_path_factory):
    """A finished run of twelve steps on the sample set: its folder."""
    from perpixel.train import train

    out = tmp_path_factory.mktemp("run")
    train(sample_set / "images", sample_set / "masks", out=out, steps=12, settings=TINY)
    return out
