"""What `bench.throughput` and `bench.latency` share: models, pictures, and the ways to decode them that are compared.

Every contestant gets the same uint8 pictures in host memory, the same weights in the same dtype, and gives token ids in
the order of the pictures. transformers gets its pixels normalised by the same table look-up as ours, on the device: its
own processor is slower.
"""

import copy
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from trocr_fast import accelerate, ops
from trocr_fast.checkpoint import BUILTIN
from trocr_fast.config import Architecture
from trocr_fast.engine import Engine
from trocr_fast.fallbacks import named_weights
from trocr_fast.model import Network
from trocr_fast.recording import MakeRecorder, no_recorder
from trocr_fast.search import SearchSettings
from trocr_fast.trocr import TrOCR
from trocr_fast.verify import Reference, repair_sinusoidal_positions

CHECKPOINTS = report.ROOT / "tests" / "checkpoints"
EXAMPLES = report.ROOT / "examples" / "lines"
FOLDERS = {
    "small": CHECKPOINTS / "small-printed",
    "base": CHECKPOINTS / "base-handwritten",
    "large": CHECKPOINTS / "large-printed",
    "builtin": BUILTIN,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OURS = "ours"
WHOLE_BATCHES = "ours, whole batches"  # static batching in the same engine
NO_GRAPHS = "ours, no CUDA graphs"
ACCELERATED = "accelerate(model)"
SHIPPED = "transformers as shipped"
CACHED = "transformers, cache"
STATIC_CACHE = "transformers, static cache"
COMPILED = "transformers, cache, compiled encoder"

IAM_MEAN, IAM_SIGMA = 11.0, 0.45
IAM_LENGTHS = (
    "new tokens a line: a log-normal of mean 11 and sigma 0.45, one line from each of equally likely parts, rounded, "
    "in a seeded order. The mean is IAM's: 31,959 tokens on the 2,915 lines of its test set (base, arXiv 2109.10282). "
    "The shape is assumed: median 10, one line in 18 past 20, one in 157 past 30; no count of IAM's lines was at hand"
)

Rows = list[list[int]]  # token ids of each line, from the start token to its end


def iam_lengths(num_lines: int, seed: int = 0) -> list[int]:
    """New tokens of each line, as `IAM_LENGTHS` says."""
    mu = torch.tensor(IAM_MEAN).log().item() - IAM_SIGMA**2 / 2
    normal = statistics.NormalDist(mu, IAM_SIGMA)
    parts = torch.tensor([normal.inv_cdf((part + 0.5) / num_lines) for part in range(num_lines)])
    lengths = [max(1, round(length)) for length in parts.exp().tolist()]
    random.Random(seed).shuffle(lengths)
    return lengths


@dataclass(frozen=True)
class Workload:
    """Pictures, and how far they are to be decoded."""

    pictures: Tensor  # uint8 [lines, 3, H, W], in host memory
    table: Tensor  # fp32 [3, 256], the normalised value of each of the 256 values
    max_new_tokens: int
    new_tokens: Sequence[int] | None = None  # that each line gets, of these and maybe more; None: until its end token
    num_beams: int = 1

    def first(self, num_lines: int, max_new_tokens: int | None = None) -> "Workload":
        """A part of it, for warming up: so many lines, with no more than so many new tokens each."""
        lengths, longest = self.new_tokens, self.max_new_tokens
        if max_new_tokens is not None:
            lengths = [min(length, max_new_tokens) for length in lengths or [longest] * len(self.pictures)]
            longest = min(longest, max_new_tokens)
        pictures = self.pictures[:num_lines]
        return dataclasses.replace(self, pictures=pictures, max_new_tokens=longest, new_tokens=lengths)

    def cut(self, line: int, tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
        """A generated row without what a batch generated, or filled in, after this line's end."""
        if self.new_tokens is not None:
            tokens = tokens[: 1 + self.new_tokens[line]]
        return next((tokens[: i + 1] for i, token in enumerate(tokens) if i and token in end_tokens), tokens)


@dataclass(frozen=True)
class Subject:
    """One model, as ours and as transformers'."""

    name: str
    network: Network
    model: Any  # transformers', of the same dtype
    reference: Any  # transformers' in fp32; `model` itself if that is its dtype
    as_shipped: bool  # the checkpoint's use_cache

    @property
    def end_tokens(self) -> tuple[int, ...]:
        end = self.model.generation_config.eos_token_id
        return () if end is None else tuple(end) if isinstance(end, list) else (end,)

    @classmethod
    def of(cls, name: str, reference: Any, device: torch.device, dtype: torch.dtype) -> "Subject":
        """Of a transformers model in fp32."""
        reference = reference.eval().to(device)
        repair_sinusoidal_positions(reference)  # `to` leaves the table of positions where it was
        model = reference
        if dtype != torch.float32:
            model = copy.deepcopy(reference).to(dtype)
            repair_sinusoidal_positions(model)
        weights = {weight_name: parameter.detach() for weight_name, parameter in named_weights(model).items()}
        network = Network(Architecture.from_dict(model.config.to_dict(), name), weights)
        return cls(name, network, model, reference, bool(model.generation_config.use_cache))


def load_subject(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """The built-in model, or a real configuration with random weights and no end token."""
    reference = Reference(BUILTIN, device).model if name == "builtin" else random_model(FOLDERS[name])
    return Subject.of(name, reference, device, dtype)


def random_model(folder: Path) -> Any:
    """A configuration with random weights that make tokens depend on the picture and on the place in the line.

    With the weights that training starts from every picture would give the same tokens, and equality would mean little.
    """
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    fields = json.loads((folder / "config.json").read_text())
    fields["encoder"]["initializer_range"] = fields["decoder"]["init_std"] = 0.08
    generation = json.loads((folder / "generation_config.json").read_text())
    torch.manual_seed(0)
    model: Any = VisionEncoderDecoderModel(VisionEncoderDecoderConfig(**fields))
    decoder = model.decoder.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight /= decoder.embed_tokens.embed_scale
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.04 if name.startswith("decoder") else 0.2)
            elif "embed_positions" in name:
                parameter.normal_(0, 2.4)
            elif "position_embeddings" in name:
                parameter.normal_(0, 0.8)
            elif name.endswith("encoder_attn.out_proj.weight"):
                parameter *= 4
    for name in ("decoder_start_token_id", "pad_token_id", "use_cache"):
        setattr(model.generation_config, name, generation[name])
    model.generation_config.eos_token_id = None  # lengths are prescribed
    return model


def random_pictures(num_lines: int, size: tuple[int, int]) -> Tensor:
    """Smooth patterns, uint8 [lines, 3, H, W]: noise looks alike to a large encoder, which averages over it."""
    coarse = torch.randn(num_lines, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 80 + 128
    smooth = [torch.nn.functional.interpolate(one[None], size=size, mode="bilinear")[0] for one in coarse]
    return torch.stack([one.clamp(0, 255).to(torch.uint8) for one in smooth])


def random_workload(
    subject: Subject, num_lines: int, new_tokens: int | None, num_beams: int = 1, seed: int = 0
) -> Workload:
    """Random pictures; so many new tokens for each, or the lengths of `iam_lengths`."""
    lengths = iam_lengths(num_lines, seed) if new_tokens is None else [new_tokens] * num_lines
    pictures = random_pictures(num_lines, subject.network.encoder.config.image_size)
    table = ((torch.arange(256) / 255 - 0.5) / 0.5).expand(3, 256).contiguous()
    return Workload(pictures, table, max(lengths), lengths, num_beams)


def example_paths(num_lines: int | None = None) -> list[Path]:
    """The sample pictures, over and over if more are asked for."""
    paths = sorted(path for path in EXAMPLES.iterdir() if not path.name.endswith(".gt.txt"))
    return [paths[i % len(paths)] for i in range(num_lines or len(paths))]


def builtin_workload(ocr: TrOCR, num_lines: int | None = None, num_beams: int = 1) -> Workload:
    """The sample pictures, loaded and resized."""
    pictures = torch.stack([torch.from_numpy(ocr.images.load(path)) for path in example_paths(num_lines)])
    return Workload(pictures, torch.from_numpy(ocr.images.table), ocr.read_max_length() - 1, num_beams=num_beams)


class TimedEngine(Engine):
    """Knows how long it encoded and decoded (the rest is the scheduler's, and moving lines), and in how many steps.

    `waits`: for the device, so that the times are the device's; slower, since nothing overlaps then.
    """

    waits = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.start_counting()
        super().__init__(*arguments, **named)

    def start_counting(self) -> None:
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self.num_steps = self.num_lines_fed = 0

    def _timed(self, part: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        found = work(*arguments)
        if self.waits:
            wait_for(self.network.device)
        self.seconds[part] += time.perf_counter() - start
        return found

    def _encode(self, *arguments: Any) -> Any:
        return self._timed("encode", super()._encode, arguments)

    def _decode(self, batch: tuple[int, ...]) -> None:
        self.num_steps += bool(batch)
        self.num_lines_fed += len(batch)
        self._timed("decode", super()._decode, (batch,))


@dataclass
class Contestant:
    """One way to decode a workload; calling it gives the tokens of all lines."""

    name: str
    subject: Subject
    batch: int

    def __call__(self, workload: Workload) -> Rows:
        raise NotImplementedError


@dataclass
class Ours(Contestant):
    """The engine with `batch` lanes.

    Args:
        workload: what it is made for; parts of it and shorter lengths can be decoded too.
        whole_batches: take new lines only when all have left.
        make_recorder: as of `Engine`.
    """

    workload: Workload
    whole_batches: bool = False
    make_recorder: MakeRecorder[Any] | None = None
    engine: TimedEngine | None = None

    def __call__(self, workload: Workload) -> Rows:
        subject = self.subject
        if self.engine is None:
            settings = SearchSettings(
                subject.model.generation_config.decoder_start_token_id,
                subject.end_tokens,
                self.workload.max_new_tokens + 1,
                num_beams=self.workload.num_beams,
            )
            self.engine = TimedEngine(
                subject.network,
                settings,
                self.batch,
                count_pads=subject.as_shipped,
                table=self.workload.table,
                make_recorder=self.make_recorder,
            )
        engine, rows = self.engine, dict[int, list[int]]()
        lines = range(len(workload.pictures))
        for start in range(0, len(lines), self.batch) if self.whole_batches else [0]:
            line_of = {}
            for line in lines[start : start + self.batch] if self.whole_batches else lines:
                limit = None if workload.new_tokens is None else workload.new_tokens[line] + 1
                line_of[engine.add(workload.pictures[line], limit)] = line
            while not engine.is_idle:
                rows.update((line_of[number], found[0].tokens) for number, found in engine.step())
        return [rows[line] for line in lines]


@dataclass
class Transformers(Contestant):
    """transformers' generate, batch by batch.

    Args:
        settings: arguments of generate.
        order: in which lines are put into batches; None: as they come.
        compiles: the encoder is compiled.
        accelerated: by `trocr_fast.accelerate`.
    """

    settings: dict[str, Any]
    order: Sequence[int] | None = None
    compiles: bool = False
    accelerated: bool = False

    def __post_init__(self) -> None:
        self._model = self.subject.model
        self._encoder = None
        if self.accelerated:
            self._model = copy.copy(self._model)  # the same modules; only its generate is another
            accelerate(self._model, unsupported="raise")
        if self.compiles:
            self._encoder = torch.compile(self._model.encoder, dynamic=False)

    @torch.inference_mode()
    def __call__(self, workload: Workload) -> Rows:
        rows: dict[int, list[int]] = {}
        for lines in batches(self.order, len(workload.pictures), self.batch):
            for line, tokens in zip(lines, self._generate(workload, lines).tolist(), strict=True):
                rows[line] = workload.cut(line, tokens, self.subject.end_tokens)
        return [rows[line] for line in range(len(rows))]

    def _generate(self, workload: Workload, lines: list[int]) -> Tensor:
        model, settings = self._model, dict(self.settings)
        pixels = ops.normalise_pixels(workload.pictures[lines].to(model.device), workload.table.to(model.device))
        pixels = pixels.to(model.dtype)
        settings["max_new_tokens"] = workload.max_new_tokens
        if workload.new_tokens is not None:
            lengths = [workload.new_tokens[line] for line in lines]
            settings["max_new_tokens"] = max(lengths)
            if min(lengths) < max(lengths):
                settings["stopping_criteria"] = stop_each_at([1 + length for length in lengths], model.device)
        if self._encoder is not None:
            settings["encoder_outputs"] = self._encoder(pixels)
        tokens: Tensor = model.generate(pixels, num_beams=workload.num_beams, do_sample=False, **settings)
        return tokens


def stop_each_at(lengths: list[int], device: torch.device) -> Any:
    """Stopping criteria that stop each line at a length of its own; a batch goes on until its longest is there."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    limits = torch.tensor(lengths, device=device)

    class OwnLength(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            # Beam search asks for several rows of each line.
            return limits.repeat_interleave(len(input_ids) // len(limits)) <= input_ids.shape[1]

    return StoppingCriteriaList([OwnLength()])


def batches(order: Sequence[int] | None, num_lines: int, batch: int) -> Iterator[list[int]]:
    """Lines in batches; of an order longer than the lines, those that there are."""
    lines = list(range(num_lines)) if order is None else [line for line in order if line < num_lines]
    for start in range(0, num_lines, batch):
        yield lines[start : start + batch]


@dataclass(frozen=True)
class Maker:
    """Makes a contestant when its turn comes: one that cannot be made is a row of the results that says why."""

    name: str
    make: Callable[[], Contestant]

    def __call__(self) -> Contestant:
        return self.make()


def contestants(
    subject: Subject, workload: Workload, batch: int, lengths: Sequence[int], everything: bool | None = None
) -> list[Maker]:
    """All that are compared, ours first.

    Args:
        lengths: of the lines; transformers with a cache gets them sorted, so that its batches waste least.
        everything: also what is meant for GPUs; None: on a GPU.
    """
    by_length = sorted(range(len(lengths)), key=lambda line: lengths[line])
    cached = {"use_cache": True}

    def transformers(name: str, settings: dict[str, Any], **more: Any) -> Maker:
        return Maker(name, lambda: Transformers(name, subject, batch, settings, **more))

    makers: list[Maker] = [Maker(OURS, lambda: Ours(OURS, subject, batch, workload))]
    if batch > 1 and len(set(lengths)) > 1:
        makers.append(Maker(WHOLE_BATCHES, lambda: Ours(WHOLE_BATCHES, subject, batch, workload, True)))
    everything = subject.network.device.type == "cuda" if everything is None else everything
    if everything:
        makers.append(Maker(NO_GRAPHS, lambda: Ours(NO_GRAPHS, subject, batch, workload, make_recorder=no_recorder)))
    makers += [
        transformers(ACCELERATED, {}, order=by_length, accelerated=True),
        transformers(CACHED, cached, order=by_length),
        transformers(SHIPPED, {"use_cache": subject.as_shipped}),
    ]
    if everything:
        static = {"use_cache": True, "cache_implementation": "static"}
        makers += [
            transformers(STATIC_CACHE, static, order=by_length),
            transformers(COMPILED, cached, order=by_length, compiles=True),
        ]
    return makers


def reference_rows(subject: Subject, workload: Workload, batch: int, num_lines: int) -> Rows:
    """What transformers gives as shipped in fp32, on the first lines."""
    fp32 = dataclasses.replace(subject, model=subject.reference)
    return Transformers(SHIPPED, fp32, batch, {"use_cache": subject.as_shipped})(workload.first(num_lines))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def what_went_wrong(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one. fp32 means fp32 there."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default bfloat16 on a GPU and float32 on a CPU."""
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]
