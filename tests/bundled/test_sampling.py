import numpy as np
import pytest
from tokenizers import Tokenizer

from codesign.bundled import target_path
from codesign.bundled.sampling import RECALLED_WEIGHT, Sampler

TOKENIZER = Tokenizer.from_file(str(target_path() / "tokenizer.json"))


def sampler(seed: int = 0) -> Sampler:
    filler = np.full(5000, TOKENIZER.encode(" self").ids[0], dtype=np.uint16)
    made = Sampler(filler, TOKENIZER)
    made.rng.seed(seed)
    return made


@pytest.mark.parametrize(("retrieval", "repeat"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_every_kind_of_sequence_has_the_asked_length(retrieval: float, repeat: float) -> None:
    batch = sampler().batch(5, 256, retrieval=retrieval, repeat=repeat)

    assert batch.token_ids.shape == batch.labels.shape == batch.weights.shape == (5, 256)


def test_every_recalled_number_was_told_before() -> None:
    text = TOKENIZER.decode(sampler().batch(1, 1024, retrieval=1.0, repeat=0.0).token_ids[0].tolist())
    for recalled in text.split("# recall ")[1:-1]:
        line = recalled.split("\n")[0]

        assert f"# key {line}\n" in text[: text.index(f"# recall {line}")]


def test_only_recalled_digits_weigh_more_than_text() -> None:
    batch = sampler().batch(2, 512, retrieval=1.0, repeat=0.0)
    heavy = batch.labels[batch.weights == RECALLED_WEIGHT].tolist()

    assert heavy
    assert all(TOKENIZER.id_to_token(token).isdigit() for token in heavy)
