"""cluster.yaml against Ray's own schema and checks; no cloud is asked."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from helpers import wait_for
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
    # In the value's own line, or in a comment of some lines above it.
    for placeholder in (
        "203.0.113.7",
        "ami-0123456789abcdef0",
        "region: us-east-1",
        "availability_zone",
        "Name: selfray-head",
        "Name: selfray-worker",
        "'us-east-1'",
        "YOUR-DATABASE",
        "s3://YOUR-BUCKET/mlflow",
    ):
        places = [i for i, line in enumerate(lines) if placeholder in line]
        assert any("CHANGE" in "".join(lines[max(0, i - 9) : i + 1]) for i in places), placeholder


def test_every_node_requires_the_token_of_who_started_the_cluster(cluster):
    # A driver takes what its cluster's owner has set.
    assert "RAY_AUTH_MODE" not in ENVIRONMENT
    assert any("RAY_AUTH_MODE=token" in command for command in cluster["setup_commands"])
    # Where Ray looks for it on a node whose user is `ubuntu`.
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 /home/ubuntu/.ray/auth_token" in cluster["setup_commands"]


def test_no_password_stands_in_a_file_that_is_committed(cluster):
    assert "postgresql://" not in json.dumps(cluster)


def test_ec2_knows_every_setting_of_a_node(cluster):
    run = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for kind in cluster["available_node_types"].values():
        settings = {"MinCount": 1, "MaxCount": 1, **kind["node_config"]}
        assert not ParamValidator().validate(settings, run.input_shape).has_errors()


def test_disks_are_encrypted_and_credentials_need_a_token_of_the_node_itself(cluster):
    for kind in cluster["available_node_types"].values():
        for disk in kind["node_config"]["BlockDeviceMappings"]:
            assert disk["Ebs"]["Encrypted"] is True
        metadata = kind["node_config"]["MetadataOptions"]
        assert metadata["HttpTokens"] == "required"
        assert metadata["HttpPutResponseHopLimit"] == 1


def test_workers_have_a_profile_of_their_own(cluster):
    kinds = cluster["available_node_types"]
    head = kinds.pop(cluster["head_node_type"])["node_config"]["IamInstanceProfile"]["Name"]
    assert {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds.values()} == {
        "selfray-worker"
    }
    assert head != "selfray-worker"


def test_nothing_but_checkout_and_token_is_copied_to_all_nodes_and_they_are_told_no_secret(cluster):
    assert list(cluster["file_mounts"].values()) == [".", "~/.ray/auth_token"]
    everywhere = [cluster[key] for key in ("setup_commands", "worker_start_ray_commands")]
    assert not any(word in str(everywhere).lower() for word in ("database", "password", "secret"))
    assert "UserData" not in str(cluster)


SECRET = "postgresql://selfray:correct-horse@db/mlflow"
HEAD = "10.0.0.17"
PROGRAMS = {
    "ray": "env > $FOUND/ray-$1.env; echo $@ > $FOUND/ray-$1",
    "mlflow": "env > $FOUND/mlflow.env; echo $@ > $FOUND/mlflow.part; mv $FOUND/mlflow.part "
    "$FOUND/mlflow",
    "python": 'if [ -e "$FOUND/forbidden" ]; then exit 1; fi; echo $@ > $FOUND/python; '
    f"echo {SECRET}",
    "curl": "exit 7",
    "getent": f"echo '{HEAD} mlflow'",
    "hostname": f"echo '{HEAD} 172.17.0.1'",
    "sudo": "cat > $FOUND/hosts",
}
"""What the head's commands call, as scripts that write down how they were called."""


@pytest.fixture
def head(cluster, tmp_path):
    """Runs the commands that start Ray on the head, and gives what each program was told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "FOUND": str(tmp_path),
    }

    def run() -> tuple[Path, bool]:
        for command in cluster["head_start_ray_commands"]:
            # A container may allow fewer files.
            command = command.replace("ulimit -n 65536", ":")
            if subprocess.run(["bash", "-c", command], env=environment).returncode:
                return tmp_path, False
        wait_for("MLflow's server", (tmp_path / "mlflow").exists)
        return tmp_path, True

    return run


def test_the_database_s_password_is_given_to_mlflow_s_server_alone(head):
    found, started = head()
    assert started
    assert f"MLFLOW_BACKEND_STORE_URI={SECRET}" in (found / "mlflow.env").read_text()
    assert "WithDecryption=True" in (found / "python").read_text()
    # Neither Ray and so its jobs, nor the list of processes, nor a log have it.
    holders = {
        path.name for path in found.iterdir() if path.is_file() and SECRET in path.read_text()
    }
    assert holders == {"mlflow.env"}


def test_mlflow_listens_inside_the_security_group_alone_and_answers_to_its_own_names(head):
    found, _ = head()
    words = (found / "mlflow").read_text().split()
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    assert flags["--host"] == HEAD
    hosts = flags["--allowed-hosts"].split(",")
    assert hosts == ["localhost:5000", "127.0.0.1:5000", f"{HEAD}:5000"]
    assert f"MLFLOW_TRACKING_URI=http://{HEAD}:5000" in (found / "ray-start.env").read_text()


def test_a_head_that_may_not_read_the_database_s_address_does_not_start(head, tmp_path):
    (tmp_path / "forbidden").touch()
    found, started = head()
    # MLflow would keep all runs in a file of the head otherwise, and lose them with it.
    assert not started
    assert not (found / "mlflow").exists()


def test_mlflow_s_host_check_is_never_switched_off(cluster):
    makefile = FILE.with_name("Makefile").read_text()
    for text in (json.dumps(cluster), makefile):
        assert "--disable-security-middleware" not in text
        assert "'*'" not in text
        assert "0.0.0.0" not in text
    assert "--host 127.0.0.1" in makefile
    assert "--allowed-hosts localhost:5000,127.0.0.1:5000" in makefile


def test_what_the_cluster_can_grow_to_is_read_from_it(cluster):
    found = largest_cluster(prepare_config(cluster))
    assert found["CPU"] == 8 * 48 + 16 * 16
    assert found["GPU"] == 8 * 4
