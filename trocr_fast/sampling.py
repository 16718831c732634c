"""Drawing each token from transformers' distribution, with randomness that belongs to the line.

A draw is a function of the settings' seed, the line's own seed and the number of tokens so far. So it does not matter
which lines are decoded beside a line, in what order, in which lane or on how many devices.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as warpers

from trocr_fast.decoder import Decoder
from trocr_fast.search import GreedySearch, Processor, Sampling, SearchSettings, process


class SampleSearch(GreedySearch):
    """A token drawn from the softmax of the scores after processors and warpers."""

    def __init__(self, settings: SearchSettings, num_lanes: int, device: torch.device) -> None:
        super().__init__(settings, num_lanes, device)
        assert settings.sampling is not None
        self._warpers = make_warpers(settings.sampling, device)
        self._seed = torch.tensor(settings.sampling.seed, dtype=torch.int64, device=device)

    def _new_line(self, device: torch.device) -> dict[str, Tensor]:
        return super()._new_line(device) | {"seed": torch.zeros((), dtype=torch.int64, device=device)}

    def _next_token(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        history, length, seed = (self.lines[name][: len(lengths)] for name in ("tokens", "length", "seed"))
        logits = decoder.logits(x).float()  # [lanes, vocab_size]
        scores = process(self._settings.processors, history, logits, lengths)
        possible = torch.ones_like(seed, dtype=torch.bool)
        for warper in self._warpers:
            possible &= scores.amax(-1).isfinite()
            # for one row of NaN there are warpers that raise an error for all
            scores = warper(history, scores.where(possible.unsqueeze(1), 0.0))
        token, drawn = draw(scores, uniform(self._seed, seed, length))
        log_prob = logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
        return token, log_prob.where(possible & drawn, torch.nan)


def make_warpers(sampling: Sampling, device: torch.device) -> list[Processor]:
    """Those that `GenerationMixin._get_logits_processor` makes, in its order. They look at the scores alone."""
    made: list[Any] = []
    if sampling.temperature != 1:
        made.append(warpers.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k != 0:
        made.append(warpers.TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1:
        made.append(warpers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        made.append(warpers.MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        made.append(warpers.TypicalLogitsWarper(sampling.typical_p))
    if sampling.epsilon_cutoff > 0:
        made.append(warpers.EpsilonLogitsWarper(sampling.epsilon_cutoff))
    if sampling.eta_cutoff > 0:
        made.append(warpers.EtaLogitsWarper(sampling.eta_cutoff, device=str(device)))
    return made


def draw(scores: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulated probability first exceeds u, never one of probability 0.

    Args:
        scores: fp32 [rows, vocab_size].
        u: fp64 [rows], from 0 to below 1.

    Returns:
        int64 [rows], and bool [rows]: whether there was a token to draw. There is none where scores are NaN or
        infinite, or all -infinity.
    """
    probabilities = scores.softmax(-1, dtype=torch.float64)
    # In fp64, so that the order of additions, which differs between devices, moves no draw. Rounding may still let the
    # sum shrink from one token to the next, so nothing relies on its being sorted.
    cumulated = probabilities.cumsum(-1).where(probabilities > 0, 0.0)
    most = cumulated.amax(-1)
    beyond = cumulated > (u * most).unsqueeze(1)
    return beyond.byte().argmax(-1), most > 0


def uniform(*keys: Tensor) -> Tensor:
    """Pseudorandom numbers from 0 to below 1, fp64, for int64 keys: each a hash of all of its keys."""
    state = torch.zeros_like(keys[0])
    for key in keys:
        state = splitmix64(state + key)
    return shift_right(state, 11).double() * 2.0**-53


def splitmix64(state: Tensor) -> Tensor:
    """The number that the generator splitmix64 gives in a state; both int64, standing for uint64."""
    # Sums and products of int64 wrap around, with the bits of uint64.
    z = state - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15
    z = (z ^ shift_right(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ shift_right(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ shift_right(z, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """The logical shift, where that of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
