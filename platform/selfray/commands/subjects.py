"""Opens the encoders that a user names, in a form that Ray tasks can load."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfray.check import require
from selfray.commands.reference import MLRUNS, name_of, open_checkpoint, output_of, run_folder
from selfray.commands.words import nearest
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
    from selfray.probes.encoders import UNTRAINED

    named = [
        None if reference == UNTRAINED else _open(reference, size, tracking, console)
        for reference in references
    ]
    runs = [n for n in named if n is not None and n.checkpoint is not None]
    if None in named:
        require(
            len(runs) > 0,
            f"{UNTRAINED} stands for a run's encoder before its first step: name a run as well",
        )
    found = []
    for each in named:
        found += [each] if each is not None else _untrained(runs, size)
    titles = [n.subject.title for n in found]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    require(twice is None, f"{twice} is named twice: name each encoder once")
    return found


def _untrained(runs: Sequence[Named], size: int | None) -> Iterator[Named]:
    """The encoder of each network before its first step, by the first run that has the network."""
    from selfray import config
    from selfray.probes.encoders import UNTRAINED, EncoderRef

    done: set[str] = set()
    for each in runs:
        assert each.checkpoint is not None
        experiment = each.checkpoint.experiment()
        network = config.dumps(experiment.encoder)
        if network not in done:
            title = UNTRAINED if not done else f"{UNTRAINED}, as {each.subject.title}"
            done.add(network)
            home = each.run or each.output
            ref = EncoderRef.untrained(experiment)
            yield Named(_subject(title, ref, home, size), each.output)


def _open(reference: str, size: int | None, tracking: str | None, console: "Console") -> Named:
    from selfray.models.portable import WEIGHTS
    from selfray.probes.encoders import TIMM, UNTRAINED, EncoderRef

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
    try:
        checkpoint = open_checkpoint(reference, tracking, console)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{nearest(reference, [UNTRAINED])}") from None
    run, output = run_folder(checkpoint), output_of(checkpoint)
    # The newest checkpoint of a run goes by the run's name.
    names_run = (
        reference.startswith(MLRUNS) or Location.of(reference).name != checkpoint.location.name
    )
    title = run.name if run is not None and names_run else name_of(checkpoint)
    subject = _subject(title, EncoderRef.of(checkpoint), run or output, size)
    return Named(subject, output, checkpoint, run)


def _subject(title: str, ref: "EncoderRef", home: Location, size: int | None) -> "Subject":
    from selfray.cluster.evaluation import Subject
    from selfray.models import on_meta

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
    asked = config if config.is_vit else replace(config, image_size=size or own)
    try:
        on_meta.require_encoder(asked, [size or own])
    except ValueError as error:
        raise ValueError(
            f"{title}: {error}".replace("encoder.image_size", "--image-size")
        ) from None
    return Subject(title, ref, home, size or own)
