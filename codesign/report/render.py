"""One self-contained HTML file: nothing is fetched, nothing but our own scripts runs, text is only ever text.

Three walls, each enough alone: Jinja escapes everything it prints; data travels as JSON that cannot close its element
and is put on the page as text; a content security policy allows the scripts and styles of this very file by hash and
no network at all.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from codesign.report.show import script_json, visible, visible_deep

_TEMPLATES = Path(__file__).parent / "templates"


# Plotly brings a map library that adds a style element when it loads, unless an element of this id is there already.
_MAP_STYLE_ID = re.compile(r'getElementById\("([0-9a-f]{64})"\)')


@cache
def plotly_js() -> str:
    """Plotly's own minified script, about 4.8 MB; Python's package holds no smaller bundle."""
    return str(plotly.offline.get_plotlyjs())


def render(template: str, *, data: dict[str, Any], with_figures: bool, **context: Any) -> str:
    """The page as text.

    Args:
        data: what page.js reads.
        with_figures: whether Plotly is put in; without it the page stays small.
    """
    style, script = (_TEMPLATES / "style.css").read_text(), (_TEMPLATES / "page.js").read_text()
    plotly_script = plotly_js() if with_figures else ""
    for inlined in (script, plotly_script):
        if "</script" in inlined.lower():
            raise ValueError("a script that holds its own end tag cannot stand in a page")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    return environment.get_template(template).render(
        **context,
        policy=_policy(scripts=[text for text in (plotly_script, script) if text], styles=[style]),
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(plotly_script),
        unwanted_style_ids=sorted(set(_MAP_STYLE_ID.findall(plotly_script))),
        data=Markup(script_json(visible_deep(data))),
    )


def _policy(*, scripts: list[str], styles: list[str]) -> str:
    # Plotly makes one empty style element and fills it by script; that empty text needs a hash too.
    allowed_styles = [*styles, ""]
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {' '.join(map(_hash, allowed_styles))}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def encoded(text: str) -> bytes:
    """UTF-8; what has no UTF-8 (a lone surrogate from a hostile record) is written as an escape."""
    return text.encode("utf-8", "backslashreplace")
