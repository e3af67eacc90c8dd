"""Opens the encoders that a user names, in a form that Ray tasks can load."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfray.check import require
from selfray.commands.reference import MLRUNS, name_of, open_checkpoint, output_of, run_folder
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.evaluation import Subject
    from selfray.console import Console
    from selfray.probes.encoders import EncoderRef
    from selfray.runs.checkpoint import Checkpoint


@dataclass(frozen=True)
class Named:
    """An encoder that the user named, and the folders and run that its results belong to."""

    subject: "Subject"
    output: Location
    """The folder of converted data sets."""
    checkpoint: "Checkpoint | None" = None
    run: Location | None = None
    """The run that trained it; numbers are logged there."""


def open_subjects(
    references: Sequence[str], size: int | None, tracking: str | None, console: "Console"
) -> list[Named]:
    """All encoders, in the order of `references`. ValueError and OSError name an encoder that
    cannot be opened, or that cannot take images of `size`."""
    from selfray.probes.encoders import UNTRAINED, EncoderRef

    named = [
        None if reference == UNTRAINED else _open(reference, size, tracking, console)
        for reference in references
    ]
    first = next((n for n in named if n is not None and n.checkpoint is not None), None)
    if None in named:
        require(
            first is not None,
            f"{UNTRAINED} stands for a run's encoder before its first step: name a run as well",
        )
    found = []
    for each in named:
        if each is None:
            assert first is not None
            assert first.checkpoint is not None
            ref = EncoderRef.untrained(first.checkpoint.experiment())
            home = first.run or first.output
            each = Named(_subject(UNTRAINED, ref, home, size), first.output)
        found.append(each)
    titles = [n.subject.title for n in found]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    require(twice is None, f"{twice} is named twice: name each encoder once")
    return found


def _open(reference: str, size: int | None, tracking: str | None, console: "Console") -> Named:
    from selfray.models.portable import WEIGHTS
    from selfray.probes.encoders import TIMM, EncoderRef

    here = Location.of("runs")
    if reference.startswith(TIMM):
        ref = EncoderRef.of_timm(reference.removeprefix(TIMM))
        console.live(f"fetching {reference}")
        ref.load()  # raises here, before images are read, if the weights are missing
        return Named(_subject(reference, ref, here, size), here)
    if not reference.startswith(MLRUNS):
        place = Location.of(reference)
        if reference.endswith(".safetensors") or (place / WEIGHTS).exists():
            require(place.exists(), f"there is no file {place}")
            ref = EncoderRef.of_file(reference)
            return Named(_subject(place.name, ref, here, size), here)
    checkpoint = open_checkpoint(reference, tracking, console)
    run, output = run_folder(checkpoint), output_of(checkpoint)
    subject = _subject(name_of(checkpoint), EncoderRef.of(checkpoint), run or output, size)
    return Named(subject, output, checkpoint, run)


def _subject(title: str, ref: "EncoderRef", home: Location, size: int | None) -> "Subject":
    from selfray.cluster.evaluation import Subject

    config = ref.encoder_config
    own = config.image_size
    if size is not None and size != own and config.is_vit:
        require(
            not config.is_beit,
            f"--image-size {size}: {title} has relative positions for {own} pixels only",
        )
        require(
            size % config.patch == 0,
            f"--image-size {size} is not a multiple of the {config.patch} pixels of a patch of "
            f"{title}: give one, such as {max(1, round(size / config.patch)) * config.patch}",
        )
    return Subject(title, ref, home, size or own)
