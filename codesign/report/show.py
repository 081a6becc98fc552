"""Values and text as a person reads them, and as a page or a spreadsheet can hold them safely."""

import json
import math
import re
from typing import Any

from codesign.results.record import MetricValue
from codesign.units import format_bytes

# Characters that a page would drop, reorder or choke on: C0 and C1 controls except tab and newline, bidirectional
# controls (they can make a log line read as another one), lone surrogates (no UTF-8 exists for them).
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What a spreadsheet takes for a formula at the start of a cell, the full-width forms included.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def visible(text: object) -> str:
    """`text` with characters that no page shows turned into escapes such as `\\x1b`."""
    plain = str(text).replace("\r\n", "\n")
    return _UNSEEN.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", plain)


def visible_deep(plain: Any) -> Any:
    """`visible` for every text inside plain data, keys included; whole numbers that no reader holds become text."""
    if isinstance(plain, int) and abs(plain) >= 2**63:
        return str(plain)
    if isinstance(plain, str):
        return visible(plain)
    if isinstance(plain, dict):
        return {visible(key): visible_deep(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [visible_deep(value) for value in plain]
    return plain


def script_json(plain: Any) -> str:
    """JSON that cannot end the `<script type="application/json">` element it stands in.

    Raises:
        ValueError: NaN or infinity.
    """
    text = json.dumps(plain, allow_nan=False, separators=(",", ":"))  # ASCII only: U+2028, U+2029 come out escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def spreadsheet_cell(value: object) -> object:
    """Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return "'" + text if text.lstrip(" ").startswith(_FORMULA) else text


def number(value: float) -> str:
    """Three significant figures, no exponent between 0.001 and a million: `1234` -> `1,234`, `0.05` -> `0.05`."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"  # an end of an interval; values themselves are always finite
    size = abs(value)
    if size == 0 or size >= 1e6 or size < 1e-3:
        return f"{value:.3g}"
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def signed(value: float) -> str:
    """`+0.031`, `−0.2`, `0`."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{number(abs(value))}"


def quantity(value: float, unit: str) -> str:
    """`(18400000, "bytes")` -> `17.5 MiB`; `(412.3, "tokens/s")` -> `412 tokens/s`."""
    if unit == "bytes":
        return format_bytes(value)
    return f"{number(value)} {visible(unit)}".strip()


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """`[401–420]`, or "" where the sample supports no interval."""
    if low is None or high is None:
        return ""
    shown = (format_bytes(low), format_bytes(high)) if unit == "bytes" else (number(low), number(high))
    return f"[{shown[0]}–{shown[1]}]"


def basis(metric: MetricValue, tier: str) -> str:
    """What the figure rests on: `p50, n=38, screen`."""
    return ", ".join(part for part in (visible(metric.statistic), f"n={metric.num_samples}", tier) if part)


def full(metric: MetricValue, tier: str) -> str:
    """The whole figure on one line: `412 tokens/s [401–420] (n=38, screen)`."""
    parts = (
        quantity(metric.value, metric.unit),
        interval(metric.low, metric.high, metric.unit),
        f"({basis(metric, tier)})",
    )
    return " ".join(part for part in parts if part)


_UNIT_SUFFIX = re.compile("(_tokens_per_s|_requests_per_s|_ms|_bytes|_w|_j)$")
_SPOKEN = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "end-to-end time",
    "kl divergence": "KL divergence",
    "top1 agreement": "top-1 agreement",
    "cost per mtok": "cost per million tokens",
    "kv": "KV bytes",
    "weights": "weight bytes",
}


def spoken(metric: str) -> str:
    """`throughput_tokens_per_s` -> `throughput`, `kv_bytes` -> `KV bytes`: for sentences, never for keys."""
    words = _UNIT_SUFFIX.sub("", metric).replace("_", " ")
    return visible(_SPOKEN.get(words, words))


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "nothing"


def plural(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
