"""Inputs that a careless, confused or hostile person writes: one wrong thing each in an otherwise good file.

A case is (dotted key to put the value at, YAML text of the value, key that the error names, what it says). The error's
key is "" where the mistake has none. `+key` adds a key, `-key` takes one away.
"""

import dataclasses
from typing import Any

from codesign.spec.yaml import dump_yaml

ARCHITECTURE = {
    "weights": "random",
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
PROFILE: dict[str, Any] = {
    "hardware": {
        "name": "a machine",
        "device": "cpu",
        "cores": 2,
        "memory": [{"name": "host", "gib": 16, "gb_per_s": 20.5}],
        "links": {"host_gb_per_s": 16},
        "peak_tflops": {"fp32": 0.1},
        "idle_power_w": 10,
        "max_power_w": 100,
    },
    "model": ARCHITECTURE,
    "workload": {
        "scenario": "offline",
        "prompt_tokens": {"lognormal": {"median": 32, "p90": 64, "max": 128}},
        "output_tokens": {"uniform": [8, 16]},
        "num_requests": 8,
        "sampling": {"temperature": 0.5},
    },
    "slo": {"tpot_ms": {"p99": 50}, "quality": {"max_kl": 0.1}, "memory_gib": 8},
    "objectives": ["throughput_tokens_per_s", {"tpot_ms": "p90"}],
}
SPACE: dict[str, Any] = {
    "dtype": ["bf16", "fp32"],
    "max_batch_size": [1, 2, 4],
    "max_step_tokens": {"low": 128, "high": 512, "step": 128},
    "weights": {"native": {}, "int4": {"group_size": [32, 64]}},
    "kv": {"policy": {"full": {}, "h2o": {"kv_budget": [0.1, 0.2]}}, "codec": ["native"]},
    "kernels": {"fused": [True, False], "graphs": [False]},
    "parallel": {"tensor_parallel_size": [1, 2], "pipeline_parallel_size": [1, 2], "num_micro_batches": [1, 4]},
    "constraints": [{"when": {"weights": "int4", "dtype": "fp32"}, "reason": "an example"}],
}
CONFIG: dict[str, Any] = {
    "dtype": "fp32",
    "max_batch_size": 4,
    "weights": {"name": "int4", "group_size": 64},
    "kv": {"policy": {"name": "h2o", "kv_budget": 0.2}, "codec": "native"},
    "kernels": {"fused": True, "graphs": False},
    "parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "num_micro_batches": 1},
}

# What no whole number of at least one is.
NOT_A_COUNT = ("0", "-1", "1.5", "true", "on", "'5'", "[1]", "{a: 1}", "null", "1e3", "2:4", "99999999999999999999")
NOT_A_POSITIVE = ("0", "-0.5", "true", "yes", "'5'", "[]", "1e400", ".inf", ".nan", "1_000", "0b1", "1:30")

PROFILE_CASES: list[tuple[str, str, str, str]] = [
    *[("hardware.count", value, "hardware.count", "") for value in NOT_A_COUNT],
    *[("workload.num_requests", value, "workload.num_requests", "") for value in NOT_A_COUNT],
    *[("hardware.memory.0.gib", value, "hardware.memory[0].gib", "") for value in NOT_A_POSITIVE],
    *[("slo.tpot_ms.p99", value, "slo.tpot_ms.p99", "") for value in NOT_A_POSITIVE],
    ("+hardwear", "{}", "hardwear", "did you mean 'hardware'"),
    ("+hardware\u202e", "{}", "'hardware\\u202e'", "unknown key"),
    ("+<<", "{device: cuda}", "<<", "unknown key"),
    ("-hardware", "", "hardware", "is missing"),
    ("-model", "", "model", "is missing"),
    ("-workload", "", "workload", "is missing"),
    ("-objectives", "", "objectives", "is missing"),
    ("hardware", "null", "hardware", "must be a mapping"),
    ("hardware", "[]", "hardware", "must be a mapping"),
    ("hardware", "cpu", "hardware", "must be a mapping"),
    ("hardware", "nowhere.yaml", "hardware", "no such file"),
    ("hardware", "{from: nowhere.yaml}", "hardware", "no such file"),
    ("hardware", "{from: [a]}", "hardware.from", "path"),
    ("hardware", "{from: null}", "hardware.from", "path"),
    ("hardware", "{from: '/dev/zero'}", "hardware", "not a regular file"),
    ("hardware", "{from: '.'}", "hardware", "directory"),
    ("-hardware.name", "", "hardware.name", "is missing"),
    ("-hardware.device", "", "hardware.device", "is missing"),
    ("hardware.name", "''", "hardware.name", "at least 1 character"),
    ("hardware.name", "5", "hardware.name", "must be text"),
    ("hardware.name", '"a\\tb"', "hardware.name", "must match"),
    ("hardware.device", "gpu", "hardware.device", "known: cpu, cuda"),
    ("hardware.device", "CUDA", "hardware.device", "did you mean"),
    ("hardware.device", "cuad", "hardware.device", "did you mean 'cuda'"),
    ("hardware.device", "2", "hardware.device", "'cuda'"),
    ("hardware.device", "cuda", "hardware", "isa and cores"),
    ("+hardware.devise", "cpu", "hardware.devise", "did you mean 'device'"),
    ("+hardware.compute_capability", "9.0", "hardware.compute_capability", "must be text"),
    ("+hardware.compute_capability", "'9'", "hardware.compute_capability", "must match"),
    ("+hardware.compute_capability", "'9.0'", "hardware", "belongs to device: cuda"),
    ("+hardware.isa", "avx2", "hardware.isa", "must be a list"),
    ("+hardware.isa", "[1]", "hardware.isa[0]", "must be text"),
    ("hardware.memory", "16", "hardware.memory", "must be a list"),
    ("hardware.memory", "{gib: 1}", "hardware.memory", "must be a list"),
    ("hardware.memory.0", "16", "hardware.memory[0]", "must be a mapping"),
    ("-hardware.memory.0.name", "", "hardware.memory[0].name", "is missing"),
    ("+hardware.memory.0.gb", "1", "hardware.memory[0].gb", "unknown key"),
    ("+hardware.memory.0.gib_per_s", "1", "hardware.memory[0].gib_per_s", "did you mean 'gb_per_s'"),
    ("hardware.memory", "[{name: a, gib: 1}, {name: a, gib: 2}]", "hardware", "must differ"),
    ("+hardware.links.hots_gb_per_s", "1", "hardware.links.hots_gb_per_s", "did you mean 'host_gb_per_s'"),
    ("+hardware.peak_tflops.bf61", "1", "hardware.peak_tflops.bf61", "did you mean 'bf16'"),
    ("hardware.idle_power_w", "-1", "hardware.idle_power_w", "at least 0"),
    ("hardware.idle_power_w", "200", "hardware", "above max_power_w"),
    ("+hardware.price_per_hour", "free", "hardware.price_per_hour", "must be a number"),
    ("model", "null", "model", "must be bundled"),
    ("model", "5", "model", "must be bundled"),
    ("model", "[bundled]", "model", "must be bundled"),
    ("model", "{}", "model", "must be bundled"),
    ("model", "''", "model", "without config.json"),
    ("model", "bundeld", "model", "neither `bundled` nor"),
    ("model", "nobody/nothing", "model", "revision"),
    ("model", "../..", "model", "without config.json"),
    ("model", "/etc/passwd", "model", "neither"),
    ("model", "'~nobody-here/x'", "model", "not a usable path"),
    ("model", "{id: a/b}", "model.revision", "is missing"),
    ("model", "{revision: abc}", "model.id", "is missing"),
    ("model", "{id: a/b, revision: main}", "model.revision", "must match"),
    ("model", "{id: ../../etc, revision: " + "a" * 40 + "}", "model.id", "must match"),
    ("model", "{id: a/b, revision: " + "a" * 40 + ", file: x}", "model.file", "unknown key"),
    ("model", "{weights: random}", "model.model_type", "is missing"),
    ("model.weights", "trained", "model.weights", "known: random"),
    ("model.model_type", "gpt2", "model.model_type", "known: llama, mistral, qwen2, qwen3"),
    ("model.hidden_size", "0", "model.hidden_size", "at least 1"),
    ("model.hidden_size", "62", "model.num_attention_heads", "must divide"),
    ("model.num_key_value_heads", "3", "model.num_key_value_heads", "must divide"),
    ("model.num_hidden_layers", "99999999999999999", "model.num_hidden_layers", "at most"),
    ("+model.hidden_sizes", "64", "model.hidden_sizes", "did you mean 'hidden_size'"),
    ("+model.rope_scaling", "{rope_type: magic}", "model.rope_scaling.rope_type", "known: default"),
    ("+model.rope_theta", "0", "model.rope_theta", "at least 1"),
    ("workload.scenario", "ofline", "workload.scenario", "did you mean 'offline'"),
    ("workload.scenario", "server", "workload", "needs `arrival`"),
    ("workload.scenario", "interactive", "workload", "needs `concurrency`"),
    ("+workload.concurrency", "4", "workload", "takes no `concurrency`"),
    ("+workload.arrival", "{process: poisson, rate_per_s: 1}", "workload", "takes no `arrival`"),
    ("+workload.arrival", "{process: posson, rate_per_s: 1}", "workload.arrival.process", "did you mean 'poisson'"),
    ("+workload.arrival", "{process: poisson}", "workload.arrival.rate_per_s", "is missing"),
    ("+workload.arrival", "{process: gamma, rate_per_s: 1}", "workload.arrival", "burstiness"),
    ("+workload.arrival", "{process: poisson, rate_per_s: 0}", "workload.arrival.rate_per_s", "greater than 0"),
    ("workload.prompt_tokens", "0", "workload.prompt_tokens", "at least 1"),
    ("workload.prompt_tokens", "many", "workload.prompt_tokens", "whole number"),
    ("workload.prompt_tokens", "[64, 128]", "workload.prompt_tokens", "whole number"),
    ("workload.prompt_tokens", "1.5", "workload.prompt_tokens", "whole number"),
    ("workload.prompt_tokens", "null", "workload.prompt_tokens", "number of tokens"),
    ("workload.prompt_tokens", "{}", "workload.prompt_tokens", "number of tokens"),
    ("workload.prompt_tokens", "{normal: 5}", "workload.prompt_tokens.normal", "did you mean 'lognormal'"),
    ("workload.prompt_tokens", "{fixed: 5, choices: [1]}", "workload.prompt_tokens", "one of uniform"),
    ("workload.prompt_tokens", "{uniform: [9, 3]}", "workload.prompt_tokens", "low <= high"),
    ("workload.prompt_tokens", "{uniform: [1, 2, 3]}", "workload.prompt_tokens.uniform", "at most 2 items"),
    ("workload.prompt_tokens", "{uniform: [1]}", "workload.prompt_tokens.uniform[1]", "is missing"),
    ("workload.prompt_tokens", "{choices: []}", "workload.prompt_tokens.choices", "at least 1 item"),
    ("workload.prompt_tokens", "{choices: [1, two]}", "workload.prompt_tokens.choices[1]", "whole number"),
    ("workload.prompt_tokens.lognormal.p90", "16", "workload.prompt_tokens.lognormal", "median < p90 <= max"),
    ("-workload.prompt_tokens.lognormal.max", "", "workload.prompt_tokens.lognormal.max", "is missing"),
    ("workload.prompt_tokens", "{empirical: []}", "workload.prompt_tokens.empirical", "at least 1 item"),
    ("workload.prompt_tokens", "{empirical: [0]}", "workload.prompt_tokens.empirical[0]", "at least 1"),
    ("workload.prompt_tokens", "{empirical: {}}", "workload.prompt_tokens.empirical", "either lengths"),
    ("workload.prompt_tokens", "{empirical: 5}", "workload.prompt_tokens.empirical", "must be a mapping"),
    ("workload.prompt_tokens", "{empirical: nowhere.txt}", "workload.prompt_tokens.empirical", "no such file"),
    ("workload.prompt_tokens", "{empirical: '/dev/zero'}", "workload.prompt_tokens.empirical", "not a regular file"),
    ("workload.prompt_tokens", '{empirical: "a\\0b"}', "workload.prompt_tokens.empirical", "control character"),
    ("-workload.output_tokens", "", "workload", "output_tokens is missing"),
    ("+workload.shared_prefix", "{num_groups: 2}", "workload.shared_prefix", "either tokens or share"),
    ("+workload.shared_prefix", "{tokens: 2, share: 0.5}", "workload.shared_prefix", "either tokens or share"),
    ("+workload.shared_prefix", "{share: 1.5}", "workload.shared_prefix.share", "at most 1"),
    ("+workload.shared_prefix", "{tokens: 2, num_groups: 0}", "workload.shared_prefix.num_groups", "at least 1"),
    ("+workload.shared_prefix", "0.5", "workload.shared_prefix", "must be a mapping"),
    ("+workload.conversation", "{turns: 3, user_tokens: 5}", "workload", "belongs to interactive"),
    ("+workload.conversation", "{turns: 1, user_tokens: 5}", "workload.conversation.turns", "at least 2"),
    ("+workload.conversation", "{turns: 3}", "workload.conversation.user_tokens", "is missing"),
    ("+workload.conversation", "{turns: 3, user_tokens: no}", "workload.conversation.user_tokens", "whole number"),
    ("+workload.conversation", "{turn: 3, user_tokens: 5}", "workload.conversation.turn", "did you mean 'turns'"),
    ("+workload.trace", "x.jsonl", "workload", "takes no `prompt_tokens` beside a trace"),
    ("+workload.trace", "x.parquet", "workload.trace", "Azure .csv"),
    ("+workload.trace", "x.json", "workload.trace", "needs max_prompt_tokens"),
    ("+workload.trace", "5", "workload.trace", "must be a mapping"),
    ("+workload.trace", "{speed: 2}", "workload.trace.file", "is missing"),
    ("+workload.trace", "{file: x.csv, speed: 0}", "workload.trace.speed", "greater than 0"),
    ("+workload.trace", "{file: x.csv, digest: abc}", "workload.trace.digest", "must match"),
    ("workload", "{scenario: offline, num_requests: 1, trace: x.csv}", "workload.trace", "no such file"),
    ("workload", "{scenario: offline, num_requests: 1, trace: {file: x.csv, speed: 2}}", "workload", "no effect"),
    (
        "workload",
        "{scenario: server, num_requests: 1, trace: {file: x.json, max_prompt_tokens: 1, max_output_tokens: 1}}",
        "workload",
        "needs `arrival`",
    ),
    ("workload.sampling", "greedy", "workload.sampling", "must be a mapping"),
    ("workload.sampling.temperature", "-1", "workload.sampling.temperature", "at least 0"),
    ("+workload.sampling.top_p", "0", "workload.sampling.top_p", "greater than 0"),
    ("workload.sampling", "{top_k: 5}", "workload.sampling", "no effect at temperature 0"),
    ("+workload.seed", "-1", "workload.seed", "at least 0"),
    ("+workload.ignore_eos", "on", "workload.ignore_eos", "must be true or false"),
    ("+workload.min_duration_s", "forever", "workload.min_duration_s", "must be a number"),
    ("+workload.trase", "x.jsonl", "workload.trase", "did you mean 'trace'"),
    ("slo", "[]", "slo", "must be a mapping"),
    ("slo", "null", "slo", "must be a mapping"),
    ("slo.tpot_ms", "50", "slo.tpot_ms", "must be a mapping"),
    ("slo.tpot_ms", "{}", "slo.tpot_ms", "at least 1 item"),
    ("slo.tpot_ms", "{p100: 5}", "slo", "unknown statistic 'p100'"),
    ("slo.tpot_ms", "{median: 5}", "slo", "allowed: a percentile"),
    ("slo.tpot_ms", "{p0: 5}", "slo", "unknown statistic"),
    ("+slo.ttft", "{p99: 5}", "slo.ttft", "did you mean 'ttft_ms'"),
    ("slo.quality.max_kl", "-1", "slo.quality.max_kl", "at least 0"),
    ("+slo.quality.min_retrieval", "90", "slo.quality.min_retrieval", "at most 1"),
    ("+slo.quality.max_ppl", "9", "slo.quality.max_ppl", "unknown key"),
    ("objectives", "[]", "objectives", "must be a list"),
    ("objectives", "tpot_ms", "objectives", "must be a list"),
    ("objectives", "{tpot_ms: p90}", "objectives", "must be a list"),
    ("objectives", "null", "objectives", "must be a list"),
    ("objectives.0", "throughput", "objectives[0]", "did you mean 'throughput_tokens_per_s'"),
    ("objectives.0", "tpot_ms", "objectives[1]", "listed twice"),
    ("objectives.0", "5", "objectives[0]", "must be a metric"),
    ("objectives.0", "null", "objectives[0]", "must be a metric"),
    ("objectives.0", "[tpot_ms]", "objectives[0]", "must be a metric"),
    ("objectives.0", "{tpot_ms: p90, e2e_ms: p50}", "objectives[0]", "must be a metric"),
    ("objectives.1.tpot_ms", "99", "objectives[1].tpot_ms", "text such as p90"),
    ("objectives.1.tpot_ms", "p101", "objectives[1]", "allowed: a percentile"),
    ("objectives.1", "{kv_bytes: p50}", "objectives[1]", "takes no statistic"),
    ("+search_space", "nowhere.yaml", "search_space", "no such file"),
    ("+search_space", "null", "search_space", "path of a search space"),
    ("+search_space", "[a.yaml]", "search_space", "path of a search space"),
    ("+search_space", "''", "search_space", "path of a search space"),
]

SPACE_CASES: list[tuple[str, str, str, str]] = [
    ("+weigths", "{}", "weigths", "did you mean 'weights'"),
    ("+name", "mine", "name", "unknown key"),
    ("dtype", "[]", "dtype", "empty list"),
    ("dtype", "null", "dtype", "plain value"),
    ("dtype", "[bf16, bf16]", "dtype", "listed twice"),
    ("dtype", "[bf61]", "dtype", "did you mean 'bf16'"),
    ("dtype", "[[bf16]]", "dtype", "plain value"),
    ("dtype", "{low: bf16, high: fp32}", "dtype.low", "must be a number"),
    ("dtype", "[16]", "dtype", "unknown dtype"),
    *[("max_batch_size", f"[1, {value}]", "max_batch_size", "") for value in ("0", "-1", "1.5", "true", "on", "2:4")],
    ("max_batch_size", "[1, null]", "max_batch_size", "plain value"),
    ("max_batch_size", "[1, {low: 2, high: 3}]", "max_batch_size", "plain value"),
    ("max_batch_size", "[1, 99999999999999999]", "max_batch_size", "2^50"),
    ("max_step_tokens", "{}", "max_step_tokens.low", "is missing"),
    ("max_step_tokens", "{low: 1}", "max_step_tokens.high", "is missing"),
    ("max_step_tokens", "{min: 1, max: 2}", "max_step_tokens.min", "unknown key of a range"),
    ("max_step_tokens.low", "512", "max_step_tokens", "low < high"),
    ("max_step_tokens.low", "0", "max_step_tokens", "from 1"),
    ("max_step_tokens.low", "true", "max_step_tokens.low", "must be a number"),
    ("max_step_tokens.step", "100", "max_step_tokens.step", "must divide"),
    ("max_step_tokens.step", "0", "max_step_tokens.step", "must divide"),
    ("max_step_tokens.step", "-128", "max_step_tokens.step", "must divide"),
    ("max_step_tokens.step", "0.5", "max_step_tokens.step", "whole number"),
    ("max_step_tokens.step", "1e-300", "max_step_tokens.step", "whole number"),
    ("+max_step_tokens.log", "true", "max_step_tokens.step", "no step"),
    ("+max_step_tokens.log", "yes", "max_step_tokens.log", "true or false"),
    ("max_step_tokens", "{low: 0, high: 5, log: true}", "max_step_tokens.low", "above 0"),
    ("max_step_tokens", "{low: 0.5, high: 5.5}", "max_step_tokens", "whole number"),
    ("weights", "{}", "weights", "must name weight formats"),
    ("weights", "[]", "weights", "must name weight formats"),
    ("weights", "null", "weights", "must name weight formats"),
    ("weights", "4", "weights", "must name weight formats"),
    ("weights", "[native, native]", "weights", "listed twice"),
    ("weights", "[native, {int4: {}}]", "weights", "must name weight formats"),
    ("weights", "itn4", "weights", "did you mean 'int4'"),
    ("weights", "{name: int4}", "weights.name", "unknown weight format"),
    ("+weights.int44", "{}", "weights.int44", "did you mean 'int4'"),
    ("+weights.__init__", "{}", "weights.__init__", "unknown weight format"),
    ("+weights.../../errors", "{}", "weights.", "unknown weight format"),
    ("weights.native", "5", "weights.native", "mapping of knobs"),
    ("weights.native", "[]", "weights.native", "mapping of knobs"),
    ("weights.native", "{group_size: 5}", "weights.native.group_size", "has no knob"),
    ("+weights.int4.groupsize", "[64]", "weights.int4.groupsize", "did you mean 'group_size'"),
    ("weights.int4.group_size", "[]", "weights.int4.group_size", "empty list"),
    ("weights.int4.group_size", "[32, 7]", "weights.int4.group_size", "group_size"),
    ("weights.int4.group_size", "[32, -64]", "weights.int4.group_size", "group_size"),
    ("weights.int4.group_size", "[32, big]", "weights.int4.group_size", "group_size"),
    ("kv", "h2o", "kv", "must be a mapping with policy, codec, place"),
    ("kv", "null", "kv", "must be a mapping"),
    ("kv", "{h2o: {}}", "kv.h2o", "unknown key"),
    ("+kv.policy.snapvk", "{}", "kv.policy.snapvk", "unknown KV policy"),
    ("+kv.policy.pyramid_kv", "{}", "kv.policy.pyramid_kv", "did you mean 'pyramidkv'"),
    ("kv.policy.h2o.kv_budget", "[0.1, 0]", "kv.policy.h2o.kv_budget", "kv_budget"),
    ("kv.policy.h2o.kv_budget", "[0.1, 1.5]", "kv.policy.h2o.kv_budget", "kv_budget"),
    ("kv.policy.h2o.kv_budget", "[0.1, -64]", "kv.policy.h2o.kv_budget", "kv_budget"),
    ("kv.policy.h2o.kv_budget", "[0.1, half]", "kv.policy.h2o.kv_budget", "kv_budget"),
    ("kv.policy.h2o.kv_budget", "{low: 0.1, high: 2.5}", "kv.policy.h2o.kv_budget", "kv_budget"),
    ("+kv.policy.h2o.recent_fraction", "[2.0]", "kv.policy.h2o", "recent_fraction"),
    ("kernels", "fused", "kernels", "must be a mapping with fused, graphs"),
    ("+kernels.graph", "[true]", "kernels.graph", "did you mean 'graphs'"),
    ("kernels.graphs", "[true, 1]", "kernels.graphs", "true or false"),
    ("kernels", "[fused]", "kernels", "must be a mapping with fused"),
    ("kernels", "null", "kernels", "must be a mapping with fused"),
    ("+kernels.fuse", "true", "kernels.fuse", "did you mean 'fused'"),
    ("+kernels.fused ", "true", "kernels.fused ", "did you mean 'fused'"),
    ("kernels.fused", "[]", "kernels.fused", "empty list"),
    ("kernels.fused", "[true, true]", "kernels.fused", "listed twice"),
    *[
        ("kernels.fused", f"[true, {value}]", "kernels.fused", "true or false")
        for value in ("1", "0", "'true'", "yes", "on", "0.5")
    ],
    ("kernels.fused", "[true, null]", "kernels.fused", "plain value"),
    ("kernels.fused", "{low: false, high: true}", "kernels.fused.low", "must be a number"),
    ("kernels.fused", "{low: 0, high: 1}", "kernels.fused", "true or false"),
    ("+kernels.fused", "{torch: {}}", "kernels.fused.torch", "unknown key of a range"),
    ("constraints.0.when", "{kernels.fused: 1}", "constraints[0].when.kernels.fused", "true or false"),
    ("constraints.0.when", "{kernels.fused: {min: 1}}", "constraints[0].when.kernels.fused", "has no order"),
    ("constraints.0.when", "{kernels: true}", "constraints[0].when.kernels", "unknown name"),
    ("constraints", "{}", "constraints", "must be a list"),
    ("constraints", "null", "constraints", "must be a list"),
    ("constraints.0", "weights", "constraints[0]", "{when, reason}"),
    ("-constraints.0.reason", "", "constraints[0].reason", "is missing"),
    ("-constraints.0.when", "", "constraints[0].when", "is missing"),
    ("+constraints.0.because", "x", "constraints[0].because", "unknown key"),
    ("constraints.0.reason", "''", "constraints[0].reason", "say why"),
    ("constraints.0.reason", "true", "constraints[0].reason", "say why"),
    ("constraints.0.when", "{}", "constraints[0].when", "mapping of names"),
    ("constraints.0.when", "[weights]", "constraints[0].when", "mapping of names"),
    ("constraints.0.when.weights", "int9", "constraints[0].when.weights", "unknown weight format"),
    ("constraints.0.when.weights", "{min: 4}", "constraints[0].when.weights", "has no order"),
    ("constraints.0.when.weights", "[]", "constraints[0].when.weights", "never holds"),
    ("constraints.0.when.weights", "null", "constraints[0].when.weights", "plain value"),
    ("constraints.0.when.dtype", "fp8", "constraints[0].when.dtype", "unknown dtype"),
    ("constraints.0.when.dtype", "{not: []}", "constraints[0].when.dtype.not", "never holds"),
    ("+constraints.0.when.wieghts", "int4", "constraints[0].when.wieghts", "did you mean 'weights'"),
    ("constraints.0.when", "{weights.int4.size: 4}", "constraints[0].when.weights.int4.size", "has no knob"),
    ("constraints.0.when", "{weights.int9.size: 4}", "constraints[0].when.weights.int9.size", "unknown weight format"),
    ("constraints.0.when", "{max_batch_size: {min: a}}", "constraints[0].when.max_batch_size.min", "must be a number"),
    ("constraints.0.when", "{max_batch_size: {min: 4, max: 2}}", "constraints[0].when.max_batch_size", "above max"),
    ("constraints.0.when", "{max_batch_size: {mni: 4}}", "constraints[0].when.max_batch_size.mni", "mean 'min'"),
    ("constraints.0.when", "{max_batch_size: {}}", "constraints[0].when.max_batch_size", "one of"),
    ("constraints.0.when", "{max_batch_size: 2.5}", "constraints[0].when.max_batch_size", "whole number"),
]

CONFIG_CASES: list[tuple[str, str, str, str]] = [
    ("+dtyp", "fp32", "dtyp", "did you mean 'dtype'"),
    ("dtype", "float32", "dtype", "known: bf16, fp16, fp32"),
    ("dtype", "32", "dtype", "unknown dtype"),
    ("dtype", "null", "dtype", "unknown dtype"),
    *[("max_batch_size", value, "max_batch_size", "whole number") for value in NOT_A_COUNT if value[0] not in "[{9"],
    ("weights", "null", "weights", "must be a weight format"),
    ("weights", "4", "weights", "must be a weight format"),
    ("weights", "itn4", "weights", "did you mean 'int4'"),
    ("weights", "'../errors'", "weights", "unknown weight format"),
    ("weights.name", "4", "weights", "must be a weight format"),
    ("weights.name", "''", "weights", "unknown weight format"),
    ("weights.group_size", "7", "weights", "group_size"),
    ("weights.group_size", "null", "weights.group_size", "plain value"),
    ("weights.group_size", "[64]", "weights.group_size", "plain value"),
    ("+weights.group_sise", "64", "weights", "did you mean 'group_size'"),
    ("+kv.polizy", "full", "kv.polizy", "did you mean 'policy'"),
    ("kv", "null", "kv", "must be a mapping"),
    ("kv", "full", "kv", "must be a mapping"),
    ("kv.codec", "nativ", "kv.codec", "did you mean 'native'"),
    ("+kv.place", "offlaod", "kv.place", "did you mean 'offload'"),
    ("+kv.place", "{name: offload, folder: /tmp}", "kv.place", "has no knob 'folder'"),
    ("+kv.plaze", "device", "kv.plaze", "did you mean 'place'"),
    ("kv.policy.kv_budget", "0", "kv.policy", "kv_budget"),
    ("kv.policy.kv_budget", "true", "kv.policy", "kv_budget"),
    ("kv.policy.kv_budget", "2:4", "kv.policy", "kv_budget"),
    ("kernels", "true", "kernels", "must be a mapping with fused, graphs"),
    ("kernels.graphs", "'true'", "kernels.graphs", "must be true or false"),
    ("kernels", "null", "kernels", "must be a mapping with fused"),
    ("+kernels.fuse", "true", "kernels.fuse", "did you mean 'fused'"),
    *[
        ("kernels.fused", value, "kernels.fused", "must be true or false")
        for value in ("1", "0", "'true'", "yes", "null", "[true]", "{}")
    ],
    ("+scheduler", "{name: continuous, speed: 9}", "scheduler", "has no knob"),
    ("+attention", "flash9", "attention", "known:"),
]

# Whole files that are nothing at all; the loader's own refusals are in test_yaml.py.
NOTHING = ("", "# nothing", "null", "5", "on", "[]", "[a, b]", "text", "'{}'", "{}", "a: 1", "hardwrae: {}", "--- ''")


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    text: str
    key: str
    says: str


def cases() -> dict[str, Case]:
    """Readable name -> case."""
    found = {}
    for kind, base, table in (
        ("profile", PROFILE, PROFILE_CASES),
        ("space", SPACE, SPACE_CASES),
        ("config", CONFIG, CONFIG_CASES),
    ):
        for place, value, key, says in table:
            found[f"{kind} {place}: {value[:40]}"] = Case(kind, _with(base, place, value), key, says)
    return found


def _with(base: dict[str, Any], place: str, value: str) -> str:
    """The base document as YAML with the raw text `value` at `place`."""
    marker = "MARKER_OF_THE_VALUE"
    path = place.lstrip("+-").split(".") if "../" not in place else ["weights", place.partition(".")[2]]
    return dump_yaml(_changed(base, path, marker, remove=place.startswith("-"))).replace(marker, value)


def _changed(node: Any, path: list[str], marker: str, *, remove: bool) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        items = list(node)
        items[int(head)] = _changed(items[int(head)], rest, marker, remove=remove) if rest else marker
        return items
    changed = dict(node)
    if rest:
        changed[head] = _changed(node[head], rest, marker, remove=remove)
    elif remove:
        del changed[head]
    else:
        changed[head] = marker
    return changed
