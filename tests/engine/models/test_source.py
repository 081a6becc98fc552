import huggingface_hub
import pytest

from codesign.engine.models.source import resolve
from codesign.errors import InputError, WorkError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "revision", ["", "main", "v1.0", REVISION[:39], REVISION + "0", REVISION.upper(), "../" + REVISION]
)
def test_only_a_full_commit_hash_is_a_revision(revision: str) -> None:
    with pytest.raises(InputError, match="40 hex digits"):
        resolve("owner/model", revision)


@pytest.mark.parametrize("name", ["owner/model/more", "a" * 200, "own er/model", "../model"])
def test_what_is_no_model_id_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match="not a model id"):
        resolve(name, REVISION)


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(WorkError, match=r"owner/model at 0123456789ab.*local directory"):
        resolve("owner/model", REVISION)
