"""Where a checkpoint lies: the built-in one, a folder, or a model of the Hugging Face hub."""

import os
import re
from pathlib import Path
from threading import Thread

from trocr_fast.errors import CheckpointError, UsageError

BUILTIN = Path(__file__).parent / "builtin"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # neither ./NAME nor ../NAME, which are folders
_SMALL_FILES = ["*.json", "*.txt", "*.model", "processor/*"]


def resolve_checkpoint(model: str | Path | None = None, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a hub id is downloaded, or found in the local cache of an earlier download.

    Args:
        model: None for the built-in model, a folder, or a hub id such as `microsoft/trocr-base-printed`.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: there is no such folder, or the hub does not give the files; says what to do.
        UsageError: a revision of something that is not on the hub.
    """
    if revision is not None and (model is None or os.path.isdir(model)):
        raise UsageError(f"revision: expected none but with a hub id, got {revision!r}")
    if model is None:
        return BUILTIN
    if os.path.isdir(model):  # unlike Path's, takes any string, and "" is no folder
        return Path(model)
    if os.path.exists(model):
        raise CheckpointError(f"{model}: expected a checkpoint folder (config.json and weights), found a file")
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{model}: expected an existing folder or a hub id of the form OWNER/NAME, found neither")
    return _download(str(model), revision)


def _download(hub_id: str, revision: str | None) -> Path:
    # Imported here: it costs a tenth of a second that reading from a folder does not need.
    from huggingface_hub import snapshot_download

    unreachable = _hub_problem(hub_id, revision)

    def fetch(patterns: list[str]) -> Path:
        local = unreachable is not None
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=local))

    try:
        folder = fetch([*_SMALL_FILES, "model.safetensors", "model-*.safetensors"])
        # Many checkpoints hold the same weights twice; the pickled copy is fetched only where it is the only one.
        if not any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
            folder = fetch([*_SMALL_FILES, "pytorch_model*.bin"])
    except Exception as error:  # the hub client raises a dozen unrelated types, httpx's and OSError among them
        problem = unreachable or error
        reason = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else 'no message'}"
        raise CheckpointError(
            f"{hub_id}: there is no such folder here, and the Hugging Face hub gave no such model ({reason}). "
            f"Expected a reachable hub, or a local folder: on a machine with a network run "
            f"`hf download {hub_id} --local-dir FOLDER`, copy FOLDER here, and pass its path"
        ) from problem
    return folder


def _hub_problem(hub_id: str, revision: str | None) -> Exception | None:
    """Why the hub does not give this model, or None.

    `snapshot_download` sets no time limit to its first question: a network that drops packets would hang it for good.
    And a limit of the client's own would hold for each address of the hub anew, and not for their look-up.
    """
    from huggingface_hub import HfApi, constants

    answers: list[Exception | None] = []
    seconds = constants.HF_HUB_ETAG_TIMEOUT  # 10, or what the environment variable of that name says

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, revision=revision, timeout=seconds)
            answers.append(None)
        except Exception as error:
            answers.append(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else TimeoutError(f"no answer within {seconds} seconds (HF_HUB_ETAG_TIMEOUT)")
