"""A KV cache filled without a model: every slot gets one random prompt, kept and stored as one that has ended."""

import torch
from torch import Tensor

from codesign.engine.attention.layer import Attention
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.policy import KVPolicy, Prompt


def fill(attention: Attention, num_tokens: int, *, num_heads: int) -> None:
    """`num_tokens` into every empty slot; the same rows in all of them."""
    store, policy, generator = attention.store, attention.policy, torch.Generator().manual_seed(0)
    num_kv_heads, head_dim = store.groups[0].key[0].shape[2], store.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, head_dim, generator=generator).to(store.device, store.dtype)

    prompt = Prompt(
        key=draw(num_kv_heads, num_tokens),
        value=draw(num_kv_heads, num_tokens),
        window_query=draw(num_heads, policy.window_tokens) if policy.evidence == "window_queries" else None,
        column_sums=torch.rand(num_kv_heads, num_tokens, generator=generator).to(store.device),
        scale=head_dim**-0.5,
    )
    for group in store.groups:
        kept = chosen(policy, group, prompt)
        for index in range(len(group.layers)):
            for slot in range(len(store.num_tokens)):
                group.admit(index, slot, prompt, kept)
    for slot in range(len(store.num_tokens)):
        store.append(slot, num_tokens)


def chosen(policy: KVPolicy, group: LayerGroup, prompt: Prompt) -> Tensor | None:
    """The rows that `admit` is given: the policy's choice, or None for all."""
    num_heads, num_tokens, _ = prompt.key.shape
    num_rows = group.rows_after(num_tokens)
    if num_rows == num_tokens:
        return None
    if policy.needs_keys:  # r_kv's T x T cosines are a cost of the prompt, minutes at 32k; here any rows will do
        return torch.arange(num_tokens - num_rows, num_tokens, device=prompt.key.device).expand(num_heads, -1)
    return policy.select(prompt, num_rows)


def beside_rows(parts: list[Attention]) -> dict[str, int]:
    """Bytes beside the rows that a policy keeps or a codec encodes; its newest rows, native, among them."""
    names = ("pending scores", "sinks", "recent queries", "victims")
    found: dict[str, int] = {}

    def add(name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.numel():
            found[name] = found.get(name, 0) + tensor.untyped_storage().nbytes()

    for part in parts:
        if part.codec.group_size:  # the newest rows, which are not encoded yet
            for tensor in (*part.store.key, *part.store.value):
                add("newest rows", tensor)
        add("positions", part.store.position)
        add("scores", part.store.column)
        for group in part.store.groups:
            for name, tensor in zip(names, group.beside, strict=True):
                add(name, tensor)
    return found
