"""CIFAR-10 at 32 pixels: ResNet-18 with the small-image stem, and a small ViT for MAE.

The data is any copy in Parquet: a folder with train-*.parquet and test-*.parquet.

    python experiments/pretrain.py simclr-cifar10 --data.path cifar10/
    python experiments/pretrain.py mae-cifar10 --data.path cifar10/
"""

from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.methods.mae import MAEConfig
from selfray.methods.simclr import SimCLRConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.schedules import Constant, WarmupCosine
from selfray.views import ColorJitter, View

DATA = DataConfig(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))

# SimCLR's own CIFAR-10 setting (arXiv:2002.05709, appendix B.9): batch 512, learning rate 1.0
# with LARS, weight decay 1e-4, temperature 0.5, colour distortion of strength 0.5 and no blur.
SIMCLR = Experiment(
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
    data=DATA,
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.5,  # 1.0 at the recipe's batch of 512
        schedule=WarmupCosine(warmup_fraction=0.01),
        weight_decay=Constant(1e-4),
    ),
    epochs=1000,
    batch_size=512,
    probe=ProbeConfig(times=20),
    checkpoint=CheckpointConfig(times=20),
)

# No paper trains MAE on CIFAR-10. A quarter-width ViT with patches of 4 pixels (64 tokens, 16 of
# them seen), and MAE's ImageNet optimizer with a larger learning rate for the smaller model.
MAE = Experiment(
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
    data=DATA,
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4 * 4,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
    ),
    epochs=800,
    batch_size=512,
    probe=ProbeConfig(times=20),
    checkpoint=CheckpointConfig(times=20),
)

RECIPES = {"simclr-cifar10": SIMCLR, "mae-cifar10": MAE}
