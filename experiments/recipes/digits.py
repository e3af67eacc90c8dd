"""scikit-learn's handwritten digits: 1,797 real 8 x 8 images, no download, minutes on a laptop.

The images are centred and upright, so views are crops without flips, and gray, so colour jitter is
brightness and contrast alone.
"""

from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.methods.mae import MAEConfig
from selfray.methods.simclr import SimCLRConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.schedules import Constant, WarmupCosine
from selfray.views import ColorJitter, View

DATA = DataConfig(path="embedded:digits", mean=(0.305, 0.305, 0.305), std=(0.376, 0.376, 0.376))

SIMCLR = Experiment(
    name="simclr-digits",
    method=SimCLRConfig(
        temperature=0.1,
        view=View(crop_scale=(0.4, 1.0), flip=0.0, color_jitter=ColorJitter(0.4, 0.4, 0.0, 0.0)),
    ),
    encoder=EncoderConfig(
        "resnet18", image_size=12, small_stem=True, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128)
    ),
    data=DATA,
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1e-2,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(1e-4),
    ),
    epochs=80,
    batch_size=256,
    probe=ProbeConfig(times=2),
    checkpoint=CheckpointConfig(times=4),
)

MAE = Experiment(
    name="mae-digits",
    method=MAEConfig(
        mask_ratio=0.75,
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=4,
        view=View(crop_scale=(0.5, 1.0), flip=0.0),
    ),
    encoder=EncoderConfig(
        "vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        width=96,
        depth=4,
        heads=4,
        position="sincos",
    ),
    data=DATA,
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=4e-3,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
    ),
    epochs=30,
    batch_size=64,
    probe=ProbeConfig(times=2),
    checkpoint=CheckpointConfig(times=4),
)

RECIPES = {"simclr-digits": SIMCLR, "mae-digits": MAE}
