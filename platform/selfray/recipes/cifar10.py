"""CIFAR-10 at 32 pixels: ResNet-18 with the small-image stem, and a small ViT for MAE.

The data is any copy in Parquet: a folder with train-*.parquet and test-*.parquet.

    python experiments/pretrain.py simclr-cifar10 --data.path cifar10/
    python experiments/pretrain.py mae-cifar10 --data.path cifar10/
"""

from dataclasses import replace
from functools import partial

from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.methods.beit import BEiTConfig
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.methods.mae import MAEConfig
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.methods.simclr import SimCLRConfig
from selfray.methods.vqvae import VQVAEConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.recipes import by_name
from selfray.schedules import Constant, Cosine, Ramp, Steps, WarmupCosine
from selfray.views import ColorJitter, View

RECIPE = partial(
    Experiment,
    data=DataConfig(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    batch_size=512,
    probe=ProbeConfig(times=20),
    checkpoint=CheckpointConfig(times=20),
)
"""What these recipes have in common."""

# SimCLR's own CIFAR-10 setting (arXiv:2002.05709, appendix B.9): batch 512, learning rate 1.0
# with LARS, weight decay 1e-4, temperature 0.5, colour distortion of strength 0.5 and no blur.
SIMCLR = RECIPE(
    name="simclr-cifar10",
    method=SimCLRConfig(
        temperature=0.5,
        projector_layers=2,
        view=View(
            crop_scale=(0.08, 1.0),
            color_jitter=ColorJitter(0.4, 0.4, 0.4, 0.1),
            grayscale=0.2,
        ),
    ),
    encoder=EncoderConfig("resnet18", image_size=32, small_stem=True),
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.5,  # 1.0 at the recipe's batch of 512
        schedule=WarmupCosine(warmup_fraction=0.01),
        weight_decay=Constant(1e-4),
    ),
    epochs=1000,
)

# No paper trains MAE on CIFAR-10. This is a quarter-width ViT with patches of 4 pixels (64 tokens,
# 16 of them visible), with MAE's ImageNet optimizer at a larger learning rate for the smaller
# model.
MAE = RECIPE(
    name="mae-cifar10",
    method=MAEConfig(
        mask_ratio=0.75,
        decoder_width=128,
        decoder_depth=4,
        decoder_heads=4,
        view=View(crop_scale=(0.2, 1.0)),
    ),
    encoder=EncoderConfig(
        "vit_tiny_patch16_224", image_size=32, patch_size=4, depth=12, position="sincos"
    ),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4 * 4,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
    ),
    epochs=800,
)

# The other methods use published settings for CIFAR-10 on one GPU: ResNet-18, batch 256, 1000
# epochs with 10 of warm-up, LARS with a trust coefficient of 0.02, no blur, solarization on the
# second view. Published linear accuracies, not reproduced here: BYOL 92.6 %, MoCo v2 92.9 %, MoCo
# v3 93.1 %, DINO 89.5 %.
JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1)
FIRST = View(crop_scale=(0.08, 1.0), color_jitter=JITTER, grayscale=0.2)
SECOND = replace(FIRST, solarize=0.2)
LARS = OptimizerConfig(
    "lars",
    base_learning_rate=0.3,
    schedule=WarmupCosine(warmup_fraction=0.01),
    weight_decay=Constant(1e-6),
    trust_coefficient=0.02,
)

RESNET = replace(SIMCLR, batch_size=256)

BYOL = replace(
    RESNET,
    name="byol-cifar10",
    method=BYOLConfig(momentum=Cosine(0.99, 1.0), first_view=FIRST, second_view=SECOND),
    optimizer=replace(LARS, base_learning_rate=1.0, weight_decay=Constant(1e-5)),
)

# On one worker, queries and keys share one batch norm, as in the setting of the published numbers.
# --method.batchnorm-groups 8 separates them, as the paper's 8 GPUs do.
MOCO_V2 = replace(
    RESNET,
    name="mocov2-cifar10",
    method=MoCoConfig(queue_size=32_768, momentum=Cosine(0.99, 0.999), view=FIRST),
    optimizer=replace(LARS, name="sgd", base_learning_rate=0.3, weight_decay=Constant(1e-4)),
)

MOCO_V3 = replace(
    RESNET,
    name="mocov3-cifar10",
    method=MoCoV3Config(first_view=FIRST, second_view=SECOND),
    optimizer=LARS,
)

DINO = replace(
    RESNET,
    name="dino-cifar10",
    method=DINOConfig(
        prototypes=4096,
        momentum=Cosine(0.9995, 1.0),
        local_crops=0,
        first_view=FIRST,
        second_view=SECOND,
    ),
    optimizer=LARS,
)

# The differences of MoCo v1: a linear head, a constant momentum, a step schedule.
MOCO_V1 = replace(
    MOCO_V2,
    name="mocov1-cifar10",
    method=replace(MOCO_V2.method, head="linear", momentum=Constant(0.99)),
    optimizer=replace(MOCO_V2.optimizer, schedule=Steps((0.6, 0.8))),
)

# No paper trains the next methods on CIFAR-10: they use the small ViT and the optimizer of MAE
# above. BEiT needs the folder of a run of tokenizer-cifar10 as --method.tokenizer.
TOKENIZER = replace(
    MAE,
    name="tokenizer-cifar10",
    method=VQVAEConfig(codes=1024, decoder_width=128, decoder_depth=2, decoder_heads=4),
    encoder=replace(MAE.encoder, depth=6),
    epochs=50,
    probe=ProbeConfig(times=4),
)

BEIT = replace(
    MAE,
    name="beit-cifar10",
    method=BEiTConfig(smallest_block=6, view=View(crop_scale=(0.2, 1.0))),
    optimizer=replace(MAE.optimizer, betas=(0.9, 0.999), clip_norm=3.0),
)

DINO_V2 = replace(
    MAE,
    name="dinov2-cifar10",
    method=DINOv2Config(
        prototypes=4096,
        centering="sinkhorn",
        momentum=Cosine(0.992, 1.0),
        teacher_temperature=Ramp(0.04, 0.07, 0.1),
        local_crops=4,
        first_view=FIRST,
        second_view=SECOND,
        local_view=replace(FIRST, size=16, crop_scale=(0.05, 0.32)),
    ),
    encoder=replace(MAE.encoder, position="learned", registers=4, layer_scale=1e-1, drop_path=0.1),
    optimizer=replace(
        MAE.optimizer,
        weight_decay=Cosine(0.04, 0.4),
        betas=(0.9, 0.999),
        clip_norm=3.0,
        clip_each="module",
    ),
)

RECIPES = by_name(SIMCLR, MAE, BYOL, MOCO_V2, MOCO_V3, DINO, MOCO_V1, TOKENIZER, BEIT, DINO_V2)
