"""The papers' own ImageNet-1k settings. Nothing here was run whole: each needs a GPU cluster.

python experiments/pretrain.py simclr-imagenet --data.path s3://bucket/imagenet --workers 32
python experiments/pretrain.py mae-imagenet --data.path s3://bucket/imagenet --workers 64
"""

from selfray.experiment import CheckpointConfig, DataConfig, Experiment, ProbeConfig
from selfray.methods.byol import BYOLConfig
from selfray.methods.dino import DINOConfig
from selfray.methods.mae import MAEConfig
from selfray.methods.moco import MoCoConfig
from selfray.methods.mocov3 import MoCoV3Config
from selfray.methods.simclr import SimCLRConfig
from selfray.models.encoder import EncoderConfig
from selfray.optim import OptimizerConfig
from selfray.schedules import Constant, Cosine, WarmupCosine
from selfray.views import ColorJitter, View

# arXiv:2002.05709, section 2 and appendix B.6: ResNet-50, batch 4096, LARS at 0.3 * B / 256 with
# weight decay 1e-6, 10 epochs of warm-up, temperature 0.1; the paper's 1000 epochs reach 69.1 %
# by its linear protocol.
SIMCLR = Experiment(
    name="simclr-imagenet",
    method=SimCLRConfig(
        temperature=0.1,
        projector_layers=2,
        view=View(
            crop_scale=(0.08, 1.0),
            color_jitter=ColorJitter(0.8, 0.8, 0.8, 0.2),
            grayscale=0.2,
            blur=0.5,
        ),
    ),
    encoder=EncoderConfig("resnet50", image_size=224),
    data=DataConfig(),
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.3,
        schedule=WarmupCosine(warmup_fraction=10 / 1000),
        weight_decay=Constant(1e-6),
    ),
    epochs=1000,
    batch_size=4096,
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2111.06377, appendix A.1: ViT-B/16, mask ratio 0.75, decoder of 8 blocks and 512 wide,
# AdamW (0.9, 0.95) at 1.5e-4 * B / 256, weight decay 0.05, 40 epochs of warm-up of 1600; the
# paper reports 83.6 % after fine-tuning and 67.8 % by its linear protocol.
MAE = Experiment(
    name="mae-imagenet",
    method=MAEConfig(
        mask_ratio=0.75,
        normalize_pixels=True,
        decoder_width=512,
        decoder_depth=8,
        decoder_heads=16,
        view=View(crop_scale=(0.2, 1.0)),
    ),
    encoder=EncoderConfig("vit_base_patch16_224", image_size=224, position="sincos"),
    data=DataConfig(),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4,
        schedule=WarmupCosine(warmup_fraction=40 / 1600),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
    ),
    epochs=1600,
    batch_size=4096,
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2003.04297: ResNet-50, batch 256, SGD at 0.03, a queue of 65,536 keys, cosine schedule; 200
# epochs reach 67.7 % (linear, the authors' code).
MOCO_V2 = Experiment(
    name="mocov2-imagenet",
    method=MoCoConfig(),
    encoder=EncoderConfig("resnet50", image_size=224),
    data=DataConfig(),
    optimizer=OptimizerConfig(
        "sgd",
        base_learning_rate=0.03,
        schedule=WarmupCosine(warmup_fraction=0.0),
        weight_decay=Constant(1e-4),
    ),
    epochs=200,
    batch_size=256,
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=20),
)

# arXiv:2104.02057: ViT-S/16 with 12 heads, batch 4096, AdamW at 1.5e-4 * B / 256, weight decay 0.1,
# 40 epochs of warm-up of 300, fixed patch embedding and positions; 73.2 % (linear, the authors').
MOCO_V3 = Experiment(
    name="mocov3-imagenet",
    method=MoCoV3Config(),
    encoder=EncoderConfig("vit_small_patch16_224", image_size=224, heads=12, position="sincos"),
    data=DataConfig(),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4,
        schedule=WarmupCosine(warmup_fraction=40 / 300),
        weight_decay=Constant(0.1),
    ),
    epochs=300,
    batch_size=4096,
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=30),
)

# arXiv:2006.07733: ResNet-50, batch 4096, LARS at 0.2 * B / 256, weight decay 1.5e-6, 10 epochs of
# warm-up of 1000; 74.3 % (linear, the paper's).
BYOL = Experiment(
    name="byol-imagenet",
    method=BYOLConfig(),
    encoder=EncoderConfig("resnet50", image_size=224),
    data=DataConfig(),
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.2,
        schedule=WarmupCosine(warmup_fraction=10 / 1000),
        weight_decay=Constant(1.5e-6),
    ),
    epochs=1000,
    batch_size=4096,
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2104.14294: ViT-S/16 for 100 epochs, batch 1024, AdamW at 5e-4 * B / 256 down to 1e-6,
# weight decay from 0.04 to 0.4; the authors' code reaches 74.0 % linear and 69.3 % kNN. It clips
# each parameter's gradient at 3; here the norm of all gradients together is clipped at 3.
DINO = Experiment(
    name="dino-imagenet",
    method=DINOConfig(free_norms=True),
    encoder=EncoderConfig("vit_small_patch16_224", image_size=224, drop_path=0.1),
    data=DataConfig(),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=5e-4,
        schedule=WarmupCosine(warmup_fraction=10 / 100, final=1e-6 / (5e-4 * 4)),
        weight_decay=Cosine(0.04, 0.4),
        clip_norm=3.0,
    ),
    epochs=100,
    batch_size=1024,
    precision="bf16",
    probe=ProbeConfig(times=10),
    checkpoint=CheckpointConfig(times=20),
)

RECIPES = {
    "simclr-imagenet": SIMCLR,
    "mae-imagenet": MAE,
    "mocov2-imagenet": MOCO_V2,
    "mocov3-imagenet": MOCO_V3,
    "byol-imagenet": BYOL,
    "dino-imagenet": DINO,
}
