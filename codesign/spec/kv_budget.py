"""kv_budget as a person writes it, a number of tokens or a fraction of `max_model_len`, in tokens."""


def kv_budget_tokens(kv_budget: int | float, max_model_len: int) -> int:
    """Tokens in 1..max_model_len; a fraction is rounded to the nearest token, a larger budget keeps everything."""
    tokens = kv_budget if isinstance(kv_budget, int) else int(kv_budget * max_model_len + 0.5)
    return max(1, min(tokens, max_model_len))
