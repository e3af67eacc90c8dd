from dataclasses import fields, replace

import pytest

from helpers import MAE, RESNET, SIMCLR, VIT, experiment
from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.health import GuardConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig

WANTED = experiment(MAE)
PLACEMENT = {
    "workers": 2,
    "gpus_per_worker": 0.5,
    "cpus_per_worker": 2.0,
    "worker_resources": "trainer=1",
    "data_cpus": 3,
    "output": "elsewhere",
    "max_failures": 9,
    "log_every": 7,
    "guard": GuardConfig(patience=0),
    "compile": True,
    "shard": "fsdp",
}
COMPUTED = {
    "name": "other",
    "method": replace(MAE, mask_ratio=0.5),
    "encoder": replace(VIT, depth=1),
    "data": DataConfig(path="elsewhere"),
    "optimizer": OptimizerConfig(base_learning_rate=0.5),
    "epochs": 7,
    "batch_size": 16,
    "accumulate": 2,
    "precision": "bf16",
    "seed": 1,
    "init_from": "elsewhere",
    "init_share": 0.5,
    "warm_up_head": 0.1,
    "probe": ProbeConfig(times=1),
    "checkpoint": CheckpointConfig(times=1),
}


# Identity


def test_every_field_is_either_placement_or_computed():
    assert {f.name for f in fields(Experiment)} == PLACEMENT.keys() | COMPUTED.keys()
    assert PLACEMENT.keys() == Experiment.PLACEMENT


@pytest.mark.parametrize("field", PLACEMENT)
def test_identity_does_not_change_with_where_and_how_a_run_is_carried_out(field):
    changed = replace(WANTED, **{"workers": 2, field: PLACEMENT[field]})
    assert changed != WANTED
    assert changed.identity == WANTED.identity


def test_identity_does_not_change_with_how_an_encoder_is_computed():
    changed = replace(WANTED, encoder=replace(WANTED.encoder, recompute=True))
    assert changed.identity == WANTED.identity


@pytest.mark.parametrize("field", COMPUTED)
def test_identity_changes_with_what_is_computed(field):
    changed = replace(WANTED, **{field: COMPUTED[field]})
    assert changed != WANTED
    assert changed.identity != WANTED.identity


def test_identity_changes_with_a_methods_type():
    assert len(WANTED.identity) == 8
    assert experiment(SIMCLR, VIT).identity != experiment(MAE, VIT).identity


def test_a_runs_folder_is_named_by_the_recipe_and_its_identity():
    assert WANTED.run_name == f"test-{WANTED.identity}"


def test_an_experiment_knows_its_views():
    (view,) = WANTED.views["global"]
    assert view.size == 16


# What is refused: each message names the field and the way out


def refuses(build, *parts: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is looked at below
        build()
    message = str(refused.value)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"name": "vit_smal_patch16_224"},
            ["encoder.name 'vit_smal_patch16_224'", "did you mean vit_small_patch16_224"],
        ),
        ({"name": "resnet5"}, ["encoder.name 'resnet5'", "did you mean resnet"]),
        ({"name": "qqqqqq"}, ["encoder.name 'qqqqqq' is not a timm model"]),
        ({"image_size": 0}, ["encoder.image_size must be positive, got 0"]),
        ({"drop_path": 1.0}, ["encoder.drop_path must lie in [0, 1), got 1.0"]),
        (
            {"image_size": 28},
            [
                "encoder.patch_size 16 does not divide encoder.image_size 28",
                "--encoder.patch-size 14",
            ],
        ),
        ({"image_size": 17, "patch_size": 4}, ["give a divisor, such as --encoder.patch-size 1"]),
        ({"patch_size": 0}, ["encoder.patch_size", "got 0"]),
        ({"patch_size": -4}, ["encoder.patch_size", "got -4"]),
        ({"width": 30, "heads": 4}, ["encoder.heads 4 does not divide encoder.width 30"]),
        (
            {"width": 30, "heads": 3, "position": "sincos"},
            ["encoder.width must be a multiple of 4 for sincos, got 30"],
        ),
        ({"small_stem": True}, ["encoder.small_stem is for ResNets, not for vit_small"]),
        ({"position": "sinus"}, ["encoder.position", "sinus"]),
        ({"name": "resnet18", "position": "sincos"}, ["encoder.position", "ViT"]),
    ],
)  # fmt: skip
def test_an_encoder_is_refused_by_the_name_of_its_field(settings, parts):
    refuses(lambda: EncoderConfig(**settings), *parts)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (EncoderConfig("resnet18", 16, depth=3), "depth"),
        (EncoderConfig("resnet18", 16, patch_size=4), "patch_size"),
        (EncoderConfig("vit_tiny_patch16_224", 16, layers=(1, 1)), "layers"),
    ],
)
def test_an_option_that_a_backbone_does_not_take_is_named(config, option):
    refuses(config.build, f"encoder {config.name} does not take the option {option}")


def test_a_small_stem_needs_a_stem_of_one_convolution():
    refuses(EncoderConfig("resnet18d", 16, small_stem=True).build, "encoder.small_stem needs a")


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: DataConfig(std=(1.0, 0.0, 1.0)), ["data.std must be positive, got (1.0, 0.0"]),
        (lambda: DataConfig(window_rows=0), ["data.window_rows must be positive, got 0"]),
        (
            lambda: DataConfig(max_broken_fraction=1.5),
            ["data.max_broken_fraction must lie in [0, 1], got 1.5"],
        ),
        (lambda: ProbeConfig(times=-1), ["probe.times must be at least 0, got -1"]),
        (lambda: CheckpointConfig(times=0), ["checkpoint.times must be at least 1, got 0"]),
        (lambda: CheckpointConfig(minutes=0), ["checkpoint.minutes must be positive, got 0"]),
        (lambda: CheckpointConfig(keep=0), ["checkpoint.keep must be at least 1, got 0"]),
        (lambda: replace(WANTED, epochs=0), ["epochs must be positive, got 0"]),
        (lambda: replace(WANTED, batch_size=0), ["batch_size must be positive, got 0"]),
        (lambda: replace(WANTED, workers=0), ["workers must be at least 1, got 0"]),
        (lambda: replace(WANTED, accumulate=0), ["accumulate must be at least 1, got 0"]),
        (lambda: replace(WANTED, log_every=0), ["log_every must be at least 1, got 0"]),
        (lambda: replace(WANTED, max_failures=-1), ["max_failures must be at least 0, got -1"]),
        (lambda: replace(WANTED, gpus_per_worker=-1), ["gpus_per_worker must be at least 0"]),
        (lambda: replace(WANTED, cpus_per_worker=0), ["cpus_per_worker must be positive, got 0"]),
        (
            lambda: replace(WANTED, workers=3),
            ["batch_size 8 does not divide among 3 workers", "give a multiple of 3"],
        ),
        (
            lambda: replace(WANTED, workers=2, accumulate=3),
            ["2 workers x 3 accumulated micro-batches", "give a multiple of 6"],
        ),
        (
            lambda: replace(WANTED, shard="fsdp"),
            ["shard fsdp splits the weights among workers, but workers is 1", "--workers 2"],
        ),
        (
            lambda: experiment(SIMCLR, RESNET, workers=2, shard="fsdp"),
            ["shard fsdp gathers the blocks of", "encoder.name resnet18", "leave --shard out"],
        ),
        (
            lambda: experiment(SIMCLR, replace(VIT, norm="ghost")),
            ["encoder.norm ghost is for ResNets: vit_tiny_patch16_224 has no batch norms"],
        ),
        (
            lambda: experiment(SIMCLR, replace(RESNET, norm="group")),
            ["encoder.channels (8, 16, 16, 16) must be multiples of 32"],
        ),
        (
            lambda: experiment(SIMCLR, replace(RESNET, recompute=True)),
            ["encoder.recompute True is for ViTs, not for resnet18"],
        ),
        (
            lambda: experiment(SIMCLR, accumulate=2),
            [
                "accumulate 2 would change the loss of simclr",
                "--encoder.norm ghost",
                "more --workers",
            ],
        ),
        (
            lambda: experiment(MAE, RESNET),
            ["needs a ViT, not encoder.name resnet18", "--encoder.name vit_small_patch16_224"],
        ),
        (lambda: replace(WANTED, workers="many"), ["workers must be a number such as 4", "many"]),
        (lambda: replace(WANTED, workers="4:2"), ["workers 4:2 must be a range such as 1:4"]),
        (
            lambda: replace(WANTED, workers="1:3"),
            ["workers 1:3: batch_size 8 does not divide", "give bounds from 1, 2, 4"],
        ),
        (
            lambda: replace(WANTED, worker_resources="trainer"),
            ["worker_resources must be names with amounts such as trainer=1, got trainer"],
        ),
        (lambda: replace(WANTED, precision="fp16"), ["precision", "fp16"]),
        (lambda: replace(WANTED, seed=-1), ["seed", "-1"]),
        (lambda: replace(WANTED, seed=2**64), ["seed", str(2**64)]),
    ],
)  # fmt: skip
def test_an_experiment_is_refused_by_the_name_of_its_field(build, parts):
    refuses(build, *parts)


@pytest.mark.parametrize(
    ("config", "grid", "patch"),
    [
        (EncoderConfig("vit_small_patch16_224"), 14, 16),
        (EncoderConfig("vit_small_patch14_dinov2", image_size=28), 2, 14),
        (VIT, 4, 4),
    ],
)
def test_a_vits_grid_follows_from_its_image_and_patch(config, grid, patch):
    assert (config.grid, config.patch) == (grid, patch)


def test_a_resnet_has_no_grid():
    assert RESNET.grid is None


def test_the_options_are_what_timm_receives_and_nothing_else():
    assert RESNET.options == {"num_classes": 0, "layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)}
    assert VIT.options == {
        "num_classes": 0,
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    }


# Elastic


def test_an_elastic_run_has_only_numbers_of_workers_that_its_batch_divides_among():
    elastic = replace(WANTED, workers="1:4")
    assert (elastic.min_workers, elastic.max_workers) == (1, 4)
    assert elastic.world_sizes == (1, 2, 4)
    assert replace(WANTED, workers=2).world_sizes == (2,)
    assert elastic.identity == WANTED.identity


def test_fewer_workers_of_an_elastic_run_take_more_micro_batches_of_the_same_size():
    elastic = replace(WANTED, batch_size=24, workers="1:6", accumulate=2)
    for workers in elastic.world_sizes:
        shared = elastic.shared_by(workers)
        parts = workers * shared.accumulate
        assert 24 % parts == 0
        assert parts >= 12, "no micro-batch is larger than on the full cluster"
        assert shared.batch_size == 24
    assert elastic.shared_by(6).accumulate == 2


def test_a_method_that_cannot_accumulate_takes_larger_batches_on_fewer_workers():
    elastic = experiment(SIMCLR, workers="1:4")
    assert elastic.shared_by(1).accumulate == 1


def test_ghost_norms_see_the_same_micro_batches_on_any_number_of_workers():
    ghost = experiment(SIMCLR, replace(RESNET, norm="ghost"), accumulate=2, workers="1:4")
    assert ghost.shared_by(1).accumulate == 2


def test_a_fixed_number_of_workers_is_shared_as_it_says():
    assert replace(WANTED, workers=2, accumulate=2).shared_by(2).accumulate == 2
