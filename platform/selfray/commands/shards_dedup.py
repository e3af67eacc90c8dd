"""`selfray shards dedup`: writes shards again without duplicates, and says what went."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional

from selfray.commands.flags import DeviceGpusFlag, TrackingFlag, flag
from selfray.commands.shards import BuildLine
from selfray.commands.shards_text import removed_lines
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.build import Progress
    from selfray.cluster.dedup import By
    from selfray.console import Console


@dataclass(frozen=True)
class DedupShards:
    """Write shards again without duplicates: of alike images one stays. Test images all stay, and
    train images that are alike to a test image go, and are named.
    $ selfray shards dedup scans/ scans-once/
    """

    interrupted: ClassVar[str] = "what was read is kept; the same command goes on"

    source: Annotated[
        Positional[str], flag("Folder that `selfray shards build` wrote; it stays as it is.", "SRC")
    ]
    destination: Annotated[
        Positional[str],
        flag("Folder for the other shards, new or empty; local, s3:// or gs://.", "DST"),
    ]
    by: Annotated[
        str | None,
        flag(
            """Compare the features of this encoder: a run's folder, an exported encoder, or
            timm:NAME. Each image is compared with each.""",
            "ENCODER",
            "perceptual hashes of 64 bits",
        ),
    ] = None
    similarity: Annotated[
        float,
        flag(
            """From this similarity on, two images are alike: the share of equal bits of their
            hashes (0.95: at most 3 of 64 differ), or the cosine of their features. 1 leaves only
            copies.""",
            "SHARE",
        ),
    ] = 0.95
    tracking: TrackingFlag = None
    device_gpus: DeviceGpusFlag = None

    def run(self, console: "Console") -> int:
        from selfray.cluster import dedup, runtime
        from selfray.cluster.endings import root_cause

        started = time.monotonic()
        line = BuildLine(console)
        with ExitStack() as stack:

            def on_progress(progress: "Progress") -> None:
                if line.first is None and self.by is None:
                    console.live("starting Ray")
                    stack.enter_context(runtime.session())
                line.show(progress)

            by = None if self.by is None else self._by(self.by, stack, console)
            try:
                manifest = dedup.dedup(
                    self.source, self.destination, self.similarity, by, on_progress
                )
            except Exception as error:
                # The message of Ray's wrapper contains the task's whole traceback.
                raise root_cause(error) from error
        destination = Location.of(self.destination)
        seconds = time.monotonic() - started
        console.say(f"{destination}: {manifest.images:,} images stay, {seconds:.0f} s")
        for text in removed_lines(manifest.dedup or {}, destination):
            console.say(text)
        return 0

    def _by(self, name: str, stack: ExitStack, console: "Console") -> "By":
        from selfray.cluster import runtime
        from selfray.cluster.dedup import By
        from selfray.commands.labelled import devices_of
        from selfray.commands.subjects import open_subjects

        console.live("loading torch and ray")
        (named,) = open_subjects([name], None, self.tracking, console)
        stack.enter_context(runtime.session())
        return By(named.subject, devices_of(self.device_gpus))
