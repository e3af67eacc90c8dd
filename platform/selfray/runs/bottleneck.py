"""One sentence that says what slowed a run down, and what to change."""

import math

WORTH_SAYING = 0.1
"""Below this share of waiting, more CPUs would hardly help."""


def bottleneck(
    waited: float,
    images_per_second: float,
    data_cpus: float | None = None,
    gpu_could_colour: bool = False,
) -> str:
    """One sentence about the bottleneck of a run.

    If trainers wait, the data tasks run at full speed. Without waiting, trainers would take
    images_per_second / (1 - waited), and the data tasks' speed grows with their CPUs.

    Args:
        waited: mean share of a step spent waiting for data, in [0, 1).
        images_per_second: measured speed of training.
        data_cpus: CPUs for data; None, unknown, gives a factor instead of a number.
        gpu_could_colour: the trainers have GPUs, and data tasks do the photometric operations.
    """
    if waited < WORTH_SAYING:
        return f"trainers waited {waited:.0%} for data: their own compute is the limit"
    factor = 1 / (1 - min(waited, 0.99))
    if data_cpus is None:
        cure = f"give the data {factor:.1f} times the CPUs (--data-cpus, or CPU nodes)"
    else:
        more = math.ceil(data_cpus * (factor - 1) - 1e-9)
        cure = (
            f"add {more} CPU{'s' if more > 1 else ''} for data (--data-cpus {data_cpus + more:g}, "
            "or CPU nodes)"
        )
    if gpu_could_colour:
        cure += ", or set --data.photometric device"
    return (
        f"trainers waited {waited:.0%} for data and could take "
        f"{images_per_second * factor:,.0f} images/s: {cure}"
    )
