"""Choosing tokens: greedy search, as transformers defines it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trocr_fast.cross_memory import CrossMemory
from trocr_fast.decoder import DecodeState


@dataclass
class Hypothesis:
    """The tokens found for one line."""

    tokens: list[int]  # the start token first, the end token last if the line ended
    log_probs: list[float] = field(default_factory=list)  # one a generated token, under the unprocessed softmax
    ended: bool = False  # by an end token; else it was cut at the length limit
    failed: bool = False  # its scores were not finite: the tokens mean nothing

    @property
    def confidence(self) -> float:
        """exp(mean log-probability of the generated tokens, end token included), 0 to 1."""
        return math.exp(sum(self.log_probs) / len(self.log_probs))


# Feeds one token a row, int64 [rows]; gives the next, int64 [rows], and their log-probabilities, fp32 [rows].
Step = Callable[[Tensor, DecodeState, CrossMemory], tuple[Tensor, Tensor]]


def greedy_search(
    step: Step,
    state: DecodeState,
    memory: CrossMemory,
    num_rows: int,
    start_token: int,
    end_tokens: Sequence[int],
    max_length: int,
    device: torch.device,
) -> list[Hypothesis]:
    """Take the best token of every row until it ends; a row that has ended leaves the batch at once.

    Args:
        step: one step of the decoder, and the best tokens after it.
        state, memory: of `num_rows` rows; used up.
        max_length: total length at which a row is cut, the start token counted.

    Returns:
        One hypothesis a row, in the order of the rows.
    """
    hypotheses = [Hypothesis([start_token]) for _ in range(num_rows)]
    live = list(hypotheses)  # live[i] is what row i of the batch decodes
    tokens = torch.full((num_rows,), start_token, dtype=torch.int64, device=device)
    for _ in range(max_length - 1):
        if not live:
            break
        tokens, log_probs = step(tokens, state, memory)
        for hypothesis, token, log_prob in zip(live, tokens.tolist(), log_probs.tolist(), strict=True):
            hypothesis.tokens.append(token)
            hypothesis.log_probs.append(log_prob)
            hypothesis.ended = token in end_tokens
            hypothesis.failed = not math.isfinite(log_prob)
        # From the last row to the first, since the last live row takes the place of one that leaves.
        for row in reversed([row for row, hypothesis in enumerate(live) if hypothesis.ended or hypothesis.failed]):
            state.remove(row)
            memory.remove(row)
            tokens[row] = tokens[len(live) - 1]
            tokens = tokens[: len(live) - 1]
            live[row] = live[-1]
            live.pop()
    return hypotheses
