"""A model id of the Hugging Face hub, at one exact revision, to a local directory."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from codesign.errors import InputError, WorkError

_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "chat_template.jinja"]


def resolve(name: str, revision: str) -> Path:
    """The directory with the model's files, downloaded once and then taken from the hub's cache.

    Only weights as safetensors, JSON, tokenizer files and the chat template are fetched.

    Args:
        name: "owner/model".
        revision: full commit hash, because branches and tags move and a record must name what was measured.
    Raises:
        InputError: not a commit hash, or not a model id.
        WorkError: no network, no such model, no access.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(
            f"model {name!r} needs a full commit hash (40 hex digits) as revision, got {revision!r:.80}", key="revision"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except HFValidationError as error:
        raise InputError(f"{name!r:.120} is not a model id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise WorkError(
            f"model {name} at {revision[:12]} cannot be downloaded: {type(error).__name__} {str(error).strip():.300}; "
            "check the name, the revision and the network, or give a local directory"
        ) from error
