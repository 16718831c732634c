"""How pictures go through the encoder together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.models import Case, build, save
from trocr_fast import encoder
from trocr_fast.model import Model


def test_pictures_in_groups_are_what_transformers_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = build(Case("A", encoder="deit"), seed=0)
    save(reference, tmp_path)
    ours = Model.load(tmp_path, torch.device("cpu"), torch.float32).encoder
    pixels = torch.randn(5, 3, 16, 16)
    expected = reference.encoder(pixels).last_hidden_state
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    picture = 18 * 72 * 4 / 3  # bytes a thread of what is widest in one: its tokens' queries, keys and values
    groups: list[int] = []
    encode = ours._encode

    def noting(pixels: Tensor, table: Tensor | None) -> Tensor:
        groups.append(len(pixels))
        return encode(pixels, table)

    monkeypatch.setattr(ours, "_encode", noting)
    with torch.inference_mode():
        for num_bytes, sizes in (
            (1, [1] * 5),
            (int(2 * picture) - 1, [1] * 5),
            (int(2 * picture), [2, 2, 1]),
            (int(4 * picture), [3, 2]),
            (int(5 * picture), [5]),
            (encoder.CACHED_BYTES, [5]),
        ):
            groups.clear()
            monkeypatch.setattr(encoder, "CACHED_BYTES", num_bytes)
            torch.testing.assert_close(ours(pixels), expected, rtol=1e-4, atol=1e-4)
            assert groups == sizes
        assert ours(pixels[:0]).shape == (0, *expected.shape[1:])


def test_a_gpu_takes_all_pictures_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(build(Case("A"), seed=0), tmp_path)
    ours = Model.load(tmp_path, torch.device("cpu"), torch.float32).encoder
    monkeypatch.setattr(encoder, "CACHED_BYTES", 1)
    assert ours.most_at_once(64) == 1
    monkeypatch.setattr(ours, "positions", ours.positions.to("meta"))  # on no CPU
    assert ours.most_at_once(64) == 64
