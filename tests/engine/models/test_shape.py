from typing import Any

import pytest

from codesign.engine.models.assemble import all_shapes
from codesign.engine.models.shape import ARCHITECTURES, read_shape
from codesign.engine.models.tiny import tiny_config
from codesign.errors import CodesignError, InputError, Unsupported
from tests.engine.models.transformers_peer import peer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_number_of_parameters_is_that_of_transformers(architecture: str, tied: bool) -> None:
    shape = read_shape(tiny_config(architecture, tie_word_embeddings=tied))

    assert shape.num_parameters == peer(architecture, tie_word_embeddings=tied).num_parameters()


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_tensor_names_and_shapes_are_those_of_transformers(changes: dict[str, Any]) -> None:
    model = peer("LlamaForCausalLM", **changes)

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert dict(all_shapes(read_shape(tiny_config(**changes)))) == expected


def test_unknown_architecture_names_the_four() -> None:
    with pytest.raises(Unsupported) as caught:
        read_shape({**tiny_config(), "architectures": ["Gemma3ForCausalLM"]})

    assert "Gemma3ForCausalLM" in str(caught.value)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_model_type_is_enough() -> None:
    plain = tiny_config("Qwen3ForCausalLM")
    del plain["architectures"]

    assert read_shape(plain).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "su"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_other_rope_scalings_are_refused_by_name(kind: str, spelling: str) -> None:
    with pytest.raises(Unsupported, match=f"{kind}.*supported: default, linear, llama3, yarn"):
        read_shape({**tiny_config(), spelling: {"type": kind, "factor": 2.0}})


def test_other_activation_and_partial_rotation_are_refused() -> None:
    with pytest.raises(Unsupported, match="gelu"):
        read_shape({**tiny_config(), "hidden_act": "gelu"})
    with pytest.raises(Unsupported, match="partial_rotary_factor"):
        read_shape({**tiny_config(), "partial_rotary_factor": 0.5})


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        (("MistralForCausalLM", {"sliding_window": 64}), 64),
        (("MistralForCausalLM", {"sliding_window": None}), None),
        (("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": False}), None),
        (("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}), 64),
        (("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}), None),
        (("Qwen3ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}), 64),
    ],
)
def test_sliding_window_is_read_as_transformers_reads_it(
    changes: tuple[str, dict[str, Any]], window: int | None
) -> None:
    architecture, keys = changes

    assert read_shape(tiny_config(architecture, **keys)).sliding_window == window


def test_mistral_without_the_key_has_the_default_window_of_transformers() -> None:
    plain = tiny_config("MistralForCausalLM")
    del plain["sliding_window"]

    assert read_shape(plain).sliding_window == 4096


def test_context_counts_rope_scaling() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

    assert read_shape(tiny_config()).max_positions == 512
    assert read_shape(tiny_config(rope_scaling={"type": "linear", "factor": 2.0})).max_positions == 1024
    assert read_shape(tiny_config(rope_scaling=yarn)).max_positions == 2048
    assert read_shape(tiny_config(rope_scaling=llama3)).max_positions == 512


HOSTILE = [
    ("vocab_size", None),
    ("vocab_size", "128"),
    ("vocab_size", True),
    ("vocab_size", -1),
    ("vocab_size", 10**30),
    ("hidden_size", 64.5),
    ("hidden_size", 10**5000),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", []),
    ("num_attention_heads", 7),
    ("num_key_value_heads", 3),
    ("head_dim", 15),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", float("inf")),
    ("rope_theta", 0),
    ("rope_theta", float("nan")),
    ("rope_scaling", "linear"),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "linear", "factor": 0}),
    ("rope_scaling", {"type": ["linear"], "factor": 2}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4, "beta_fast": 0}),
    ("tie_word_embeddings", "yes"),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [1]),
    ("architectures", ["LlamaForCausalLM", "Qwen2ForCausalLM"]),
    ("max_position_embeddings", 0),
    ("hidden_act", 3),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda value: repr(value)[:40] if value != 10**5000 else "huge")
def test_impossible_values_name_the_key(key: str, value: object) -> None:
    with pytest.raises(CodesignError) as caught:
        plain = tiny_config(**{key: value})
        if key in ("num_attention_heads", "hidden_size"):
            plain["head_dim"], plain["num_key_value_heads"] = None, 1
        read_shape(plain, file="dir/config.json")

    assert isinstance(caught.value, InputError | Unsupported)
    assert len(str(caught.value)) < 400
    if isinstance(caught.value, InputError):
        assert caught.value.file == "dir/config.json"
        assert caught.value.key is not None and caught.value.key.split(".")[0] == key
