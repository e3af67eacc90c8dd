"""cluster.yaml against Ray's own schema and checks; no cloud is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from selfray.cluster.runtime import ENVIRONMENT, largest_cluster

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_ray_accepts_it(cluster):
    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_slip(cluster):
    cluster["head_node_typ"] = cluster.pop("head_node_type")
    with pytest.raises(Exception, match="head_node_typ"):
        validate_config(prepare_config(cluster))


def test_workers_are_on_spot_and_come_from_none_and_the_head_is_on_demand(cluster):
    kinds = cluster["available_node_types"]
    head = kinds.pop(cluster["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"]["CPU"] == 0
    for kind in kinds.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert kind["min_workers"] == 0 < kind["max_workers"]


def test_nothing_but_ssh_from_one_address_is_open(cluster):
    (rule,) = cluster["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert [r["CidrIp"] for r in rule["IpRanges"]] == ["203.0.113.7/32"]
    commands = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands


def test_every_value_that_a_user_must_change_is_marked():
    lines = FILE.read_text().splitlines()
    # In the value's own line, or in a comment of at most three lines above it.
    for placeholder in (
        "203.0.113.7",
        "ami-0123456789abcdef0",
        "region: us-east-1",
        "availability_zone",
        "Name: selfray",
        "mlflow_database: ~",
        "s3://YOUR-BUCKET/mlflow",
    ):
        places = [i for i, line in enumerate(lines) if placeholder in line]
        assert any("CHANGE" in "".join(lines[max(0, i - 6) : i + 1]) for i in places), placeholder


def test_all_nodes_agree_on_how_ray_authenticates(cluster):
    # A driver takes what its cluster's owner has set.
    assert "RAY_AUTH_MODE" not in ENVIRONMENT
    assert any("RAY_AUTH_MODE=disabled" in command for command in cluster["setup_commands"])


def test_no_password_stands_in_a_file_that_is_committed(cluster):
    assert "postgresql://" not in json.dumps(cluster)


def test_what_the_cluster_can_grow_to_is_read_from_it(cluster):
    found = largest_cluster(prepare_config(cluster))
    assert found["CPU"] == 8 * 48 + 16 * 16
    assert found["GPU"] == 8 * 4
