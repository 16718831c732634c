"""The decoding loop of a `generate` call on the engine, where nothing has to be on the host at every step.

transformers has resolved the arguments by then. Lines that are done leave the batch, which its own loops keep until the
last one is done; results are the same.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from trocr_fast.kept_engine import KeptEngine
from trocr_fast.search import SearchSettings

MAX_LANES = 64  # pictures decoded at a time; the others wait, and keep the batch full

# What these do to a row depends on that row alone.
PROCESSORS = (
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.LogitNormalization,
)


def is_possible(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
) -> bool:
    """Whether the engine decodes this call; the arguments are those of transformers' decoding loops."""
    num_beams = 1 if config.num_beams is None else config.num_beams
    return (
        num_beams > 0  # else transformers has its own error
        and not config.do_sample
        and not config.return_dict_in_generate
        and streamer is None
        and input_ids.shape[1] == 1  # no prompt but the start token, the same for all
        and bool((input_ids == input_ids[0]).all())
        and all(type(processor) in PROCESSORS for processor in processors)
        and all(_is_own(criterion, config) for criterion in criteria)
        and (num_beams == 1 or (config.length_penalty is not None and not config.low_memory))
    )


def _is_own(criterion: Any, config: GenerationConfig) -> bool:
    """Whether a stopping criterion is what the configuration says, and none of the caller's."""
    if type(criterion) is stopping_criteria.MaxLengthCriteria:
        return bool(criterion.max_length == config.max_length)
    if type(criterion) is stopping_criteria.EosTokenCriteria:
        end_tokens = config._eos_token_tensor
        return end_tokens is not None and criterion.eos_token_id.tolist() == end_tokens.tolist()
    return False


def decode(
    engines: KeptEngine,
    pixels: Tensor,
    count_pads: bool,
    start_token: int,
    processors: Any,
    config: GenerationConfig,
) -> Tensor | None:
    """Token ids as transformers returns them; None if scores were not finite, which its own loop does not mind.

    Args:
        pixels: [batch, channels, H, W].
        count_pads: the rule of sinusoidal positions, as of `Decoder.positions`.
        processors, config: as resolved by transformers.

    Returns:
        int64 [batch * num_return_sequences, longest], on the device of pixels.
    """
    end_tokens = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
    num_beams = config.num_beams or 1
    settings = SearchSettings(
        start_token,
        tuple(end_tokens),
        config.max_length,
        num_beams=num_beams,
        length_penalty=config.length_penalty if config.length_penalty is not None else 1.0,
        early_stopping=config.early_stopping or False,
        num_return_sequences=config.num_return_sequences or 1,
        processors=tuple(processors),
    )
    with engines.lend(settings, min(len(pixels), MAX_LANES), count_pads) as engine:
        hypotheses = [hypothesis for found in engine.decode(pixels) for hypothesis in found]
    if any(hypothesis.failed for hypothesis in hypotheses):
        return None
    rows = [hypothesis.tokens for hypothesis in hypotheses]
    pad = config._pad_token_tensor
    fill = 0 if pad is None else int(pad)
    if num_beams > 1:  # where a pad token 0 counts as none
        fill = fill or (end_tokens[0] if end_tokens else -1)
    longest = max(len(row) for row in rows)
    filled = [row + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=pixels.device)
