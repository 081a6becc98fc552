"""The Llama architecture, small, for training the pair and timing it on its own; the engine has its own model code.

Parameter names are Hugging Face's, so a checkpoint is the state dict in bf16. Shapes: B sequences, T tokens, C hidden
size, H query heads, K KV heads, D head size, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one model; the names are those of Hugging Face's `config.json`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int = 64
    vocab_size: int = 4096
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True


TARGET = Shape(
    hidden_size=256,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    tie_word_embeddings=False,
)
"""Deep and thin, with a vocabulary matrix at each end: on two CPU cores the body's products are what training costs,
and a draft of two layers costs about two tenths of a step."""
DRAFT = Shape(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=160)


def training_dtype() -> torch.dtype:
    """What matrix products of a training step are made in: bf16 where the CPU multiplies it in hardware."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_size, kv_size = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, cache: "LayerCache | None") -> Tensor:
        (batch, num_tokens, _), size = x.shape, self.shape.head_dim
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        heads = F.linear(x, weight).view(batch, num_tokens, -1, size).transpose(1, 2)
        num_q, num_kv = self.shape.num_attention_heads, self.shape.num_key_value_heads
        rotated = rotate(heads[:, : num_q + num_kv], rotation)
        query, key, value = rotated[:, :num_q], rotated[:, num_q:], heads[:, num_q + num_kv :]
        if cache is not None:
            key, value = cache.append(key, value)
        group = num_q // num_kv
        if num_tokens == 1:  # the whole cache is visible: the query group becomes query rows
            query = query.reshape(batch, num_kv, group, size)
            out = F.scaled_dot_product_attention(query, key, value).reshape(batch, num_q, 1, size)
        elif key.shape[2] == num_tokens:
            out = causal_attention(query, key, value)
        else:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            mask = torch.ones(num_tokens, key.shape[2], dtype=torch.bool).tril(key.shape[2] - num_tokens)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return F.linear(out.transpose(1, 2).reshape(batch, num_tokens, -1), self.o_proj.weight)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, H, T, D].

    One block of query rows after the other, each against the keys up to its end. On CPUs the matrix products of this
    form train faster than `scaled_dot_product_attention`, whose backward pass reaches a seventh of their rate.
    """
    batch, num_q, num_tokens, size = query.shape
    num_kv = key.shape[1]
    query = query.view(batch, num_kv, num_q // num_kv, num_tokens, size) * size**-0.5
    blocks = []
    block = max(128, num_tokens // 4)
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        rows = query[:, :, :, start:end].reshape(batch, num_kv, -1, size)
        scores = (rows @ key[:, :, :end].mT).view(batch, num_kv, -1, end - start, end).float()
        weights = (scores + torch.full((end - start, end), float("-inf")).triu(start + 1)).softmax(-1).to(value.dtype)
        out = weights.view(batch, num_kv, -1, end) @ value[:, :, :end]
        blocks.append(out.view(batch, num_q, end - start, size))
    return torch.cat(blocks, 2)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, rotation: Tensor, cache: "LayerCache | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """`forward` gives logits, `hidden` stops before the vocabulary."""

    rotation: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        if not shape.tie_word_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.register_buffer("rotation", rotation_table(shape), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.num_hidden_layers) if is_output else 1))

    def hidden(self, token_ids: Tensor, caches: "list[LayerCache] | None" = None) -> Tensor:
        """token_ids [B, T] -> [B, T, C], already normalised. With caches the tokens follow what the caches hold."""
        start = caches[0].num_tokens if caches else 0
        x: Tensor = self.model.embed_tokens(token_ids)
        rotation = self.rotation[:, start : start + token_ids.shape[1]]
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rotation, caches[index] if caches else None)
        normalised: Tensor = self.model.norm(x)
        return normalised

    def forward(self, token_ids: Tensor, caches: "list[LayerCache] | None" = None) -> Tensor:
        """token_ids [B, T] -> logits [B, T, V]."""
        return F.linear(self.hidden(token_ids, caches), self.vocabulary)

    @property
    def vocabulary(self) -> Tensor:
        """[V, C]: the rows that score the next token."""
        return self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight

    def new_caches(self, batch: int, capacity: int) -> "list[LayerCache]":
        return [LayerCache(self.shape, batch, capacity) for _ in range(self.shape.num_hidden_layers)]

    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


class LayerCache:
    """Keys and values of one layer, [B, K, capacity, D]; all sequences hold the same number of tokens."""

    def __init__(self, shape: Shape, batch: int, capacity: int) -> None:
        self.key = torch.zeros(batch, shape.num_key_value_heads, capacity, shape.head_dim)
        self.value = torch.zeros_like(self.key)
        self.num_tokens = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.num_tokens + key.shape[2]
        self.key[:, :, self.num_tokens : end] = key
        self.value[:, :, self.num_tokens : end] = value
        self.num_tokens = end
        return self.key[:, :, :end], self.value[:, :, :end]


@torch.no_grad()
def greedy_continuations(model: Llama, prompts: Tensor, num_tokens: int) -> Tensor:
    """prompts [B, T] -> [B, T + num_tokens]: each continued with the first choices; an end of text ends nothing."""
    caches = model.new_caches(prompts.shape[0], prompts.shape[1] + num_tokens)
    ids, last = [prompts], prompts
    for _ in range(num_tokens):
        last = (model.hidden(last, caches)[:, -1:] @ model.vocabulary.T).argmax(-1)
        ids.append(last)
    return torch.cat(ids, 1)


def rotation_table(shape: Shape) -> Tensor:
    """[2, max positions, D]: cosines and sines, the sines' first half negated: `rotate` is two products and a swap."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.max_position_embeddings, dtype=torch.float64), frequencies)
    cosines, sines = angles.cos().float(), angles.sin().float()
    return torch.stack([torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)])


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """heads [B, H, T, D] turned to their positions; halves are paired as in Hugging Face's Llama."""
    first, second = heads.chunk(2, -1)
    return heads * rotation[0] + torch.cat([second, first], -1) * rotation[1]


def save_pretrained(model: Llama, folder: Path, *, end_of_text_id: int) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors` (bf16) as Hugging Face would."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "pad_token_id": end_of_text_id,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_pretrained(folder: Path) -> Llama:
    """The model in `folder`, weights widened to fp32."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval()
