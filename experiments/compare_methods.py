"""Trains every method on handwritten digits and compares their encoders in a table and a figure.

All `...-digits` recipes run through the whole platform in one Ray session, one after the other.
Each encoder is judged by the probe that suits the method (`MethodConfig.judged_by`) and compared
with raw pixels and with the same encoder untrained, since untrained encoders differ in accuracy.

    python experiments/compare_methods.py             # writes its results to runs/compare
    python experiments/compare_methods.py --only simclr-digits mae-digits --epochs 2
    python experiments/compare_methods.py --skip dino-digits --seeds 3

A failed run is shown with its cause and does not stop the others. The same command, given again,
resumes.
The second command takes 131 s on two busy CPU cores: SimCLR 59.3 -> 67.0 % by kNN, MAE 85.9 ->
90.6 % by the linear probe.
"""

import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from selfray.cluster import runtime
from selfray.commands.script import one_line_errors, with_console
from selfray.console import Console
from selfray.metrics import ACCURACIES

if TYPE_CHECKING:
    from selfray.cluster.launch import RunResult
    from selfray.experiment import Experiment
    from selfray.probes.features import ProbeResult

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer-digits"
"""Trained first, since BEiT predicts its tokens. It yields no encoder and has no row in the table.
"""


@dataclass(frozen=True)
class Comparison:
    """Pretrain with every method on handwritten digits and compare their encoders."""

    only: tuple[str, ...] = ()
    """Recipes to run; by default all."""
    skip: tuple[str, ...] = ()
    """Recipes to leave out."""
    seeds: int = 1
    """Runs of each recipe, with seeds 0, 1, ...; the table shows their means."""
    epochs: int | None = None
    """Epochs of each run; None keeps each recipe's own."""
    output: str = "runs"
    """Folder of all output."""


def main() -> int:
    started = time.time()
    settings = tyro.cli(Comparison, description=__doc__)
    folder = Path(settings.output).expanduser().absolute() / "compare"
    ray = runtime.Starting()  # Ray's processes start while torch is imported
    try:
        return with_console(
            folder, lambda console: compare(settings, folder, console, ray, started)
        )
    finally:
        ray.stop()


def compare(
    settings: Comparison, folder: Path, console: Console, ray: runtime.Starting, started: float
) -> int:
    from selfray.cluster.launch import baseline
    from selfray.recipes import digits

    recipes = choose(digits.RECIPES, settings)
    names = ", ".join(name.removesuffix("-digits") for name in recipes)
    console.say(f"selfray: {names} on 1,797 handwritten digits, labels unseen")
    with ray.session(console.say):
        outcomes = run_all(recipes, settings.seeds, console)
        judged = [recipe for name, recipe in recipes.items() if name != TOKENIZER]
        pixels = baseline(judged[0], console) if judged else None
    table = rows(outcomes)
    write(table, pixels, folder)
    show(console, table, pixels, folder, time.time() - started)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


# Which runs


def choose(recipes: "Mapping[str, Experiment]", settings: Comparison) -> "dict[str, Experiment]":
    """The recipes to run, with the tokenizer first if one of them needs it. ValueError for an
    unknown name."""
    if settings.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {settings.seeds}")
    for name in (*settings.only, *settings.skip):
        if name not in recipes:
            raise ValueError(f"there is no recipe {name!r}; there are {', '.join(recipes)}")
    names = [name for name in settings.only or recipes if name not in settings.skip]
    if any(needs_tokenizer(recipes[name]) for name in names) and TOKENIZER not in settings.skip:
        names.append(TOKENIZER)
    if not names:
        raise ValueError("--skip leaves no recipe to run")
    ordered = sorted(dict.fromkeys(names), key=lambda name: name != TOKENIZER)
    changes: dict[str, Any] = {"output": settings.output}
    if settings.epochs is not None:
        changes["epochs"] = settings.epochs
    return {name: replace(with_fast_precision(recipes[name]), **changes) for name in ordered}


def with_fast_precision(recipe: "Experiment") -> "Experiment":
    """The recipe with bf16 if it trains a ResNet and the CPU has bf16 instructions, as in the
    quickstart, so that the two scripts share runs."""
    from quickstart import fast_precision

    return replace(recipe, precision=fast_precision()) if recipe.encoder.is_resnet else recipe


def needs_tokenizer(experiment: "Experiment") -> bool:
    """Whether the method predicts a tokenizer's tokens and its recipe names no tokenizer."""
    method = experiment.method
    # By field, not by type, so that this script need not know every method.
    return any(f.name == "tokenizer" and getattr(method, f.name) == "" for f in fields(method))


# The runs


@dataclass(frozen=True)
class Outcome:
    """The result or the failure of one run."""

    recipe: str
    experiment: "Experiment"
    result: "RunResult | None"
    failure: str | None
    """The cause in one line, if there is no result."""


def run_all(recipes: "Mapping[str, Experiment]", seeds: int, console: Console) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for seed in range(seeds):
        tokenizer: str | None = None
        for number, (name, recipe) in enumerate(recipes.items(), start=1):
            console.say()
            console.say(f"[{seed * len(recipes) + number} of {seeds * len(recipes)}] {name}")
            outcome = run_one(name, replace(recipe, seed=seed), tokenizer, console)
            if name == TOKENIZER and outcome.result is not None:
                tokenizer = outcome.result.folder
            if outcome.failure is not None:
                console.say(f"{name} failed: {outcome.failure}")
            outcomes.append(outcome)
    return outcomes


def run_one(
    name: str, experiment: "Experiment", tokenizer: str | None, console: Console
) -> Outcome:
    """Run a recipe. A failure is returned as an outcome; an interruption is raised."""
    from selfray import config
    from selfray.cluster.endings import RunFailed
    from selfray.cluster.launch import launch

    try:
        if needs_tokenizer(experiment):
            if tokenizer is None:
                raise ValueError(f"{name} needs the run of {TOKENIZER}, which failed or is skipped")
            experiment = config.override(experiment, **{"method.tokenizer": tokenizer})
        return Outcome(name, experiment, launch(experiment, console), None)
    except (RunFailed, ValueError, OSError) as error:
        log.exception("%s", name)
        return Outcome(name, experiment, None, str(error))


# The table


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each recipe except the tokenizer's: means over seeds, accuracies in 0..1."""
    table = []
    for name in dict.fromkeys(outcome.recipe for outcome in outcomes):
        if name == TOKENIZER:
            continue
        of_recipe = [outcome for outcome in outcomes if outcome.recipe == name]
        judged_by = of_recipe[0].experiment.method.judged_by
        failures = [outcome.failure for outcome in of_recipe if outcome.failure is not None]
        line: dict[str, Any] = {
            "method": name.removesuffix("-digits"),
            "judged_by": judged_by,
            "failure": failures[0] if failures else None,
            "runs": [],
        }
        for outcome in of_recipe:
            result = outcome.result
            if result is None or 0 not in result.probes or result.final_probe is None:
                continue
            batch_size = outcome.experiment.batch_size
            line["runs"].append(
                {
                    "seed": outcome.experiment.seed,
                    "folder": result.folder,
                    "untrained": asdict(result.probes[0]),
                    "pretrained": asdict(result.final_probe),
                    "steps_per_second": result.images_per_second / batch_size,
                    "seconds": result.seconds,
                }
            )
        if line["runs"]:
            for when in ("untrained", "pretrained"):
                line[when] = {probe: _mean(line["runs"], when, probe) for probe in ACCURACIES}
            line["margin"] = line["pretrained"][judged_by] - line["untrained"][judged_by]
            for name in ("steps_per_second", "seconds"):
                line[name] = statistics.mean(run[name] for run in line["runs"])
        elif line["failure"] is None:
            line["failure"] = "the encoder was not probed: give the recipe probe.times"
        table.append(line)
    return table


def _mean(runs: list[dict[str, Any]], when: str, probe: str) -> float:
    return statistics.mean(run[when][probe] for run in runs)


def write(table: list[dict[str, Any]], pixels: "ProbeResult | None", folder: Path) -> None:
    """Write table.json, table.md and, if any run succeeded, comparison.png."""
    from selfray.report.charts import Compared, comparison

    baseline = pixels and asdict(pixels)
    text = json.dumps({"raw_pixels": baseline, "methods": table}, indent=1)
    (folder / "table.json").write_text(text)
    (folder / "table.md").write_text(markdown(table, pixels))
    ended = {
        line["method"]: Compared(line["untrained"], line["pretrained"], line["judged_by"])
        for line in table
        if line["runs"]
    }
    if ended and pixels is not None:
        both = {"knn": pixels.knn, "linear": pixels.linear}
        lines = {name: value for name, value in both.items() if value is not None}
        title = "Pretrained on handwritten digits without labels"
        comparison(ended, lines, title).save(folder / "comparison.png")


def markdown(table: list[dict[str, Any]], pixels: "ProbeResult | None") -> str:
    """The table as Markdown, with the accuracy by which a method is judged in bold."""
    lines = [
        "| method | kNN, untrained | kNN | linear, untrained | linear | margin | steps/s |",
        "|---|---|---|---|---|---|---|",
    ]
    if pixels is not None:
        lines.append(f"| raw pixels | | {pixels.knn:.1%} | | {pixels.linear:.1%} | | |")
    for line in table:
        if not line["runs"]:
            lines.append(f"| {line['method']} | failed: {line['failure']} | | | | | |")
            continue
        cells = [line["method"]]
        for probe in ACCURACIES:
            bold = "**" if probe == line["judged_by"] else ""
            cells += [
                f"{line['untrained'][probe]:.1%}",
                f"{bold}{line['pretrained'][probe]:.1%}{bold}",
            ]
        cells += [f"{100 * line['margin']:+.1f}", f"{line['steps_per_second']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(
    console: Console,
    table: list[dict[str, Any]],
    pixels: "ProbeResult | None",
    folder: Path,
    seconds: float,
) -> None:
    console.say()
    console.say(
        f"{'method':12}{'kNN':>9}{'untrained':>11}{'linear':>9}{'untrained':>11}{'margin':>9}"
        f"{'steps/s':>9}{'seconds':>9}"
    )
    if pixels is not None:
        console.say(f"{'raw pixels':12}{pixels.knn:8.1%} {'':11}{pixels.linear:8.1%}")
    for line in table:
        if not line["runs"]:
            console.say(f"{line['method']:12}  failed: {line['failure']}")
            continue
        numbers = ""
        for probe in ACCURACIES:
            mark = "*" if probe == line["judged_by"] else " "
            numbers += f"{line['pretrained'][probe]:8.1%}{mark}{line['untrained'][probe]:11.1%}"
        console.say(
            f"{line['method']:12}{numbers}{100 * line['margin']:+9.1f}"
            f"{line['steps_per_second']:9.1f}{line['seconds']:9.0f}"
        )
        if line["failure"] is not None:
            console.say(f"{'':12}  one of its seeds failed: {line['failure']}")
    console.say(
        "* the probe that judges the method; margin: percentage points above the untrained "
        f"encoder; {seconds:.0f} s in all"
    )
    console.say()
    console.say(f"figure    {folder / 'comparison.png'}")
    console.say(f"table     {folder / 'table.md'}")
    console.say(f"full log  {console.log}")


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
