"""What a run says of itself."""

import io
from itertools import islice
from types import SimpleNamespace

import pytest
from rich.console import Console

from perpixel.progress import TrainingLog
from perpixel.recipe import TrainSection


def test_the_share_of_waiting_is_that_of_the_steps_whatever_else_the_run_does(tmp_path, monkeypatch):
    """Three batches take 1 s each to come and 4 s to be learned from, 3 / 15; a validation of 100 s and the batch that the end of
    the run left unused are in neither sum."""
    clock = SimpleNamespace(now=50.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("perpixel.progress.time", clock)

    def batches():
        while True:
            clock.now += 1
            yield "batch"

    said = io.StringIO()
    with TrainingLog(tmp_path, Console(file=said, width=200), TrainSection(steps=3, batch=2), first_step=0) as log:
        for number, _ in enumerate(islice(log.waiting(batches()), 4), start=1):
            if number == 4:
                break
            clock.now += 4
            log.step(number, number / 3, clock.now, cost=1.0, lr=0.1, left=0)
            clock.now += 100
    assert "3 steps; 20.0 % of their time waiting for data" in said.getvalue()
    assert log.latest["images_per_second"] == pytest.approx(3 * 2 / 15)
