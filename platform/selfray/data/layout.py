"""The meaning of a data set's file names: train and test, classes, and files that are left out.

It is decided only here, for every command: `selfray pretrain`, the sweeps, `selfray probe` and
`selfray shards build` call `understand` with the names of all files and get the same answer. The
table of layouts is in docs/layouts.md; columns.py gives the meaning of Parquet columns.
"""

import collections
import posixpath
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from selfray.check import require

SourceKind = Literal["images", "tar", "parquet"]
LabelRule = Literal["auto", "folders", "none"]

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    "avif", "bmp", "dcm", "dicom", "gif", "gtif", "gtiff", "heic", "jfif", "jp2", "jpe", "jpeg",
    "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
})
# fmt: on

TRAIN, UNLABELED, VALIDATION, TEST = "train", "unlabeled", "validation", "test"
SPLITS = (TRAIN, UNLABELED, VALIDATION, TEST)
"""In the order of a data set's shards. The first two are used for training, the others never."""

_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training", "trainval"), TRAIN),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsupervised"), UNLABELED),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), TEST),
}
# fmt: off
_NEUTRAL_WORDS = frozenset({
    "", "class", "classes", "data", "dataset", "examples", "files", "folder", "image", "images",
    "img", "imgs", "jpeg", "jpg", "of", "only", "parquet", "part", "photos", "pictures", "pics",
    "png", "sample", "samples", "set", "shard", "shards", "split", "subset", "tar",
})
# fmt: on
"""Beside a split's name in a folder's name, these say nothing more: `test_images`, `trainingSet`"""
_PARTS = (_NEUTRAL_WORDS - {"class", "classes", "sample", "samples"}) | {
    "batch", "chunk", "disc", "disk", "fold", "vol", "volume",
}  # fmt: skip
"""With a number behind it, each is a part of a data set: `images_001`, `fold2`."""
_IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "photos", "pictures"})
_MASK_FOLDERS = frozenset({
    "annotation", "annotations", "ground_truth", "groundtruth", "mask", "masks", "segmentation",
    "segmentationclass", "segmentationobject", "segmentations",
})  # fmt: skip
"""Beside a folder of `_IMAGE_FOLDERS`, a folder of such a name holds no images to learn from."""
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SPLIT_KEYS = ("split", "subset", "partition")
LABEL_KEYS = ("label", "labels", "class", "target", "category")
"""Keys of folders named like `label=cat`, as in partitioned data sets of Hive and pyarrow."""


@dataclass(frozen=True)
class Understood:
    """The meaning of files' names, in the order of the files."""

    splits: tuple[str | None, ...]
    """One of SPLITS for each file; None for files that are left out."""
    labels: tuple[str | None, ...]
    """The class of each file whose folder is a class."""
    has_splits: bool
    """Whether any name is that of a split; if not, all files are train."""
    origins: Mapping[str, str]
    """split -> its name in the data set, such as `val2017/`."""
    left_out: Mapping[str, int]
    """Files outside of the splits, if there are splits: top folder or file -> number of files."""
    joined: tuple[str, ...] = ()
    """Folders side by side that each hold a whole data set of Parquet files, such as the
    configs of a Hugging Face data set; empty if there are not several."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes in the order of their labels, numbers by value; None if no folder is a
        class."""
        found = {label for label in self.labels if label is not None}
        return tuple(sorted(found, key=natural)) if found else None


def understand(
    names: Sequence[str], kind: SourceKind, rule: LabelRule = "auto", source: object = ""
) -> Understood:
    """Determine splits and classes from the names of all files of a data set.

    Args:
        names: paths inside the data set, with /.
        kind: the kind of files.
        rule: where class names come from; see BuildOptions.labels.
        source: the data set, for messages.

    Raises:
        ValueError: the rule is "folders", and an image lies outside of class folders.
    """
    masks = _masks(names) if kind == "images" else {}
    if masks:
        return _without_masks(names, masks, rule, source)
    folders = _Folders(pictures(names, kind), kind)
    splits: list[str | None] = []
    marks: list[str] = []
    for name in names:
        split, mark = folders.split_of(posixpath.dirname(name))
        if split is None and kind != "images":
            split, mark = _of_file(posixpath.basename(name))
        splits.append(split)
        marks.append(mark)
    if kind != "images" and not set(splits) & {TRAIN, UNLABELED, None}:
        # A single file named `crash-test.parquet` is not a test set.
        splits = [
            split if mark.endswith("/") or not _parsed(posixpath.basename(name))[1] else None
            for name, split, mark in zip(names, splits, marks, strict=True)
        ]
    has_splits = any(split is not None for split in splits)
    labels = _labels(names, folders, splits, kind, rule, source)
    left_out: collections.Counter[str] = collections.Counter()
    if TRAIN in splits:
        seen = set(pictures(names, kind))
        used = {n.partition("/")[0] for n, s in zip(names, splits, strict=True) if s is not None}
        for name, split in zip(names, splits, strict=True):
            if split is None and name in seen:
                top, slash, _ = name.partition("/")
                left_out[
                    f"{posixpath.dirname(name)}/" if slash and top in used else top + slash
                ] += 1
    else:
        splits = [split or TRAIN for split in splits]
    origins: dict[str, str] = {}
    for split, mark in sorted({(s, m) for s, m in zip(splits, marks, strict=True) if s and m}):
        origins[split] = f"{origins[split]}, {mark}" if split in origins else mark
    joined = _joined(names, folders, splits) if kind == "parquet" else ()
    return Understood(tuple(splits), tuple(labels), has_splits, origins, dict(left_out), joined)


def _joined(
    names: Sequence[str], folders: "_Folders", splits: Sequence[str | None]
) -> tuple[str, ...]:
    """Understood.joined: the folders above a split that several folders have."""
    above: dict[str, set[str]] = collections.defaultdict(set)
    for name, split in zip(names, splits, strict=True):
        outer, inner = folders.parts(posixpath.dirname(name))
        path = outer or inner
        if split is not None and not any("=" in p or _is_numbered_part(p) for p in path):
            above[split].add("/".join(path) + "/")
    return tuple(sorted(set().union(*(found for found in above.values() if len(found) > 1))))


def _masks(names: Sequence[str]) -> dict[str, str]:
    """Image file -> its folder of masks, such as `train/masks/` beside `train/images/`."""
    beside: dict[str, set[str]] = collections.defaultdict(set)
    folders = {posixpath.dirname(name) for name in pictures(names, "images")}
    for folder in folders:
        while folder:
            above, base = posixpath.split(folder)
            beside[above].add(base)
            folder = above
    tops = {
        posixpath.join(above, base)
        for above, bases in beside.items()
        if any(base.lower() in _IMAGE_FOLDERS for base in bases)
        for base in bases
        if base.lower() in _MASK_FOLDERS
    }
    found = {}
    for name in names:
        parts = name.split("/")
        above = next((a for i in range(1, len(parts)) if (a := "/".join(parts[:i])) in tops), None)
        if above is not None:
            found[name] = f"{above}/"
    return found


def _without_masks(
    names: Sequence[str], masks: Mapping[str, str], rule: LabelRule, source: object
) -> Understood:
    """The meaning of the other files, with the masks left out."""
    rest = understand([name for name in names if name not in masks], "images", rule, source)
    splits, labels = iter(rest.splits), iter(rest.labels)
    counts = collections.Counter(masks[name] for name in pictures(names, "images") if name in masks)
    return Understood(
        tuple(None if name in masks else next(splits) for name in names),
        tuple(None if name in masks else next(labels) for name in names),
        rest.has_splits,
        rest.origins,
        {**rest.left_out, **counts},
        rest.joined,
    )


def extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def pictures(names: Sequence[str], kind: SourceKind) -> Sequence[str]:
    """The names that determine splits and classes: in a folder of images, a README or a folder of
    .xml files is neither."""
    if kind != "images":
        return names
    return [name for name in names if extension(name) in IMAGE_EXTENSIONS] or names


def natural(name: str) -> tuple[int, int, str]:
    """A sort key: numbers by value, before words."""
    is_number = name.isascii() and name.isdigit() and len(name) < 30
    return (0, int(name), name) if is_number else (1, 0, name)


# Splits ------------------------------------------------------------------------------------------


@lru_cache(maxsize=65_536)
def _parsed(name: str) -> tuple[str | None, tuple[str, ...]]:
    """(the split in a name, its other words)."""
    key, _, value = name.partition("=")
    if value and key.lower() in _SPLIT_KEYS:
        name = value
    elif value:
        return None, ()
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.sub(r"(held|hold)[\W_]out", r"\1out", words)
    parts = [w.rstrip("0123456789") for w in re.split(r"[\W_]+", words)]
    found = {_SPLIT_OF_WORD[word] for word in parts if word in _SPLIT_OF_WORD}
    rest = tuple(w for w in parts if w not in _SPLIT_OF_WORD and w not in _NEUTRAL_WORDS)
    if found == {TRAIN, UNLABELED}:
        found = {UNLABELED}
    if TRAIN not in found and found & {VALIDATION, TEST} and len(found) > 1:
        found = {TEST}
    return (found.pop() if len(found) == 1 else None), rest


def _of_file(base: str) -> tuple[str | None, str]:
    split, _ = _parsed(base)
    return split, split or ""


class _Folders:
    """The folders of a data set, and which of them are splits."""

    def __init__(self, names: Iterable[str], kind: SourceKind) -> None:
        self._kind = kind
        self._inside: dict[str, set[str]] = collections.defaultdict(set)
        """Folder -> the folders in it that hold files."""
        self._holds_files: set[str] = set()
        self._known: dict[str, tuple[str | None, str]] = {}
        self._splits: dict[str, dict[str, str]] = {}
        for folder in {posixpath.dirname(name) for name in names}:
            self._holds_files.add(folder)
            while folder and folder not in self._known:
                self._known[folder] = (None, "")
                above, base = posixpath.split(folder)
                self._inside[above].add(base)
                folder = above
        self._known = {}

    def split_of(self, folder: str) -> tuple[str | None, str]:
        """(split, name of the split's folder with a /) of the files in a folder."""
        if folder not in self._known:
            parts = folder.split("/") if folder else []
            found = self._place_of_split(parts)
            self._known[folder] = (None, "")
            if found is not None:
                first, last, split = found
                self._known[folder] = (split, "/".join(parts[first : last + 1]) + "/")
        return self._known[folder]

    def _place_of_split(self, parts: Sequence[str]) -> tuple[int, int, str] | None:
        """(index of the split's folder, the same or that of a split nested in it, the split) of the
        folders that lead to a file; None without a split."""
        for index, part in enumerate(parts):
            split = self._splits_in("/".join(parts[:index])).get(part)
            if split is None:
                continue
            nested = self._nested_in(parts[: index + 1]) if split == TRAIN else {}
            below = parts[index + 1] if len(parts) > index + 1 else ""
            return (index, index + 1, nested[below]) if below in nested else (index, index, split)
        return None

    def _nested_in(self, train: Sequence[str]) -> Mapping[str, str]:
        """The folders in a train folder that are splits of their own: `train/val`, which is not
        trained on. It is a class if the test folder has a class of that name, too."""
        above = "/".join(train[:-1])
        tests = [p for p, s in self._splits_in(above).items() if s in (VALIDATION, TEST)]
        classes = set().union(*(self._inside[f"{above}/{p}".lstrip("/")] for p in tests))
        inside = self._inside.get("/".join(train), set())
        found = {part: _parsed(part) for part in inside - classes}
        splits = {part: split for part, (split, rest) in found.items() if split and not rest}
        if not set(splits.values()) & {VALIDATION, TEST}:  # `train/train` is a class of trains
            return {}
        return splits

    def parts(self, folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(folders above the split's folder, folders below it); without a split, all are below."""
        parts = tuple(folder.split("/")) if folder else ()
        found = self._place_of_split(parts)
        return ((), parts) if found is None else (parts[: found[0]], parts[found[1] + 1 :])

    def _splits_in(self, above: str) -> dict[str, str]:
        """The folders in a folder that are splits."""
        if above not in self._splits:
            self._splits[above] = self._find(above)
        return self._splits[above]

    def _find(self, above: str) -> dict[str, str]:
        inside = self._inside.get(above, set())
        parsed = {part: _parsed(part) for part in inside}
        splits = {p: split for p, (split, rest) in parsed.items() if split and not rest}
        # `cells_train` and `cells_test` are splits as a pair; `crash-test` alone is a class.
        pairs: dict[tuple[str, ...], set[str]] = collections.defaultdict(set)
        for split, rest in parsed.values():
            if split and rest:
                pairs[rest].add(split)
        for part, (split, rest) in parsed.items():
            if split and rest and TRAIN in pairs[rest] and len(pairs[rest]) > 1:
                splits[part] = split
        if self._kind == "images" and self._train_is_a_class(above, splits, inside - set(splits)):
            splits = {part: split for part, split in splits.items() if split != TRAIN}
        return splits

    def _train_is_a_class(self, above: str, splits: Mapping[str, str], others: set[str]) -> bool:
        """Whether `train` is the class of railway trains: it holds images directly, beside folders
        of other classes, and there is no test folder, or the test folder has the same classes."""

        def inside(part: str) -> set[str]:
            return self._inside.get(f"{above}/{part}" if above else part, set())

        trains = [part for part, split in splits.items() if split == TRAIN]
        if len(trains) != 1 or trains[0].lower() != "train" or inside(trains[0]):
            return False
        tests = [part for part, split in splits.items() if split in (VALIDATION, TEST)]
        if not tests:
            return len(others) >= 2 and not any(inside(part) for part in others)
        return any(trains[0] in inside(part) and inside(part) & others for part in tests)


# Classes -----------------------------------------------------------------------------------------


def _labels(
    names: Sequence[str],
    folders: _Folders,
    splits: Sequence[str | None],
    kind: SourceKind,
    rule: LabelRule,
    source: object,
) -> list[str | None]:
    nothing: list[str | None] = [None] * len(names)
    if rule == "none":
        return nothing
    hive = [_hive_label(name) for name in names]
    if any(label is not None for label in hive):
        return hive
    if kind != "images":
        return nothing
    if rule == "folders":
        return _first_folders(names, folders, source)
    # Work per folder, not per image: a data set has millions of images, but few folders.
    seen = set(pictures(names, kind))
    is_used = {
        posixpath.dirname(name): split
        for name, split in zip(names, splits, strict=True)
        if name in seen and (split is not None or TRAIN not in splits)
    }
    below = {f: folders.parts(f) for f, split in is_used.items() if split != UNLABELED}
    for side in (1, 0):
        class_of = _classes({f: parts[side] for f, parts in below.items()}, any(splits))
        of_train = {class_of.get(f) for f, s in is_used.items() if s in (TRAIN, None)}
        # `val/images` beside `train/CLASS`: those images have no label.
        class_of = {f: c for f, c in class_of.items() if c in of_train or _has_meaning(c)}
        labels = [class_of.get(posixpath.dirname(name)) for name in names]
        trained = [
            label
            for name, label, split in zip(names, labels, splits, strict=True)
            if name in seen and (split == TRAIN or (split is None and TRAIN not in splits))
        ]
        # Images outside of class folders have no label; if most are outside, there are no classes.
        if 2 * sum(label is not None for label in trained) > len(trained):
            return labels
    return nothing


def _classes(parts_of: Mapping[str, tuple[str, ...]], has_splits: bool) -> dict[str, str]:
    """Folder -> class, from the folders that lead to it; empty if they are not classes."""
    paths = {parts for parts in parts_of.values() if parts}
    depth = 0
    # A folder around all others, such as `images`, is no class, nor are `part1`, `part2`.
    while paths and all(len(p) > depth + 1 for p in paths):
        names = {p[depth] for p in paths}
        if len(names) > 1 and not all(map(_is_numbered_part, names)):
            break
        depth += 1
    found = {parts[depth] for parts in paths}
    if all(map(_is_numbered_part, found)):
        return {}
    if len(found) < 2 and not (has_splits and found and _has_meaning(next(iter(found)))):
        return {}
    return {folder: parts[depth] for folder, parts in parts_of.items() if len(parts) > depth}


def _is_numbered_part(name: str) -> bool:
    """`images_001`, `fold2`: how a data set was cut up for its size."""
    words = [word for word in re.split(r"[\W_\d]+", name.lower()) if word]
    return name[-1:].isdigit() and bool(words) and all(w in _PARTS for w in words)


def _has_meaning(name: str) -> bool:
    return any(w not in _NEUTRAL_WORDS for w in re.split(r"[\W_\d]+", name.lower()))


def _hive_label(name: str) -> str | None:
    for part in name.split("/")[:-1]:
        key, _, value = part.partition("=")
        if value and key.lower() in LABEL_KEYS:
            return None if value == _HIVE_NULL else urllib.parse.unquote(value)
    return None


def _first_folders(names: Sequence[str], folders: _Folders, source: object) -> list[str | None]:
    """The rule `folders`: the first folder is the class, deeper ones are ignored."""
    labels: list[str | None] = []
    seen = set(pictures(names, "images"))
    for name in names:
        _, below = folders.parts(posixpath.dirname(name))
        require(
            bool(below) or name not in seen,
            f'labels "folders" needs every image in a class folder, but {source} holds '
            f'{name} itself: move it, or use labels "none"',
        )
        labels.append(below[0] if below else None)
    return labels
