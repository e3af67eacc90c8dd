"""Ray's ASHA behind a record that outlives its driver."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from selfray.cluster.sweep.tune import Rungs
from selfray.storage import Location
from selfray.sweeps.question import Halving

TOTAL = 1600
Told = tuple[int, int, float]
"""A run's number, images seen, value."""


def results(runs: int = 12, seed: int = 0) -> list[Told]:
    """Runs side by side, each told of at 100, 200, 400, 800 and 1600 images, in a mixed order."""
    rng = np.random.default_rng(seed)
    told = [(n, 100 * 2**k, float(rng.random())) for n in range(runs) for k in range(5)]
    order = sorted(range(len(told)), key=lambda i: (told[i][1] * (1 + rng.random()), i))
    return [told[i] for i in order]


def rungs(folder: Path) -> Rungs:
    location = Location.of(folder)
    halving = Halving("knn", first=1 / 16, factor=2)
    return Rungs(halving, TOTAL, location / "rungs.json", location / "stops")


def tell(scheduler: Rungs, some: Sequence[Told]) -> None:
    for number, images, value in some:
        result = {"number": number, "images_seen": images, "value": value}
        # Never STOP: Tune would kill the run; it ends by itself.
        assert scheduler.on_trial_result(None, None, result) == TrialScheduler.CONTINUE


def stopped(folder: Path) -> set[int]:
    return {int(file.stem) for file in (folder / "stops").iterdir()}


class TuneTrial:
    def __init__(self, number: int) -> None:
        self.trial_id = f"{number}"


def stopped_by_ray(some: Sequence[Told]) -> set[int]:
    """What Ray's own scheduler says of the same results."""
    asha = ASHAScheduler(
        time_attr="t", metric="v", mode="max", max_t=TOTAL, grace_period=100, reduction_factor=2
    )
    gone, known = set(), set()
    nothing: Any = None
    for number, images, value in some:
        trial: Any = TuneTrial(number)
        if number in gone:
            continue
        if number not in known:
            asha.on_trial_add(nothing, trial)
            known.add(number)
        verdict = asha.on_trial_result(nothing, trial, {"t": images, "v": value})
        if verdict == TrialScheduler.STOP and images < TOTAL:
            gone.add(number)
    return gone


@pytest.mark.parametrize("seed", range(4))
def test_it_stops_the_runs_that_rays_asha_stops(tmp_path: Path, seed: int) -> None:
    told = results(seed=seed)
    tell(rungs(tmp_path), told)
    assert stopped(tmp_path) == stopped_by_ray(told)
    assert 0 < len(stopped(tmp_path)) < 12


def test_a_new_driver_judges_as_if_the_old_one_had_gone_on(tmp_path: Path) -> None:
    told = results(seed=1)
    tell(rungs(tmp_path / "whole"), told)
    tell(rungs(tmp_path / "killed"), told[:25])
    resumed = rungs(tmp_path / "killed")
    # Runs that go on from their checkpoints tell again of what was judged before.
    tell(resumed, told[20:25])
    tell(resumed, told[25:])
    records = [json.loads((tmp_path / n / "rungs.json").read_text()) for n in ("whole", "killed")]
    assert records[0] == records[1]
    assert stopped(tmp_path / "whole") == stopped(tmp_path / "killed")


def test_a_stop_that_the_old_driver_did_not_come_to_write_is_written(tmp_path: Path) -> None:
    tell(rungs(tmp_path), results())
    before = stopped(tmp_path)
    for file in (tmp_path / "stops").iterdir():
        file.unlink()
    rungs(tmp_path)
    assert stopped(tmp_path) == before


def test_the_reason_names_the_figure_and_the_rung(tmp_path: Path) -> None:
    tell(rungs(tmp_path), [(0, 100, 0.9), (1, 100, 0.1)])
    reason = json.loads((tmp_path / "stops" / "0001.json").read_text())
    assert reason == {"reason": "not among the best by kNN at 100 images"}


def test_a_run_at_its_end_is_not_stopped(tmp_path: Path) -> None:
    tell(rungs(tmp_path), [(0, 1600, 0.9), (1, 1600, 0.1)])
    assert not stopped(tmp_path)
