"""Training on labels in `selfray evaluate`: the flags, and adding its figures to other results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from selfray.commands.flags import flag, require_positive

if TYPE_CHECKING:
    from selfray.cluster.evaluation import Judged
    from selfray.cluster.finetuning import Carrying, Labels
    from selfray.probes.encoders import EncoderRef
    from selfray.probes.finetuning import FineTuning
    from selfray.probes.judgement import Judgement
    from selfray.probes.linear_paper import LinearOnViews

Preset = Literal["auto", "finetune-mae-vit", "finetune-beit-vit", "finetune-resnet", "small"]


@dataclass(frozen=True)
class FineTuneFlags:
    """Settings of `--by finetune`, and of low-shot evaluation by fine-tuning."""

    preset: Annotated[
        Preset,
        flag(
            """Settings of a paper (docs/evaluation.md), or for small data. auto: small below 20,000
            train images, else the paper that fits the encoder.""",
        ),
    ] = "auto"
    epochs: Annotated[int | None, flag("Epochs.", "N", "the preset's")] = None
    batch_size: Annotated[int | None, flag("Images in a step.", "N", "the preset's")] = None
    learning_rate: Annotated[
        float | None, flag("Learning rate at a batch of 256 images.", "RATE", "the preset's")
    ] = None
    flip: Annotated[
        float | None,
        flag("Probability of a horizontal flip.", "SHARE", "as in pretraining, else 0.5"),
    ] = None
    workers: Annotated[int, flag("Train workers.", "N")] = 1
    precision: Annotated[Literal["float32", "tf32", "bf16"], flag("Precision of training.")] = (
        "float32"
    )
    no_scratch: Annotated[
        bool, flag("Skip the baseline, the same network trained from scratch.", default="")
    ] = False

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "learning_rate", "workers")
        require_positive(self, names, "finetune.")

    def settings(self, encoder: "EncoderRef", images: int) -> "FineTuning":
        """The preset for an encoder and this many images, with the given flags applied."""
        from selfray.probes.finetuning import FineTuning

        flips = _pretraining_flip(encoder) if self.flip is None else self.flip
        given = {
            "epochs": self.epochs,
            "least_steps": None if self.epochs is None else 1,  # keep the user's number of epochs
            "batch_size": self.batch_size,
            "base_learning_rate": self.learning_rate,
            "flip": flips,
        }
        found = FineTuning.of(self.preset, encoder.encoder_config, images)
        return replace(found, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class LinearPaperFlags:
    """Settings of `--by linear-paper`."""

    optimizer: Annotated[
        Literal["auto", "sgd", "lars"],
        flag(
            """sgd: DINOv2's grid of learning rates. lars: MAE's optimizer, with a batch norm before
            the linear layer. auto: lars for MAE and BEiT, sgd with that batch norm
            for them below 20,000 train images, else sgd.""",
        ),
    ] = "auto"
    epochs: Annotated[int | None, flag("Epochs.", "N", "10, lars 90, and at least 500 steps")] = (
        None
    )
    batch_size: Annotated[int | None, flag("Images in a step.", "N", "1,024, lars 16,384")] = None
    workers: Annotated[int, flag("Train workers.", "N")] = 1

    def __post_init__(self) -> None:
        require_positive(self, ("epochs", "batch_size", "workers"), "linear-paper.")

    def settings(self, encoder: "EncoderRef", images: int) -> "LinearOnViews":
        from selfray.probes.linear_paper import LinearOnViews

        found = LinearOnViews.of(_method_of(encoder), images)
        if self.optimizer != "auto":
            found = LinearOnViews.lars() if self.optimizer == "lars" else LinearOnViews()
        given = {
            "epochs": self.epochs,
            "least_steps": None if self.epochs is None else 1,
            "batch_size": self.batch_size,
            "flip": _pretraining_flip(encoder),
        }
        return replace(found, **{k: v for k, v in given.items() if v is not None})


def with_linear_paper(
    results: "Sequence[Sequence[Judged]]", flags: LinearPaperFlags, how: "Carrying"
) -> "list[list[Judged]]":
    """The results with the figures of the papers' linear evaluation added."""
    from selfray.cluster.endings import RunFailed
    from selfray.cluster.linear_paper import on_views

    def judged_by_it(judged: "Judged") -> "Judged":
        encoder = judged.subject.encoder
        if encoder is None:  # raw pixels
            return judged
        images = len(judged.examined.train)
        return _and(judged, [on_views(judged, encoder, flags.settings(encoder, images), how)])

    try:
        return [[judged_by_it(judged) for judged in of_encoder] for of_encoder in results]
    except RunFailed as error:
        raise RunFailed(f"linear-paper: {error}") from error


def _and(judged: "Judged", numbers: "Sequence[Judgement]") -> "Judged":
    seconds = judged.seconds + sum(judgement.seconds for judgement in numbers)
    return replace(judged, judgements=judged.judgements + tuple(numbers), seconds=seconds)


def _method_of(encoder: "EncoderRef") -> str | None:
    from selfray import config

    return None if encoder.experiment is None else config.loads(encoder.experiment).method.name


def _pretraining_flip(encoder: "EncoderRef") -> float | None:
    """The probability of a horizontal flip in the encoder's pretraining; None if it is unknown."""
    from selfray import config

    if encoder.experiment is None:
        return None
    experiment = config.loads(encoder.experiment)
    return next(iter(experiment.views.values()))[0].flip


class FineTuned(NamedTuple):
    """Results [encoder][data set] with fine-tuning's figures."""

    results: "list[list[Judged]]"
    """Those of the encoders, then a row for each network from scratch."""
    scratch: "list[list[Judged] | None]"
    """For each encoder the row of its network from scratch; None if there is none."""


def with_finetuning(
    results: "Sequence[Sequence[Judged]]",
    flags: FineTuneFlags,
    which: "Sequence[Labels]",
    how: "Carrying",
) -> FineTuned:
    """Add fine-tuning's figures, and those of the same networks from scratch. Untrained encoders
    are not fine-tuned if there are these, which are the same."""
    from selfray.cluster.endings import RunFailed

    try:
        found = [
            [_with(judged, flags, which, how, from_scratch=False) for judged in of_encoder]
            for of_encoder in results
        ]
        scratch: list[list[Judged] | None] = [None] * len(results)
        if not flags.no_scratch:
            scratch = _from_scratch(results, flags, which, how)
    except RunFailed as error:
        raise RunFailed(f"fine-tuning: {error}") from error
    rows = {id(row): row for row in scratch if row is not None}
    return FineTuned(found + list(rows.values()), scratch)


def _with(
    judged: "Judged",
    flags: FineTuneFlags,
    which: "Sequence[Labels]",
    how: "Carrying",
    from_scratch: bool,
) -> "Judged":
    from selfray.cluster.finetuning import fine_tuned

    encoder = judged.subject.encoder
    if encoder is None:  # raw pixels
        return judged
    if encoder.is_untrained and not (from_scratch or flags.no_scratch):
        return judged
    protocol = flags.settings(encoder, len(judged.examined.train))
    if from_scratch:
        protocol = protocol.as_baseline()
    numbers = tuple(fine_tuned(judged, encoder, protocol, labels, how) for labels in which)
    seconds = sum(judgement.seconds for judgement in numbers)
    return replace(judged, judgements=judged.judgements + numbers, seconds=judged.seconds + seconds)


def _from_scratch(
    results: "Sequence[Sequence[Judged]]",
    flags: FineTuneFlags,
    which: "Sequence[Labels]",
    how: "Carrying",
) -> "list[list[Judged] | None]":
    """For each encoder the row of its network, trained with the same settings from random weights;
    encoders of one network have one row."""
    from selfray import config

    rows: dict[str, list[Judged]] = {}
    found: list[list[Judged] | None] = []
    for of_encoder in results:
        subject = of_encoder[0].subject
        if subject.encoder is None:
            found.append(None)
            continue
        settings = [flags.settings(subject.encoder, len(j.examined.train)) for j in of_encoder]
        network = config.dumps(subject.encoder.encoder_config)
        kind = f"{network} {subject.size} {settings} {subject.encoder.normalization}"
        if kind not in rows:
            title = "from scratch" if not rows else f"from scratch, as {subject.title}"
            rows[kind] = [
                _with(
                    replace(
                        judged, subject=replace(subject, title=title), judgements=(), seconds=0.0
                    ),
                    flags,
                    which,
                    how,
                    from_scratch=True,
                )
                for judged in of_encoder
            ]
        found.append(rows[kind])
    return found
