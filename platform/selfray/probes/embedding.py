"""Images -> Parquet files of embeddings, in blocks: each file is a pure function of its rows."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from selfray.check import require, require_one_of
from selfray.data.reader import ShardSet, read_rows
from selfray.data.source import evaluation_views
from selfray.models.encoder import Encoder, normalize
from selfray.probes.encoders import EncoderRef
from selfray.probes.features import pixels
from selfray.probes.labelfree import LabelFree
from selfray.probes.subsets import image_digest
from selfray.storage import Location
from selfray.views import RGB

VERSION = 1
"""Changes whenever the same settings would give different files."""
PLAN = "_embeddings.json"
"""The file in a folder of embeddings that records their encoder, images and settings. Readers of
Parquet folders skip names that begin with _."""
BATCH = 128
"""Images in one forward pass; fixed, because rounding depends on it."""
LAYERS = 4
PATH, LABEL, KEY, EMBEDDING = "path", "label", "key", "embedding"
PATCH_MEAN, PATCHES, EARLIER, OF_CROP = "patch_mean", "patches", "earlier_layers", "of_crop"


@dataclass(frozen=True)
class Contents:
    """What is written for each image, beside its label and `embedding` [D]."""

    path: bool = False
    key: bool = False
    """A hash of the image's bytes."""
    patch_mean: bool = False
    """The mean of a ViT's patch tokens, [D]."""
    earlier_layers: bool = False
    """The class tokens of the three blocks before the last, [3 D]."""
    of_crop: bool = False
    """The embedding of one fixed random crop, [D]."""
    patches: bool = False
    """All patch tokens as float16, [N, D] in row-major order."""
    normalize: bool = False
    """Normalise embeddings to length 1."""
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        require_one_of("dtype", self.dtype, ("float32", "float16"))


@dataclass(frozen=True)
class Rows:
    """Chosen rows of a data set, in a fixed order."""

    shards: ShardSet
    groups: np.ndarray
    """int64 [n]: the row group of each image, counted over all files."""
    rows: np.ndarray
    """int64 [n]: the row of each image within its row group."""

    @classmethod
    def all_of(cls, shards: ShardSet) -> "Rows":
        counts = np.array(shards.group_rows)
        groups = np.repeat(np.arange(len(counts)), counts)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        return cls(shards, groups, np.arange(len(groups)) - starts)

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """A sha256 of the chosen rows and their files (name, size and time of change)."""
        read = [self.shards.image_column, self.shards.label_column, self.shards.label_names]
        found = hashlib.sha256(json.dumps(read).encode())
        for file in self.shards.files:
            info = Location.of(file.uri).info()
            text = json.dumps([file.uri, file.group_rows, info.size, info.mtime_ns])
            found.update(text.encode())
        found.update(self.groups.astype("<i8").tobytes() + self.rows.astype("<i8").tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Embedding:
    """A folder of embeddings to write: of which rows, by which encoder, at which image size."""

    rows: Rows
    encoder: EncoderRef | None
    """None writes raw pixels."""
    size: int
    """Side in pixels to which images are resized."""
    contents: Contents
    block_rows: int = 512
    """Images per file."""
    channels: int = RGB
    """Channels of raw pixels; an encoder reads its own."""

    @property
    def reads(self) -> int:
        """The number of channels with which images are read."""
        encoder = self.encoder
        return self.channels if encoder is None else encoder.encoder_config.in_channels

    @property
    def blocks(self) -> int:
        return -(-len(self.rows) // self.block_rows)

    def plan(self) -> dict[str, Any]:
        """The content of PLAN: it identifies encoder, rows and settings of a folder's files."""
        encoder = None
        if self.encoder is not None:
            mean, std = self.encoder.normalization
            encoder = {"digest": self.encoder.digest, "mean": list(mean), "std": list(std)}
        # Left out at its default, so that features of earlier versions are found.
        channels = {"channels": self.channels} if self.reads != RGB and encoder is None else {}
        return {
            "format": "selfray-embeddings",
            "version": VERSION,
            "encoder": encoder,
            "rows": self.rows.digest(),
            "images": len(self.rows),
            "size": self.size,
            "block_rows": self.block_rows,
            "contents": asdict(self.contents),
            **channels,
        }

    @staticmethod
    def key(plan: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, block: int, folder: Location) -> int:
        """Write one block's file atomically. Returns the number of readable images."""
        table = self.table(block)
        write_part(table, folder / part_name(block))
        return table.num_rows

    def table(self, block: int) -> pa.Table:
        """The table of a block: one row for each readable image."""
        cv2.setNumThreads(1)
        chosen = slice(block * self.block_rows, (block + 1) * self.block_rows)
        groups, rows = self.rows.groups[chosen], self.rows.rows[chosen]
        images, labels = read_rows(self.rows.shards, groups, rows)
        views, readable = evaluation_views(images, self.size, self.reads)
        kept = np.flatnonzero(readable)
        columns: dict[str, pa.Array] = {}
        if self.contents.path:
            columns[PATH] = pa.array(paths_of(self.rows.shards, groups[kept], rows[kept]))
        known = labels[kept]
        columns[LABEL] = pa.array(known, pa.int64(), mask=known < 0)
        if self.contents.key:
            keys = np.array([image_digest(images[i]) for i in kept], np.uint64)
            columns[KEY] = pa.array(keys, pa.uint64())
        for name, values in self._embedded(views[kept]).items():
            columns[name] = fixed_lists(values)
        return pa.table(columns)

    def _embedded(self, views: np.ndarray) -> dict[str, np.ndarray]:
        if self.encoder is None:
            return {EMBEDDING: pixels(views)}
        encoder = loaded(self.encoder)
        arrays = embedded(encoder, views, *self.encoder.normalization, self.contents)
        if self.contents.of_crop:
            plain = Contents(dtype=self.contents.dtype)
            crops = LabelFree().crops(views)
            of_crops = embedded(encoder, crops, *self.encoder.normalization, plain)
            arrays[OF_CROP] = of_crops[EMBEDDING]
        return arrays


def part_name(block: int) -> str:
    return f"part-{block:06d}.parquet"


def write_part(table: pa.Table, place: Location) -> None:
    """Write a block's file atomically."""
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd", use_dictionary=False)
    place.write_bytes(data.getvalue())


@lru_cache(maxsize=2)
def loaded(ref: EncoderRef) -> Encoder:
    """The encoder on this process's device; cached, so that several blocks load it once."""
    return ref.load().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def embedded(
    encoder: Encoder,
    views: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    contents: Contents,
) -> dict[str, np.ndarray]:
    """Embed uint8 views [n, C, H, W].

    Returns the columns by name, each [n, width] in `contents.dtype` (patches always in float16).
    Raises ValueError if earlier layers are asked of an encoder that is not a ViT.
    """
    device = next(encoder.parameters()).device
    is_vit = encoder.config.is_vit
    require(
        is_vit or not contents.earlier_layers,
        f"{encoder.config.name} has no class tokens of earlier blocks: that is for ViTs",
    )
    found: dict[str, list[torch.Tensor]] = {EMBEDDING: []}
    for first in range(0, max(len(views), 1), BATCH):
        part = torch.from_numpy(views[first : first + BATCH]).to(device)
        images = normalize(part, mean, std)
        cls, patches = encoder(images) if len(part) else _empty_features(encoder, images)
        if contents.normalize:
            cls = F.normalize(cls.float(), dim=1)
            patches = F.normalize(patches.float(), dim=-1)
        found[EMBEDDING].append(cls)
        if contents.patch_mean and is_vit:
            found.setdefault(PATCH_MEAN, []).append(patches.mean(1))
        if contents.patches:
            found.setdefault(PATCHES, []).append(patches.half().flatten(1))
        if contents.earlier_layers and len(part):
            found.setdefault(EARLIER, []).append(earlier_layers(encoder, images))
    dtype = torch.float16 if contents.dtype == "float16" else torch.float32
    return {
        name: torch.cat(parts).to(torch.float16 if name == PATCHES else dtype).cpu().numpy()
        for name, parts in found.items()
    }


def _empty_features(encoder: Encoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty features of the right shapes, for a block without any readable image."""
    cls, patches = encoder(torch.zeros(1, *images.shape[1:], device=images.device))
    return cls[:0], patches[:0]


def last_layers(encoder: Encoder, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(patch tokens [b, N, D], class and register tokens [b, P, D]) of each of a ViT's last LAYERS
    blocks, in order, after the final norm, for normalised images [b, C, H, W]."""
    backbone: Any = encoder.backbone
    return backbone.forward_intermediates(
        images,
        indices=LAYERS,
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )


def earlier_layers(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
    """Class tokens of the three blocks before the last, after the final norm: [b, 3 D]."""
    found = last_layers(encoder, images)
    return torch.cat([prefix[:, 0] for _, prefix in found[:-1]], dim=1)


def fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """A matrix [n, width] as a column."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def paths_of(shards: ShardSet, groups: np.ndarray, rows: np.ndarray) -> list[str]:
    """Each row's path as stored in its file, or else `file name#row number`."""
    return [_paths_of_group(shards, int(g))[int(r)] for g, r in zip(groups, rows, strict=True)]


@lru_cache(maxsize=64)
def _paths_of_group(shards: ShardSet, group: int) -> Sequence[str]:
    file, inner, first = _file_of(shards, group)
    names = [f"{file.rpartition('/')[2]}#{first + i}" for i in range(shards.group_rows[group])]
    place = Location.of(file)
    with place.filesystem.open_input_file(place.path) as opened:
        parquet = pq.ParquetFile(opened)
        kind = parquet.schema_arrow.field(shards.image_column).type
        has_paths = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        if has_paths:
            table = parquet.read_row_group(inner, columns=[f"{shards.image_column}.path"])
            stored = table[shards.image_column].combine_chunks()
            if isinstance(stored, pa.ChunkedArray):
                stored = stored.chunk(0)
            written = stored.field("path").to_pylist()
            names = [p or name for p, name in zip(written, names, strict=True)]
    return names


def _file_of(shards: ShardSet, group: int) -> tuple[str, int, int]:
    """(file, row group within it, first row of that group in the file) of a row group of the
    set."""
    for file in shards.files:
        if group < len(file.group_rows):
            return file.uri, group, sum(file.group_rows[:group])
        group -= len(file.group_rows)
    raise AssertionError("no such row group")
