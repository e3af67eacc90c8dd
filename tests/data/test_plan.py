import numpy as np
import pytest

from selfray.data import plan as plan_module
from selfray.data.plan import ReadPlan, Rows, Share

GROUPS = (7, 20, 1, 13, 40, 0, 19)  # 100 rows
SHARES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 3), (12, 1)]


def plan(**changes) -> ReadPlan:
    settings = {"group_rows": GROUPS, "batch_size": 12, "epochs": 3, "seed": 5, "window_rows": 30}
    return ReadPlan(**(settings | changes))


def ids(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.groups.tolist(), rows.rows.tolist(), strict=True))


def global_batch(wanted: ReadPlan, step: int, ranks: int, accumulate: int) -> list[tuple[int, int]]:
    seen = []
    for rank in range(ranks):
        share = Share(rank, ranks, accumulate)
        size = share.micro_batch(wanted.batch_size)
        for start in share.starts(wanted, step):
            seen += ids(wanted.read(start, size))
    return seen


@pytest.mark.parametrize(("ranks", "accumulate"), SHARES)
def test_every_image_of_an_epoch_is_seen_exactly_once_at_any_world_size(ranks, accumulate):
    wanted = plan()
    everything = {(g, r) for g, rows in enumerate(GROUPS) for r in range(rows)}
    for epoch in range(wanted.epochs):
        steps = range(epoch * wanted.steps_per_epoch, (epoch + 1) * wanted.steps_per_epoch)
        seen = [i for step in steps for i in global_batch(wanted, step, ranks, accumulate)]
        assert len(seen) == len(set(seen)) == wanted.images_per_epoch
        assert len(everything - set(seen)) == wanted.tail == 4


@pytest.mark.parametrize(("ranks", "accumulate"), SHARES)
def test_any_world_size_reads_the_same_global_batch_in_the_same_order(ranks, accumulate):
    wanted = plan()
    for step in (0, 1, 7, 8, 23):
        assert global_batch(wanted, step, ranks, accumulate) == global_batch(wanted, step, 1, 1)


def test_a_run_has_as_many_steps_as_whole_batches_fit_into_its_epochs():
    wanted = plan()
    assert (wanted.rows, wanted.steps_per_epoch, wanted.tail) == (100, 8, 4)
    assert (wanted.images_per_epoch, wanted.total_images, wanted.total_steps) == (96, 288, 24)


def test_without_a_tail_every_image_is_seen_in_every_epoch():
    wanted = plan(batch_size=10)
    assert wanted.tail == 0
    assert len(set(ids(wanted.read(100, 100)))) == 100


def test_the_images_of_the_tail_differ_between_epochs():
    wanted = plan()
    seen = [set(ids(wanted.read(96 * epoch, 96))) for epoch in range(3)]
    assert seen[0] != seen[1] != seen[2]


def test_epochs_have_different_orders():
    wanted = plan()
    assert len({tuple(ids(wanted.read(96 * epoch, 96))) for epoch in range(3)}) == 3


def test_seeds_have_different_orders_and_the_same_seed_the_same_one():
    assert ids(plan(seed=5).read(0, 96)) == ids(plan(seed=5).read(0, 96))
    assert ids(plan(seed=5).read(0, 96)) != ids(plan(seed=6).read(0, 96))


def test_the_rows_of_a_window_are_shuffled_by_seed_epoch_and_window():
    # One row group a window, so that the order of row groups says nothing about the rows'.
    def orders(seed: int) -> list[tuple[int, ...]]:
        wanted = plan(group_rows=(10, 10, 10), batch_size=10, window_rows=10, epochs=2, seed=seed)
        return [tuple(wanted.read(start, 10).rows.tolist()) for start in range(0, 60, 10)]

    seen = orders(5) + orders(6)
    assert len(set(seen)) == len(seen) == 12


def test_rows_know_their_positions_and_their_epoch():
    rows = plan().read(96 + 24, 12)
    assert rows.positions.tolist() == list(range(120, 132))
    assert rows.epoch == 1


def test_reading_does_not_depend_on_what_was_read_before():
    wanted = plan()
    in_order = {start: ids(wanted.read(start, 12)) for start in range(0, wanted.total_images, 12)}
    for seed in range(3):
        plan_module._layout.cache_clear()
        plan_module._window.cache_clear()
        for start in np.random.default_rng(seed).permutation(list(in_order)).tolist():
            assert ids(wanted.read(start, 12)) == in_order[start]


def test_what_is_read_does_not_depend_on_how_much_is_read_at_once():
    wanted = plan()
    one_by_one = [i for position in range(96) for i in ids(wanted.read(position, 1))]
    assert one_by_one == ids(wanted.read(0, 96))


def test_reading_beyond_an_epoch_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="cross an epoch's end"):
        plan().read(90, 12)


def test_a_window_of_the_whole_data_set_shuffles_all_of_it():
    wanted = plan(group_rows=(10,) * 10, batch_size=100, window_rows=100)
    groups = wanted.read(0, 100).groups
    assert len(set(groups[:20].tolist())) > 5
    assert np.abs(np.diff(groups)).mean() > 1


def _distance_from_the_mixture(labels: np.ndarray, batch: int) -> float:
    """Mean total variation distance between a batch's labels and the data set's, 0 to 1."""
    classes = int(labels.max()) + 1
    overall = np.bincount(labels, minlength=classes) / len(labels)
    return float(
        np.mean(
            [
                np.abs(np.bincount(part, minlength=classes) / batch - overall).sum() / 2
                for part in labels.reshape(-1, batch)
            ]
        )
    )


def test_batches_of_a_sorted_data_set_are_nearly_as_mixed_as_random_ones():
    # 100,000 rows in 1,000 row groups, sorted by 10 labels; a window is a tenth of them.
    wanted = plan(group_rows=(100,) * 1000, batch_size=100, epochs=1, window_rows=10_000)
    labels = wanted.read(0, wanted.rows).groups // 100
    shuffled = np.random.default_rng(0).permutation(labels)
    as_stored = _distance_from_the_mixture(np.sort(labels), 100)
    assert as_stored == pytest.approx(0.9)
    ours, best = _distance_from_the_mixture(labels, 100), _distance_from_the_mixture(shuffled, 100)
    assert best < ours < best + 0.1


def test_the_rows_of_a_batch_come_from_many_row_groups_but_only_from_one_windows():
    wanted = plan(group_rows=(100,) * 1000, batch_size=100, epochs=1, window_rows=2000)
    for start in (0, 2000, 50_000):
        window = wanted.read(start, 2000)
        assert len(np.unique(window.groups)) == 20, "a window is 20 row groups of 100 rows"
        assert len(np.unique(window.groups[:100])) > 15
        assert np.ptp(window.groups) > 500, "a window gathers row groups from all over"


def test_a_row_group_is_read_in_one_window_of_an_epoch_only():
    wanted = plan(group_rows=(100,) * 50, batch_size=100, epochs=1, window_rows=450)
    windows = [set(wanted.read(start, 500).groups.tolist()) for start in range(0, 5000, 500)]
    assert sum(len(window) for window in windows) == 50
    assert set().union(*windows) == set(range(50))


def test_reading_a_unit_of_a_large_data_set_computes_only_the_window_that_holds_it():
    wanted = plan(group_rows=(1000,) * 1000, batch_size=256, epochs=100)
    plan_module._layout.cache_clear()
    plan_module._window.cache_clear()
    # Step 30,003 lies in epoch 7 of 3,906 steps; its first unit lies within one window.
    rows = wanted.read(30_003 * 256, 64)
    assert len(rows.rows) == 64
    assert plan_module._layout.cache_info().misses == 1
    assert plan_module._window.cache_info().misses == 1
    wanted.read(30_003 * 256 + 64, 64)
    assert plan_module._window.cache_info().misses == 1, "the next unit shares the window"


def test_a_batch_that_is_larger_than_the_data_set_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match="batch_size 101 is larger than the data set of 100 images"
    ):
        plan(batch_size=101)
    with pytest.raises(ValueError, match="give --batch-size 100 or less"):
        plan(batch_size=101)


@pytest.mark.parametrize("field", ["batch_size", "epochs"])
def test_a_plan_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        plan(**{field: 0})


def test_a_batch_that_cannot_be_shared_evenly_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match="batch_size 10 does not divide among 4 workers: give a multiple of 4"
    ):
        Share(0, 4).micro_batch(10)
    with pytest.raises(
        ValueError, match=r"2 workers x 3 accumulated micro-batches: .* multiple of 6"
    ):
        Share(0, 2, 3).micro_batch(10)


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Share(2, 2)


# Quantiles: masks whose ratios are spread over a batch


def test_the_quantiles_of_a_batch_lie_one_in_each_equal_part():
    plan = ReadPlan((100,), batch_size=10, epochs=2, seed=3)
    for step in range(20):
        values = plan.quantiles(np.arange(10) + 10 * step, views=2)
        assert values.shape == (10, 2)
        assert sorted((values * 20).astype(int).ravel().tolist()) == list(range(20))


def test_quantiles_are_the_same_however_the_batch_is_cut_and_differ_from_step_to_step():
    plan = ReadPlan((100,), batch_size=10, epochs=2, seed=3)
    whole = plan.quantiles(np.arange(20), views=2)
    parts = [plan.quantiles(np.arange(first, first + 5), views=2) for first in range(0, 20, 5)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(whole[:10], whole[10:])
