"""Shared by all tests: the marker for real data, a small data set, a run on it."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time, so that a landing says something of the change; --hypothesis-profile=default explores further.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# The models of the tests are so small that threads cost more than they bring; processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    "train.report=false",
)


CHROMIUM = shutil.which("chromium")


def pytest_collection_modifyitems(config, items):
    absent = [marker for marker, there in (("shared_data", (SHARED / "data").is_dir()), ("chromium", CHROMIUM)) if not there]
    away = [item for item in items if any(item.get_closest_marker(marker) for marker in absent)]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in away]


def pytest_report_header():
    where = SHARED / "data"
    return [
        f"real data: {where}" if where.is_dir() else f"real data: none at {where}, so the tests marked shared_data are deselected",
        f"browser: {CHROMIUM}" if CHROMIUM else "browser: no chromium on the path, so the tests marked chromium are deselected",
    ]


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


@pytest.fixture
def make_bundle(tmp_path):
    """Writes a bundle of an untrained narrow model: `make_bundle(bands=3, dtype="uint8", classes=3, tile=1024, ...)` -> its path."""

    def make(name="model.safetensors", *, bands=3, dtype="uint8", classes=3, tile=1024, overlap=64, model="unet", **options):
        import torch

        from perpixel.bundle import Card, save_bundle
        from perpixel.data.images import default_colors
        from perpixel.models import build

        encoder = "plain" if model == "unet" else None
        options = {"width": 2, **options}
        torch.manual_seed(0)
        network = build(model, classes, encoder=encoder, in_channels=bands, **options)
        side = network.geometry.fit(64)
        with torch.no_grad():
            network.decoder.classify.weight.normal_()
            means = network.eval()(torch.randn(1, bands, side, side)).mean((0, 2, 3))
            network.decoder.classify.bias -= means  # so that every class is predicted somewhere
        card = Card(
            perpixel="0.1.0", model=model, encoder=encoder, options=options, bands=bands, dtype=dtype,
            mean=[0.5] * bands, std=[0.25] * bands, classes=[f"class {k}" for k in range(classes)], colors=default_colors(classes),
            label_map={"values": {str(k): k for k in range(classes)}, "ignore": 255 if classes <= 255 else 65535},
            tile=tile, overlap=overlap,
        )  # fmt: skip
        save_bundle(tmp_path / name, network.state_dict(), card)
        return tmp_path / name

    return make


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a small image has many: blocks of 96 pixels, whole steps of tiles of 64 with 16 in common."""
    for module in ("perpixel.segmenter", "perpixel.budget"):
        monkeypatch.setattr(f"{module}.WHOLE", 0)
    monkeypatch.setattr("perpixel.budget.SIDE", 96)


@dataclass(frozen=True)
class Said:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys, monkeypatch) -> Callable[..., Said]:
    """`command("check", folder)` runs `perpixel check folder` through `main` in this process; an exception that escapes fails the test."""
    from perpixel.cli import main

    monkeypatch.setenv("COLUMNS", "1000")  # messages stay on one line
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["perpixel", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        assert "Traceback" not in out + err
        return Said(code, out, err)

    return call


@pytest.fixture
def one_thread():
    """So that other work on the machine does not slow the small layers of these networks down."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
