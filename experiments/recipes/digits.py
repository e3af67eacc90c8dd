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

DATA = DataConfig(path="embedded:digits", mean=(0.305,) * 3, std=(0.376,) * 3)

SIMCLR = Experiment(
    name="simclr-digits",
    method=SimCLRConfig(
        temperature=0.2,
        view=View(
            crop_scale=(0.3, 1.0),
            flip=0.0,
            color_jitter=ColorJitter(0.4, 0.4, 0.0, 0.0),
            blur=0.2,
        ),
    ),
    encoder=EncoderConfig(
        "resnet18", image_size=16, small_stem=True, layers=(1, 1, 1, 1), channels=(32, 64, 128, 256)
    ),
    data=DATA,
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=2e-3,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(1e-4),
    ),
    epochs=60,
    batch_size=256,
    probe=ProbeConfig(times=4),
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
        patch_size=2,
        width=96,
        depth=4,
        heads=3,
        position="sincos",
    ),
    data=DATA,
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=2e-3,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
    ),
    epochs=100,
    batch_size=256,
    probe=ProbeConfig(times=4),
    checkpoint=CheckpointConfig(times=4),
)

RECIPES = {"simclr-digits": SIMCLR, "mae-digits": MAE}
