import dataclasses

import pytest

from codesign.engine.kernels.triton.configs import (
    ROW_BUCKETS,
    Config,
    Plan,
    Problem,
    candidates,
    default,
    load_tuned,
    plan,
)

PROBLEMS = [
    Problem("w8a16", "bf16", 4096, 14336),
    Problem("w8a16", "fp32", 48, 16),
    Problem("w4a16", "bf16", 4096, 4096, 128),
    Problem("w2a16", "fp16", 128256, 4096, 16),
    Problem("nf4", "bf16", 14336, 4096, 64),
]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bucket", ROW_BUCKETS)
def test_every_candidate_can_be_launched(problem: Problem, bucket: int) -> None:
    configs = candidates(problem, bucket)

    assert configs[0] == default(problem, bucket)
    assert len(configs) == len(set(configs))
    for config in configs:
        assert min(config.block_m, config.block_n, config.block_k) >= 16  # what tl.dot takes
        sizes = (config.block_m, config.block_n, config.block_k, config.split_k, config.num_warps)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert problem.group_size is None or problem.group_size % config.block_k == 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_splits_fill_the_device_and_leave_each_some_blocks(problem: Problem) -> None:
    config = default(problem, 16)
    tiles, blocks = -(-problem.num_out // config.block_n), -(-problem.num_in // config.block_k)

    assert config.split_k == 1 or (tiles * config.split_k < 512 and blocks // config.split_k >= 4)
    assert default(problem, 1024).split_k == 1 or problem.dtype == "fp32"


def test_a_config_comes_back_from_its_words() -> None:
    config = Config(block_m=16, block_n=32, block_k=128, split_k=4, num_warps=8, num_stages=5)

    assert Config.parse(str(config)) == config
    with pytest.raises(ValueError, match="not a kernel config"):
        Config.parse("16x32 split 4")


def test_rows_go_to_the_smallest_bucket_that_holds_them() -> None:
    small, large = Config(block_m=16, block_n=32, block_k=32), Config(block_m=64, block_n=32, block_k=32)
    chosen = Plan(((16, small), (64, large)), "")

    assert [chosen.config(num_rows) for num_rows in (1, 16, 17, 64, 900)] == [small, small, large, large, large]


def test_a_plan_says_what_runs_and_whether_anyone_measured_it() -> None:
    problem = PROBLEMS[2]
    fastest = dataclasses.replace(default(problem, 16), num_stages=5)
    in_part = {"GPU": {problem.key(16): str(fastest)}}
    in_full = {"GPU": {**in_part["GPU"], problem.key(64): str(default(problem, 64))}}

    partly = plan(problem, max_rows=64, device_name="GPU", tuned=in_part)

    assert partly.config(1) == fastest
    assert partly.note == f"{fastest} to M=16; {default(problem, 64)} to M=64; in part tuned on GPU"
    assert plan(problem, max_rows=64, device_name="GPU", tuned=in_full).note.endswith("; tuned on GPU")
    assert plan(problem, max_rows=64, device_name="other", tuned=in_full).note.endswith("; not tuned on other")


def test_the_recorded_choices_can_be_read() -> None:
    for known in load_tuned().values():
        for words in known.values():
            assert str(Config.parse(words)) == words
