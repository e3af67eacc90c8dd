"""The work of data tasks: rows of the plan -> augmented views, with numpy and pyarrow only.

Without torch and ray a data task's process starts in a second; torch alone would take four.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from selfray.data.columns import NO_LABEL
from selfray.data.plan import ReadPlan, Share
from selfray.data.reader import ShardSet, read_chosen, read_rows
from selfray.pixels.augment import Augmented, allocate, augment_batch, evaluation_view
from selfray.pixels.codecs import BrokenImage, decode
from selfray.views import Photometric, Views

if TYPE_CHECKING:
    from selfray.experiment import Experiment

POSITION, LABEL, BROKEN, VIEWS = "position", "label", "broken", "views"
REASON = "reason"
SUBSTITUTES = 16
"""If a whole micro-batch is unreadable, up to this many others, spread over the epoch, are searched
for a readable image."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """Everything that the tasks of a stream need: the data set, the plan over it and the views."""

    shards: ShardSet
    plan: ReadPlan
    views: Views
    photometric: Photometric = "cpu"
    channels: int = 3

    def allocate(self, count: int) -> Arrays:
        """Arrays for the views and masks of `count` images, to be filled by `draw`."""
        return allocate(self.views, count, self.photometric, self.channels)

    def draw(self, start: int, count: int, out: Arrays | None = None) -> Arrays:
        """The augmented images at positions [start, start + count), one micro-batch.

        Views are written to `out`, arrays from `allocate`, if given.

        Returns:
            Each group of views as uint8 [count, V, C, H, W] and its masks as bool [count, V, N];
            `position` int64, `label` int64 (-1 for none, and for broken images), `broken` bool and
            `reason` str, all [count]. A broken image is replaced by a neighbour, so that counts
            follow the plan; its `reason` is "FILE row 7: truncated: ...", or the same "FILE: ..."
            for all rows of an unreadable shard. It is empty for readable images.
        """
        chosen = self.plan.read(start, count)
        read = read_chosen(self.shards, chosen.groups, chosen.rows)
        quantiles = {
            name: self.plan.quantiles(chosen.positions, len(group))
            for name, group in self.views.items()
            if any(view.mask is not None for view in group)
        }
        try:
            drawn = self._augment(read.images, chosen.epoch, quantiles, out)
            arrays, broken = drawn.arrays, drawn.reasons
        except BrokenImage as error:
            substitute = self._substitute(start, count, str(error))
            repeated = {n: np.concatenate([v[:1], v]) for n, v in quantiles.items()}
            drawn = self._augment([substitute, *read.images], chosen.epoch, repeated)
            arrays = {name: values[1:] for name, values in drawn.arrays.items()}
            for name, values in (out or {}).items():
                values[:] = arrays[name]
                arrays[name] = values
            broken = {row - 1: reason for row, reason in drawn.reasons.items()}
        reasons = np.full(count, "", dtype=object)
        for row, reason in broken.items():
            shard = read.unreadable.get(row)
            name = self.name_of(int(chosen.positions[row]))
            reasons[row] = f"{name}: {reason}" if shard is None else str(shard)
        # What stands in for a broken image has another label, which nobody here knows.
        labels = np.where(arrays[BROKEN], NO_LABEL, read.labels)
        return arrays | {POSITION: chosen.positions, LABEL: labels, REASON: reasons}

    def _augment(
        self,
        images: Sequence[bytes],
        epoch: int,
        quantiles: dict[str, np.ndarray],
        out: Arrays | None = None,
    ) -> Augmented:
        seed = self.plan.seed
        return augment_batch(
            images, self.views, seed, epoch, quantiles, self.photometric, out, self.channels
        )

    def _substitute(self, start: int, count: int, reason: str) -> bytes:
        """A readable image from elsewhere in the epoch. Raises BrokenImage if none is found."""
        epoch, offset = divmod(start, self.plan.images_per_epoch)
        batches = self.plan.images_per_epoch // count
        for step in np.unique(np.linspace(0, batches - 1, SUBSTITUTES + 1).astype(int))[1:]:
            other = (offset // count + int(step)) % batches * count
            rows = self.plan.read(epoch * self.plan.images_per_epoch + other, count)
            for data in read_rows(self.shards, rows.groups, rows.rows)[0]:
                try:
                    decode(data, channels=self.channels)
                except BrokenImage:
                    continue
                return data
        raise BrokenImage(
            "no readable image",
            f"neither near {self.name_of(start)} nor elsewhere in the data set ({reason})",
        )

    def originals(self, start: int, count: int, size: int) -> np.ndarray:
        """The unaugmented images at these positions: central views uint8 [count, C, size, size]."""
        chosen = self.plan.read(start, count)
        images, _ = read_rows(self.shards, chosen.groups, chosen.rows)
        return evaluation_views(images, size, self.channels)[0]

    def name_of(self, position: int) -> str:
        """The file and row at a position, for messages."""
        chosen = self.plan.read(position, 1)
        group, row = int(chosen.groups[0]), int(chosen.rows[0])
        for file in self.shards.files:
            if group < len(file.group_rows):
                return f"{file.uri} row {sum(file.group_rows[:group]) + row}"
            group -= len(file.group_rows)
        raise AssertionError(f"position {position} lies in no file")


@dataclass(frozen=True)
class Segment:
    """One rank's micro-batches of consecutive steps, in chunks of one task each."""

    source: Source
    share: Share
    bounds: tuple[int, ...]
    """The first step of each chunk, and the step after the last."""

    @property
    def chunks(self) -> int:
        return len(self.bounds) - 1

    @property
    def batches(self) -> int:
        """The number of micro-batches in all chunks."""
        return (self.bounds[-1] - self.bounds[0]) * self.share.accumulate

    @property
    def micro_batch(self) -> int:
        return self.share.micro_batch(self.source.plan.batch_size)

    def starts(self, chunk: int) -> Iterator[int]:
        """The first positions of this rank's micro-batches in a chunk, in order."""
        for step in range(*self.bounds[chunk : chunk + 2]):
            yield from self.share.starts(self.source.plan, step)

    def draw(self, ids: Arrays) -> Iterator[Arrays]:
        """The work of one data task: each chunk in ids["id"], its micro-batches concatenated."""
        cv2.setNumThreads(1)  # a task has one CPU; more threads would compete with other tasks
        for chunk in ids["id"]:
            starts = list(self.starts(int(chunk)))
            # Views are drawn directly into the chunk's arrays, which avoids a copy.
            views = self.source.allocate(len(starts) * self.micro_batch)
            others = []
            for start, out in zip(starts, self.micro_batches(views), strict=True):
                drawn = self.source.draw(start, self.micro_batch, out)
                others.append({name: drawn[name] for name in drawn.keys() - views.keys()})
            yield views | {name: np.concatenate([o[name] for o in others]) for name in others[0]}

    def micro_batches(self, chunk: Arrays) -> Iterator[Arrays]:
        """A chunk's arrays split into micro-batches, without a copy."""
        rows = len(next(iter(chunk.values())))
        for first in range(0, rows, self.micro_batch):
            part = slice(first, first + self.micro_batch)
            yield {name: values[part] for name, values in chunk.items()}


@dataclass(frozen=True)
class Sample:
    """Rows of a data set as the probes see them: central views, in blocks of one task each."""

    shards: ShardSet
    groups: np.ndarray
    rows: np.ndarray
    size: int
    block_rows: int = 512
    channels: int = 3

    @property
    def blocks(self) -> int:
        return -(-len(self.rows) // self.block_rows)

    def read(self, block: int) -> Arrays:
        """`views` uint8 [n, C, size, size] and `label` int64 [n]; unreadable images left out."""
        cv2.setNumThreads(1)
        chosen = slice(block * self.block_rows, (block + 1) * self.block_rows)
        images, labels = read_rows(self.shards, self.groups[chosen], self.rows[chosen])
        views, readable = evaluation_views(images, self.size, self.channels)
        return {VIEWS: views[readable], LABEL: labels[readable]}


def evaluation_views(
    images: Sequence[bytes], size: int, channels: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """(central views uint8 [n, C, size, size], whether each image could be read, bool [n])."""
    views = np.zeros((len(images), channels, size, size), dtype=np.uint8)
    readable = np.ones(len(images), dtype=bool)
    for index, data in enumerate(images):
        try:
            image = decode(data, channels=channels)
            views[index] = evaluation_view(image, size).transpose(2, 0, 1)
        except BrokenImage:
            readable[index] = False
    return views, readable


def source_of(experiment: "Experiment", shards: ShardSet) -> Source:
    plan = ReadPlan(
        shards.group_rows,
        experiment.batch_size,
        experiment.epochs,
        experiment.seed,
        experiment.data.window_rows,
    )
    data = experiment.data
    return Source(shards, plan, experiment.views, data.photometric, data.channels)
