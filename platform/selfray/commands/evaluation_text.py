"""The output of `selfray evaluate`: console tables, JSON, MLflow metric names and pictures."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from selfray.metrics import EVALUATION, SCRATCH

if TYPE_CHECKING:
    from PIL.Image import Image

    from selfray.cluster.evaluation import Judged, Labelled, Subject
    from selfray.experiment import DataConfig
    from selfray.probes.judgement import Judgement


WIDEST = 110
"""Characters of a table's widest line."""


def report(results: "Sequence[Sequence[Judged]]", sets: "Sequence[Labelled]") -> Iterator[str]:
    """Lines for the console: a table and the significant differences for each data set, then the
    settings of each protocol."""
    from selfray.probes.judgement import verdicts

    for place, data in enumerate(sets):
        column = [judged[place] for judged in results]
        first = column[0].examined
        yield (
            f"{data.name}: {len(first.train):,} train and {len(first.test):,} test images, "
            f"{first.classes} classes"
        )
        yield from first.notes
        if unreadable := column[0].unreadable:
            yield f"{unreadable:,} images could not be read and are left out"
        yield from map(sizes, (judged.subject for judged in column if judged.subject.encoder))
        yield from _fewer_labels(column)
        yield ""
        yield from _table(column)
        yield ""
        found = {judged.subject.title: judged.judgements for judged in column}
        yield from verdicts(found, len(first.test))
        yield from label_efficiency_of(column)
        yield ""
    if len(sets) > 1:
        yield from _ranks(results, sets)
        yield ""
    yield from _protocols(results)


def _fewer_labels(column: "Sequence[Judged]") -> Iterator[str]:
    """A line if a number of labels was asked for that the train images do not have."""
    asked = {
        int(judgement.key.split("-")[1]): judgement.more["labels"]
        for judged in column
        for judgement in judged.judgements
        if judgement.key.startswith("labels-")
    }
    fewer = [count for count, used in sorted(asked.items()) if used < count]
    if fewer:
        yield (
            f"--labels {' '.join(map(str, fewer))}: only {len(column[0].examined.train):,} train "
            "images have labels, and all were used"
        )


def sizes(subject: "Subject") -> str:
    """A line with the image size at which an encoder is judged, and the size of its training."""
    assert subject.encoder is not None
    own = subject.encoder.encoder_config.image_size
    other = "its own size" if own == subject.size else f"trained at {own}"
    return f"{subject.title}: images at {subject.size} x {subject.size} pixels, {other}"


def _protocols(results: "Sequence[Sequence[Judged]]") -> Iterator[str]:
    """A line with the settings of each protocol; if they differ between encoders, a line for each
    setting, with the encoders' names."""
    found: dict[str, dict[str, list[str]]] = {}
    for judged in results:
        for judgement in judged[0].judgements:
            titles = found.setdefault(judgement.key, {}).setdefault(judgement.protocol, [])
            titles.append(judged[0].subject.title)
    for key, by_protocol in found.items():
        for protocol, titles in by_protocol.items():
            whose = f", {', '.join(titles)}" if len(by_protocol) > 1 else ""
            yield f"{key}{whose}: {protocol}"


def _table(column: "Sequence[Judged]") -> Iterator[str]:
    """A row for each encoder, a column for each protocol by which any of them was judged."""
    from selfray.probes.judgement import is_uneven

    uneven = is_uneven(column[0].examined.test)
    by_key = [{judgement.key: judgement for judgement in j.judgements} for j in column]
    first_of = {key: found[key] for found in reversed(by_key) for key in found}
    keys = dict.fromkeys(judgement.key for judged in column for judgement in judged.judgements)
    heads, rows = [], [[] for _ in column]
    for key in keys:
        heads.append(_head(first_of[key]))
        for row, found in zip(rows, by_key, strict=True):
            row.append(_shown(found[key]) if key in found else "")
        if uneven and "balanced" in first_of[key].more:
            heads.append("balanced")
            for row, found in zip(rows, by_key, strict=True):
                row.append(f"{100 * found[key].more['balanced']:.1f}" if key in found else "")
    rows = [[*row, f"{judged.seconds:.1f}"] for row, judged in zip(rows, column, strict=True)]
    heads.append("seconds")
    titles = [judged.subject.title for judged in column]
    columns = [
        [f"  {cell:>{max(map(len, cells))}}" for cell in cells]
        for cells in ([head, *(row[place] for row in rows)] for place, head in enumerate(heads))
    ]
    yield from _in_blocks(["", *titles], columns)
    several = any(len(judgement.scores) > 1 for judgement in first_of.values())
    yield (
        "in %, with 95 % intervals over test images"
        + (", and over subsets where the labels are few" if several else "")
    )


def _in_blocks(titles: Sequence[str], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, one block of lines below the other where it is wider than WIDEST."""
    first = max(map(len, titles))
    blocks: list[list[Sequence[str]]] = [[]]
    for column in columns:
        width = first + sum(len(other[0]) for other in blocks[-1]) + len(column[0])
        if blocks[-1] and width > WIDEST:
            blocks.append([])
        blocks[-1].append(column)
    for block in blocks:
        if block is not blocks[0]:
            yield ""
        for title, *cells in zip(titles, *block, strict=True):
            line = f"{title:{first}}{''.join(cells)}".rstrip()
            if "".join(cells).strip():  # an encoder may have no figure in a block
                yield line


def label_efficiency_of(column: "Sequence[Judged]") -> Iterator[str]:
    """A line for each fine-tuned encoder: the largest number of labels with which it beats the same
    network from scratch."""
    scratch = {j.key: j for judged in column for j in judged.judgements if _is_scratch(judged, j)}
    for judged in column:
        gaps = [
            (judgement.more["labels"], judgement.against(scratch[judgement.key]))
            for judgement in judged.judgements
            if judgement.key in scratch
            and "labels" in judgement.more
            and not _is_scratch(judged, judgement)
        ]
        if not gaps:
            continue
        better = [(labels, gap) for labels, gap in sorted(gaps) if gap.low > 0]
        worse = [labels for labels, gap in gaps if gap.high < 0]
        if better:
            labels, gap = better[-1]
            text = (
                f"pretraining pays up to {labels:,.0f} of the tried numbers of labels, there by "
                f"{100 * gap.value:.1f} points [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
            )
        else:
            text = "these images show no gain of pretraining over training from scratch"
        if worse:
            text += f"; from scratch is better at {', '.join(f'{n:,.0f}' for n in sorted(worse))}"
        yield f"{judged.subject.title}, fine-tuned: {text}"


def _is_scratch(judged: "Judged", judgement: "Judgement") -> bool:
    return judgement.key.endswith("-finetune") and "from_scratch True" in judgement.protocol


def _head(judgement: "Judgement") -> str:
    return (
        judgement.key if judgement.metric == "accuracy" else f"{judgement.key} {judgement.metric}"
    )


def _shown(judgement: "Judgement") -> str:
    value, low, high = judgement.interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _ranks(results: "Sequence[Sequence[Judged]]", sets: "Sequence[Labelled]") -> Iterator[str]:
    """Lines with each encoder's mean rank over data sets, one line for each protocol."""
    from selfray.probes.judgement import mean_ranks

    yield f"mean rank over {', '.join(data.name for data in sets)} (1 is the best)"
    by_key: dict[str, dict[str, list[float]]] = {}
    for judged in results:
        for found in judged:
            for judgement in found.judgements:
                values = by_key.setdefault(judgement.key, {})
                values.setdefault(found.subject.title, []).append(judgement.interval.value)
    for key, values in by_key.items():
        ranks = sorted(mean_ranks(values).items(), key=lambda item: item[1])
        yield f"{key}: " + ", ".join(f"{title} {rank:.1f}" for title, rank in ranks)


def metrics_of(judged: "Judged", scratch: "Judged | None" = None) -> dict[str, float]:
    """MLflow metric names -> values: eval/<data>/<protocol> is the protocol's main figure,
    eval/<data>/<protocol>/<name> its other figures, and eval/<data>/<protocol>-from-scratch the
    figure of `scratch`, the same network trained from scratch."""
    found = {}
    for key, judgement in _logged(judged, scratch):
        prefix = f"{EVALUATION}{judged.data.name}/{key}"
        for name, value in judgement.numbers().items():
            found[f"{prefix}/{name}" if name else prefix] = value
    return found


def tags_of(judged: "Judged", scratch: "Judged | None" = None) -> dict[str, str]:
    """MLflow tags: each protocol's version, its settings and the hyper-parameters that were chosen
    on held-out images."""
    return {
        f"eval.{judged.data.name}.{key}.protocol": (
            judgement.protocol + (f"; chosen: {dict(judgement.chosen)}" if judgement.chosen else "")
        )
        for key, judgement in _logged(judged, scratch)
    }


def _logged(judged: "Judged", scratch: "Judged | None") -> "Iterator[tuple[str, Judgement]]":
    """(protocol, as a metric's name may hold it; its judgement)"""
    for each, end in ((judged, ""), (scratch, SCRATCH)):
        for judgement in each.judgements if each is not None else ():
            # MLflow takes no % in a name.
            yield judgement.key.replace("%", "pct") + end, judgement


def as_json(
    results: "Sequence[Sequence[Judged]]",
    sets: "Sequence[Labelled]",
    chosen: "Sequence[DataConfig]",
) -> dict[str, Any]:
    """All figures, grouped by data set, then by encoder."""
    return {
        "data": [
            {
                "name": data.name,
                "path": config.path,
                "test": config.test_path,
                "train_images": len(results[0][place].examined.train),
                "test_images": len(results[0][place].examined.test),
                "classes": list(results[0][place].examined.names),
                "notes": list(results[0][place].examined.notes),
                "encoders": {
                    judged[place].subject.title: _encoder_json(judged[place]) for judged in results
                },
            }
            for place, (data, config) in enumerate(zip(sets, chosen, strict=True))
        ]
    }


def _encoder_json(judged: "Judged") -> dict[str, Any]:
    from selfray.probes.judgement import accuracy_by_class

    names = judged.examined.names
    found = {}
    for judgement in judged.judgements:
        value, low, high = judgement.interval
        entry = {
            "metric": judgement.metric,
            "value": value,
            "low": low,
            "high": high,
            **judgement.more,
            "chosen": dict(judgement.chosen),
            "protocol": judgement.protocol,
            "seconds": judgement.seconds,
        }
        if judgement.predicted is not None:
            by_class = accuracy_by_class(judgement.predicted, judged.examined.test)
            entry["by_class"] = {
                names[c] if c < len(names) else f"unknown to train, {c}": share
                for c, share in by_class.items()
            }
        found[judgement.key] = entry
    return {"seconds": judged.seconds, "image_size": judged.subject.size, "protocols": found}


def pictures_of(judged: "Judged", scratch: "Judged | None" = None) -> "dict[str, Image]":
    """File name -> picture: the confusion matrix of the best classifier and the label-efficiency
    curve, each if there is one. The curve has also that of `scratch`, if given."""
    from selfray.probes.judgement import confusion
    from selfray.report.evaluation_charts import confusion_matrix

    found = {}
    named = [j for j in judged.judgements if j.predicted is not None]
    if named:
        best = max(named, key=lambda judgement: judgement.interval.value)
        assert best.predicted is not None
        examined = judged.examined
        counts = confusion(best.predicted, examined.test, examined.classes)
        title = f"{judged.subject.title} on {judged.data.name}, {best.key}"
        found["confusion.png"] = confusion_matrix(counts, examined.names, title)
    return found | label_curves([judged] if scratch is None else [judged, scratch])


def label_curves(column: "Sequence[Judged]") -> "dict[str, Image]":
    """The label-efficiency curves of some encoders on one data set; empty without --labels."""
    from selfray.report.evaluation_charts import label_efficiency

    curves = {}
    for judged in column:
        by_learner: dict[str, list[tuple[float, ...]]] = {}
        for judgement in judged.judgements:
            if "labels" in judgement.more:
                learner = "fine-tuned" if judgement.key.endswith("-finetune") else "logistic"
                point = (judgement.more["labels"], *judgement.interval)
                by_learner.setdefault(learner, []).append(point)
        for learner, points in by_learner.items():
            title = f"{judged.subject.title}, {learner}"
            if len(points) > 1:
                curves[judged.subject.title if len(by_learner) == 1 else title] = points
    if not curves:
        return {}
    title = f"Accuracy by the number of labels, {column[0].data.name}"
    return {"labels.png": label_efficiency(curves, title)}
