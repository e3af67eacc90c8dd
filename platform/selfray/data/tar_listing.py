"""Lists the tars of a data set to find splits, classes and labels before they are read."""

import collections
import itertools
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from selfray.data import columns
from selfray.data.columns import NO_LABEL
from selfray.data.files import File, is_ignored
from selfray.data.layout import IMAGE_EXTENSIONS, LabelRule, Understood, extension, understand
from selfray.data.rows import Input, Layout, Sample, raise_if_outage
from selfray.data.tar import StrictTarInfo, folder_of, read_tar, shown
from selfray.storage import Location

SAMPLE_BYTES = 1024
"""Smallest size of a member in a tar: 512 bytes of header, and content in blocks of 512."""
LOOKED_AT = 100
"""Number of members read to find out whether members are in folders and labels are text."""


@dataclass(frozen=True)
class Tars:
    """The tars of a data set, as inputs of work items."""

    inputs: list[Input]
    layout: Layout
    understood: Understood
    """The meaning of the names of the tars and of the folders inside."""
    has_folders: bool
    """Whether the folders inside the tars name splits or classes."""


def plan_tars(
    root: Location,
    files: Sequence[File],
    understood: Understood,
    rule: LabelRule,
    label_column: str | None,
) -> Tars:
    """Inputs for all tars that are used. Labels in `.cls` and `.json` members take precedence over
    folders.

    Args:
        understood: the meaning of the tars' names.
    """
    inside = _inside(root, files, understood, rule)
    if inside is None:
        inputs = _whole(files, understood)
        layout = _layout(root, files, understood, rule, label_column)
        return Tars(inputs, layout, understood, has_folders=False)
    layout = _layout(
        root, files, replace(understood, labels=(None,) * len(files)), rule, label_column
    )
    if layout.has_labels or rule == "none":
        inside = replace(
            inside, understood=replace(inside.understood, labels=(None,) * len(inside.names))
        )
    else:
        names = inside.understood.classes
        layout = Layout("tar", names is not None, names)
    said = inside.understood
    splits = {file.name: split for file, split in zip(files, understood.splits, strict=True)}
    # If a tar's name tells its split, the folders inside tell only classes.
    combined = tuple(splits.get(file.name) for file in files)
    if not (said.has_splits or said.classes):
        inputs = _whole(files, understood)
        return Tars(inputs, layout, understood, has_folders=False)
    return Tars(
        inside.inputs(layout),
        layout,
        replace(said, splits=combined, labels=(None,) * len(files)),
        has_folders=True,
    )


def have_folders(root: Location, files: Sequence[File]) -> bool:
    """Whether members are in folders, judged by the first ones."""
    for file in files:
        names = list(itertools.islice(_members(root, file), LOOKED_AT))
        if names:
            return any(folder_of(name) for name in names)
    return False


@dataclass(frozen=True)
class _Inside:
    """The members of all tars, and the meaning of their folders."""

    files: Sequence[File]
    names: tuple[str, ...]
    """The normalised names of the members."""
    of: tuple[int, ...]
    """The index of each member's tar."""
    understood: Understood

    def inputs(self, layout: Layout) -> list[Input]:
        """One input for each tar and split; folders determine which members belong to it."""
        place = {name: index for index, name in enumerate(layout.label_names or ())}
        found: dict[tuple[int, str], dict[str, int]] = {}
        rows: dict[tuple[int, str], int] = {}
        said = zip(self.of, self.names, self.understood.splits, self.understood.labels, strict=True)
        for file, name, split, label in said:
            if split is None:
                continue
            folders = found.setdefault((file, split), {})
            folders[posixpath.dirname(name)] = NO_LABEL if label is None else place[label]
            is_picture = extension(name) in IMAGE_EXTENSIONS
            rows[file, split] = rows.get((file, split), 0) + is_picture
        total: collections.Counter[int] = collections.Counter()
        for (file, _), count in rows.items():
            total[file] += count
        return [
            Input(
                self.files[file].name,
                self.files[file].bytes * rows[file, split] // max(1, total[file]),
                rows[file, split],
                split=split,
                folders=tuple(sorted(folders.items())),
            )
            for (file, split), folders in sorted(found.items())
        ]


def _inside(
    root: Location, files: Sequence[File], understood: Understood, rule: LabelRule
) -> _Inside | None:
    """None if no member is in a folder."""
    used = [i for i, split in enumerate(understood.splits) if split is not None]
    if not have_folders(root, [files[i] for i in used]):
        return None
    with ThreadPoolExecutor(8) as pool:
        members = list(pool.map(lambda i: tuple(_members(root, files[i])), used))
    names = tuple(itertools.chain.from_iterable(members))
    of = tuple(i for i, own in zip(used, members, strict=True) for _ in own)
    said = understand(names, "images", rule, root)
    if understood.has_splits and not said.has_splits:
        # cat/1.jpg inside `train-000.tar` counts as train/cat/1.jpg.
        outer = [f"{understood.splits[i]}/{name}" for i, name in zip(of, names, strict=True)]
        said = replace(understand(outer, "images", rule, root), origins=understood.origins)
        said = replace(said, left_out=understood.left_out)
    return _Inside(files, names, of, said)


def _members(root: Location, file: File) -> Iterator[str]:
    """The names of a tar's members; of a damaged tar, those before the damage."""
    location = root / file.name
    try:
        # Seek in local files; in an object store every seek would be a request.
        whole = location.filesystem.open_input_file(location.path) if location.is_local else None
        with (
            whole or location.filesystem.open_input_stream(location.path) as stream,
            tarfile.open(
                fileobj=stream,  # type: ignore[arg-type]
                mode="r:" if location.is_local else "r|",
                tarinfo=StrictTarInfo,
                errors="surrogateescape",
            ) as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isdir() and not is_ignored(member.name):
                    yield shown(
                        posixpath.join(folder_of(member.name), posixpath.basename(member.name))
                    )
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise_if_outage(error, root)  # the damage is reported when the tar is read


def _whole(files: Sequence[File], understood: Understood) -> list[Input]:
    place = {name: index for index, name in enumerate(understood.classes or ())}
    return [
        Input(
            file.name,
            file.bytes,
            file.bytes // SAMPLE_BYTES,
            label=NO_LABEL if label is None else place[label],
        )
        for file, split, label in zip(files, understood.splits, understood.labels, strict=True)
        if split is not None
    ]


def _layout(
    root: Location,
    files: Sequence[File],
    understood: Understood,
    rule: LabelRule,
    label_column: str | None,
) -> Layout:
    """Labels from the folders around the tars, else from `.cls` and `.json` members."""
    names = understood.classes
    if names is not None or rule == "none":
        return Layout("tar", names is not None, names)

    def texts(file: File, most: int | None = None) -> set[str]:
        rows = read_tar(root, file.name, label_column, only_labels=True)
        sound = (row for row in rows if isinstance(row, Sample))
        return {row.text for row in itertools.islice(sound, most) if row.text is not None}

    used = [f for f, split in zip(files, understood.splits, strict=True) if split is not None]
    first = next(filter(None, (texts(file, LOOKED_AT) for file in used)), set())
    if all(columns.is_label_number(text) for text in first):
        return Layout("tar", bool(first), label_column=label_column)
    with ThreadPoolExecutor(8) as pool:
        found = set().union(*pool.map(texts, used))
    return Layout("tar", True, tuple(sorted(found, key=columns.natural)), label_column=label_column)
