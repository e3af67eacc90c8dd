"""Fine-tuning as a method, its augmentation and its presets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from selfray.contract import RESNET, VIT
from selfray.data.source import BROKEN, LABEL, REASON, Source
from selfray.experiment import DataConfig
from selfray.method import Batch
from selfray.models.encoder import EncoderConfig
from selfray.pixels.augment import augment_batch, encode_png
from selfray.probes.finetune import FineTune, FineTuneConfig
from selfray.probes.finetuning import FineTuning, Placing
from selfray.schedules import Progress
from selfray.train import TrainState
from selfray.views import View

NOW = Progress(0, 100, 0)


def started(config: FineTuneConfig, encoder: EncoderConfig = VIT) -> FineTune:
    torch.manual_seed(0)
    return config.build(encoder.build())


def batch(labels: list[int], size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(labels), 1, 3, size, size, generator=generator)
    return {"global": images, "label": torch.tensor(labels)}


def loss_of(method: FineTune, seen: Batch, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return method.eval()(seen, NOW)[0].detach()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_loss_is_smoothed_cross_entropy_over_the_datas_own_labels(pool):
    method = started(FineTuneConfig((3, 7, 9), pool=pool, smoothing=0.1, head_std=0.5))
    seen = batch([7, 3, 9, 7], VIT.image_size)
    logits = method.eval().head(method.encoder(seen["global"][:, 0]))
    places = torch.tensor([1, 0, 2, 1])
    expected = torch.nn.functional.cross_entropy(logits, places, label_smoothing=0.1)
    assert float(loss_of(method, seen)) == pytest.approx(float(expected.detach()), abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"mixup": 0.8, "cutmix": 1.0, "erase": 0.9}])
def test_images_without_a_label_are_no_part_of_the_loss(more):
    method = started(FineTuneConfig((0, 1), head_std=0.5, **more))
    seen = batch([-1, -1, -1], VIT.image_size)
    assert loss_of(method, seen) == 0
    one = batch([1, -1, -1, -1], VIT.image_size)
    changed = {**one, "global": one["global"].clone()}
    changed["global"][1:3] += 1
    assert loss_of(method, one) == loss_of(method, changed)


def test_mixing_and_erasing_follow_torchs_generator_and_leave_the_batch_as_it_is():
    method = started(FineTuneConfig((0, 1, 2), mixup=0.8, cutmix=1.0, erase=0.5, head_std=0.5))
    seen = batch([0, 1, 2, 1, 0], VIT.image_size)
    before = seen["global"].clone()
    numpy_before = np.random.get_state()[1].copy()
    first, again, other = (loss_of(method, seen, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert torch.equal(seen["global"], before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_rand_augment_is_a_function_of_seed_epoch_and_image_alone():
    view = View(size=16, rand_augment="rand-m9-n2-p1.0-mstd0.5-inc1")
    images = [
        encode_png(np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8))
        for i in range(3)
    ]
    views = {"global": (view,)}
    both = augment_batch(images, views, 0, 0).arrays["global"].copy()
    alone = augment_batch(images[2:], views, 0, 0).arrays["global"].copy()
    assert np.array_equal(both[2:], alone)
    plain = augment_batch(images, {"global": (replace(view, rand_augment=""),)}, 0, 0)
    assert not np.array_equal(plain.arrays["global"], both)
    later = augment_batch(images, views, 0, 1).arrays["global"]
    assert not np.array_equal(later, both)


@pytest.mark.parametrize(
    ("encoder", "preset"),
    [
        (EncoderConfig("vit_base_patch16_224"), "finetune-mae-vit"),
        (EncoderConfig("beit_base_patch16_224", position="relative"), "finetune-beit-vit"),
        (EncoderConfig("resnet50"), "finetune-resnet"),
    ],
)
def test_large_data_gets_the_published_settings_and_small_data_its_own(encoder, preset):
    assert FineTuning.of("auto", encoder, 100_000).preset == preset
    assert FineTuning.of("auto", encoder, 1_000).preset == "small"


def test_mae_fine_tunes_as_published():
    large = FineTuning.of("finetune-mae-vit", EncoderConfig("vit_large_patch16_224"), 10**6)
    assert (large.epochs, large.base_learning_rate, large.layer_decay) == (50, 1e-3, 0.75)
    assert (large.drop_path, large.mixup, large.cutmix, large.erase) == (0.2, 0.8, 1.0, 0.25)


def test_the_baseline_is_the_same_budget_without_decay_by_layers():
    protocol = FineTuning.of("small", VIT, 1_000)
    placing, data = Placing("runs"), DataConfig("x")
    tuned = protocol.experiment(VIT, data, (0, 1), 1_000, placing, "encoder.safetensors")
    scratch = protocol.as_baseline().experiment(VIT, data, (0, 1), 1_000, placing, None)
    assert (scratch.epochs, scratch.batch_size) == (tuned.epochs, tuned.batch_size)
    assert (tuned.optimizer.layer_decay, scratch.optimizer.layer_decay) == (0.75, 1.0)
    assert (tuned.init_from, scratch.init_from) == ("encoder.safetensors", None)


def test_few_labels_are_seen_for_as_many_steps_as_many():
    protocol = FineTuning.of("small", RESNET, 12)
    run = protocol.experiment(RESNET, DataConfig("x"), (0, 1), 12, Placing("runs"), None)
    assert run.batch_size == 12
    assert run.epochs == protocol.least_steps


def test_positions_and_tokens_are_not_decayed_and_every_layer_has_its_rate():
    config = FineTuning.of("small", VIT, 1_000)
    run = config.experiment(VIT, DataConfig("x"), (0, 1), 1_000, Placing("runs"), None)
    state = TrainState.start(run, 1_000)
    rates = {group["rate"] for group in state.optimizer.param_groups if group["params"]}
    depth = VIT.depth or 0
    assert rates == {0.75**layer for layer in range(depth + 2)}
    kept = {id(p) for g in state.optimizer.param_groups if not g["decays"] for p in g["params"]}
    assert id(state.method.encoder.backbone.cls_token) in kept


@pytest.mark.parametrize(
    ("preset", "encoder", "reason"),
    [("finetune-mae-vit", RESNET, "is for ViTs, not for"), ("best", VIT, "must be one of")],
)
def test_a_preset_that_does_not_fit_is_one_line(preset, encoder, reason):
    with pytest.raises(ValueError, match=reason):
        FineTuning.of(preset, encoder, 100)


def test_what_stands_in_for_a_broken_image_has_no_label(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from helpers import write
    from selfray.data.plan import ReadPlan
    from selfray.data.shard_set import open_shards

    image = encode_png(np.zeros((20, 20, 3), np.uint8))
    table = pa.table(
        {
            "image": [{"bytes": b, "path": str(i)} for i, b in enumerate([image, b"no", image])],
            "label": [4, 5, 6],
        }
    )
    write(tmp_path, {})
    pq.write_table(table, tmp_path / "a.parquet")
    shards = open_shards([str(tmp_path / "a.parquet")], str(tmp_path))
    source = Source(shards, ReadPlan(shards.group_rows, 3, 1, 0), {"global": (View(size=8),)})
    drawn = source.draw(0, 3)
    assert sorted(drawn[LABEL][~drawn[BROKEN]].tolist()) == [0, 2]
    assert drawn[LABEL][drawn[BROKEN]].tolist() == [-1]
    assert sum(map(bool, drawn[REASON])) == 1
