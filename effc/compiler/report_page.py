"""What the HTML pages have in common: their templates, how they are written, and figures with units."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from effc.errors import OutputError


def write_page(path: Path, text: str, what: str) -> None:
    """Write ``text``, replacing what is there only once all of it is written.

    Args:
        what: it is, for the message.

    Raises:
        OutputError: if ``path`` cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"The {what} '{path}' cannot be written: {error.strerror or error}.",
            "Check that its directory exists, is writable and has space left.",
        ) from None


def page(template: str) -> Template:
    """A template of this package, with the figures below as its filters."""
    environment = Environment(
        loader=PackageLoader("effc", "compiler"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, milliseconds, seconds, size, times, cosine, percent, label, memory)
    environment.filters.update({filter_.__name__: filter_ for filter_ in filters})
    return environment.get_template(template)


def number(value: Any, digits: int = 3) -> str:
    """A figure with ``digits`` significant digits, without exponents where a person would write none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(value: float) -> str:
    """``12.3 ms``, ``4.56 s``."""
    return f"{fixed(value)} ms" if value < 10_000 else f"{fixed(value / 1000)} s"


def seconds(value: float) -> str:
    """``340 ms``, ``12.3 s``, ``2 min 05 s``."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def size(value: float) -> str:
    """Bytes in decimal units, as file managers and disks count."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{fixed(value)} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def memory(mebibytes: float) -> str:
    """``348 MiB``, ``1.20 GiB``: binary units, as memory is sold and as the figure beside it is drawn."""
    return f"{mebibytes:,.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:,.2f} GiB"


def times(value: float) -> str:
    """A ratio, ``4.21×``; never rounded up to 1 from below."""
    if 0.995 <= value < 1:
        return f"{math.floor(value * 1000) / 1000:.3f}×"
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def cosine(value: float) -> str:
    """Four decimals, or as many as tell it from 1."""
    if not math.isfinite(value):
        return number(value)
    return f"{value:.4f}" if 1 - value > 1e-4 or value >= 1 else f"{min(value, 1 - 1e-7):.7f}"


def percent(value: float | None) -> str:
    """A share of 1 as a percentage."""
    if value is None:
        return "–"
    return f"{value:.1%}" if math.isfinite(value) else number(value)


def label(key: Any) -> str:
    """A key of a record as a person would write it: ``memory_gib`` becomes ``memory GiB``."""
    spelled = {"cpu": "CPU", "cpus": "CPUs", "gib": "GiB", "mib": "MiB", "isa": "ISA", "gpu": "GPU"}
    return " ".join(spelled.get(word, word) for word in str(key).split("_"))


def fixed(value: float) -> str:
    """Three significant digits, trailing zeros kept, so that columns line up."""
    if not math.isfinite(value) or value == 0:
        return number(value)
    return f"{value:,.{min(6, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"
