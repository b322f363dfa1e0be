"""What a run says of itself."""

import io
import math
from itertools import islice
from types import SimpleNamespace

import pytest
from rich.console import Console

from perpixel.progress import TrainingLog
from perpixel.recipe import TrainSection


def test_the_share_of_waiting_is_that_of_the_steps_whatever_else_the_run_does(tmp_path, monkeypatch):
    """Three batches take 1 s each to come and 4 s to be learned from, 3 / 15; a validation of 100 s and the batch that the end of
    the run left unused are in neither sum. The end says where the time of all of it went."""
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
            log.validated_for(100)
        log.ending()
        clock.now += 71
        log.ended(10 + 15 + 300 + 71 + 1)  # with 10 s of reading, and the batch left unused
    assert "6:37 in all: steps 0:15, 3 validations meanwhile 5:00, last validation, final scores and report 1:11, " in said.getvalue()
    assert "reading and the rest 0:11" in said.getvalue()
    assert "3 steps; 20.0 % of their time waiting for data" in said.getvalue()
    assert log.latest["images_per_second"] == pytest.approx(3 * 2 / 15)


def test_an_end_that_will_take_longer_than_the_minutes_is_said_once_and_early(tmp_path):
    said = io.StringIO()
    with TrainingLog(tmp_path, Console(file=said, width=200), TrainSection(minutes=3), first_step=0) as log:
        for step in range(1, 5):
            log.step(step, 0.1, 1.0, cost=1.0, lr=0.1, left=0)
            log.foresee(240.0)
    assert said.getvalue().count("large for 3 minutes: its last scores will take about 4:00 more than that") == 1


def test_a_run_by_steps_tells_once_how_long_it_will_take_and_counts_its_steps(tmp_path, monkeypatch):
    clock, said = SimpleNamespace(now=50.0), io.StringIO()
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("perpixel.progress.time", clock)
    with TrainingLog(tmp_path, Console(file=said, width=200), TrainSection(steps=90, batch=2), first_step=0) as log:
        for step, _ in enumerate(islice(log.waiting(iter(range(9))), 8), start=1):
            clock.now += 4
            log.step(step, step / 90, clock.now, cost=1.0, lr=0.1, left=math.nan if step == 1 else 4.0 * (90 - step))
        log.validated(8, SimpleNamespace(confusion=SimpleNamespace(miou=0.5, pixel_accuracy=0.75), cost=0.25))
    assert said.getvalue().count("all scores included") == 1
    assert "step 5 of 90; 5:40 left, all scores included" in said.getvalue()
    assert "step 8 of 90: cost 1.000; on validation cross-entropy 0.250, mIoU 0.500, pixel accuracy 0.750; 5:28 left" in said.getvalue()
