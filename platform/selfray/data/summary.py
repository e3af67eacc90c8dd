"""Summarises a data set in one line, printed before it is trained on or built."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from selfray.data.shard_set import ShardSet


@dataclass(frozen=True)
class Part:
    """The train images or the test images of a data set."""

    images: int | None
    """Number of images; None if unknown, as for tars."""
    labelled: int | None
    """Number of labelled images; None if there are some, but their number is unknown."""
    classes: tuple[str, ...] = ()
    tars: int = 0

    @property
    def has_labels(self) -> bool:
        return self.labelled != 0

    def words(self, what: str) -> str:
        """Such as `60 train images`."""
        if self.images is None:
            return f"{what} images in {self.tars:,} tar{'s' if self.tars > 1 else ''}"
        return f"{self.images:,} {what} images"


def line(
    train: Part,
    test: Part | None,
    origin: str = "",
    unlabeled: int = 0,
    left_out: Mapping[str, int] | None = None,
    joined: Sequence[str] = (),
) -> str:
    """Such as `60 train images of 3 classes (a, b, c), 30 test images from val/, 2 left out: x/`.

    Args:
        origin: the folder or file of the test images.
        unlabeled: number of train images from a split of unlabelled images.
        left_out: folders or files in neither set, with their numbers of images.
        joined: folders that each hold a whole data set; all are taken together.
    """
    parts = [_train_words(train)]
    if unlabeled:
        parts[0] += f" ({unlabeled:,} of them from unlabeled)"
    if test is not None:
        origin = f" from {origin}" if origin else ""
        without = "" if test.has_labels else ", without labels"
        parts.append(f"{test.words('test')}{origin}{without}")
    if left_out:
        names = list(left_out)
        more = f" and {len(names) - 3} more" if names[3:] else ""
        parts.append(f"{sum(left_out.values()):,} left out: {', '.join(names[:3])}{more}")
    if joined:
        parts.append(f"of {len(joined):,} data sets side by side ({shown(joined)}) taken as one")
    return ", ".join(parts)


def _train_words(train: Part) -> str:
    if not train.has_labels:
        return f"{train.words('train')} without labels"
    if not train.classes:
        return f"{train.words('train')} with labels"
    names = train.classes
    classes = f"{len(names):,} class{'es' if len(names) > 1 else ''} ({shown(names)})"
    if train.labelled in (None, train.images):
        return f"{train.words('train')} of {classes}"
    return f"{train.words('train')}, {train.labelled:,} of them of {classes}"


def shown(names: Sequence[str]) -> str:
    """Up to three names; of more, only the first and the last."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"


def odd(train: Part, test: Part | None) -> Iterator[str]:
    """Lines about properties that make the probes' numbers meaningless."""
    if not train.has_labels:
        if test is not None and test.has_labels:
            yield "the test images have labels, but the train images have none: no probes"
        return
    count = train.labelled
    seen = train.classes
    if len(seen) == 1:
        yield f"there is only one class, {seen[0]}: accuracies of probes are meaningless"
    elif count is not None and len(seen) >= count:
        yield f"there are as many classes ({len(seen):,}) as labelled images ({count:,})"
    if test is not None and test.has_labels:
        known = set(seen)
        unseen = [name for name in test.classes if name not in known]
        if unseen:
            yield (
                f"{len(unseen):,} of the classes of the test images are not among those of the "
                f"train images, such as {unseen[0]}: probes cannot find them"
            )


def classes_of(shards: ShardSet) -> list[str]:
    """The classes that occur in a data set's own files."""
    names = shards.label_names or ()
    known = {file.classes for file in shards.files if file.classes is not None}
    own = {file.label for file in shards.files if file.label >= 0}
    for classes in known:
        own.update(i for i, value in enumerate(classes.values) if value is not None)
    return [name for index, name in enumerate(names) if index in own]


def part_of(shards: ShardSet) -> Part:
    labelled = sum(file.labelled for file in shards.files) if shards.has_labels else 0
    return Part(shards.rows, labelled, tuple(classes_of(shards)))
