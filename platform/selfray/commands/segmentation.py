"""`selfray evaluate --by segmentation`: compares attention and patch tokens with masks."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfray.commands.evaluation_text import sizes
from selfray.commands.labelled import data_name, devices_of, slug
from selfray.commands.subjects import open_subjects
from selfray.storage import Location

if TYPE_CHECKING:
    from selfray.cluster.segmentation import Segmented
    from selfray.commands.evaluate import Evaluate
    from selfray.commands.subjects import Named
    from selfray.console import Console


def judge_segmentation(command: "Evaluate", masks: str, console: "Console") -> int:
    """Judge the command's encoders on images with masks: print a table, write pictures and JSON,
    and log the figures to MLflow. Returns the exit code."""
    from selfray.cluster import runtime
    from selfray.cluster.endings import root_cause
    from selfray.probes.segmentation import pairs_of, require_attention

    named = open_subjects(command.encoders, command.image_size, command.tracking, console)
    for each in named:
        assert each.subject.encoder is not None
        require_attention(each.subject.encoder.encoder_config, each.subject.title)
    folder = Location.of(command.data[0])
    pairs = pairs_of(folder, Location.of(masks))[: command.test_limit]
    console.live("starting Ray")
    with runtime.session():
        from selfray.cluster.segmentation import segmented

        devices = devices_of(command.device_gpus)
        try:
            found = [segmented(each.subject, pairs, console, devices) for each in named]
        except Exception as error:
            raise root_cause(error) from error
    name = data_name(command.data[0])
    for line in _report(found, name):
        console.say(line)
    if command.json is not None:
        Location.of(command.json).write_json(_as_json(found, name))
        console.say(f"written to {Location.of(command.json)}")
    pictures = Location.of(command.pictures or (named[0].output / "evaluation").uri)
    pictures.make_folder()
    for each in found:
        data = io.BytesIO()
        _picture(each, name).save(data, format="PNG")
        file = pictures / f"{name}-{slug(each.subject.title)}-segmentation.png"
        file.write_bytes(data.getvalue())
        console.say(f"picture: {file}")
    if not command.no_track:
        _track(command, named, found, name, console)
    return 0


def _report(found: "Sequence[Segmented]", name: str) -> list[str]:
    from selfray.probes.judgement import verdicts

    lines = [
        f"{name}: {found[0].images:,} images with masks, {found[0].classes} classes; mIoU is "
        "measured on the half that the classifier did not see",
        *(sizes(each.subject) for each in found),
        "",
    ]
    first = max(len(each.subject.title) for each in found)
    lines.append(f"{'':{first}}  attention Jaccard  mean of heads       patches mIoU  pixels")
    for each in found:
        attention, patches = each.judgements
        (value, low, high), (miou, least, most) = attention.interval, patches.interval
        lines.append(
            f"{each.subject.title:{first}}  "
            f"{f'{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]':>17}  "
            f"{100 * attention.more['mean_of_heads']:13.1f}  "
            f"{f'{100 * miou:.1f} [{100 * least:.1f}, {100 * most:.1f}]':>17}  "
            f"{each.subject.size:6}"
        )
    lines += ["in %, with 95 % intervals over images", ""]
    judgements = {each.subject.title: each.judgements for each in found}
    lines += [*verdicts(judgements, found[0].images), ""]
    lines += [f"{each.key}: {each.protocol}" for each in found[0].judgements]
    return lines


def _numbers(each: "Segmented", name: str) -> dict[str, float]:
    return {
        f"eval/{name}/{judgement.key}{'/' if key else ''}{key}": value
        for judgement in each.judgements
        for key, value in judgement.numbers().items()
    }


def _as_json(found: "Sequence[Segmented]", name: str) -> dict[str, Any]:
    return {
        "data": name,
        "images": found[0].images,
        "encoders": {
            each.subject.title: {
                judgement.key: {
                    "metric": judgement.metric,
                    "value": judgement.interval.value,
                    "low": judgement.interval.low,
                    "high": judgement.interval.high,
                    **judgement.more,
                    "chosen": dict(judgement.chosen),
                    "protocol": judgement.protocol,
                }
                for judgement in each.judgements
            }
            for each in found
        },
    }


def _picture(each: "Segmented", name: str) -> Any:
    from selfray.report.sheets import segmentation

    title = f"{each.subject.title} on {name}"
    return segmentation(each.views, each.heads, each.colours, title)


def _track(
    command: "Evaluate",
    named: "Sequence[Named]",
    found: "Sequence[Segmented]",
    name: str,
    console: "Console",
) -> None:
    from selfray.cluster.after_run import log_to_run

    for each, judged in zip(named, found, strict=True):
        if each.run is None or each.checkpoint is None:
            continue
        tags = {f"eval.{name}.{j.key}.protocol": j.protocol for j in judged.judgements}
        pictures = {f"eval/{name}/segmentation.png": _picture(judged, name)}
        seen, values = each.checkpoint.images_seen, _numbers(judged, name)
        log_to_run(each.run, seen, values, tags, command.tracking, console, pictures)
