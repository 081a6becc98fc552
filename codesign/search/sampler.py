"""Which sampler asks for the next configuration, and why.

Optuna's TPE: it copes with conditional and categorical knobs, several objectives and constraints, and is useful from
the tenth trial on, which is the budget that real builds allow. Knobs are drawn one by one (`multivariate=False`):
the joint variant needs a search space that stays the same from trial to trial, and ours is conditional. Infeasible
trials are told with constraint values, so that TPE learns to stay away; trials told as failed it would not see.

The seed is derived from the study's seed and the place of the draw, so that a study that was killed and resumed draws
what it would have drawn, instead of repeating the first draws of its generator.
"""

import hashlib

import optuna

NUM_STARTUP_TRIALS = 10


def make_sampler(seed: int, *place: int) -> optuna.samplers.TPESampler:
    """A sampler for one draw.

    Args:
        seed: of the study.
        place: e.g. record number and how many draws were rejected for it.
    """
    return optuna.samplers.TPESampler(
        n_startup_trials=NUM_STARTUP_TRIALS,
        multivariate=False,
        seed=derived_seed(seed, *place),
    )


def derived_seed(seed: int, *place: int) -> int:
    """A 32-bit seed that is unrelated for different places."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
