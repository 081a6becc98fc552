"""What kv_scaling.py says about its results: checks with the figures that explain a miss, a table, a static picture."""

import math
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

Results = list[dict[str, Any]]

_ONE_QUERY = (
    "The same model with as many heads as KV heads. Values cost what there are queries; scores do not: the kernel "
    "finds those of eight queries at a time, however many there are."
)

BYTES_WITHIN, TIME_WITHIN, LEAST_CONTEXT = 0.03, 0.15, 8192
# Okabe and Ito's palette, safe for colour-blind readers; dashes tell lines apart in grey.
STYLES = {
    "full": ("#22262B", ""),
    "full int8": ("#0072B2", ""),
    "full int4": ("#D55E00", "6 3"),
    "streaming_llm": ("#E69F00", "2 2"),
    "h2o": ("#D55E00", ""),
    "snapkv": ("#0072B2", ""),
    "pyramidkv": ("#56B4E9", "6 3"),
    "ada_kv": ("#009E73", ""),
    "r_kv": ("#CC79A7", "6 3"),
    "dynamic": ("#8A8F98", "2 2"),
}


def found(results: Results, case: str, context: int) -> dict[str, Any]:
    return next(own for own in results if own["case"] == case and own["context"] == context)


def time_share(own: dict[str, Any], part: str) -> list[float]:
    """Its time over that of the full beside it, round by round."""
    return [mine / whole for mine, whole in zip(own[part], own.get("full_beside", own)[part], strict=True)]


def byte_share(results: Results, own: dict[str, Any]) -> float:
    share: float = own["kv_bytes"] / found(results, "full", own["context"])["kv_bytes"]
    return share


def line(results: Results, case: str) -> tuple[float, float] | None:
    """(milliseconds of attention that no byte costs, milliseconds per GB), through the shortest and longest context."""
    own = sorted((item for item in results if item["case"] == case), key=lambda item: item["context"])
    if len(own) < 2:
        return None
    (low, first), (high, last) = ((item["kv_bytes"] / 1e9, median(item["attention_ms"])) for item in (own[0], own[-1]))
    slope = (last - first) / (high - low)
    return first - slope * low, slope


def checks(results: Results, one_query: Results) -> list[dict[str, Any]]:
    return [
        *_byte_checks(results),
        *_time_checks(results, "attention time share / byte share"),
        *_time_checks(one_query, "attention time share / byte share, one query"),
    ]


def _byte_checks(results: Results) -> Iterator[dict[str, Any]]:
    for own in results:
        beside = {name: size / own["promised_bytes"] for name, size in own["beside_rows_bytes"].items()}
        whole = own["kv_bytes"] / own["promised_bytes"]
        rows = (whole - sum(beside.values())) / own["encoded_share"]
        parts = [f"rows {rows:.1%}", *(f"{name} {share:.1%}" for name, share in beside.items())]
        for what, ratio in (("bytes of rows / promised", rows), ("all bytes / promised", whole)):
            yield {
                "what": what,
                "case": own["case"],
                "context": own["context"],
                "found": ratio,
                "within": BYTES_WITHIN,
                "met": abs(ratio - 1) <= BYTES_WITHIN,
                "required": what == "bytes of rows / promised",
                "because": "of what was promised: " + ", ".join(parts),
            }


def _time_checks(results: Results, what: str) -> Iterator[dict[str, Any]]:
    base = line(results, "full")
    for own in results:
        if own["context"] < LEAST_CONTEXT or own["case"] == "full":
            continue
        share = byte_share(results, own)
        ratio = median(time_share(own, "attention_ms")) / share
        fitted, because = line(results, own["case"]), "one context tells no fixed cost"
        if fitted is not None and base is not None:
            per_byte = fitted[1] / base[1]
            because = (
                f"fixed {fitted[0]:.2f} of {median(own['attention_ms']):.2f} ms; one more byte takes {per_byte:.2f}"
            )
            if own["codec"] != "native":
                because += f", one more row {per_byte * share:.2f}"
            because += " x full's time"
        yield {
            "what": what,
            "case": own["case"],
            "context": own["context"],
            "found": ratio,
            "within": TIME_WITHIN,
            "met": abs(ratio - 1) <= TIME_WITHIN,
            "required": own["codec"] == "native",
            "because": because,
        }


def table(document: dict[str, Any], picture: str) -> str:
    facts, results = document["facts"], document["results"]
    where, model = facts["machine"], facts["model"]
    lines = [
        "# KV memory and decode speed against context",
        "",
        f"`{facts['command']}`, {facts['date']}, commit {facts['code']['commit']}: {where['cpu']}, ATen "
        f"{facts['capability']}, {facts['num_threads']} threads, torch {facts['torch']}; {facts['num_rounds']} "
        f"interleaved rounds of {facts['steps_per_round']} steps, three cases at most and full beside them, clock "
        f"{facts['clock']}, {facts['seconds']} s in all.",
        f"Random-weights Qwen2 in {facts['dtype']}: {model['num_hidden_layers']} layers, hidden "
        f"{model['hidden_size']}, {model['num_attention_heads']} heads on "
        f"{model['num_key_value_heads']} KV heads of {model['head_dim']}, "
        f"MLP {model['intermediate_size']}, vocabulary {model['vocab_size']}; {facts['batch_size']} sequences.",
        f"{model['num_attention_heads'] // model['num_key_value_heads']} queries per KV head.",
        "Random rows instead of a prompt; speed only, no quality. Times in ms of one decode step, median over rounds "
        "[least, most]. `attention`: its calls in all layers; `around`: commit, eviction and indices of the step; the "
        f"clock adds {facts['clock_us_per_call']} us to each of the calls, which is not subtracted.",
        "`x full`: the share of full's in the same round. Number after a policy: its budget as a share of the context.",
        "",
        f"![KV bytes, attention and step against context]({picture})",
    ]
    for context in facts["contexts"]:
        lines += ["", f"## {context} tokens", "", *_rows(results, context)]
    lines += ["", *_rescoring(results), "", *_kernels(results)]
    lines += ["", "## Codecs at one query per KV head", "", _ONE_QUERY]
    for context in dict.fromkeys(own["context"] for own in document["one_query"]):
        lines += ["", f"{context} tokens:", "", *_rows(document["one_query"], context)]
    lines += ["", "## Checks", "", *_summary(document["checks"])]
    for is_required, title in ((True, "Required and missed:"), (False, "Not required, outside all the same:")):
        lines += _outside(title, [own for own in document["checks"] if own["required"] == is_required])
    return "\n".join(lines) + "\n"


def _outside(title: str, all_checks: list[dict[str, Any]]) -> list[str]:
    missed = [check for check in all_checks if not check["met"]]
    if not missed:
        return []
    head = ["| check | case | context | found | within | why, measured |", "|---" * 6 + "|"]
    return [
        *("", title, "", *head),
        *(
            f"| {check['what']} | {check['case']} | {check['context']} | **{check['found']:.2f}** "
            f"| 1 ± {check['within']} | {check['because']} |"
            for check in missed
        ),
    ]


def _rows(results: Results, context: int) -> list[str]:
    head = ["| case | KV MiB | x full | attention ms | x full | around ms | step ms | x full |", "|---" * 8 + "|"]
    return head + [f"| {' | '.join(_cells(results, own))} |" for own in results if own["context"] == context]


def _cells(results: Results, own: dict[str, Any]) -> list[str]:
    shares = [f"{median(time_share(own, part)):.3f}" for part in ("attention_ms", "step_ms")]
    attention, step = (_spread(own[part]) for part in ("attention_ms", "step_ms"))
    memory = [f"{own['kv_bytes'] / 2**20:.2f}", f"{byte_share(results, own):.4f}"]
    return [own["case"], *memory, attention, shares[0], f"{median(own['around_ms']):.2f}", step, shares[1]]


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _rescoring(results: Results) -> list[str]:
    """What is paid once in many steps and is in none of the steps above."""
    lines = []
    for own in results:
        if own["steps_between_rescorings"]:
            lines.append(
                f"| {own['case']} | {own['context']} | {own['rescoring_ms_per_sequence']:.1f} "
                f"| {own['steps_between_rescorings']} | {own['rescoring_ms_per_step']:.2f} |"
            )
    if not lines:
        return []
    head = "| case | context | ms to score one sequence anew | every .. steps | ms a step for the batch |"
    return ["## Scored anew now and then, not in the steps above", "", head, "|---" * 5 + "|", *lines]


def _kernels(results: Results) -> list[str]:
    kernels: dict[str, list[str]] = {}
    for own in results:
        names = kernels.setdefault(own["kernel"], [])
        if own["case"] not in names:
            names.append(own["case"])
    return [f"- {', '.join(names)}: {kernel}" for kernel, names in kernels.items()]


def _summary(all_checks: list[dict[str, Any]]) -> Iterator[str]:
    for what, is_required in dict.fromkeys((check["what"], check["required"]) for check in all_checks):
        own = [check for check in all_checks if (check["what"], check["required"]) == (what, is_required)]
        met = sum(check["met"] for check in own)
        yield (
            f"- {what} within 1 ± {own[0]['within']}, {'required' if is_required else 'not required'}: "
            f"{met} of {len(own)} met"
        )


_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP_X, _GAP_Y = 270, 190, 70, 56, 62, 46
_ROWS = (("KV bytes, MiB", "kv"), ("attention, ms per step", "attention_ms"), ("step and rescoring, ms", "step_ms"))


def svg(document: dict[str, Any]) -> str:
    """Three quantities (rows) for each budget and for the codecs (columns), log-log, `full` in each."""
    results, contexts = document["results"], document["facts"]["contexts"]
    budgets = sorted({own["budget"] for own in results if own["budget"] is not None})
    columns = [
        (f"budget {budget:g} of the context", [own for own in results if own["budget"] == budget]) for budget in budgets
    ]
    columns.append(("codecs, every row kept", [own for own in results if own["codec"] != "native"]))
    full = [own for own in results if own["case"] == "full"]
    width = _LEFT + len(columns) * (_WIDTH + _GAP_X)
    height = _TOP + len(_ROWS) * (_HEIGHT + _GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#22262B">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for place, (title, own) in enumerate(columns):
        left = _LEFT + place * (_WIDTH + _GAP_X)
        shown = own + full
        parts.append(f'<text x="{left}" y="16" font-weight="bold">{title}</text>')
        parts += _legend(list(dict.fromkeys(_style(item) for item in shown)), left)
        for row, (label, part) in enumerate(_ROWS):
            values = [_value(item, part) for item in results]
            panel = _Panel(
                left, _TOP + row * (_HEIGHT + _GAP_Y), (min(contexts), max(contexts)), (min(values), max(values))
            )
            parts += panel.frame(contexts, label if place == 0 else "")
            for name in dict.fromkeys(_style(item) for item in shown):
                points = sorted((item["context"], _value(item, part)) for item in shown if _style(item) == name)
                parts += panel.curve(points, *STYLES[name])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _style(own: dict[str, Any]) -> str:
    return own["policy"] if own["codec"] == "native" else f"{own['policy']} {own['codec']}"


def _value(own: dict[str, Any], part: str) -> float:
    if part == "kv":
        return own["kv_bytes"] / 2**20
    return median(own[part]) + (own["rescoring_ms_per_step"] if part == "step_ms" else 0)


def _legend(names: list[str], left: int) -> Iterator[str]:
    for number, name in enumerate(names):
        x, y = left + number % 4 * 84, 30 + number // 4 * 14
        colour, dash = STYLES[name]
        yield f'<path d="M{x} {y - 4}h14" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        yield f'<text x="{x + 17}" y="{y}" font-size="10">{name}</text>'


class _Panel:
    """One pair of logarithmic axes; x and y are (least, most)."""

    def __init__(self, left: int, top: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.left, self.top = left, top
        self.x, self.y = (x[0] / 1.15, x[1] * 1.15), (y[0] / 1.3, y[1] * 1.3)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = _log_share(x, *self.x) * _WIDTH + self.left
        return round(across, 1), round(self.top + _HEIGHT - _log_share(y, *self.y) * _HEIGHT, 1)

    def frame(self, contexts: Iterable[int], label: str) -> Iterator[str]:
        bottom = self.top + _HEIGHT
        for context in contexts:
            x, _ = self.place(context, self.y[0])
            name = f"{context // 1024}k" if context % 1024 == 0 else str(context)
            yield f'<path d="M{x} {self.top}V{bottom}" stroke="#D9DDE3"/>'
            yield f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{name}</text>'
        for tick in (own for power in range(-4, 7) for own in (10.0**power, 3 * 10.0**power)):
            if self.y[0] <= tick <= self.y[1]:
                _, y = self.place(self.x[0], tick)
                yield f'<path d="M{self.left} {y}h{_WIDTH}" stroke="#D9DDE3"/>'
                yield f'<text x="{self.left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
        middle = self.left + _WIDTH / 2
        yield f'<text x="{middle}" y="{bottom + 30}" text-anchor="middle" font-size="11">context, tokens</text>'
        yield f'<rect x="{self.left}" y="{self.top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#8A8F98"/>'
        if label:
            x, y = self.left - 50, self.top + _HEIGHT / 2
            yield f'<text transform="translate({x} {y}) rotate(-90)" text-anchor="middle">{label}</text>'

    def curve(self, points: list[tuple[int, float]], colour: str, dash: str) -> Iterator[str]:
        places = [self.place(*point) for point in points]
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        yield from (f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in places)


def _log_share(value: float, least: float, most: float) -> float:
    return math.log(value / least) / math.log(most / least)
