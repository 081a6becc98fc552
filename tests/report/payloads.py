"""Texts that have broken reports elsewhere, and a record that carries one in every free-text field it has."""

import dataclasses
import json
from typing import Any

from codesign.results.record import MetricValue, Outcome, TrialRecord

PAYLOADS: tuple[str, ...] = (
    "<script>window.hacked=1;alert(1)</script>",
    "</script><script>window.hacked=1;alert(2)</script>",
    "</ScRiPt ><script>alert(3)</script>",
    "<!--<script>alert(4)//-->",
    "--><script>alert(5)</script><!--",
    "<img src=x onerror=alert(6)>",
    "<img src=//evil.example/x.png>",
    '"><svg onload=alert(7)>',
    "'><svg/onload=alert(8)>",
    '" onmouseover="alert(9)" x="',
    "' autofocus onfocus='alert(10)",
    "<iframe srcdoc='<script>alert(11)</script>'></iframe>",
    "<a href='javascript:alert(12)'>click</a>",
    "javascript:alert(13)",
    "<style>@import url(//evil.example/x.css);</style>",
    "</style><script>alert(14)</script>",
    "</textarea></title><script>alert(15)</script>",
    "<base href='//evil.example/'>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "{{ 7*7 }}{% print(8) %}{# c #}",
    "${alert(16)}`${alert(17)}`",
    "%{x}<br>%{customdata}<extra></extra>",
    "<b>bold</b><sup>x</sup><span style='color:red'>s</span>",
    "$\\href{javascript:alert(18)}{x}$",
    "&lt;script&gt;alert(19)&lt;/script&gt;&amp;&#60;",
    "a\u2028alert(20)\u2029//",
    "]]><script>alert(21)</script><![CDATA[",
    "\\u003cscript\\u003ealert(22)\\u003c/script\\u003e",
    "<template><script>alert(23)</script></template>\x00\x1b[31m\u202egnp.exe\ud800",
)
assert len(PAYLOADS) == 30


def hostile(record: TrialRecord, text: str) -> TrialRecord:
    """The record with `text` in every free-text field; what must be a number, an id or a known name stays."""
    plain: dict[str, Any] = json.loads(record.to_json())
    config = {**plain["config"], "dtype": text, "weights": {"name": text, text: text}}
    return dataclasses.replace(
        record,
        study=text,
        config=config,
        config_digest=text,
        resolved={text: text, "list": [text]},
        outcome=Outcome(kind=record.outcome.kind, detail=text if record.outcome.kind != "ok" else ""),
        violations={**record.violations, text: 0.5 if record.number % 3 == 1 else -0.5},
        metrics={
            name: MetricValue(**{**dataclasses.asdict(metric), "unit": text, "statistic": text})
            for name, metric in record.metrics.items()
        },
        requests=tuple(dataclasses.replace(request, finish_reason=text) for request in record.requests),
        bytes={**record.bytes, text: 1},
        monitor={text: text, "nested": {"deep": [text]}},
        phases={**record.phases, text: 0.1},
        kernels={text: text},
        trust={text: text},
        provenance={
            "machine": {"cpu": text, "os": text},
            "gpus": [{"name": text}],
            text: text,
            "versions": {text: text},
        },
        warnings=(text,),
        started_at=text,
        finished_at=text,
    )


def hostile_inputs(text: str, plain: dict[str, Any]) -> dict[str, Any]:
    """study.json with `text` in every free-text field."""
    profile = {
        "hardware": {"name": text, text: text},
        "workload": {"scenario": text, text: [text]},
        "slo": {text: {text: 1}},
    }
    return {**plain, "study": text, "model": text, "created_at": text, "profile": profile, "space": {text: [text]}}
