"""`selfray shards`: converts images to Parquet shards and checks shards for damage."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional

from selfray.check import require
from selfray.commands.flags import flag
from selfray.commands.script import FAILED
from selfray.commands.shards_text import summary
from selfray.commands.words import clock, size
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.build import Progress
    from selfray.console import Console


LINES_WITHOUT_TERMINAL = 10
"""Progress lines that a build prints if its output is not a terminal."""


@dataclass(frozen=True)
class BuildShards:
    """Convert images to Parquet shards, in parallel on all CPUs. Broken images are listed with the
    reason and do not stop the build; the same command, given again, resumes an interrupted build.
    $ selfray shards build ~/scans s3://bucket/scans --max-side 512
    """

    interrupted: ClassVar[str] = "finished shards are kept; the same command resumes"

    source: Annotated[
        Positional[str],
        flag(
            """Folder of images, of WebDataset .tar or of .parquet files, or one such file; local,
            s3:// or gs://.""",
            "SRC",
        ),
    ]
    destination: Annotated[
        Positional[str],
        flag("Folder for the shards, new or empty; local, s3:// or gs://.", "DST"),
    ]
    max_side: Annotated[
        int | None,
        flag(
            """Shrink images whose longer side exceeds this many pixels and store them as JPEGs of
            quality 95. A crop of a fifth of a square image has 0.45 of its side: give at least
            twice the size of the views.""",
            "PIXELS",
            "keep the files' bytes unchanged",
        ),
    ] = None
    labels: Annotated[
        Literal["auto", "folders", "none"],
        flag(
            """auto: from class folders, a metadata table beside the images, .cls or .json members
            of tars, or a label column of Parquet. folders: the class is the first folder below SRC
            or below its split. none: no labels."""
        ),
    ] = "auto"
    shard_mib: Annotated[
        float, flag("Size of a shard in MiB; a task needs about three times this memory.", "MIB")
    ] = 128
    window: Annotated[
        tuple[float, float] | None,
        flag(
            """The values of deep images (16 bits, floats, DICOM) that become black and white:
            percentiles such as 0.5 99.5, or fixed values such as -1000 400.""",
            "LOW HIGH",
            "a DICOM's own, else percentiles 0.5 99.5 of each image",
        ),
    ] = None
    window_of: Annotated[
        Literal["image", "set", "fixed"] | None,
        flag(
            """What --window means: percentiles of each image, percentiles of all images together,
            which are read twice for it, or fixed values.""",
            default="image for two numbers within 0..100, else fixed",
        ),
    ] = None
    keep_depth: Annotated[
        bool, flag("Store deep images as PNGs of 16 bits instead of 8.", default="")
    ] = False
    page: Annotated[
        int | None,
        flag(
            "Take this page or frame of files that have several, counted from 0.",
            "N",
            "each is an image",
        ),
    ] = None
    channels: Annotated[
        int | None,
        flag(
            """Images of other channels are quarantined; gray and colour images count as one.""",
            "N",
            "those that most images have",
        ),
    ] = None
    max_pixels: Annotated[
        int | None,
        flag(
            "Quarantine images with more pixels (width x height) than this, without decoding.",
            "N",
            "100 million",
        ),
    ] = None
    seed: Annotated[int, flag("Seed of the random order of images in shards.", "N")] = 0
    image_column: Annotated[
        str | None,
        flag("Column of the images, if SRC is Parquet.", "NAME", "found by its type"),
    ] = None
    label_column: Annotated[
        str | None,
        flag(
            "Column of the labels, in Parquet or in a metadata table beside the images.",
            "NAME",
            "found by its name",
        ),
    ] = None

    group_column: Annotated[
        str | None,
        flag(
            """Column that names each image's patient, slide or scene, in Parquet or in a metadata
            table beside the images. Shards keep it as the column `group`, for --data.group-by
            group.""",
            "NAME",
            "no groups are kept",
        ),
    ] = None

    def run(self, console: "Console") -> int:
        from selfray.cluster import build, runtime

        require(self.shard_mib > 0, f"--shard-mib must be positive, got {self.shard_mib:g}")
        options = build.BuildOptions(
            max_side=self.max_side,
            shard_bytes=max(1, int(self.shard_mib * 2**20)),
            labels=self.labels,
            seed=self.seed,
            image_column=self.image_column,
            label_column=self.label_column,
            window=self.window,
            window_of=self.window_of,
            keep_depth=self.keep_depth,
            page=self.page,
            channels=self.channels,
            group_column=self.group_column,
        )
        if self.max_pixels is not None:
            options = replace(options, max_pixels=self.max_pixels)
        started = time.monotonic()
        line = BuildLine(console)
        with ExitStack() as stack:

            def on_progress(progress: "Progress") -> None:
                # The first report comes after planning and before any task, so that a wrong folder
                # is reported before Ray starts.
                if line.first is None:
                    console.live("starting Ray")
                    stack.enter_context(runtime.session())
                line.show(progress)

            console.live(f"listing {self.source}")
            manifest = build.build(self.source, self.destination, options, on_progress)
        destination = Location.of(self.destination)
        for text in summary(manifest, destination, time.monotonic() - started):
            console.say(text)
        return 0


@dataclass(frozen=True)
class CheckShards:
    """Compare shards with their manifest: existence, size, sha256, structure. The exit code is 0
    if there are no problems, 1 if there are, 2 if the folder does not exist.
    $ selfray shards check s3://bucket/scans --deep
    """

    interrupted: ClassVar[str] = "nothing was changed"

    destination: Annotated[
        Positional[str], flag("Folder that `selfray shards build` wrote.", "DST")
    ]
    deep: Annotated[
        bool, flag("Also decode every image; takes about as long as the build.", default="")
    ] = False

    def run(self, console: "Console") -> int:
        from selfray.cluster import build, runtime

        started = time.monotonic()

        def on_progress(progress: "Progress") -> None:
            console.live(f"{progress.shards_done:,} of {progress.shards_total:,} shards checked")

        with ExitStack() as stack:
            if (Location.of(self.destination) / build.MANIFEST).exists():
                console.live("starting Ray")
                stack.enter_context(runtime.session())
            report = build.check(self.destination, on_progress, self.deep)
        for problem in report.problems:
            console.say(f"problem: {problem}")
        found = len(report.problems)
        console.say(
            f"{report.destination}: {report.images:,} images in {report.shards:,} shards, "
            f"{size(report.bytes)}: "
            + ("no problems" if report.ok else f"{found:,} problem{'s' if found > 1 else ''}")
            + ("" if self.deep else "; images not decoded (--deep does)" if report.ok else "")
            + f"; {time.monotonic() - started:.0f} s"
        )
        return 0 if report.ok else FAILED


class BuildLine:
    """Shows the progress of a build: one live line on a terminal, else about ten lines in all."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self.first: Progress | None = None
        """The first report. It counts shards of an earlier, interrupted build, which the speed must
        not include."""
        self._started = 0.0
        self._shown = 0

    def show(self, progress: "Progress") -> None:
        if progress.note:
            self._console.say(progress.note)
        if self.first is None:
            self.first, self._started = progress, time.monotonic()
        line = self._line(progress, self.first)
        self._console.live(line)
        if self._console.is_terminal:
            return
        tenth = progress.shards_done * LINES_WITHOUT_TERMINAL // max(1, progress.shards_total)
        if tenth > self._shown:
            if progress is not self.first:
                self._console.say(line)
            self._shown = tenth

    def _line(self, now: "Progress", first: "Progress") -> str:
        seconds = time.monotonic() - self._started
        total = f" of {now.images_total:,}" if now.images_total is not None else ""
        parts = [f"{now.images_done:,}{total} images"]
        if now.shards_done > first.shards_done:
            images = (now.images_done - first.images_done) / seconds
            size = (now.bytes - first.bytes) / seconds
            left = seconds * (now.shards_total - now.shards_done)
            left /= now.shards_done - first.shards_done
            parts += [f"{images:,.0f} images/s", f"{size / 1e6:,.1f} MB/s", f"{clock(left)} left"]
        return "  ".join([*parts, f"{now.quarantined:,} quarantined"])
