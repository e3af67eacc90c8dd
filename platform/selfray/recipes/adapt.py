"""Adapt public weights to your own images: settings for 10 to 50 thousand images.

python experiments/pretrain.py dinov2-adapt --data.path ~/scans
python experiments/pretrain.py mae-adapt --data.path ~/scans --init-from mae_pretrain_vit_base.pth
python experiments/pretrain.py dino-adapt --data.path ~/scans --init-from dino_deitsmall16.pth

None of these recipes was run at this size. Their settings follow from the papers' by the rules in
the comments; each needs a GPU for some hours (ViT-S) to a day (ViT-B). --init-from also determines
the encoder. With labelled images, in the data or given by --data.test-path, the last line of the
run says by how much the adaptation helped.
"""

from dataclasses import replace
from functools import partial

from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.dinov2 import DINOv2Config
from selfray.methods.mae import MAEConfig
from selfray.methods.simclr import SimCLRConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.recipes import by_name
from selfray.schedules import Constant, Cosine, WarmupCosine
from selfray.views import ColorJitter, View

# Common rules: the encoder's learning rate is at most a tenth of the paper's rate from scratch, and
# falls with each layer towards the input, because early layers transfer best; new heads are trained
# alone at first; the teacher's momentum is higher, because there are few steps (40 to 200 per
# epoch). 112 pixels are whole patches of 8, 14 and 16: local crops fit the encoder of any public
# weights.
LOCAL = 112

RECIPE = partial(
    Experiment,
    data=DataConfig(),
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=20),
)
"""Settings that these recipes share."""


DINO_V2 = RECIPE(
    name="dinov2-adapt",
    method=DINOv2Config(
        prototypes=16_384,
        momentum=Cosine(0.998, 1.0),
        freeze_prototypes=0.02,
        local_view=replace(DINOv2Config().local_view, size=LOCAL),
    ),
    encoder=EncoderConfig(
        "vit_small_patch14_dinov2", image_size=224, drop_path=0.1, drop_path_uniform=True
    ),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=2e-4 / 1024**0.5,
        scaling="sqrt",
        schedule=WarmupCosine(warmup_fraction=0.1, final=0.01),
        weight_decay=Constant(0.04),
        clip_norm=3.0,
        clip_each="module",
        layer_decay=0.9,
        patch_embed_rate=0.2,
    ),
    epochs=50,
    batch_size=256,
    init_from="timm:vit_small_patch14_dinov2.lvd142m",
    warm_up_head=0.05,
)

DINO = RECIPE(
    name="dino-adapt",
    method=DINOConfig(
        prototypes=16_384,
        momentum=Cosine(0.998, 1.0),
        freeze_prototypes=0.02,
        local_view=replace(DINOConfig().local_view, size=LOCAL),
    ),
    encoder=EncoderConfig("vit_small_patch16_224", image_size=224, drop_path=0.1),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=5e-5,
        schedule=WarmupCosine(warmup_fraction=0.1, final=0.01),
        weight_decay=Cosine(0.04, 0.2),
        clip_norm=3.0,
        clip_each="parameter",
        layer_decay=0.9,
        patch_embed_rate=0.2,
    ),
    epochs=50,
    batch_size=256,
    init_from="timm:vit_small_patch16_224.dino",
    warm_up_head=0.05,
)

# MAE's decoder is new: it is trained alone for the first tenth. There are more epochs, because each
# shows only a quarter of an image and there is no second network.
MAE = RECIPE(
    name="mae-adapt",
    method=MAEConfig(),
    encoder=EncoderConfig("vit_base_patch16_224", image_size=224),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=5e-5,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
        layer_decay=0.85,
    ),
    epochs=200,
    batch_size=256,
    init_from="timm:vit_base_patch16_224.mae",
    warm_up_head=0.1,
)

# A ResNet has batch norms and one learning rate for all layers: LARS at a tenth of the paper's
# rate.
SIMCLR = RECIPE(
    name="simclr-adapt",
    method=SimCLRConfig(
        temperature=0.2,
        view=View(
            crop_scale=(0.2, 1.0),
            color_jitter=ColorJitter(0.4, 0.4, 0.4, 0.1),
            grayscale=0.2,
            blur=0.5,
        ),
    ),
    encoder=EncoderConfig("resnet50", image_size=224),
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.03,
        schedule=WarmupCosine(warmup_fraction=0.1),
        weight_decay=Constant(1e-6),
    ),
    epochs=100,
    batch_size=512,
    init_from="timm:resnet50.a1_in1k",
    warm_up_head=0.05,
)

RECIPES = by_name(DINO_V2, DINO, MAE, SIMCLR)
