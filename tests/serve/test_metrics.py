"""The page of metrics: Prometheus' text format, and as many lines whatever clients do."""

import re

from codesign.serve.metrics import Histogram, Metrics

LINE = re.compile(r'(# (HELP|TYPE) codesign_\w+ .+)|(codesign_\w+(\{(\w+="[^"\n]*",?)+\})? -?[0-9.e+-]+)')


def test_every_line_is_of_the_format() -> None:
    metrics = Metrics()
    metrics.http["/health", 200] += 3
    metrics.ttft_s.observe(0.03)

    text = metrics.text({"kv_bytes": ("Bytes.", 4096)})

    assert text.endswith("\n")
    assert all(LINE.fullmatch(line) for line in text.splitlines())
    assert 'codesign_http_requests_total{route="/health",status="200"} 3\n' in text
    assert "codesign_kv_bytes 4096\n" in text


def test_every_metric_has_its_help_and_type_before_its_values() -> None:
    described = set()
    for line in Metrics().text({}).splitlines():
        if line.startswith("# TYPE"):
            described.add(line.split()[2])
        elif not line.startswith("#"):
            name = re.split(r"[{ ]", line)[0]
            assert {name, re.sub(r"_(bucket|sum|count)$", "", name)} & described


def test_buckets_are_cumulative_and_a_value_on_the_bound_is_in() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)

    assert list(histogram.lines("x")) == [
        'x_bucket{le="0.1"} 2',
        'x_bucket{le="1.0"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 7.65",
        "x_count 4",
    ]
