"""Choosing tokens, as transformers 5.17 does: greedy and beam search, for lines that begin and end at any step.

All that a search knows of its lines stays on the device. The host looks at two things only: whether a line is done,
and which beam each beam goes on from.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trocr_fast.config import GenerationDefaults
from trocr_fast.decoder import Decoder
from trocr_fast.lane_tensors import LaneTensors

# Changes scores of the next token: (tokens so far, int64 [rows, length]; scores, fp32 [rows, vocab_size]) -> scores.
# transformers' `LogitsProcessor`s are of this kind. All rows of a call are of one length.
Processor = Callable[[Tensor, Tensor], Tensor]

FIRST_COLUMNS = 32  # tokens that there is room for at first
NOT_FINITE = "expected finite scores from the model, got NaN or infinity; try dtype float32"
DEAD = -1e9  # the score of a beam that is none, as in transformers


@dataclass
class Hypothesis:
    """The tokens found for one line."""

    tokens: list[int]  # the start token first, the end token last if the line ended
    log_probs: list[float] = field(default_factory=list)  # one a generated token, under the unprocessed softmax
    ended: bool = False  # by an end token; else it was cut at the length limit
    error: str | None = None  # why the tokens mean nothing
    score: float | None = None  # of beam search: the sum of the processed scores over a power of their number

    @property
    def failed(self) -> bool:
        """The tokens mean nothing."""
        return self.error is not None

    @property
    def confidence(self) -> float:
        """exp(mean log-probability of the generated tokens, end token included), 0 to 1; 0 if there are none."""
        return math.exp(sum(self.log_probs) / len(self.log_probs)) if self.log_probs else 0.0


def check(name: str, value: Any, kind: Any, fits: Callable[[Any], bool], expected: str) -> None:
    """Raise ValueError, with the name, if a value is not of a kind or does not fit."""
    if not isinstance(value, kind) or not fits(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


SAMPLING_RANGES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: 0 < x < math.inf, "a number above 0"),
    "top_k": (Integral, lambda x: x >= 0, "an integer from 0"),
    "top_p": (Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "min_p": (Real | None, lambda x: x is None or 0 <= x <= 1, "None or a number from 0 to 1"),
    "typical_p": (Real, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "epsilon_cutoff": (Real, lambda x: 0 <= x < 1, "a number from 0 to below 1"),
    "eta_cutoff": (Real, lambda x: 0 <= x < 1, "a number from 0 to below 1"),
    "seed": (Integral, lambda x: 0 <= x < 2**63, "an integer from 0 to below 2**63"),
}


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. Names and meaning are those of transformers' `GenerationConfig`.

    Raises:
        ValueError: a value out of its range, named.
    """

    temperature: float = 1.0
    top_k: int = 50  # 0: all tokens
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    seed: int = 0  # with the line's own seed it decides every draw

    def __post_init__(self) -> None:
        for name, (kind, fits, expected) in SAMPLING_RANGES.items():
            check(name, getattr(self, name), kind, fits, expected)


@dataclass(frozen=True)
class SearchSettings:
    """How tokens are chosen. The names are those of transformers' `GenerationConfig`.

    Raises:
        ValueError: a value out of its range, named.
    """

    start_token: int
    end_tokens: tuple[int, ...]
    max_length: int  # at which a line is cut, the start token counted
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # True, False or "never"
    num_return_sequences: int = 1
    processors: Sequence[Processor] = ()
    sampling: Sampling | None = None  # None: the best token, or the best beams

    @property
    def is_recordable(self) -> bool:
        """Whether choosing tokens is nothing but work for the device, the same at every step.

        Processors look at lengths that the host knows; the warper of `eta_cutoff` waits for the device.
        """
        return not self.processors and (self.sampling is None or self.sampling.eta_cutoff == 0)

    @classmethod
    def greedy(cls, generation: GenerationDefaults, max_length: int) -> "SearchSettings":
        """Greedy search with a checkpoint's start and end tokens."""
        return cls(generation.decoder_start_token_id, generation.eos_token_ids, max_length)

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("num_beams", 1), ("num_return_sequences", 1)):
            check(name, getattr(self, name), Integral, partial(operator.le, least), f"at least {least}")
        check("length_penalty", self.length_penalty, Real, math.isfinite, "a number")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences: expected at most num_beams ({self.num_beams}), got {self.num_return_sequences}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping: expected True, False or "never", got {self.early_stopping!r}')
        if self.sampling is not None and self.num_beams > 1:
            raise ValueError(
                f"num_beams: expected 1 where tokens are sampled, got {self.num_beams}; beam sampling is there in "
                "`TrOCR.generate`, and in the `generate` of a model after `trocr_fast.accelerate`"
            )


@dataclass(frozen=True)
class Choice:
    """What a step has chosen for the lines of the batch."""

    done: Tensor  # bool [lanes]: the line has come to its end
    parents: Tensor | None  # int64 [lanes, beams], the beam that each one goes on from; None: every one from itself


class Search(Protocol):
    """Of the lines of a decode batch, by lane."""

    RESULT: tuple[str, ...]  # the tensors of `lines` that hold what was found
    lines: LaneTensors  # "limit" is the length at which a line is cut; it may be set for each

    def tokens(self, num_lanes: int) -> Tensor:
        """What to feed next to the rows of the first lanes, int64 [rows]."""
        ...

    def choose(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> Choice:
        """Let the lines of the first lanes go on by one token, for which `lines` has room and one column more.

        A line that is done stays as it is.

        Args:
            x: [rows, width], from `Decoder.step`.
            lengths: tokens of each line so far, int64 [lanes]; looked at unless the settings are recordable.
        """
        ...

    def so_far(self, line: dict[str, Tensor]) -> list[int]:
        """The tokens of a line, done or not, from its `lines`; of beams, those of the best running one."""
        ...

    def found(self, line: dict[str, Tensor]) -> list[Hypothesis]:
        """`num_return_sequences` hypotheses of a line that is done, the best first, from its `RESULT`, on the host."""
        ...


def make_search(settings: SearchSettings, num_lanes: int, device: torch.device) -> Search:
    """The search that the settings ask for, with room for so many lines."""
    if settings.sampling is not None:
        from trocr_fast.sampling import SampleSearch  # takes transformers with it, which is slow to import

        return SampleSearch(settings, num_lanes, device)
    return (GreedySearch if settings.num_beams == 1 else BeamSearch)(settings, num_lanes, device)


class GreedySearch:
    """The token of the best score, the first of equals."""

    RESULT: tuple[str, ...] = ("tokens", "log_probs", "length")

    def __init__(self, settings: SearchSettings, num_lanes: int, device: torch.device) -> None:
        self._settings = settings
        self._end_tokens = torch.tensor(settings.end_tokens, dtype=torch.int64, device=device)
        self.lines = LaneTensors(num_lanes, self._new_line(device), by_token=("tokens", "log_probs"))

    def _new_line(self, device: torch.device) -> dict[str, Tensor]:
        settings = self._settings
        return {
            "tokens": torch.full((FIRST_COLUMNS,), settings.start_token, dtype=torch.int64, device=device),
            "log_probs": torch.zeros(FIRST_COLUMNS, device=device),  # of each token; of the start token 0
            "length": torch.ones((), dtype=torch.int64, device=device),
            "limit": torch.full((), settings.max_length, dtype=torch.int64, device=device),
            "done": torch.zeros((), dtype=torch.bool, device=device),
        }

    def tokens(self, num_lanes: int) -> Tensor:
        last = self.lines["length"][:num_lanes].unsqueeze(1) - 1
        return self.lines["tokens"][:num_lanes].gather(1, last).squeeze(1)

    def choose(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> Choice:
        lanes = len(lengths)
        history, log_probs, length, limit, done = (
            self.lines[name][:lanes] for name in ("tokens", "log_probs", "length", "limit", "done")
        )
        token, log_prob = self._next_token(x, decoder, lengths)
        at = length.unsqueeze(1)
        done_now = is_one_of(token, self._end_tokens) | (length + 1 >= limit) | ~log_prob.isfinite()
        new = {
            "tokens": history.scatter(1, at, token.unsqueeze(1)),
            "log_probs": log_probs.scatter(1, at, log_prob.unsqueeze(1)),
            "length": length + 1,
            "done": done_now,
        }
        self.lines.update(new, alive=~done)
        return Choice(self.lines["done"][:lanes], None)

    def _next_token(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token, int64 [lanes], and its log-probability, fp32 [lanes]: not finite if the scores mean nothing."""
        if not self._settings.processors:
            return decoder.greedy_token(x)
        logits = decoder.logits(x).float()
        history = self.lines["tokens"][: len(lengths)]
        best = process(self._settings.processors, history, logits, lengths).argmax(-1)
        return best, logits.log_softmax(-1).gather(1, best.unsqueeze(1)).squeeze(1)

    def so_far(self, line: dict[str, Tensor]) -> list[int]:
        tokens: list[int] = line["tokens"][: int(line["length"])].tolist()
        return tokens

    def found(self, line: dict[str, Tensor]) -> list[Hypothesis]:
        length = int(line["length"])
        tokens, log_probs = line["tokens"][:length].tolist(), line["log_probs"][1:length].tolist()
        error = None if math.isfinite(log_probs[-1]) else NOT_FINITE
        return [Hypothesis(tokens, log_probs, tokens[-1] in self._settings.end_tokens, error)]


class BeamSearch:
    """Beam search step by step as `GenerationMixin._beam_search` of transformers has it, each line for itself.

    There the batch goes on until all of its lines are done, and a line that is done changes no more; so it can leave.
    """

    RESULT: tuple[str, ...] = ("finished_tokens", "finished_log_probs", "finished_lengths", "finished_scores")

    def __init__(self, settings: SearchSettings, num_lanes: int, device: torch.device) -> None:
        self._settings = settings
        self._end_tokens = torch.tensor(settings.end_tokens, dtype=torch.int64, device=device)
        beams = settings.num_beams
        tokens = torch.full((beams, FIRST_COLUMNS), settings.start_token, dtype=torch.int64, device=device)
        dead = torch.full((beams,), DEAD, device=device)
        line = {
            "length": torch.ones((), dtype=torch.int64, device=device),  # of the running beams
            "limit": torch.full((), settings.max_length, dtype=torch.int64, device=device),
            "done": torch.zeros((), dtype=torch.bool, device=device),
            "open": torch.ones((), dtype=torch.bool, device=device),  # a running beam may still beat a finished one
            # only the first beam lives at first, or all would do the same
            "scores": dead.masked_fill(torch.arange(beams, device=device) == 0, 0.0),
            "tokens": tokens,
            "log_probs": torch.zeros((beams, FIRST_COLUMNS), device=device),
            "finished": torch.zeros(beams, dtype=torch.bool, device=device),
            "finished_scores": dead,
            "finished_tokens": tokens,
            "finished_log_probs": torch.zeros((beams, FIRST_COLUMNS), device=device),
            "finished_lengths": torch.ones(beams, dtype=torch.int64, device=device),
        }
        by_token = ("tokens", "log_probs", "finished_tokens", "finished_log_probs")
        self.lines = LaneTensors(num_lanes, line, by_token)
        # More than beams, so that enough are left when those of end tokens are taken out.
        self._num_candidates = max(2, 1 + len(settings.end_tokens)) * beams
        self._is_top = torch.arange(self._num_candidates, device=device) < beams

    def tokens(self, num_lanes: int) -> Tensor:
        last = (self.lines["length"][:num_lanes] - 1).view(-1, 1, 1).expand(-1, self._settings.num_beams, 1)
        return self.lines["tokens"][:num_lanes].gather(2, last).flatten()

    def choose(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> Choice:
        settings, beams, lanes = self._settings, self._settings.num_beams, len(lengths)
        names = ("tokens", "log_probs", "scores", "length", "limit", "open", "done")
        old = {name: self.lines[name][:lanes] for name in names}
        length, limit = old["length"].unsqueeze(1), old["limit"].unsqueeze(1)  # [lanes, 1]

        log_probs = decoder.logits(x).float().log_softmax(-1)  # [rows, vocab_size]
        scores = process(settings.processors, old["tokens"].flatten(0, 1), log_probs, np.repeat(lengths, beams))
        vocab_size = scores.shape[1]
        totals = (scores.view(lanes, beams, vocab_size) + old["scores"].unsqueeze(2)).flatten(1)
        top, places = totals.topk(self._num_candidates)  # [lanes, candidates]
        parents, tokens = places // vocab_size, places % vocab_size
        chosen = log_probs.view(lanes, -1).gather(1, places)
        at = length.unsqueeze(2).expand(-1, self._num_candidates, 1)
        top_tokens = of_beams(old["tokens"], parents).scatter(2, at, tokens.unsqueeze(2))
        top_log_probs = of_beams(old["log_probs"], parents).scatter(2, at, chosen.unsqueeze(2))
        ends = is_one_of(tokens, self._end_tokens) | (length + 1 >= limit)

        # The best that go on
        running = top + ends * DEAD
        kept = running.topk(beams).indices
        running_scores = running.gather(1, kept)

        # The best that are finished, of those before and those of this step
        candidates = top / self._power(length)
        full = self.lines["finished"][:lanes].all(-1, keepdim=True) & (settings.early_stopping is True)
        candidates += full * DEAD
        candidates += ~old["open"].unsqueeze(1) * DEAD
        just_finished = ends & self._is_top
        candidates += ~just_finished * DEAD
        merged = {
            "finished_scores": candidates,
            "finished": just_finished,
            "finished_tokens": top_tokens,
            "finished_log_probs": top_log_probs,
            "finished_lengths": (length + 1).expand_as(top),
        }
        merged = {name: torch.cat([self.lines[name][:lanes], found], dim=1) for name, found in merged.items()}
        best = merged["finished_scores"].topk(beams).indices
        finished = {name: of_beams(tensor, best) for name, tensor in merged.items()}

        # Whether a running beam can still get better than the worst finished one
        hopeful = settings.early_stopping == "never" and settings.length_penalty > 0.0
        reach = limit - 1 if hopeful else length
        worst = finished["finished_scores"].amin(1, keepdim=True).where(finished["finished"], DEAD)
        still_open = old["open"] & (running_scores[:, :1] / self._power(reach) > worst).any(-1)
        done = ~still_open | ends.all(-1) | top[:, 0].isnan()
        if settings.early_stopping is True:
            done |= finished["finished"].all(-1)
        new = {
            "length": old["length"] + 1,
            "done": done,
            "open": still_open,
            "scores": running_scores,
            "tokens": of_beams(top_tokens, kept),
            "log_probs": of_beams(top_log_probs, kept),
            **finished,
        }
        alive = ~old["done"]
        self.lines.update(new, alive)
        own = torch.arange(beams, device=x.device).expand(lanes, -1)
        return Choice(self.lines["done"][:lanes], torch.where(alive.unsqueeze(1), parents.gather(1, kept), own))

    def _power(self, length: Tensor) -> Tensor:
        """length ** length_penalty, in fp64 and then rounded, as of a Python number; length int64 [lanes, 1]."""
        return (length.double() ** self._settings.length_penalty).float()

    def so_far(self, line: dict[str, Tensor]) -> list[int]:
        tokens: list[int] = line["tokens"][0, : int(line["length"])].tolist()
        return tokens

    def found(self, line: dict[str, Tensor]) -> list[Hypothesis]:
        hypotheses = []
        for beam in range(self._settings.num_return_sequences):
            length = int(line["finished_lengths"][beam])
            tokens = line["finished_tokens"][beam, :length].tolist()
            log_probs = line["finished_log_probs"][beam, 1:length].tolist()
            score = float(line["finished_scores"][beam])
            ended = tokens[-1] in self._settings.end_tokens and length > 1
            error = NOT_FINITE if math.isnan(score) else None
            hypotheses.append(Hypothesis(tokens, log_probs, ended, error, score))
        return hypotheses


def make_processors(repetition_penalty: float, no_repeat_ngram_size: int) -> tuple[Processor, ...]:
    """transformers' own, in its order; equal for equal values, so that settings can be compared.

    Raises:
        ValueError: a value out of its range, named.
    """
    check("repetition_penalty", repetition_penalty, Real, lambda x: 0 < x < math.inf, "a number above 0")
    check("no_repeat_ngram_size", no_repeat_ngram_size, Integral, lambda x: x >= 0, "an integer from 0")
    penalty = () if repetition_penalty == 1 else (_processor("RepetitionPenalty", float(repetition_penalty)),)
    no_repeat = () if no_repeat_ngram_size == 0 else (_processor("NoRepeatNGram", int(no_repeat_ngram_size)),)
    return penalty + no_repeat


@cache
def _processor(name: str, value: float) -> Processor:
    from transformers.generation import logits_process  # slow to import

    processor: Processor = getattr(logits_process, f"{name}LogitsProcessor")(value)
    return processor


def process(processors: Sequence[Processor], history: Tensor, scores: Tensor, lengths: np.ndarray) -> Tensor:
    """Scores after all processors, which see rows of one length at a time.

    Args:
        history: int64 [rows, columns].
        scores: fp32 [rows, vocab_size].
        lengths: of the rows, int64 [rows], on the host.
    """
    if not processors:
        return scores
    out = scores.clone()  # which processors may write to
    groups = np.unique(lengths)
    for length in groups:
        rows: Tensor | slice = slice(None)
        if len(groups) > 1:
            rows = torch.from_numpy(np.flatnonzero(lengths == length)).to(scores.device)
        tokens, some = history[rows, : int(length)], out[rows]
        for processor in processors:
            some = processor(tokens, some)
        out[rows] = some
    return out


def of_beams(tensor: Tensor, beams: Tensor) -> Tensor:
    """The entries of some beams: tensor [lanes, beams, ...], beams int64 [lanes, some] -> [lanes, some, ...]."""
    return tensor.take_along_dim(beams.view(*beams.shape, *[1] * (tensor.dim() - 2)), dim=1)


def is_one_of(tokens: Tensor, few: Tensor) -> Tensor:
    """Whether each token is one of few."""
    return (tokens.unsqueeze(-1) == few).any(-1)
