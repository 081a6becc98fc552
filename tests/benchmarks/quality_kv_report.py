"""The report of quality_kv.py: tables with intervals, and the checks."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from codesign.measure.bootstrap import Interval, bootstrap, share
from codesign.measure.ruler import OUTPUT_TOKENS, TASKS
from codesign.measure.suite import ASKED
from codesign.spec.engine_config import Choice

FULL = Choice("full")
BUDGETS = (0.05, 0.1, 0.2, 0.4)
COMPARED_BUDGET = 0.2
GRID_LENGTH = 512
NEEDLES = ("single_needle", "multi_key")
INFORMATIVE = 0.5
NLL_RESOLUTION = 1e-3  # nat/token
LEAST_BUDGET = 0.1  # below, at 512 tokens, sinks and window leave 14 rows, and a told line has 12 tokens
BY_SLOT = ("dynamic",)  # a sample's slot says what is kept of it, and the codecs' runs fill slots differently
Result = dict[str, Any]


def flags(result: Result, tasks: Sequence[str], asked: str) -> list[bool]:
    """Sample after sample, whether it was answered."""
    return [exact for task in tasks for exact in result["answers"][task][asked]["is_exact"]]


def log_probs(result: Result, tasks: Sequence[str], asked: str) -> list[float]:
    """Sample after sample, the mean log-probability of the answer's tokens."""
    return [value for task in tasks for value in result["answers"][task][asked]["log_prob"]]


def configurations(own: dict[str, dict[str, Result]]) -> Iterator[tuple[str, str, Result]]:
    """(policy, budget, result) of one codec."""
    for label, budgets in own.items():
        for budget, result in budgets.items():
            yield label, budget, result


def checks(results: Result) -> list[dict[str, Any]]:
    """What must hold, and what is only said: {"what", "is_required", "holds", "detail"}."""
    found = [
        _check(f"{label} that keeps all equals full bit for bit", same is True, "" if same in (True, False) else same)
        for label, same in results["keep_all"].items()
    ]
    for better in ("snapkv", "pyramidkv"):
        for budget in results["grid"]["native"]["streaming_llm"]:
            found += [_beats(results, better, budget, asked) for asked in ASKED]
            found.append(_is_surer(results, better, budget))
    return [*found, *_int8(results)]


def _check(what: str, holds: bool, detail: str, *, is_required: bool = True) -> dict[str, Any]:
    return {"what": what, "is_required": is_required, "holds": holds, "detail": detail}


def _sides(results: Result, better: str, budget: str) -> tuple[list[Result], str]:
    """The results of `better` and of streaming_llm, or why one of them is missing."""
    own = results["grid"]["native"]
    sides = [own.get(label, {}).get(budget, {"refused": f"no {label}"}) for label in (better, "streaming_llm")]
    return sides, next((side["refused"] for side in sides if "refused" in side), "")


def _beats(results: Result, better: str, budget: str, asked: str) -> dict[str, Any]:
    what = f"{better} recalls more than streaming_llm at {budget}, asked {asked.replace('_', ' ')}"
    is_required = asked == "in_prompt" and float(budget) >= LEAST_BUDGET
    sides, refused = _sides(results, better, budget)
    if refused:
        return _check(what, False, refused, is_required=is_required)
    mine, theirs = (share(flags(side, NEEDLES, asked)) for side in sides)
    return _check(what, mine.low > theirs.high, f"{_show(mine, 2)} to {_show(theirs, 2)}", is_required=is_required)


def _is_surer(results: Result, better: str, budget: str) -> dict[str, Any]:
    what = f"{better} is surer of the answer than streaming_llm at {budget}, asked in prompt"
    sides, refused = _sides(results, better, budget)
    if refused:
        return _check(what, False, refused)
    mine, theirs = (bootstrap(log_probs(side, NEEDLES, ASKED[0])) for side in sides)
    return _check(what, mine.low > theirs.high, f"{_show(mine, 2)} to {_show(theirs, 2)} nat/token")


def _int8(results: Result) -> list[dict[str, Any]]:
    """Differences of int8 to native, sample by sample, each averaged over all policies and budgets first.

    One interval each instead of one per configuration, of which one in forty would miss 0 by chance.
    """
    recalled, nll = [], []
    int8 = results["grid"].get("int8", {})
    for label, budget, mine in configurations(int8):
        theirs = results["grid"]["native"][label][budget]
        if "refused" in mine or "refused" in theirs:
            continue
        nll.append(np.subtract(mine["nll"], theirs["nll"]))
        if label in BY_SLOT:
            continue
        pairs = [(flags(mine, [task], ASKED[0]), flags(theirs, [task], ASKED[0])) for task in NEEDLES]
        recalled.append([int(a) - int(b) for ours, native in pairs for a, b in zip(ours, native, strict=False)])
    if not recalled:
        return [_check("int8 loses nothing measurable", False, "it was not measured")]
    lost, worse = (bootstrap(np.mean(values, axis=0).tolist()) for values in (recalled, nll))
    return [
        _check(
            "int8 recalls as much as native", lost.high >= 0, f"{_show(lost, 4)} over {len(recalled)} configurations"
        ),
        _check(
            f"int8 costs no likelihood beyond {NLL_RESOLUTION:g} nat/token",
            worse.low <= NLL_RESOLUTION,
            f"{_show(worse, 5)} over {len(nll)} configurations",
        ),
    ]


def _show(found: Interval, digits: int) -> str:
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def report(results: Result, found: list[dict[str, Any]], facts: Result) -> str:
    machine, versions, code = facts["machine"], facts["versions"], facts["code"]
    lines = [
        "# Quality of KV policies and codecs",
        "",
        f"`{facts['command']}`, {facts['date']}, {facts['wall_s'] / 60:.0f} minutes: {facts['model']['name']} "
        f"({facts['model']['digest']}) in bf16 on {machine['cpu']}, {machine['cores']} cores, "
        f"{', '.join(machine['isa'])}, torch {versions['torch']}, codesign {versions['codesign']} at "
        f"{str(code['commit'])[:12]}{' with changes' if code.get('dirty') else ''}.",
        "",
        "Budgets are fractions of the length. There are 16 slots; dynamic keeps whole sequences in four of them.",
        f"Questions are asked in the prompt, which the policy cuts when it ends, or after {OUTPUT_TOKENS} and more "
        "tokens of output: then the policy cuts before it has seen the question, and evicts during the output.",
        "Policies that evict are asked after output with the native codec only.",
        "Recall is the share of single_needle and multi_key samples whose five digits are all the engine's best guess "
        f"({2 * facts['num_samples']} samples, half as many of 2048 tokens, and in the first table twice as many asked "
        "in the prompt).",
        f"KL is to the full cache in nats per token, over the last quarter of {facts['num_sequences']} held-out texts "
        f"of {GRID_LENGTH} tokens, forced token by token after the others were prefilled.",
        "The log-probability is the mean over the answer's tokens, in nats: it still tells apart where no sample is "
        "answered.",
        "Brackets are 95 % bootstrap intervals over samples; where all samples are alike, Wilson's.",
        "",
        "## What the model can do with the full cache",
        "",
        f"A task of which the full cache answers less than {INFORMATIVE:.0%} says little about a cache: what is wrong "
        "is the model's. Such tasks are scored all the same and marked.",
        "",
        *_full_table(results),
        "",
        f"## Every policy, budget and codec at {GRID_LENGTH} tokens",
        "",
        *_grid_tables(results),
        f"## Every task at a budget of {COMPARED_BUDGET}, native",
        "",
        "Accuracy, and the mean log-probability of the answer's tokens. Marked (-): see above.",
        "",
        *_task_table(results),
        "",
        f"## Recall by length at a budget of {COMPARED_BUDGET}, native, asked in the prompt",
        "",
        *_length_table(results),
        "",
        "## Why: which rows are kept",
        "",
        *_kept_table(results),
        "",
        "## Checks",
        "",
        "| check | required | holds | |",
        "|---|---|---|---|",
    ]
    for check in found:
        holds = "yes" if check["holds"] else "**NO**" if check["is_required"] else "no"
        lines.append(f"| {check['what']} | {'yes' if check['is_required'] else ''} | {holds} | {check['detail']} |")
    return "\n".join([*lines, *_refusals(results)]) + "\n"


def _is_informative(results: Result, length: int, task: str, asked: str) -> bool:
    return float(np.mean(flags(_of_full(results, length, task), [task], asked))) >= INFORMATIVE


def _of_full(results: Result, length: int, task: str) -> Result:
    """The result with the full cache that has this task."""
    if length != GRID_LENGTH:
        return results["full"][str(length)]  # type: ignore[no-any-return]  # plain JSON
    return results["grid"]["native"]["full"][""] if task in NEEDLES else results["other_tasks"]["full"]  # type: ignore[no-any-return]


def _full_table(results: Result) -> list[str]:
    lines = ["| task | asked | " + " | ".join(f"{length} tokens" for length in results["lengths"]) + " |"]
    lines.append("|---" * (2 + len(results["lengths"])) + "|")
    for task, asked in itertools.product(TASKS, ASKED):
        cells = []
        for length in results["lengths"]:
            mark = "" if _is_informative(results, length, task, asked) else " (-)"
            cells.append(_show(share(flags(_of_full(results, length, task), [task], asked)), 2) + mark)
        lines.append(f"| {task} | {asked.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def _grid_tables(results: Result) -> list[str]:
    full_bytes = results["grid"]["native"]["full"][""]["kv_bytes"]
    lines = []
    for codec, own in results["grid"].items():
        lines += [f"### {codec}", ""]
        lines += [
            "| policy | budget | rows | bytes | recall, in prompt | log-prob | recall, after output | KL | top-1 |"
        ]
        lines += ["|---" * 9 + "|"]
        never = {label for label, budgets in own.items() if all("refused" in result for result in budgets.values())}
        lines += [f"| {label} | all | refused | | | | | | |" for label in own if label in never]
        for label, budget, result in configurations(own):
            if label in never:
                continue
            if "refused" in result:
                lines.append(f"| {label} | {budget} | refused | | | | | | |")
                continue
            ways = result["answers"][NEEDLES[0]]
            recall = [_show(share(flags(result, NEEDLES, asked)), 2) if asked in ways else "" for asked in ASKED]
            lines.append(
                f"| {label} | {budget} | {result['rows']:.0f} | {result['kv_bytes'] / full_bytes:.3f} "
                f"| {recall[0]} | {_show(bootstrap(log_probs(result, NEEDLES, ASKED[0])), 2)} | {recall[1]} "
                f"| {_show(bootstrap(result['kl']), 4)} | {np.mean(result['top1']):.3f} |"
            )
        lines.append("")
    return lines


def _task_table(results: Result) -> list[str]:
    columns = [*itertools.product(TASKS, ASKED)]
    marks = ["" if _is_informative(results, GRID_LENGTH, *column) else " (-)" for column in columns]
    heads = [f"{task}, {asked.replace('_', ' ')}{mark}" for (task, asked), mark in zip(columns, marks, strict=True)]
    lines = ["| policy | " + " | ".join(heads) + " |", "|---" * (1 + len(columns)) + "|"]
    for label, other in results["other_tasks"].items():
        needles = results["grid"]["native"][label]["" if label == "full" else str(COMPARED_BUDGET)]
        if "refused" in other:
            continue
        cells = []
        for task, asked in columns:
            result = needles if task in NEEDLES else other
            log_prob = float(np.mean(log_probs(result, [task], asked)))
            cells.append(f"{np.mean(flags(result, [task], asked)):.2f}, {log_prob:.2f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _length_table(results: Result) -> list[str]:
    lengths = results["lengths"]
    lines = ["| policy | " + " | ".join(f"{length} tokens" for length in lengths) + " |"]
    lines.append("|---" * (1 + len(lengths)) + "|")
    full = {str(length): _of_full(results, length, NEEDLES[0]) for length in lengths}
    for label, others in {"full": full, **results["other_lengths"]}.items():
        own = {str(GRID_LENGTH): results["grid"]["native"][label].get(str(COMPARED_BUDGET)), **others}
        cells = [
            "refused" if "refused" in result else _show(share(flags(result, NEEDLES, ASKED[0])), 2)
            for result in (own[str(length)] for length in lengths)
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _kept_table(results: Result) -> list[str]:
    lines = [
        f"At the end of prompts of {GRID_LENGTH} tokens that hold the question, at a budget of {COMPARED_BUDGET}, mean "
        "over layers and KV heads: the share of the told answer's rows that are kept, and where the older half of the "
        "kept rows (without sinks) stands, 0 at the first token and 1 at the last.",
        "",
        "What to expect of h2o: it adds up what all queries of the prompt looked at, and the question is less than ten "
        "of them, so rows that only the question needs count for little under every norm; and half the budget belongs "
        "to the newest tokens.",
        "The norms differ in what wins instead: a plain sum favours old rows, which more queries had a chance to look "
        "at; a mean per query favours young ones, whose few queries are their neighbours, and queries look at what is "
        "near; a decayed sum forgets half within 69 tokens and keeps what was near to the last of them.",
        "",
        "| policy | answer's rows kept | place of the older half |",
        "|---|---|---|",
    ]
    for label, kept in results["kept"].items():
        lines.append(f"| {label} | {_show(bootstrap(kept['answer']), 2)} | {_show(bootstrap(kept['depth']), 2)} |")
    return lines


def _refusals(results: Result) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for codec, own in results["grid"].items():
        for label, budget, result in configurations(own):
            if "refused" in result:
                reasons.setdefault(result["refused"], []).append(f"{label} {budget} {codec}".replace("  ", " "))
    lines = ["", "## What cannot be built", ""] if reasons else []
    for reason, named in reasons.items():
        shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        lines.append(f"- {shown}: {reason}")
    return lines
