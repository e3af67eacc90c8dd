"""How Ray is started, joined and stopped."""

import pytest
import ray

from selfray.cluster import runtime


def test_a_session_inside_another_leaves_the_outer_one_running(ray_session) -> None:
    with runtime.session():
        assert ray.is_initialized()
    assert ray.is_initialized()
    with runtime.Starting().session():
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_a_cluster_that_does_not_answer_is_named_at_once() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        runtime._require_cluster("127.0.0.1:9")
