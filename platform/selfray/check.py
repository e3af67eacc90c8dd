"""Checks of values that a user gives: each raises ValueError that names the field."""

import math


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of the choices.

    The command line checks its own choices; this check is for recipes and files.
    """
    require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_number(
    name: str,
    value: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ValueError unless a number is finite and inside its bounds.

    Args:
        name: the field, as a user writes it.
        least, most: bounds that the number may equal.
        above, below: bounds that it may not equal.
    """
    low = f"({above:g}" if above is not None else f"[{least:g}" if least > -math.inf else "(-inf"
    high = f"{below:g})" if below is not None else f"{most:g}]" if most < math.inf else "inf)"
    inside = (
        is_finite(value)
        and least <= value <= most
        and (above is None or value > above)
        and (below is None or value < below)
    )
    require(inside, f"{name} must be a number in {low}, {high}, got {value}")


def is_finite(value: float) -> bool:
    """Whether a number is finite and within the range of floats."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False


def named_amounts(field_name: str, text: str) -> dict[str, float]:
    """Parse `trainer=1,disk=0.5` into a dict of names and positive amounts.

    Raises ValueError that names the field.
    """
    amounts = {}
    for part in filter(None, text.split(",")):
        name, _, amount = part.rpartition("=")
        try:
            amounts[name.strip()] = float(amount)
        except ValueError:
            amounts[""] = 0.0
    require(
        all(name and 0 < amount < math.inf for name, amount in amounts.items()),
        f"{field_name} must be names with amounts such as trainer=1, got {text}",
    )
    return amounts
