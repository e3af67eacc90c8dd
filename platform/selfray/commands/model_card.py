"""The model card of an exported encoder: its training data, settings and measured accuracies."""

from typing import TYPE_CHECKING

from selfray.commands.reference import run_folder
from selfray.metrics import HIGH, LOW, METRICS, evaluation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from selfray.experiment import Experiment
    from selfray.runs.checkpoint import Checkpoint


def model_card(checkpoint: "Checkpoint", experiment: "Experiment") -> str:
    """The card as Markdown with Hugging Face's header; the protocol of each figure is given."""
    from selfray.models.portable import opening_lines

    encoder, data = experiment.encoder, experiment.data
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- self-supervised",
        f"- {experiment.method.name}",
        "- timm",
        "- transformers",
        "---",
        "",
        f"# {experiment.run_name}",
        "",
        f"A {encoder.name} at {encoder.image_size} x {encoder.image_size} pixels, pretrained "
        f"without labels by {experiment.method.name}.",
        "",
        "| | |",
        "|---|---|",
        f"| images | {data.path} |",
        f"| epochs | {experiment.epochs:,} |",
        f"| images seen | {checkpoint.images_seen:,} |",
        f"| batch size | {experiment.batch_size:,} |",
        "| mean, std | {}, {} |".format(*data.normalization),
        f"| seed | {experiment.seed} |",
        "",
    ]
    numbers, protocols = _known(checkpoint)
    if numbers:
        lines += ["## Evaluation", "", "| metric | value, with its 95 % interval |", "|---|---|"]
        lines += _rows(numbers)
        lines += ["", *(f"- {name}: {text}" for name, text in sorted(protocols.items())), ""]
    use = opening_lines(encoder, "PATH_OF_THIS_FOLDER", "huggingface")
    lines += ["## Use", "", "```python", use, "```", ""]
    return "\n".join(lines)


def _rows(numbers: "Mapping[str, float]") -> "Iterator[str]":
    """A row for the main figure of each protocol and for each probe."""
    for name, value in sorted(numbers.items()):
        metric = METRICS.get(name) or evaluation(name)
        if metric is None:
            continue
        low, high = numbers.get(name + LOW), numbers.get(name + HIGH)
        interval = ""
        if low is not None and high is not None:
            interval = f" [{100 * low:.1f}, {100 * high:.1f}]"
        yield f"| {metric.title} | {metric.shown(value)}{interval} |"


def _known(checkpoint: "Checkpoint") -> tuple[dict[str, float], dict[str, str]]:
    """(metric -> value, metric -> protocol) of the newest probes and evaluations of the
    checkpoint's run; both empty if the checkpoint lies outside a run's folder."""
    from selfray.runs.folder import SPOOL
    from selfray.runs.spool import SpoolReader

    run = run_folder(checkpoint)
    numbers: dict[str, float] = {}
    protocols: dict[str, str] = {}
    if run is None:
        return numbers, protocols
    records, _ = SpoolReader(run / SPOOL).read({})
    for record in records:
        if record["kind"] == "metrics":
            found = record["values"].items()
            numbers |= {n: v for n, v in found if n.startswith(("probe/", "eval/"))}
        elif record["kind"] == "tags":
            found = record["values"].items()
            protocols |= {n: v for n, v in found if n.endswith(".protocol")}
    return numbers, protocols
