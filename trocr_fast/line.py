"""The result row: what one picture of a text line became."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One picture, read or refused. Either `text` or `error` is None.

    path             the picture's path as it was given, undecodable bytes as surrogates (os.fsdecode); None for a
                     picture that came from memory
    text             the text that was read, special tokens left out; None if the picture could not be read
    confidence       exp(mean log-probability of the generated tokens), 0 to 1, end of sequence included
    token_ids        the sequence behind `text` as `generate` returns it: start token first, end token last if it came
    truncated        whether the length limit cut the line before its end of sequence
    error            why the picture could not be read; None if it was
    token_log_probs  the log-probability of each of `token_ids` after the start token, under the unprocessed softmax,
                     whatever the search; None unless asked for
    """

    path: str | None = None
    text: str | None = None
    confidence: float | None = None
    token_ids: list[int] | None = None
    truncated: bool = False
    error: str | None = None
    token_log_probs: list[float] | None = None
