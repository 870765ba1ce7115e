"""Format names and numbers for the page."""

import math
import re

__all__ = ["DASH", "clean", "duration", "natural", "number", "shorten"]

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

# Control characters, overrides of the writing direction and lone surrogates (which no UTF-8 file can hold).
_CONTROL = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029], " ")
_DIRECTION = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "")
_SURROGATE = dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
_UNPRINTABLE = _CONTROL | _DIRECTION | _SURROGATE


def clean(text: str) -> str:
    r"""Remove characters that cannot be shown, or that would change how other text is shown.

    Examples
    --------
    >>> clean("T\x1b[31m cell\n")
    'T [31m cell'
    """
    return " ".join(text.translate(_UNPRINTABLE).split())


def shorten(text: str, width: int = 40) -> str:
    """Cut the middle out of a long name; its two ends usually distinguish it from others.

    Examples
    --------
    >>> shorten("CD4-positive, alpha-beta memory T cell", width=21)
    'CD4-positi…ory T cell'
    """
    text = clean(text)
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:]}"


def natural(name: str) -> list[str | int]:
    """Return a sort key that puts ``"C10"`` after ``"C9"``.

    Examples
    --------
    >>> sorted(["C10", "C9"], key=natural)
    ['C9', 'C10']
    """
    # Every other part is a number, of at most 18 digits, because Python does not parse numbers of thousands of digits.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name))]


def number(value: float | None, *, whole: bool = False) -> str:
    """Format a number with about four digits (``whole``: no fraction), commas between thousands, and a dash for None.

    Examples
    --------
    >>> [number(value) for value in (-1234.56, 1234567, 0.01234, 1.0, None)]
    ['−1,234.6', '1,234,567', '0.0123', '1', '–']
    """
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    if whole:
        value = round(value)
    size = abs(value)
    if value == round(value) and size < 1e15:
        text = f"{round(value):,d}"
    elif size >= 1e12 or size < 1e-3:
        text = f"{value:.2e}"
    elif size >= 100:
        text = f"{value:,.0f}" if size >= 1e4 else f"{value:,.1f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Format a time span.

    Examples
    --------
    >>> [duration(seconds) for seconds in (2.345, 75.2, 7384, None)]
    ['2.35 s', '1 min 15 s', '2 h 3 min', '–']
    """
    if seconds is None or not 60 <= seconds < math.inf:
        return f"{number(seconds)} s" if seconds is not None else DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"
