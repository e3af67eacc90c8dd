"""How many workers an elastic run takes; that it shrinks and grows is a drill."""

import pytest
from ray.train import ScalingConfig

from selfray.cluster.elastic import WholeShares


@pytest.mark.parametrize(("trainers", "taken"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_only_as_many_workers_are_taken_as_the_batch_divides_among(trainers, taken):
    wanted = {"CPU": 1.0, "trainer": 1.0}
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker=wanted)
    policy = WholeShares(scaling, (1, 2, 4), "nowhere")
    nodes = {f"node {i}": {"CPU": 2.0, "trainer": 1.0} for i in range(trainers)}
    assert policy._count_possible_workers(nodes | {"data": {"CPU": 8.0}}) == taken


def test_fewer_nodes_than_the_least_size_are_not_enough():
    scaling = ScalingConfig(num_workers=(2, 4), resources_per_worker={"CPU": 1.0})
    policy = WholeShares(scaling, (2, 4), "nowhere")
    assert policy._count_possible_workers({"one": {"CPU": 1.0}}) == 0
