"""The metrics of a run: what each is called, in which unit, and whether higher is better.

The only such table. A new probe is its own file and a row here.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    """In a table's head: kNN."""
    title: str
    """On an axis: kNN accuracy."""
    unit: str = ""
    """images/s, or empty for a plain number; shares, accuracies among them, are in %."""
    sign: Literal[1, 0, -1] = 0
    """1 where higher is better, -1 where lower is better, 0 where neither tells runs apart."""
    is_accuracy: bool = False
    """Whether it is in 0..1 and needs labels."""
    is_summary: bool = False
    """Whether a run that only MLflow knows is shown with its curve, which takes a request."""

    @property
    def is_share(self) -> bool:
        return self.unit == "%"

    def shown(self, value: float) -> str:
        """A value as a person reads it: 97.5%, or 12.3 of what is no share."""
        return f"{value:.1%}" if self.is_share else f"{value:.3g}"

    def shown_difference(self, value: float) -> str:
        return f"{100 * value:.1f} points" if self.is_share else f"{value:.2g}"


PROBE = "probe/"
"""Before the name of a probe's figure in a run's metrics."""
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
"""What a probe tells of an encoder, and what runs can be ranked by. No loss: it does not compare
across temperatures or mask ratios."""

EVALUATION = "eval/"
"""Before <data>/<protocol> in the metrics that `selfray evaluate` logs."""

_SHARES: dict[str, Any] = {"unit": "%", "sign": 1, "is_accuracy": True}
EVALUATIONS = {
    "knn": Metric("kNN", "kNN accuracy, k chosen", **_SHARES),
    "linear": Metric("linear", "linear probe's accuracy", **_SHARES),
    "linear-paper": Metric("linear-paper", "published linear evaluation's accuracy", **_SHARES),
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
"""By the name that a run's spool and MLflow have for it. A method's own metrics are not listed:
they are plain numbers under their own names."""

ACCURACIES = tuple(name for name, metric in PROBES.items() if metric.is_accuracy)
SUMMARY = tuple(name for name, metric in METRICS.items() if metric.is_summary)

if TYPE_CHECKING:
    ProbeName = str
else:  # a flag's choices are read from its annotation
    ProbeName = Literal[tuple(PROBES)]


def evaluation(name: str) -> Metric | None:
    """The row of a metric such as `eval/digits/low-shot-1pct-finetune`; None for other metrics and
    for what belongs to such a number, such as the ends of its interval."""
    parts = name.split("/")
    if len(parts) != 3 or f"{parts[0]}/" != EVALUATION:
        return None
    _, data, key = parts
    known = max(
        (k for k in EVALUATIONS if key == k or key.startswith(f"{k}-")), key=len, default=""
    )
    if not known:
        return None
    metric = EVALUATIONS[known]
    rest = key[len(known) + 1 :].replace("pct", " %").replace("-", ", ")
    head = f"{metric.name} {rest}".strip()
    return replace(metric, name=f"{data}: {head}", title=f"{data}: {metric.title} {rest}".strip())


def probe_name(probe: str) -> str:
    """A probe's name for a person: kNN."""
    return PROBES[probe].name if probe in PROBES else probe
