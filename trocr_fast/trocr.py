"""The public class: a checkpoint that reads pictures of text lines."""

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trocr_fast import cross_memory as memories
from trocr_fast.checkpoint import resolve_checkpoint
from trocr_fast.config import NEUTRAL_GENERATION, UNUSED_BY_GREEDY
from trocr_fast.engine import Engine, decode_batch
from trocr_fast.errors import CheckpointError, PictureError, UsageError
from trocr_fast.image_config import ImageConfig
from trocr_fast.images import DEFAULT_FORMATS, DEFAULT_MAX_FILE_BYTES, DEFAULT_MAX_MPIXELS, ImageProcessor, Picture
from trocr_fast.line import Line
from trocr_fast.model import Model
from trocr_fast.search import Hypothesis, SearchSettings
from trocr_fast.text import TextDecoder

OUTPUT_FLAGS = frozenset(
    ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


NOT_FINITE = "expected finite scores from the model, got NaN or infinity; try dtype float32"


class TrOCR:
    """A loaded TrOCR checkpoint; made by `from_pretrained`.

    Attributes:
        folder: where the checkpoint lies.
        model: encoder and decoder (`trocr_fast.model.Model`).
        images: pictures -> pixels (`trocr_fast.images.ImageProcessor`).
        text: token ids -> text (`trocr_fast.text.TextDecoder`).
    """

    def __init__(self, folder: Path, model: Model, images: ImageProcessor, text: TextDecoder) -> None:
        self.folder = folder
        self.model = model
        self.images = images
        self.text = text

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        cross_memory: str = "auto",
        pixels: str = "sane",
        max_image_mpixels: float = DEFAULT_MAX_MPIXELS,
        max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
        formats: Sequence[str] = DEFAULT_FORMATS,
    ) -> "TrOCR":
        """Load a checkpoint.

        Args:
            model: a folder, a hub id such as "microsoft/trocr-base-printed", or None for the built-in model.
            revision: branch, tag or commit of a hub id.
            device: "auto" takes CUDA where there is one.
            dtype: "float32", "bfloat16", "float16" or a torch.dtype; "auto" is bfloat16 on CUDA, float32 on a CPU.
            cross_memory: "kv" or "latent" (`trocr_fast.cross_memory`); "auto" takes the one that measured faster for
                such a checkpoint.
            pixels: "sane" or "stock" (`trocr_fast.images`).
            max_image_mpixels, max_file_bytes: larger pictures are refused.
            formats: Pillow's names of the formats that files and bytes may have; others are refused.

        Raises:
            CheckpointError: the checkpoint can't be had, can't be run, or its files disagree.
            UsageError: an option with an unknown value, or a device that is not there.
        """
        chosen_device = _choose_device(device)
        chosen_dtype = _choose_dtype(dtype, chosen_device)
        if cross_memory not in ("auto", *memories.KINDS):
            raise UsageError(f"cross_memory: expected auto, {' or '.join(memories.KINDS)}, got {cross_memory!r}")
        folder = resolve_checkpoint(model, revision)
        images = ImageProcessor(ImageConfig.from_folder(folder), pixels, max_image_mpixels, max_file_bytes, formats)
        text = TextDecoder.from_folder(folder)
        loaded = Model.load(folder, chosen_device, chosen_dtype, cross_memory)
        size, expected = images.config.pixel_size, loaded.config.encoder.image_size
        if size is not None and size != expected:
            raise CheckpointError(
                f"{folder}: the picture settings give pixels of {size[0]}x{size[1]} (height x width), "
                f"config.json's encoder.image_size expects {expected[0]}x{expected[1]}"
            )
        return cls(folder, loaded, images, text)

    def read(
        self,
        pictures: Iterable[Picture],
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        num_workers: int | None = None,
    ) -> Iterator[Line]:
        """Read pictures of text lines, as a stream, in the order in which they come.

        A line is decoded to its end, or to the checkpoint's own length limit, and is then marked `truncated`. A bad
        picture is a row with `error` set; the pictures beside it are read.

        Args:
            pictures: paths, bytes, `PIL.Image` pictures or NumPy arrays, mixed at will; may be endless.
            batch_size: pictures decoded together; by default 16.
            max_new_tokens: a shorter limit than the checkpoint's.
            num_workers: threads that load pictures; by default one a core.

        Raises:
            UsageError: one picture in place of an iterable; a `batch_size`, `max_new_tokens` or `num_workers` below 1.
        """
        if isinstance(pictures, str | bytes | bytearray | os.PathLike | Image.Image | np.ndarray):
            raise UsageError(
                f"pictures: expected an iterable of pictures, got one ({type(pictures).__name__}); put it in a list"
            )
        if num_workers is not None and num_workers < 1:
            raise UsageError(f"num_workers: expected at least 1, got {num_workers}")
        if batch_size is None:
            batch_size = 16
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        max_length = self.read_max_length(max_new_tokens)
        if self.model.config.generation.other:
            warnings.warn(
                f"{self.folder}: its generation settings {dict(self.model.config.generation.other)} are not "
                "followed: lines are read by plain greedy search",
                stacklevel=2,
            )
        return self._read(pictures, batch_size, max_length, num_workers)

    def read_max_length(self, max_new_tokens: int | None = None) -> int:
        """Total length, start token counted, at which `read` cuts a line."""
        limit = self.model.config.read_max_length
        if max_new_tokens is None:
            return limit
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        return min(max_new_tokens + 1, limit)

    def _read(
        self, pictures: Iterable[Picture], batch_size: int, max_length: int, num_workers: int | None
    ) -> Iterator[Line]:
        generation = self.model.config.generation
        engine = Engine(
            self.model,
            SearchSettings.greedy(generation, max_length),
            batch_size,
            count_pads=generation.use_cache,
            table=torch.from_numpy(self.images.table),
        )
        loaded = self.load_pictures(pictures, num_workers)
        taken: deque[tuple[str | None, PictureError | None]] = deque()
        failure: Exception | None = None

        def pixels() -> Iterator[Tensor | None]:
            nonlocal failure
            try:
                for path, picture in loaded:
                    if isinstance(picture, PictureError):
                        taken.append((path, picture))
                        yield None
                    else:
                        taken.append((path, None))
                        yield torch.from_numpy(picture)
            except Exception as error:  # of `pictures`: raised below, once all that came before it is read
                failure = error

        for found in engine.decode(pixels()):
            path, error = taken.popleft()
            yield Line(path=path, error=str(error)) if error is not None else self._line(path, *found)
        if failure is not None:
            raise failure

    def _line(self, path: str | None, found: Hypothesis) -> Line:
        if found.failed:
            return Line(path=path, error=NOT_FINITE)
        (text,) = self.text.batch_decode([found.tokens])
        return Line(
            path=path,
            text=text,
            confidence=found.confidence,
            token_ids=found.tokens,
            truncated=not found.ended,
        )

    def load_pictures(
        self, pictures: Iterable[Picture], num_workers: int | None = None
    ) -> Iterator[tuple[str | None, np.ndarray | PictureError]]:
        """The path of each picture, if it came by one, and its uint8 pixels [3, H, W] or what is wrong with it."""
        paths: deque[str | None] = deque()

        def remember() -> Iterator[Picture]:
            for picture in pictures:
                paths.append(_path_of(picture))
                yield picture

        expected = (3, *self.model.config.encoder.image_size)
        for pixels in self.images.load_many(remember(), num_workers):
            if not isinstance(pixels, PictureError) and pixels.shape != expected:  # of a checkpoint with no resizing
                pixels = PictureError(
                    f"expected a picture of {expected[2]}x{expected[1]} pixels (width x height), since the "
                    f"checkpoint does not resize, got {pixels.shape[2]}x{pixels.shape[1]}"
                )
            yield paths.popleft(), pixels

    def pixel_values(self, pixels: list[np.ndarray]) -> Tensor:
        """uint8 pictures [3, H, W] -> normalised fp32 [batch, 3, H, W], on the model's device."""
        return self.images.normalise(torch.from_numpy(np.stack(pixels)).to(self.model.device))

    def generate(
        self,
        pixel_values: Tensor,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        use_cache: bool | None = None,
        **settings: object,
    ) -> Tensor:
        """Token ids of normalised pictures, as `VisionEncoderDecoderModel.generate` of transformers 5 returns them.

        Lengths default as in transformers: to 20 new tokens, unless the checkpoint says otherwise.

        Args:
            pixel_values: floating-point [batch, 3, H, W].
            max_new_tokens, max_length: limits without and with the start token; the first wins.
            use_cache: matters to the positions of sinusoidal decoders alone; by default the checkpoint's.
            settings: other arguments of transformers' `generate`, as long as they leave greedy search what it is and
                ask for token ids alone.

        Returns:
            int64 [batch, longest], each row from the start token, filled up with the pad token after its end.

        Raises:
            ValueError: pixels of a wrong shape or dtype, a limit below one new token or beyond the position table
                if a row gets there, or a setting (an argument or the checkpoint's own) that asks for another search.
                A row whose scores are not finite.
            TypeError: an argument that this greedy search does not take, known to transformers or not.
        """
        config = self.model.config
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values: expected a floating-point tensor [batch, 3, H, W], got {kind}")
        for name in settings.keys() - NEUTRAL_GENERATION.keys() - UNUSED_BY_GREEDY - OUTPUT_FLAGS:
            raise TypeError(f"generate() takes no argument {name!r}; it searches greedily and returns token ids alone")
        for name, value in {**config.generation.other, **settings}.items():
            neutral = (False,) if name in OUTPUT_FLAGS else NEUTRAL_GENERATION.get(name, (value,))
            if value is not None and value not in neutral:
                raise ValueError(
                    f"{name}: expected a setting of plain greedy search, the only one there is, got {value!r}"
                )

        limit = config.generation.resolve_max_length(max_new_tokens, max_length)
        search = SearchSettings.greedy(config.generation, limit)
        found = decode_batch(self.model, pixel_values, search, use_cache)
        if any(hypothesis.failed for hypothesis in found):
            raise ValueError(NOT_FINITE)
        longest = max((len(hypothesis.tokens) for hypothesis in found), default=1)
        pad = config.generation.pad_token_id
        # Without an end token nothing ends early, so there is nothing to fill.
        rows = [h.tokens + [0 if pad is None else pad] * (longest - len(h.tokens)) for h in found]
        return torch.tensor(rows, dtype=torch.int64, device=self.model.device).view(len(found), longest)


def _path_of(picture: Picture) -> str | None:
    if not isinstance(picture, str | os.PathLike):
        return None
    try:
        return os.fsdecode(picture)
    except Exception:  # somebody's own kind of path; loading it tells what is wrong
        return None


def _choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cuda, cuda:N or cpu, got {device!r}") from None
    if chosen.type not in ("cuda", "cpu"):
        raise UsageError(f"device: expected auto, cuda, cuda:N or cpu, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {device} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen


def _choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise UsageError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
