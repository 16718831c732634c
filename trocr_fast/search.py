"""Choosing tokens, as transformers 5.17 does: greedy and beam search, for lines that begin and end at any step.

All that a search knows of its lines stays on the device. The host looks at two things only: whether a line is done,
and which beam each beam goes on from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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
DEAD = -1e9  # the score of a beam that is none, as in transformers


@dataclass
class Hypothesis:
    """The tokens found for one line."""

    tokens: list[int]  # the start token first, the end token last if the line ended
    log_probs: list[float] = field(default_factory=list)  # one a generated token, under the unprocessed softmax
    ended: bool = False  # by an end token; else it was cut at the length limit
    failed: bool = False  # its scores were not finite: the tokens mean nothing
    score: float | None = None  # of beam search: the sum of the processed scores over a power of their number

    @property
    def confidence(self) -> float:
        """exp(mean log-probability of the generated tokens, end token included), 0 to 1; 0 if there are none."""
        return math.exp(sum(self.log_probs) / len(self.log_probs)) if self.log_probs else 0.0


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

    @classmethod
    def greedy(cls, generation: GenerationDefaults, max_length: int) -> "SearchSettings":
        """Greedy search with a checkpoint's start and end tokens."""
        return cls(generation.decoder_start_token_id, generation.eos_token_ids, max_length)

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("num_beams", 1), ("num_return_sequences", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences: expected at most num_beams ({self.num_beams}), got {self.num_return_sequences}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping: expected True, False or "never", got {self.early_stopping!r}')


@dataclass(frozen=True)
class Choice:
    """What a step has chosen for the lines of the batch."""

    done: Tensor  # bool [lanes]: the line has come to its end
    parents: Tensor | None  # int64 [lanes, beams], the beam that each one goes on from; None: every one from itself


class Search(Protocol):
    """Of the lines of a decode batch, by lane."""

    lines: LaneTensors  # "limit" is the length at which a line is cut; it may be set for each

    def tokens(self, num_lanes: int) -> Tensor:
        """What to feed next to the rows of the first lanes, int64 [rows]."""
        ...

    def choose(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> Choice:
        """Let the lines of the first lanes go on by one token; a line that is done stays as it is.

        Args:
            x: [rows, width], from `Decoder.step`.
            lengths: tokens of each line so far, int64 [lanes].
        """
        ...

    def result(self, lane: int) -> list[Hypothesis]:
        """`num_return_sequences` hypotheses of a line that is done, the best first."""
        ...


def make_search(settings: SearchSettings, num_lanes: int, device: torch.device) -> Search:
    """The search that the settings ask for, with room for so many lines."""
    return (GreedySearch if settings.num_beams == 1 else BeamSearch)(settings, num_lanes, device)


class GreedySearch:
    """The token of the best score, the first of equals."""

    def __init__(self, settings: SearchSettings, num_lanes: int, device: torch.device) -> None:
        self._settings = settings
        self._end_tokens = torch.tensor(settings.end_tokens, dtype=torch.int64, device=device)
        line = {
            "tokens": torch.full((FIRST_COLUMNS,), settings.start_token, dtype=torch.int64, device=device),
            "log_probs": torch.zeros(FIRST_COLUMNS, device=device),  # of each token; of the start token 0
            "length": torch.ones((), dtype=torch.int64, device=device),
            "limit": torch.full((), settings.max_length, dtype=torch.int64, device=device),
            "done": torch.zeros((), dtype=torch.bool, device=device),
        }
        self.lines = LaneTensors(num_lanes, line, by_token=("tokens", "log_probs"))

    def tokens(self, num_lanes: int) -> Tensor:
        last = self.lines["length"][:num_lanes].unsqueeze(1) - 1
        return self.lines["tokens"][:num_lanes].gather(1, last).squeeze(1)

    def choose(self, x: Tensor, decoder: Decoder, lengths: np.ndarray) -> Choice:
        lanes = len(lengths)
        self.lines.make_room(int(lengths.max()) + 1)
        history, log_probs, length, limit, done = (
            self.lines[name][:lanes] for name in ("tokens", "log_probs", "length", "limit", "done")
        )
        if self._settings.processors:
            logits = decoder.logits(x).float()
            best = process(self._settings.processors, history, logits, lengths).argmax(-1)
            chosen = logits.log_softmax(-1).gather(1, best.unsqueeze(1)).squeeze(1)
        else:
            best, chosen = decoder.greedy_token(x)
        at = length.unsqueeze(1)
        done_now = is_one_of(best, self._end_tokens) | (length + 1 >= limit) | ~chosen.isfinite()
        new = {
            "tokens": history.scatter(1, at, best.unsqueeze(1)),
            "log_probs": log_probs.scatter(1, at, chosen.unsqueeze(1)),
            "length": length + 1,
            "done": done_now,
        }
        self.lines.update(new, alive=~done)
        return Choice(self.lines["done"][:lanes], None)

    def result(self, lane: int) -> list[Hypothesis]:
        length = int(self.lines["length"][lane])
        tokens = self.lines["tokens"][lane, :length].tolist()
        log_probs = self.lines["log_probs"][lane, 1:length].tolist()
        ended = tokens[-1] in self._settings.end_tokens
        return [Hypothesis(tokens, log_probs, ended, failed=not math.isfinite(log_probs[-1]))]


class BeamSearch:
    """Beam search step by step as `GenerationMixin._beam_search` of transformers has it, each line for itself.

    There the batch goes on until all of its lines are done, and a line that is done changes no more; so it can leave.
    """

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
        self.lines.make_room(int(lengths.max()) + 1)
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

    def result(self, lane: int) -> list[Hypothesis]:
        found = []
        for beam in range(self._settings.num_return_sequences):
            length = int(self.lines["finished_lengths"][lane, beam])
            tokens = self.lines["finished_tokens"][lane, beam, :length].tolist()
            log_probs = self.lines["finished_log_probs"][lane, beam, 1:length].tolist()
            score = float(self.lines["finished_scores"][lane, beam])
            ended = tokens[-1] in self._settings.end_tokens and length > 1
            found.append(Hypothesis(tokens, log_probs, ended, failed=math.isnan(score), score=score))
        return found


def process(processors: Sequence[Processor], history: Tensor, scores: Tensor, lengths: np.ndarray) -> Tensor:
    """Scores after all processors, which see rows of one length at a time.

    Args:
        history: int64 [rows, columns].
        scores: fp32 [rows, vocab_size].
        lengths: of the rows, int64 [rows], on the host.
    """
    if not processors:
        return scores
    out = scores.clone()
    for length in np.unique(lengths):
        rows = torch.from_numpy(np.flatnonzero(lengths == length)).to(scores.device)
        tokens, some = history[rows, : int(length)], scores[rows]
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
