import numpy as np
import pytest

from selfray.data.plan import ReadPlan
from selfray.runs.bottleneck import bottleneck
from shuffle import shuffle_quality

SORTED = np.repeat(np.arange(10), 1000)


def test_a_sorted_order_leaks_all_and_a_random_one_nothing():
    assert shuffle_quality(SORTED, 100).leak == 1
    random = np.random.default_rng(3).permutation(SORTED)
    assert abs(shuffle_quality(random, 100).leak) < 0.01


def test_the_distance_is_that_of_the_histograms():
    quality = shuffle_quality(np.array([0, 0, 1, 1, 0, 1, 0, 1]), 2)
    assert quality.measured == (0.5 + 0.5 + 0 + 0) / 4
    assert quality.unshuffled == 0.5


def test_a_larger_window_leaks_less():
    def leak(window: int) -> float:
        plan = ReadPlan((100,) * 1000, 100, epochs=1, seed=0, window_rows=window)
        return shuffle_quality(plan.read(0, plan.rows).groups // 100, 100).leak

    narrow, middle, wide = leak(300), leak(2_000), leak(20_000)
    assert narrow > 2 * middle > 4 * wide
    assert wide < 0.05


def test_labels_that_cannot_tell_are_refused():
    with pytest.raises(ValueError, match="one class"):
        shuffle_quality(np.zeros(100), 10)
    with pytest.raises(ValueError, match="fewer than two batches of 60"):
        shuffle_quality(SORTED[:100], 60)


def test_the_summary_says_how_many_cpus_the_data_lacks():
    assert bottleneck(0.02, 500, 4) == (
        "trainers waited 2% for data: their own compute is the limit"
    )
    text = bottleneck(0.37, 630, 20)
    assert "waited 37% for data and could take 1,000 images/s" in text
    assert "add 12 CPUs for data (--data-cpus 32" in text
    assert "add 1 CPU for data (--data-cpus 2" in bottleneck(0.5, 10, 1)
    assert "2.0 times the CPUs" in bottleneck(0.5, 10, None)
    assert "photometric" not in text
    assert bottleneck(0.37, 630, 20, True).endswith("or set --data.photometric device")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_resume_at_another_world_size_sees_each_remaining_image_once(ranks, seed):
    from selfray.data.plan import Share

    rng = np.random.default_rng(seed)
    sizes = tuple(rng.integers(0, 60, 40).tolist())
    plan = ReadPlan(sizes, 24, epochs=2, seed=seed, window_rows=int(rng.integers(1, 400)))
    stop = int(rng.integers(1, plan.steps_per_epoch))
    seen = []
    for first, last, world in ((0, stop, 4), (stop, plan.steps_per_epoch, ranks)):
        for step in range(first, last):
            for rank in range(world):
                share = Share(rank, world)
                for start in share.starts(plan, step):
                    rows = plan.read(start, share.micro_batch(24))
                    seen += zip(rows.groups.tolist(), rows.rows.tolist(), strict=True)
    assert len(seen) == len(set(seen)) == plan.rows - plan.tail
    assert 0 <= plan.tail < 24


def test_a_plan_over_millions_of_rows_is_the_order_of_row_groups_only():
    plan = ReadPlan((40,) * 250_000, 256, epochs=800, seed=0)
    assert plan.rows == 10_000_000
    assert len(plan.read(255 * plan.images_per_epoch + 256 * 1000, 256).rows) == 256


def test_reading_a_batch_does_not_go_through_all_row_groups():
    class Counted(tuple):
        """Row groups that count how often they are gone through."""

        walks = 0

        def __iter__(self):
            Counted.walks += 1
            return super().__iter__()

        def __hash__(self):
            Counted.walks += 1
            return super().__hash__()

    plan = ReadPlan(Counted((40,) * 100), 50, epochs=1, seed=0, window_rows=4000)
    plan.read(0, 50)
    before = Counted.walks
    for step in range(1, 50):
        plan.read(50 * step, 50)
    assert Counted.walks == before
