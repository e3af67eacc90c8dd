import math

import pytest

from selfray.schedules import Constant, Cosine, Progress, Ramp, Steps, WarmupCosine


def at(fraction: float) -> Progress:
    return Progress(round(fraction * 1000), 1000, 0)


def test_progress_counts_images_and_steps():
    progress = Progress(0, 100, 0).advance(32).advance(32)
    assert (progress.images_seen, progress.step, progress.fraction) == (64, 2, 0.64)
    assert not progress.finished
    assert progress.advance(36).finished


def test_constant_does_not_change():
    assert {Constant(0.3)(at(f)) for f in (0, 0.5, 1)} == {0.3}


def test_cosine_starts_halves_and_ends_where_it_says():
    momentum = Cosine(0.996, 1.0)
    assert momentum(at(0)) == pytest.approx(0.996)
    assert momentum(at(0.5)) == pytest.approx(0.998)
    assert momentum(at(1)) == pytest.approx(1.0)
    assert momentum(at(0.25)) == pytest.approx(1 - 0.004 * (math.cos(math.pi / 4) + 1) / 2)


def test_ramp_is_a_straight_line_and_then_constant():
    temperature = Ramp(0.04, 0.07, fraction=0.3)
    assert temperature(at(0)) == pytest.approx(0.04)
    assert temperature(at(0.15)) == pytest.approx(0.055)
    assert temperature(at(0.3)) == temperature(at(1)) == pytest.approx(0.07)


def test_warmup_cosine_rises_in_a_line_and_falls_on_a_cosine():
    factor = WarmupCosine(warmup_fraction=0.1, final=0.01)
    assert factor(at(0)) == 0
    assert factor(at(0.05)) == pytest.approx(0.5)
    assert factor(at(0.1)) == pytest.approx(1.0)
    assert factor(at(0.55)) == pytest.approx(0.505)
    assert factor(at(1)) == pytest.approx(0.01)


def test_warmup_cosine_has_no_jump_at_the_end_of_the_warmup():
    factor = WarmupCosine(warmup_fraction=0.1)
    assert abs(factor(at(0.099)) - factor(at(0.101))) < 0.02


def test_steps_fall_tenfold_at_each_share():
    factor = Steps(at=(0.6, 0.8), factor=0.1)
    assert [factor(at(f)) for f in (0, 0.59, 0.6, 0.79, 0.8, 1)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_without_warmup_the_first_step_has_the_full_rate():
    assert WarmupCosine(warmup_fraction=0.0)(at(0)) == 1.0


@pytest.mark.parametrize(
    "schedule", [Constant(0.1), Cosine(1.0, 0.1), Ramp(0.0, 1.0, 0.5), WarmupCosine(0.1)]
)
def test_schedules_follow_images_and_not_steps(schedule):
    few_large_steps, many_small_steps = Progress(300, 1000, 3), Progress(300, 1000, 30)
    assert schedule(few_large_steps) == schedule(many_small_steps)


@pytest.mark.parametrize("schedule", [Cosine(1.0, 0.1), Ramp(0.0, 1.0, 0.5), WarmupCosine(0.1)])
def test_schedules_stay_at_their_end_beyond_the_end(schedule):
    assert schedule(Progress(1500, 1000, 0)) == pytest.approx(schedule(at(1)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ramp(0, 1, fraction=0), r"Ramp.fraction must lie in \(0, 1\], got 0"),
        (lambda: Ramp(0, 1, fraction=1.5), r"Ramp.fraction must lie in \(0, 1\], got 1.5"),
        (lambda: Steps((0.8, 0.6)), r"Steps.at must be growing shares of the run in \(0, 1\)"),
        (lambda: Steps(factor=10), r"Steps.factor must lie in \(0, 1\), got 10"),
        (lambda: WarmupCosine(1.0), r"warmup_fraction must lie in \[0, 1\), got 1.0"),
        (lambda: WarmupCosine(-0.1), r"warmup_fraction must lie in \[0, 1\), got -0.1"),
        (lambda: WarmupCosine(final=2.0), r"final factor must lie in \[0, 1\], got 2.0"),
    ],
)
def test_a_schedule_refuses_settings_outside_its_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
