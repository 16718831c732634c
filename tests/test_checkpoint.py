"""Where a checkpoint comes from: the package, a folder, the hub or its cache; and what to do when it is nowhere."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.models import Case, build, save
from trocr_fast.checkpoint import BUILTIN, resolve_checkpoint
from trocr_fast.errors import CheckpointError
from trocr_fast.model import Model

HUB_ID = "somebody/trocr-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# The hub client reads its settings once, when it is imported, so each is tried in a process of its own.
RESOLVE = """
import json, sys, time
from trocr_fast.checkpoint import resolve_checkpoint
from trocr_fast.errors import CheckpointError
from huggingface_hub import HfApi, snapshot_download  # not part of the time

found = []
for request in json.loads(sys.argv[1]):
    started = time.monotonic()
    try:
        answer = str(resolve_checkpoint(*request))
    except CheckpointError as error:
        answer = str(error)
    found.append((answer, time.monotonic() - started))
print(json.dumps(found))
"""


def resolve(cache, *requests, **environment):
    """(folder or message, seconds) of each request, in a fresh process whose hub cache is `cache`."""
    names = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    names |= {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub")} | environment
    command = [sys.executable, "-c", RESOLVE, json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=names)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def silent_hub():
    """The address of a server that takes connections and never answers, as behind a network that drops packets."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def absent_hub():
    """An address where nothing listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    return address


@pytest.fixture
def cached(tmp_path):
    """A hub cache as the client lays it out: names that link to blobs."""

    def make(form):
        saved = save(build(Case(), seed=1), tmp_path / "saved")
        if form == "bin":
            tensors = load_file(saved / "model.safetensors")
            (saved / "model.safetensors").unlink()
            torch.save(tensors, saved / "pytorch_model.bin")
        root = tmp_path / "cache" / "hub" / f"models--{HUB_ID.replace('/', '--')}"
        snapshot = root / "snapshots" / COMMIT
        for folder in (root / "refs", root / "blobs", snapshot):
            folder.mkdir(parents=True)
        (root / "refs" / "main").write_text(COMMIT)
        for file in saved.iterdir():
            shutil.move(file, root / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        return tmp_path / "cache", snapshot

    return make


def says_what_to_do(message, hub_id=HUB_ID):
    return (
        message.startswith(f"{hub_id}: there is no such folder here")
        and f"`hf download {hub_id} --local-dir FOLDER`" in message
        and len(message.splitlines()) == 1
    )


# --- on this machine


def test_the_builtin_checkpoint_is_in_the_package():
    assert resolve_checkpoint() == resolve_checkpoint(None) == BUILTIN
    assert BUILTIN.is_dir() and BUILTIN.parent.joinpath("checkpoint.py").is_file()


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(str(tmp_path)) == tmp_path
    # even one whose name could be a hub id
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("owner/name") == Path("owner/name")


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(path)
    assert str(caught.value) == f"{path}: expected a checkpoint folder (config.json and weights), found a file"


@pytest.mark.parametrize(
    "model", ["", " ", "nonsense", "a/b/c", "/no/such/folder", "./a", "../x", "a/..", "a/", "ä ö/x", "a\0b", "x" * 5000]
)
def test_nonsense(model, monkeypatch):
    monkeypatch.setattr("trocr_fast.checkpoint._download", None)  # the network is not even asked
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(model)
    assert "expected an existing folder or a hub id of the form OWNER/NAME, found neither" in str(caught.value)


# --- the hub


def test_offline_and_not_cached(tmp_path):
    hub_ids = [HUB_ID, "a--b/c", "a/b.git", "a/b..c"]  # all but the first are such as the hub does not allow
    found = resolve(tmp_path, *([hub_id] for hub_id in hub_ids), HF_HUB_OFFLINE="1")
    for hub_id, (message, seconds) in zip(hub_ids, found, strict=True):
        assert says_what_to_do(message, hub_id) and seconds < 5
    assert "offline" in found[0][0]


def test_a_hub_that_is_not_there(tmp_path, absent_hub):
    ((message, seconds),) = resolve(tmp_path, [HUB_ID], HF_ENDPOINT=absent_hub)
    assert says_what_to_do(message) and "ConnectError" in message
    assert seconds < 10


def test_a_hub_that_never_answers(tmp_path, silent_hub):
    ((message, seconds),) = resolve(tmp_path, [HUB_ID], HF_ENDPOINT=silent_hub, HF_HUB_ETAG_TIMEOUT="1")
    assert says_what_to_do(message) and "no answer within 1 seconds (HF_HUB_ETAG_TIMEOUT)" in message
    assert 0.9 < seconds < 8


def test_the_wait_for_an_answer_is_ten_seconds():
    from huggingface_hub import constants

    assert constants.DEFAULT_ETAG_TIMEOUT == 10


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_cached_model_works_offline(cached, form):
    cache, snapshot = cached(form)
    *found, (other, _) = resolve(
        cache, [HUB_ID], [HUB_ID, "main"], [HUB_ID, COMMIT], [HUB_ID, "v2"], HF_HUB_OFFLINE="1"
    )
    for folder, seconds in found:
        assert folder == str(snapshot) and seconds < 5
    assert says_what_to_do(other)  # another revision is not taken from the cache
    Model.load(snapshot, torch.device("cpu"), torch.float32)


def test_a_cached_model_works_without_a_network(cached, absent_hub, silent_hub):
    cache, snapshot = cached("safetensors")
    for hub in (absent_hub, silent_hub):
        ((found, seconds),) = resolve(cache, [HUB_ID], HF_ENDPOINT=hub, HF_HUB_ETAG_TIMEOUT="1")
        assert found == str(snapshot) and seconds < 8


# --- which files are fetched, with a hub that is made up


def fetched(monkeypatch, tmp_path, files):
    """The names that are asked for, of a repository with these files."""
    import fnmatch

    import huggingface_hub

    wanted = []

    def snapshot_download(hub_id, revision, allow_patterns, local_files_only):
        assert (hub_id, revision, local_files_only) == (HUB_ID, "v1", False)
        for name in files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()
                wanted.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert resolve_checkpoint(HUB_ID, "v1") == tmp_path
    return sorted(set(wanted))


SMALL = ["config.json", "generation_config.json", "merges.txt", "sentencepiece.bpe.model", "vocab.json"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        # a half-precision variant of a name that nothing here reads must not pass for the weights
        (["model.fp16.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ),
    ],
)
def test_the_pickled_copy_is_fetched_only_if_it_is_the_only_one(monkeypatch, tmp_path, weights, expected):
    assert fetched(monkeypatch, tmp_path, SMALL + weights + ["README.md"]) == sorted(SMALL + expected)


def test_a_download_that_breaks_says_so(monkeypatch):
    import huggingface_hub

    def breaks(*_, **__):
        raise OSError("No space left on device\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(HUB_ID)
    assert says_what_to_do(str(caught.value)) and "OSError: No space left on device" in str(caught.value)
    assert time.monotonic() - started < 5
