"""What a kv_budget must be, what must fit in it, and its split over layers."""

from collections.abc import Sequence


def check_kv_budget(kv_budget: int | float) -> None:
    """Raises ValueError unless it is a whole number of tokens >= 1 or a fraction in (0, 1]."""
    is_tokens = isinstance(kv_budget, int) and not isinstance(kv_budget, bool) and kv_budget >= 1
    is_fraction = isinstance(kv_budget, float) and 0 < kv_budget <= 1
    if not (is_tokens or is_fraction):
        raise ValueError(
            f"kv_budget must be a whole number of tokens (at least 1) or a fraction in (0, 1], got {kv_budget!r}"
        )


def check_tokens(name: str, value: int, *, least: int = 0) -> None:
    """Raises ValueError unless `value` is a whole number >= `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_room(name: str, kv_budget: int | float, tokens: int, protected: int, max_model_len: int) -> None:
    """Raises ValueError when `tokens` leave nothing to evict beside `protected` rows, unless everything is kept."""
    if tokens <= protected and tokens < max_model_len:
        raise ValueError(
            f"{name}: kv_budget {kv_budget!r} is {tokens} tokens per layer and head at max_model_len {max_model_len}, "
            f"{protected} of them are never evicted; allow at least {protected + 1}"
        )


def exact_budgets(wanted: Sequence[float], *, total: int, least: int, most: int) -> tuple[int, ...]:
    """Whole numbers near `wanted` in [least, most] whose sum is exactly `total`.

    What clamping takes from some layers or gives to them, all others share alike: k_l = clamp(wanted_l + shift). Then
    largest remainders, so the order of the layers is kept.

    Raises:
        ValueError: `total` cannot be reached within the limits.
    """
    if not len(wanted) * least <= total <= len(wanted) * most:
        raise ValueError(f"{len(wanted)} budgets in [{least}, {most}] cannot sum to {total}")

    def clamped(shift: float) -> list[float]:
        return [min(max(value + shift, least), most) for value in wanted]

    low, high = least - max(wanted), most - min(wanted)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clamped(middle)) < total else (low, middle)
    real = clamped(high)
    budgets = [int(value) for value in real]
    by_remainder = sorted(range(len(real)), key=lambda layer: (budgets[layer] - real[layer], layer))
    for layer in by_remainder[: total - sum(budgets)]:
        budgets[layer] += 1
    return tuple(budgets)
