"""Counters of one server in Prometheus' text format 0.0.4, written by hand: it is a dozen lines of text.

Every label has a fixed set of values, so that no client can make the page grow.
"""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ITL_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Histogram:
    """Args:
    bounds: upper ends of the buckets, ascending, in seconds.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Everything that is counted; only the event loop's thread touches it.

    Attributes:
        http: (route, status) -> answers.
        rejected: reason (queue_full, going_down) -> generation requests not taken.
        aborted: sequences whose client left, or that a shutdown cut off.
        ttft_s: from the arrival of the request to the sequence's first token.
        itl_s: between two tokens of one sequence.
    """

    def __init__(self) -> None:
        self.http: Counter[tuple[str, int]] = Counter()
        self.rejected: Counter[str] = Counter({"queue_full": 0, "going_down": 0})
        self.num_sequences = 0
        self.aborted = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.ttft_s = Histogram(_TTFT_S)
        self.itl_s = Histogram(_ITL_S)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The page.

        Args:
            gauges: name -> (help, value), for what is read when the page is asked for.
        """
        http = [
            f'{{route="{route}",status="{status}"}} {count}' for (route, status), count in sorted(self.http.items())
        ]
        rejected = [f'{{reason="{reason}"}} {count}' for reason, count in sorted(self.rejected.items())]
        counters: dict[str, tuple[str, Iterable[str]]] = {
            "http_requests_total": ("Answered HTTP requests.", http),
            "sequences_total": ("Sequences given to the engine.", [f" {self.num_sequences}"]),
            "requests_rejected_total": ("Generation requests that were not taken.", rejected),
            "sequences_aborted_total": ("Sequences cut off: client gone, or shutdown.", [f" {self.aborted}"]),
            "prompt_tokens_total": ("Prompt tokens given to the engine.", [f" {self.prompt_tokens}"]),
            "output_tokens_total": ("Tokens that the engine drew.", [f" {self.output_tokens}"]),
        }
        lines = []
        for name, (what, values) in counters.items():
            lines += [f"# HELP codesign_{name} {what}", f"# TYPE codesign_{name} counter"]
            lines += [f"codesign_{name}{value}" for value in values]
        for name, (what, number) in gauges.items():
            lines += [f"# HELP codesign_{name} {what}", f"# TYPE codesign_{name} gauge", f"codesign_{name} {number}"]
        for name, what, histogram in (
            ("time_to_first_token_seconds", "From arrival to first token, per sequence.", self.ttft_s),
            ("inter_token_latency_seconds", "Between two tokens of a sequence.", self.itl_s),
        ):
            lines += [f"# HELP codesign_{name} {what}", f"# TYPE codesign_{name} histogram"]
            lines += histogram.lines(f"codesign_{name}")
        return "\n".join(lines) + "\n"
