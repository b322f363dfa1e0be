"""The optimiser, the learning rate over a run, averaged weights, the clock."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from perpixel.models import build
from perpixel.optimisation import ENDING, Average, Clock, learning_rate, make_optimizer, validation_seconds
from perpixel.recipe import TrainSection


def test_poly_is_the_formula_of_deeplab_v2_after_the_warm_up():
    """(1 - iteration / max_iteration)^power, arXiv:1606.00915, section 4.1."""
    section = TrainSection(schedule="poly", warmup=0.0, poly_power=0.9)
    assert [learning_rate(section, i / 10) for i in range(10)] == pytest.approx([(1 - i / 10) ** 0.9 for i in range(10)])


def test_step_is_a_tenth_after_each_third_of_the_run():
    """DeepLab v1's solver: base_lr 0.001, gamma 0.1, stepsize 2000, max_iter 6000."""
    section = TrainSection(schedule="step", warmup=0.0)
    rates = [learning_rate(section, iteration / 6000) for iteration in (0, 1999, 2000, 3999, 4000, 5999, 6000)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_one_cycle_rises_to_one_and_falls_to_zero():
    section = TrainSection(schedule="one_cycle", warmup=0.25)
    rates = [learning_rate(section, i / 100) for i in range(101)]
    assert max(rates) == rates[25] == 1.0
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_constant_stays_at_one_after_the_warm_up():
    section = TrainSection(schedule="constant", warmup=0.1)
    assert {learning_rate(section, p) for p in (0.1, 0.5, 1.0)} == {1.0}


def test_weight_decay_reaches_convolutions_only_and_the_encoder_has_its_own_rate():
    model = build("unet", 2, encoder="plain", width=4)
    optimizer = make_optimizer(model, TrainSection(weight_decay=0.1, encoder_lr_scale=0.5))
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = where[id(parameter)]
        assert group["weight_decay"] == (0.1 if name.endswith("weight") and parameter.ndim > 1 else 0.0), name
        assert group["scale"] == (0.5 if name.startswith("encoder") else 1.0), name
    assert len(where) == len(list(model.parameters()))


def test_averaged_weights_are_the_recursion_by_hand():
    """a <- d a + (1 - d) w with d = min(decay, (1 + step) / (10 + step)), buffers too, counters copied."""
    model = build("unet", 2, encoder="plain", width=2)
    average = Average(model, 0.9)
    name = "decoder.classify.weight"
    by_hand = model.state_dict()[name].double()
    for step in range(200):
        with torch.no_grad():
            model.get_parameter(name).add_(0.01 * (step % 7))
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * model.state_dict()[name].double()
    torch.testing.assert_close(average.model.state_dict()[name].double(), by_hand, rtol=1e-4, atol=1e-5)


def test_progress_by_steps_is_their_share():
    clock = Clock(TrainSection(steps=8), time.monotonic(), 0.0)
    assert [clock.progress(step) for step in (0, 2, 8, 9)] == [0.0, 0.25, 1.0, 1.0]


def test_progress_by_minutes_counts_time_before_an_interruption_and_never_falls():
    clock = Clock(TrainSection(minutes=2), time.monotonic(), before=60.0)
    clock.reserve = 20.0
    assert clock.progress(0) == pytest.approx(60 / 100, abs=0.05)
    clock.reserve = 0.0
    assert clock.progress(0) == pytest.approx(60 / 100, abs=0.05)
    assert clock.left(0) == pytest.approx(60, abs=5)


def test_progress_ends_at_one():
    clock = Clock(TrainSection(minutes=1), time.monotonic(), before=math.inf)
    assert clock.progress(0) == 1.0


@pytest.mark.parametrize("validation", [0.2, 1.0, 5.0, 20.0, 150.0])
@pytest.mark.parametrize("guess", [0.5, 1.0, 2.0])
def test_validations_take_a_quarter_of_the_minutes_at_most_and_leave_time_for_the_end(validation, guess, monkeypatch):
    """A run of 3 minutes whose steps take 1 s and whose validations take `validation`, foreseen as `guess` times that, as `fit` does it."""
    world = SimpleNamespace(now=1000.0)
    world.monotonic = lambda: world.now
    monkeypatch.setattr("perpixel.optimisation.time", world)
    clock, step, rounds, scoring = Clock(TrainSection(minutes=3, validations=10), started=1000.0, before=0.0), 0, 0, 0.0
    while clock.progress(step) < 1:
        world.now, step = world.now + 1, step + 1
        clock.expect(guess * validation)
        if (due := clock.due(clock.progress(step), rounds)) > rounds:
            rounds, scoring, world.now = due, scoring + validation, world.now + validation
            clock.validated(validation)
    trained = world.now - 1000
    assert scoring <= (trained + validation) / 4  # three times as long before each
    assert trained - scoring >= 50  # however large the validation part is
    if validation <= 20:
        assert trained + 3 * validation <= 180 + 1 + validation * (guess < 1)  # the last step may end late
        assert validation > 5 or scoring > 0


def test_by_steps_validations_are_due_by_the_step_alone(monkeypatch):
    """However long they take: a resumed run has them where the uninterrupted one has."""
    clock = Clock(TrainSection(steps=20, validations=4), started=time.monotonic(), before=0.0)
    rounds, at = 0, []
    for step in range(1, 21):
        clock.expect(1e6)
        if (due := clock.due(clock.progress(step), rounds)) > rounds:
            rounds = due
            at.append(step)
            clock.validated(1e6)
    assert at == [5, 10, 15]


def test_the_time_left_by_steps_counts_the_validations_to_come_and_the_end(monkeypatch):
    """20 steps of 2 s, a validation of 30 s after each fifth, and three times one at the end: told from the second step on."""
    world = SimpleNamespace(now=1000.0)
    world.monotonic = lambda: world.now
    monkeypatch.setattr("perpixel.optimisation.time", world)
    clock, rounds, said = Clock(TrainSection(steps=20, validations=4), started=1000.0, before=0.0), 0, {}
    for step in range(1, 21):
        world.now += 2 + 50 * (step == 1)  # the first waits for libraries
        said[step] = (clock.left(step), world.now)
        clock.expect(30.0)
        if (due := clock.due(clock.progress(step), rounds)) > rounds:
            rounds, world.now = due, world.now + 30
            clock.validated(30.0)
    end = world.now + ENDING * 30
    assert math.isnan(said[1][0])
    assert [left for left, _ in list(said.values())[1:]] == pytest.approx([end - now for _, now in list(said.values())[1:]])


def test_a_validation_is_expected_to_take_the_forward_share_of_a_step_by_pixels():
    section = TrainSection(batch=4, crop=(64, 32), steps=1)
    assert validation_seconds(6.0, section, pixels=3 * 4 * 64 * 32, images=40) == pytest.approx(3 * 2.0)
    section = TrainSection(batch=4, crop=(64, 32), steps=1, batch_norm_pass=True)
    assert validation_seconds(6.0, section, pixels=3 * 4 * 64 * 32, images=40) == pytest.approx((3 + 10) * 2.0)
