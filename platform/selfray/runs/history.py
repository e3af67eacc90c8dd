"""The curves of a run, as they are stored in run.json and drawn in its pictures."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class History:
    """The curves of a run against images seen: (images, value) pairs."""

    loss: list[tuple[float, float]] = field(default_factory=list)
    knn: list[tuple[float, float]] = field(default_factory=list)
    linear: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, list[list[float]]]) -> "History":
        """Restore from JSON, where pairs have become lists."""
        return cls(**{name: [(x, y) for x, y in points] for name, points in value.items()})
