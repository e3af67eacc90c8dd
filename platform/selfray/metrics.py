"""The metrics of a run: the name of each, its unit, and whether higher is better.

This is the only such table. A new probe needs its own file and one row here.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    """The short name for heads of tables, such as kNN."""
    title: str
    """The long name for axes, such as kNN accuracy."""
    unit: str = ""
    """Such as images/s; empty for a plain number; % for shares, which include accuracies."""
    sign: Literal[1, 0, -1] = 0
    """1 if higher is better, -1 if lower is better, 0 if runs are not ranked by it."""
    is_accuracy: bool = False
    """Whether it lies in 0..1 and needs labels."""
    is_summary: bool = False
    """Whether its curve is fetched, by one request, for a run that exists only in MLflow."""

    @property
    def is_share(self) -> bool:
        return self.unit == "%"

    def shown(self, value: float) -> str:
        """A value as text for a person: 97.5% for a share, else 12.3."""
        return f"{value:.1%}" if self.is_share else f"{value:.3g}"

    def shown_difference(self, value: float) -> str:
        return f"{100 * value:.1f} points" if self.is_share else f"{value:.2g}"


PROBE = "probe/"
"""Prefix of the probes' names in a run's metrics."""
LOSS = "loss"
RATE = "throughput/images_per_second"

PROBES = {
    "knn": Metric("kNN", "kNN accuracy", "%", 1, is_accuracy=True, is_summary=True),
    "linear": Metric(
        "linear", "linear probe's accuracy", "%", 1, is_accuracy=True, is_summary=True
    ),
    "rankme": Metric("RankMe", "RankMe", "dimensions", 1, is_summary=True),
    "uniformity": Metric("uniformity", "uniformity (lower is better)", "", -1),
    "alignment": Metric("alignment", "alignment (lower is better)", "", -1),
}
"""The figures of a probe, by which runs can be ranked. The loss is not among them: losses are not
comparable between temperatures or mask ratios."""

EVALUATION = "eval/"
"""Before <data>/<protocol> in the metrics that `selfray evaluate` logs."""

SCRATCH = "-from-scratch"
"""After the protocol in the metrics of the same network trained from scratch, which are logged to
the encoder's run."""
LOW, HIGH = "/low", "/high"
"""After the protocol in the ends of its 95 % interval."""

_SHARES: dict[str, Any] = {"unit": "%", "sign": 1, "is_accuracy": True}
EVALUATIONS = {
    "knn": Metric("kNN", "kNN accuracy, k chosen", **_SHARES),
    "linear": Metric("linear", "linear probe's accuracy", **_SHARES),
    "linear-paper": Metric("linear-paper", "accuracy of the papers' linear evaluation", **_SHARES),
    "logistic": Metric("logistic", "logistic regression's accuracy", **_SHARES),
    "retrieval": Metric("mAP", "retrieval's mAP", **_SHARES),
    "finetune": Metric("fine-tuned", "accuracy after fine-tuning", **_SHARES),
    "low-shot": Metric("low-shot", "accuracy with few labels", **_SHARES),
    "labels": Metric("few labels", "accuracy with few labels", **_SHARES),
    "attention": Metric("attention", "attention's Jaccard index", **_SHARES),
    "patches": Metric("patches", "patch tokens' mIoU", **_SHARES),
}
"""What `selfray evaluate` measures, by the protocol's first words."""

METRICS = {
    LOSS: Metric("loss", "loss", is_summary=True),
    "epoch": Metric("epoch", "epoch"),
    "learning_rate": Metric("learning rate", "learning rate"),
    "gradient_norm": Metric("gradient norm", "norm of the gradient"),
    **{f"{PROBE}{name}": metric for name, metric in PROBES.items()},
    "health/feature_std": Metric("spread", "spread of the features (1 fills the sphere)"),
    "health/effective_rank": Metric("rank", "effective rank of a batch", "dimensions"),
    RATE: Metric("images/s", "speed", "images/s", is_summary=True),
    "throughput/data_wait_seconds": Metric("data wait", "wait for data in each step", "s"),
    "throughput/data_wait_fraction": Metric(
        "data wait", "share of the time that waited for data", "%"
    ),
}
"""Metrics by their names in a run's spool and in MLflow. A method's own metrics are not listed:
they are plain numbers under their own names."""

ACCURACIES = tuple(name for name, metric in PROBES.items() if metric.is_accuracy)
SUMMARY = tuple(name for name, metric in METRICS.items() if metric.is_summary)

if TYPE_CHECKING:
    ProbeName = str
else:  # the command line reads a flag's choices from its annotation
    ProbeName = Literal[tuple(PROBES)]


def evaluation(name: str) -> Metric | None:
    """The row of EVALUATIONS for a metric such as `eval/digits/low-shot-1pct-finetune`; None for
    other metrics, and for secondary figures such as the ends of an interval."""
    parts = name.split("/")
    if len(parts) != 3 or f"{parts[0]}/" != EVALUATION:
        return None
    _, data, key = parts
    is_scratch = key.endswith(SCRATCH)
    key = key.removesuffix(SCRATCH)
    known = max(
        (k for k in EVALUATIONS if key == k or key.startswith(f"{k}-")), key=len, default=""
    )
    if not known:
        return None
    metric = EVALUATIONS[known]
    rest = key[len(known) + 1 :].replace("pct", " %").replace("-", ", ")
    end = f"{f' {rest}' if rest else ''}{', from scratch' if is_scratch else ''}"
    return replace(metric, name=f"{data}: {metric.name}{end}", title=f"{data}: {metric.title}{end}")


def is_end(name: str) -> bool:
    """Whether a metric is an end of the interval of a figure that `evaluation` knows."""
    figure = name.removesuffix(LOW).removesuffix(HIGH)
    return figure != name and evaluation(figure) is not None


def probe_name(probe: str) -> str:
    """A probe's name as shown to a person, such as kNN."""
    return PROBES[probe].name if probe in PROBES else probe
