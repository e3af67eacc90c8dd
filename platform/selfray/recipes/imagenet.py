"""The papers' ImageNet-1k settings. None was run to its end: each needs a GPU cluster.

python experiments/pretrain.py simclr-imagenet --data.path s3://bucket/imagenet --workers 32
python experiments/pretrain.py mae-imagenet --data.path s3://bucket/imagenet --workers 64
python experiments/train_tokenizer.py tokenizer-imagenet --data.path s3://bucket/imagenet
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
from selfray.schedules import Constant, Cosine, Steps, WarmupCosine
from selfray.views import ColorJitter, View

RECIPE = partial(Experiment, data=DataConfig(), precision="bf16", probe=ProbeConfig(times=10))
"""Settings that these recipes share."""


# arXiv:2002.05709, section 2 and appendix B.6: ResNet-50, batch 4096, LARS at 0.3 * B / 256 with
# weight decay 1e-6, 10 epochs of warm-up, temperature 0.1; the paper's 1000 epochs reach 69.3 % by
# its linear protocol (the authors' repository: 69.1 %). Not yet measured here.
SIMCLR = RECIPE(
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
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.3,
        schedule=WarmupCosine(warmup_fraction=10 / 1000),
        weight_decay=Constant(1e-6),
    ),
    epochs=1000,
    batch_size=4096,
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2111.06377, appendix A.1: ViT-B/16, mask ratio 0.75, decoder of 8 blocks and 512 wide,
# AdamW (0.9, 0.95) at 1.5e-4 * B / 256, weight decay 0.05, 40 epochs of warm-up of 1600; the
# paper reports 83.6 % after fine-tuning and 68.0 % by its linear protocol (the authors' repository:
# 67.8 %). Not yet measured here.
MAE = RECIPE(
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
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4,
        schedule=WarmupCosine(warmup_fraction=40 / 1600),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.95),
    ),
    epochs=1600,
    batch_size=4096,
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2003.04297: ResNet-50, batch 256, SGD at 0.03, a queue of 65,536 keys, cosine schedule; 200
# epochs reach 67.7 % (linear protocol of MoCo, the authors' code). Not yet measured here. Give
# --workers 8 as the paper's 8 GPUs with separate batch norms, or on one worker
# --method.batchnorm-groups 8. Weight decay applies to every parameter, as in the authors' code.
MOCO_V2 = RECIPE(
    name="mocov2-imagenet",
    method=MoCoConfig(),
    encoder=EncoderConfig("resnet50", image_size=224),
    optimizer=OptimizerConfig(
        "sgd",
        base_learning_rate=0.03,
        schedule=WarmupCosine(warmup_fraction=0.0),
        weight_decay=Constant(1e-4),
    ),
    epochs=200,
    batch_size=256,
    checkpoint=CheckpointConfig(times=20),
)

# arXiv:1911.05722: as v2, but a linear head, temperature 0.07, crops jittered at 0.4 without blur,
# and a learning rate that falls tenfold after epochs 120 and 160; 60.6 % (linear protocol of
# MoCo, the authors'). Not yet measured here.
MOCO_V1 = replace(
    MOCO_V2,
    name="mocov1-imagenet",
    method=MoCoConfig(
        head="linear",
        temperature=0.07,
        view=View(
            crop_scale=(0.2, 1.0),
            color_jitter=ColorJitter(0.4, 0.4, 0.4, 0.4, probability=1.0),
            grayscale=0.2,
        ),
    ),
    optimizer=replace(MOCO_V2.optimizer, schedule=Steps((120 / 200, 160 / 200))),
)

# arXiv:2104.02057: ViT-S/16 with 12 heads, batch 4096, AdamW at 1.5e-4 * B / 256, weight decay 0.1,
# 40 epochs of warm-up of 300, fixed patch embedding and positions; 73.2 % (linear
# protocol of MoCo v3, the authors'). Not yet measured here.
MOCO_V3 = RECIPE(
    name="mocov3-imagenet",
    method=MoCoV3Config(),
    encoder=EncoderConfig("vit_small_patch16_224", image_size=224, heads=12, position="sincos"),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4,
        schedule=WarmupCosine(warmup_fraction=40 / 300),
        weight_decay=Constant(0.1),
    ),
    epochs=300,
    batch_size=4096,
    checkpoint=CheckpointConfig(times=30),
)

# arXiv:2006.07733: ResNet-50, batch 4096, LARS at 0.2 * B / 256, weight decay 1.5e-6, 10 epochs of
# warm-up of 1000; 74.3 % (the paper's linear protocol). Not yet measured here.
BYOL = RECIPE(
    name="byol-imagenet",
    method=BYOLConfig(),
    encoder=EncoderConfig("resnet50", image_size=224),
    optimizer=OptimizerConfig(
        "lars",
        base_learning_rate=0.2,
        schedule=WarmupCosine(warmup_fraction=10 / 1000),
        weight_decay=Constant(1.5e-6),
    ),
    epochs=1000,
    batch_size=4096,
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2104.14294: ViT-S/16 for 100 epochs, batch 1024, AdamW at 5e-4 * B / 256 down to 1e-6,
# weight decay from 0.04 to 0.4; each parameter's gradient is clipped at 3, and prototypes have
# trained norms. The authors' code reaches 74.0 % linear and 69.3 % kNN with a constant teacher
# temperature of 0.04 and unit prototypes (DINO's linear and kNN protocols). Not yet measured here.
DINO = RECIPE(
    name="dino-imagenet",
    method=DINOConfig(free_norms=True),
    encoder=EncoderConfig("vit_small_patch16_224", image_size=224, drop_path=0.1),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=5e-4,
        schedule=WarmupCosine(warmup_fraction=10 / 100, final=1e-6 / (5e-4 * 4)),
        weight_decay=Cosine(0.04, 0.4),
        clip_norm=3.0,
        clip_each="parameter",
    ),
    epochs=100,
    batch_size=1024,
    checkpoint=CheckpointConfig(times=20),
)

# The BEiT paper uses DALL-E's tokenizer: a dVAE with 8192 codes on 112-pixel images, trained on 250
# million images that are not public. This tokenizer has the same number of codes and tokens; its
# training is our choice, with an optimizer like MAE's.
TOKENIZER = RECIPE(
    name="tokenizer-imagenet",
    method=VQVAEConfig(),
    encoder=EncoderConfig("vit_small_patch16_224", image_size=112, patch_size=8, position="sincos"),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-4,
        schedule=WarmupCosine(warmup_fraction=0.05),
        weight_decay=Constant(0.05),
        betas=(0.9, 0.99),
    ),
    epochs=20,
    batch_size=1024,
    probe=ProbeConfig(times=4),
    checkpoint=CheckpointConfig(times=20),
)

# arXiv:2106.08254: ViT-B/16 with shared relative positions and layer scale 0.1, 75 of 196 patches
# hidden in blocks, batch 2048, AdamW at 1.5e-3 down to 1e-5, 10 epochs of warm-up of 800, weight
# decay 0.05, clipping at 3, stochastic depth 0.1; 83.2 % after fine-tuning (the paper's, with its
# own tokenizer). Not yet measured here. Give --method.tokenizer the folder of a run of
# tokenizer-imagenet.
BEIT = RECIPE(
    name="beit-imagenet",
    method=BEiTConfig(mask_ratio=75 / 196),
    encoder=EncoderConfig(
        "beit_base_patch16_224",
        image_size=224,
        position="relative",
        layer_scale=0.1,
        drop_path=0.1,
    ),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=1.5e-3,
        scaling="none",
        schedule=WarmupCosine(warmup_fraction=10 / 800, final=1e-5 / 1.5e-3),
        weight_decay=Constant(0.05),
        clip_norm=3.0,
    ),
    epochs=800,
    batch_size=2048,
    checkpoint=CheckpointConfig(times=100),
)

# arXiv:2304.07193, the authors' short recipe: ViT-L/16, batch 2048, AdamW at 0.004 * sqrt(B / 1024)
# down to 1e-6, weight decay from 0.04 to 0.4, layer decay 0.9, clipping at 3 for each module,
# stochastic depth 0.3 in every block; 100 "epochs" of 1250 steps are 200 of ImageNet-1k; 81.6 %
# kNN and 82.9 % linear (the authors', by DINOv2's protocols). Not yet measured here.
DINO_V2 = RECIPE(
    name="dinov2-imagenet",
    method=DINOv2Config(),
    encoder=EncoderConfig(
        "vit_large_patch16_224",
        image_size=224,
        layer_scale=1e-5,
        drop_path=0.3,
        drop_path_uniform=True,
    ),
    optimizer=OptimizerConfig(
        "adamw",
        base_learning_rate=0.004 / 1024**0.5,
        scaling="sqrt",
        schedule=WarmupCosine(warmup_fraction=0.1, final=1e-6 / (0.004 * 2**0.5)),
        weight_decay=Cosine(0.04, 0.4),
        clip_norm=3.0,
        clip_each="module",
        layer_decay=0.9,
        patch_embed_rate=0.2,
    ),
    epochs=200,
    batch_size=2048,
    checkpoint=CheckpointConfig(times=100),
)

# The high-resolution phase at the end of the paper's runs: 10,000 steps at 518 pixels (512 here:
# 32 patches of 16). Give --init-from the folder of a run of dinov2-imagenet; its positions are
# interpolated. The paper does not give the learning rate: a tenth is our choice.
DINO_V2_HIGH_RESOLUTION = replace(
    DINO_V2,
    name="dinov2-imagenet-512",
    method=DINOv2Config(
        local_view=replace(DINOv2Config().local_view, size=224),
        momentum=Constant(0.9995),
        teacher_temperature=Constant(0.07),
        freeze_prototypes=0.0,
    ),
    encoder=replace(DINO_V2.encoder, image_size=512),
    optimizer=replace(
        DINO_V2.optimizer,
        base_learning_rate=DINO_V2.optimizer.base_learning_rate / 10,
        weight_decay=Constant(0.4),
    ),
    epochs=16,
)

RECIPES = by_name(
    SIMCLR,
    MAE,
    MOCO_V2,
    MOCO_V3,
    BYOL,
    DINO,
    MOCO_V1,
    TOKENIZER,
    BEIT,
    DINO_V2,
    DINO_V2_HIGH_RESOLUTION,
)
