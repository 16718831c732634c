"""encoder_attention against its reference, through Triton's interpreter (or on a GPU where there is one)."""

import pytest
import torch

from tests.kernels.compare import DEVICE, assert_close, assert_refused, over, poisoned
from trocr_fast import ops
from trocr_fast.kernels.encoder_attention import cases, encoder_attention, inputs, reference

# (batch, tokens, num_heads, head_dim): awkward sizes, then the real token counts with few heads. 64 and 128 are whole
# tiles, with no key left over.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 3, 7),
    (1, 16, 2, 16),
    (1, 31, 1, 33),
    (3, 64, 2, 32),
    (2, 65, 2, 64),
    (1, 127, 1, 80),
    (2, 128, 1, 128),
    (1, 129, 1, 96),
    *sorted({(1, tokens, 2, head_dim) for _, tokens, _, head_dim in cases()}),
]


@over(SHAPES, cases())
def test_equals_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, *rest = shape
    # the reference in fp64 holds all scores: of 64 pictures that is more than the comparison needs
    arguments = inputs((min(batch, 8), *rest), dtype, DEVICE, seed=sum(shape))
    (out,) = poisoned(reference(*arguments))
    assert_close([encoder_attention(*arguments, out=out)], reference, arguments)


def test_reference_is_the_attention_of_ops() -> None:
    qkv, num_heads = inputs((2, 37, 3, 32), torch.float64, DEVICE)
    torch.testing.assert_close(reference(qkv, num_heads), ops.encoder_attention(qkv, num_heads))


@pytest.mark.parametrize("tokens", [64, 77])
def test_reads_and_writes_nothing_outside(tokens: int) -> None:
    """Queries and keys beyond the last token, and those of other pictures, are neither read nor written."""
    qkv, num_heads = inputs((3, tokens, 2, 24), torch.float32, DEVICE)
    expected = encoder_attention(qkv[1:2], num_heads)
    qkv[0], qkv[2] = torch.nan, torch.nan
    around = poisoned(torch.empty(3, tokens, 48, device=DEVICE))[0]
    encoder_attention(qkv[1:2], num_heads, out=around[1:2])
    assert torch.equal(around[1:2], expected)
    assert around[0].isnan().all() and around[2].isnan().all()
    assert torch.equal(encoder_attention(qkv, num_heads)[1:2], expected)


def test_heads_do_not_mix() -> None:
    qkv, num_heads = inputs((1, 19, 3, 16), torch.float32, DEVICE)
    expected = encoder_attention(qkv, num_heads).view(1, 19, 3, 16)
    qkv.view(1, 19, 3, 3, 16)[:, :, :, 1] = torch.nan
    out = encoder_attention(qkv, num_heads).view(1, 19, 3, 16)
    assert torch.equal(out[:, :, [0, 2]], expected[:, :, [0, 2]])


def test_one_token_takes_its_own_value() -> None:
    qkv, num_heads = inputs((5, 1, 2, 32), torch.float16, DEVICE)
    assert torch.equal(encoder_attention(qkv, num_heads), qkv[..., 128:])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("key", [0, 63, 64])  # of the first tile in memory, and of the last keys
def test_scores_out_of_range_of_the_exponential(key: int, sign: int) -> None:
    """A key far above all others takes everything; where all are far below zero nothing vanishes."""
    qkv = torch.ones(1, 65, 3, 32, device=DEVICE, dtype=torch.float16)
    qkv[:, :, 1] = -100
    qkv[:, key, 1] = sign * 100
    qkv[0, :, 2, 0] = torch.arange(65)
    out = encoder_attention(qkv.view(1, 65, 96), 1)
    assert torch.equal(out[0, :, 1:], torch.ones_like(out[0, :, 1:]))
    torch.testing.assert_close(out[0, :, 0], torch.full_like(out[0, :, 0], key if sign > 0 else 32))


def test_empty_batch_launches_nothing() -> None:
    assert encoder_attention(*inputs((0, 5, 2, 32), torch.float32, DEVICE)).shape == (0, 5, 64)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    batch = 2**31 // (577 * 2304) + 2
    qkv = torch.empty(batch, 577, 2304, dtype=torch.bfloat16, device=DEVICE)
    last, num_heads = inputs((1, 577, 12, 64), torch.bfloat16, DEVICE)
    qkv[-1:] = last
    assert torch.equal(encoder_attention(qkv, num_heads)[-1:], encoder_attention(last, num_heads))


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "qkv"),
        (0, lambda x: x.double(), "qkv"),
        (0, lambda x: x[0], "qkv"),
        (1, lambda _: 5, "num_heads"),
        (1, lambda _: 0, "num_heads"),
        (1, lambda _: 1, "num_heads"),  # of 192
        (2, lambda x: x[..., :-1], "out"),
        (2, lambda x: x.half(), "out"),
        (2, lambda x: x.repeat(1, 1, 2)[..., ::2], "out"),
    ],
)
def test_wrong_arguments_are_named(index: int, change, name: str) -> None:
    arguments = [*inputs((2, 3, 6, 32), torch.float32, DEVICE), torch.empty(2, 3, 192, device=DEVICE)]
    assert_refused(encoder_attention, arguments, index, change, name)
