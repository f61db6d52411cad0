"""Numbers as a reader wants them: four digits at most, thousands apart, with their unit."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"
SPELLED = {"us": "\N{MICRO SIGN}s"}
"""Units whose name in the records is plain ASCII."""


def number(value: float) -> str:
    """31.42, 0.00271, 24,897: rounded to a whole number from 1,000 on, to four significant digits below."""
    size = abs(value)
    if size >= 1000 or value == int(value):
        text = f"{size:,.0f}"
    else:
        digits = 3 - math.floor(math.log10(size))
        text = f"{size:,.{max(0, min(digits, 12))}f}"
    return f"{MINUS}{text}" if value < 0 and text.strip("0.,") else text


def quantity(value: float, unit: str) -> str:
    """The number with its unit, which no line break divides."""
    return f"{number(value)}{SPACE}{SPELLED.get(unit, unit)}"


def percent(share: float) -> str:
    """+3.1 %: 0.031, with its sign and one decimal."""
    text = f"{abs(share) * 100:,.1f}"
    sign = "" if text == "0.0" else "+" if share > 0 else MINUS
    return f"{sign}{text}{SPACE}%"
