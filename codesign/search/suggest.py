"""From a search space to a configuration, by whatever picks: Optuna, a random generator, a given configuration.

`SearchSpace.build(pick)` walks the tree of choices and asks `pick(name, domain)` for each knob that the choices so far
make real, so a knob of int4 exists only where int4 was chosen. A `Point` keeps what was picked beside what came out.

A list of numbers is an ordered scale, and Optuna is told so: it sees the place in the sorted list, not an unordered
category, and can learn that 16 lies between 8 and 32.
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from codesign.errors import InputError
from codesign.spec.domain import Domain, Values
from codesign.spec.engine_config import EngineConfig, Scalar
from codesign.spec.space import Pick, SearchSpace

_LOOKED_AT = 300


@dataclasses.dataclass(frozen=True)
class Point:
    """A configuration and the picks that led to it.

    Attributes:
        config: resolved, unless it is refused.
        params: knob name -> value as Optuna stores it.
        distributions: knob name -> what it was drawn from; the same keys.
        refusal: why it may not be built, or None.
    """

    config: EngineConfig
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Points:
    """The points of a space.

    Args:
        max_model_len: what the workload needs, where the space itself does not say.
        refuse: why a resolved configuration makes no sense in this study, beside what the space itself rules out.
    """

    space: SearchSpace
    max_model_len: int | None = None
    refuse: Callable[[EngineConfig], str | None] = lambda config: None

    def suggested(self, trial: optuna.Trial) -> Point:
        """The point that Optuna suggests for `trial`."""

        def pick(name: str, domain: Domain) -> Scalar:
            match distribution_of(domain):
                case CategoricalDistribution(choices=choices):
                    stored = trial.suggest_categorical(name, choices)
                case IntDistribution() as whole:
                    stored = trial.suggest_int(name, whole.low, whole.high, step=whole.step, log=whole.log)
                case FloatDistribution() as real:
                    stored = trial.suggest_float(name, real.low, real.high, step=real.step, log=real.log)
            return decode(domain, stored)

        return self._point(pick)

    def drawn(self, rng: random.Random) -> Point:
        """A point drawn at random, each knob on its own."""
        return self.completed({}, rng)

    def completed(self, params: Mapping[str, Any], rng: random.Random) -> Point:
        """The point with these picks, in Optuna's form, as far as it has those knobs; its others drawn at random."""
        return self._point(lambda name, domain: decode(domain, params[name]) if name in params else _draw(domain, rng))

    def baseline(self) -> Point:
        """The unmodified configuration."""
        return self.located(self.space.default(self.max_model_len).resolve())

    def located(self, config: EngineConfig) -> Point:
        """A given resolved configuration with the picks that lead to it, as far as the space offers them.

        A value that the space does not offer has no pick, nor have the knobs below it.
        """
        values = config.flat()
        found: dict[str, tuple[Domain, Scalar]] = {}

        def pick(name: str, domain: Domain) -> Scalar:
            value = values.get(name)
            if value is not None and value in domain:
                found[name] = (domain, value)
                return value
            return domain.examples[0]

        self.space.build(pick)
        return Point(
            config,
            {name: encode(domain, value) for name, (domain, value) in found.items()},
            {name: distribution_of(domain) for name, (domain, _) in found.items()},
        )

    def all(self) -> Iterator[Point]:
        """Every point, the first knob slowest. Raises ValueError where a range is continuous.

        Walks the tree by replaying it with one more choice changed each time: an odometer whose wheels depend on the
        wheels before them.
        """
        wheels: list[int] = []
        while True:
            sizes: list[int] = []

            def pick(name: str, domain: Domain, sizes: list[int] = sizes) -> Scalar:
                values = members(domain)
                if len(sizes) == len(wheels):
                    wheels.append(0)
                sizes.append(len(values))
                return values[wheels[len(sizes) - 1]]

            yield self._point(pick)
            while wheels and wheels[-1] == sizes[len(wheels) - 1] - 1:
                wheels.pop()
            if not wheels:
                return
            wheels[-1] += 1

    def ruled_out(self) -> tuple[int, dict[str, int]]:
        """(how many points were looked at, reason -> how many of them it rules out), the most frequent reason first.

        A small space is looked at whole, of another a sample.
        """
        size, rng = self.space.size, random.Random(0)
        is_small = size is not None and size <= _LOOKED_AT
        looked_at = list(self.all()) if is_small else [self.drawn(rng) for _ in range(_LOOKED_AT)]
        reasons = collections.Counter(point.refusal for point in looked_at if point.refusal is not None)
        return len(looked_at), dict(reasons.most_common())

    def _point(self, pick: Pick) -> Point:
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}

        def recording(name: str, domain: Domain) -> Scalar:
            value = pick(name, domain)
            params[name], distributions[name] = encode(domain, value), distribution_of(domain)
            return value

        config = self.space.build(recording, max_model_len=self.max_model_len)
        try:
            config = config.resolve()
        except InputError as error:  # knobs that their member refuses only together
            return Point(config, params, distributions, str(error))
        return Point(config, params, distributions, self.space.refusal(config) or self.refuse(config))


def distribution_of(domain: Domain) -> BaseDistribution:
    """The domain in Optuna's words."""
    if isinstance(domain, Values):
        scale = _scale(domain)
        return CategoricalDistribution(domain.values) if scale is None else IntDistribution(0, len(scale) - 1)
    if domain.is_integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def encode(domain: Domain, value: Scalar) -> Any:
    """A value of the domain as Optuna stores it."""
    scale = _scale(domain)
    return value if scale is None else scale.index(value)


def decode(domain: Domain, stored: Any) -> Scalar:
    """The reverse of `encode`."""
    scale = _scale(domain)
    value: Scalar = stored if scale is None else scale[stored]
    return value


def members(domain: Domain) -> tuple[Scalar, ...]:
    """Every value of a finite domain.

    Raises:
        ValueError: a range of real numbers without a step.
    """
    if isinstance(domain, Values):
        return domain.values
    if domain.is_integer:
        return tuple(range(int(domain.low), int(domain.high) + 1, int(domain.step or 1)))
    if domain.step is None:
        raise ValueError("a continuous range has no list of members")
    count = int((domain.high - domain.low) / domain.step + 1e-9) + 1
    return tuple(domain.low + index * domain.step for index in range(count))


def _scale(domain: Domain) -> tuple[int | float, ...] | None:
    """The sorted numbers of a list of numbers of one kind; None for anything else."""
    if not isinstance(domain, Values) or len(domain.values) < 2:
        return None
    for kind in (int, float):
        if all(type(value) is kind for value in domain.values):
            return tuple(sorted(cast(tuple[float, ...], domain.values)))
    return None


def _draw(domain: Domain, rng: random.Random) -> Scalar:
    if isinstance(domain, Values) or domain.step is not None or (domain.is_integer and not domain.log):
        return rng.choice(members(domain))
    low, high = float(domain.low), float(domain.high)
    value = low * (high / low) ** rng.random() if domain.log else rng.uniform(low, high)
    return min(max(round(value), domain.low), domain.high) if domain.is_integer else value
