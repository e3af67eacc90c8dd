"""BEiT: hide blocks of patches, and predict the visual tokens that a tokenizer gives them.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv:2106.08254.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.check import require
from selfray.method import Batch, Method, MethodConfig, Normalization, hidden_places, whole
from selfray.models import initial
from selfray.models.encoder import Encoder, EncoderConfig
from selfray.schedules import Progress
from selfray.storage import Location
from selfray.tokenizer import TokenizerFile
from selfray.views import BlockMask, ColorJitter, View, Views

JITTER = ColorJitter(0.4, 0.4, 0.4, 0.0, probability=1.0)


@dataclass(frozen=True)
class BEiTConfig(MethodConfig):
    judged_by: ClassVar[Literal["knn", "linear"]] = "linear"

    tokenizer: str = ""
    """Folder of a tokenizer's run or checkpoint; experiments/train_tokenizer.py trains one."""
    mask_ratio: float = 0.4
    """Share of the patches that is hidden."""
    smallest_block: int = 16
    """Patches of the smallest rectangle that is hidden."""
    view: View = field(default_factory=lambda: View(crop_scale=(0.08, 1.0), color_jitter=JITTER))
    """The crop that both encoder and tokenizer see. Two differences from the authors' code: they
    jitter the whole image before they crop it, here the crop comes first, so contrast is taken
    about the crop's mean instead of the image's; and they resize the tokenizer's view from the
    image by Lanczos, here it is resized from the crop by bicubic interpolation."""

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, f"mask_ratio must lie in (0, 1), got {self.mask_ratio}")
        self.mask  # noqa: B018 - checks the smallest block

    @property
    def mask(self) -> BlockMask:
        return BlockMask((self.mask_ratio, self.mask_ratio), smallest=self.smallest_block)

    def views(self, encoder: EncoderConfig) -> Views:
        require(
            encoder.is_vit,
            f"BEiT hides patches, so it needs a ViT, not encoder.name {encoder.name}: give "
            "--encoder.name beit_base_patch16_224 --encoder.position relative, for example",
        )
        return {"global": (whole(self.view, encoder, mask=self.mask),)}

    def provenance(self, encoder: EncoderConfig, normalization: Normalization) -> Mapping[str, str]:
        file = TokenizerFile.open(self.tokenizer, encoder)
        theirs = file.checkpoint.experiment()
        require(
            normalization == (theirs.data.mean, theirs.data.std),
            f"method.tokenizer {self.tokenizer} saw images normalised by mean {theirs.data.mean} "
            f"and std {theirs.data.std}, not by {normalization[0]} and {normalization[1]}: give "
            "its --data.mean and --data.std",
        )
        return {
            "tokenizer": file.checkpoint.location.uri,
            "tokenizer.sha256": file.digest,
            "tokenizer.run": theirs.run_name,
            "tokenizer.version": file.version or "not registered",
        }

    def located(self) -> "BEiTConfig":
        known = self.tokenizer and Location.of(self.tokenizer).uri
        return replace(self, tokenizer=known)

    def build(self, encoder: Encoder) -> "BEiT":
        return BEiT(self, encoder)


class BEiT(Method):
    def __init__(self, config: BEiTConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        initial.as_beit(encoder.backbone)
        self.mask_token = nn.Parameter(torch.zeros(encoder.width))
        file = TokenizerFile.open(config.tokenizer, encoder.config)
        self.tokenizer = file.load()
        self.tokenizer_digest = file.digest
        self.head = nn.Linear(encoder.width, file.config.codes)
        initial.cut_normal(self.mask_token)
        initial.cut_normal(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """All but biases, norms, layer scales, class token and learned positions, as in the
        authors' code. The mask token is decayed."""
        if name == "mask_token":
            return True
        return parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        images, mask = batch["global"][:, 0], batch["global_mask"][:, 0]  # [B, 3, H, W], [B, N]
        hidden = hidden_places(batch, "global")  # [M], hidden patches in the whole batch
        tokens = self.tokenizer(images).flatten()[hidden]  # [M]
        features = self.encoder(images, mask=mask, mask_token=self.mask_token)
        logits = self.head(features.patches.flatten(0, 1)[hidden]).float()  # [M, K]
        accuracy = (logits.argmax(-1) == tokens).float().mean()
        # DDP needs a gradient for every parameter: those of the class token get zero.
        loss = F.cross_entropy(logits, tokens) + 0 * features.cls.sum()
        return loss, {"token_accuracy": accuracy}

    # The tokenizer never changes, so checkpoints hold only its sha256: a run resumed with a
    # different tokenizer would have to predict different tokens.

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(bytes.fromhex(self.tokenizer_digest)), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        theirs = bytes(state.tolist()).hex()
        if theirs != self.tokenizer_digest:
            raise ValueError(
                f"method.tokenizer {self.config.tokenizer} is not the tokenizer of the checkpoint: "
                f"its sha256 is {self.tokenizer_digest[:12]}..., not {theirs[:12]}...: give the "
                "one that the checkpoint was trained with"
            )
