"""The public class: a checkpoint that reads pictures of text lines."""

import os
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trocr_fast import cross_memory as memories
from trocr_fast.async_engine import AsyncEngine, OnText
from trocr_fast.checkpoint import resolve_checkpoint
from trocr_fast.errors import CheckpointError, PictureError, UsageError
from trocr_fast.image_config import ImageConfig
from trocr_fast.images import DEFAULT_FORMATS, DEFAULT_MAX_FILE_BYTES, DEFAULT_MAX_MPIXELS, ImageProcessor, Picture
from trocr_fast.kept_engine import KeptEngine
from trocr_fast.line import Line
from trocr_fast.model import Model
from trocr_fast.places import CLOSED
from trocr_fast.recording import give_back
from trocr_fast.search import Hypothesis, Sampling, SearchSettings, make_processors
from trocr_fast.text import TextDecoder

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

PICTURE_TYPES = str | bytes | bytearray | os.PathLike | Image.Image | np.ndarray
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        self._async_engine: AsyncEngine | None = None
        self._engines = KeptEngine(model)
        self._arguments: dict[str, Any] | None = None  # of `from_pretrained`
        self._closed, self._opening = False, Lock()

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
        ocr = cls(folder, loaded, images, text)
        ocr._arguments = {
            "model": folder.resolve(),
            "device": chosen_device,
            "dtype": chosen_dtype,
            "cross_memory": loaded.cross_memory,
            "pixels": pixels,
            "max_image_mpixels": max_image_mpixels,
            "max_file_bytes": max_file_bytes,
            "formats": tuple(formats),
        }
        return ocr

    def __reduce__(self) -> Any:
        """A copy, and what was pickled, loads the checkpoint again."""
        if self._arguments is None:
            raise TypeError("TrOCR: expected one that `from_pretrained` made, which alone can be copied or pickled")
        return partial(TrOCR.from_pretrained, **self._arguments), ()

    def read(
        self,
        pictures: Iterable[Picture],
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        num_workers: int | None = None,
        token_log_probs: bool = False,
        **search: Any,
    ) -> Iterator[Line]:
        """Read pictures of text lines, as a stream, in the order in which they come.

        A line is decoded to its end, or to the checkpoint's own length limit, and is then marked `truncated`: greedily,
        unless `search` asks for more. A bad picture is a row with `error` set; the pictures beside it are read.

        Args:
            pictures: paths, bytes, `PIL.Image` pictures or NumPy arrays, mixed at will; may be endless.
            batch_size: pictures decoded together; by default 16.
            max_new_tokens: a shorter limit than the checkpoint's.
            num_workers: threads that load pictures; by default one a core.
            token_log_probs: give each line those of its tokens.
            search: settings of another search than greedy, as of `search_settings`. With `do_sample` the line's own
                seed is its number among the pictures, so the same seed gives the same texts again.

        Raises:
            UsageError: one picture in place of an iterable; a `batch_size`, `max_new_tokens` or `num_workers` below 1;
                settings of a search that make no sense.
        """
        if isinstance(pictures, PICTURE_TYPES):
            raise UsageError(
                f"pictures: expected an iterable of pictures, got one ({type(pictures).__name__}); put it in a list"
            )
        if num_workers is not None and num_workers < 1:
            raise UsageError(f"num_workers: expected at least 1, got {num_workers}")
        if batch_size is None:
            batch_size = 16
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        settings = self.search_settings(max_new_tokens=max_new_tokens, **search)
        self._warn_of_ignored(search, stacklevel=3)
        return self._read(pictures, batch_size, settings, num_workers, token_log_probs)

    def _warn_of_ignored(self, search: dict[str, Any], stacklevel: int) -> None:
        # What is asked for by name has been answered, whatever the value.
        generation = self.model.config.generation
        own = {**generation.other}
        if search.get("num_beams", 1) > 1:
            own |= generation.of_beams
        if search.get("do_sample"):
            own |= generation.of_sampling
        ignored = {name: value for name, value in own.items() if name not in search}
        if ignored:
            warnings.warn(
                f"{self.folder}: its generation settings {ignored} are not followed: lines are read by "
                f"{'the search that was asked for' if search else 'plain greedy search'}",
                stacklevel=stacklevel,
            )

    def search_settings(
        self,
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        min_p: float | None = None,
        typical_p: float = 1.0,
        epsilon_cutoff: float = 0.0,
        eta_cutoff: float = 0.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
    ) -> SearchSettings:
        """How `read` chooses tokens: greedily, with beams or by sampling. Names and meaning are transformers'.

        Sampling, `repetition_penalty` and `no_repeat_ngram_size` import transformers.

        Args:
            max_new_tokens: a shorter limit than the checkpoint's.
            num_beams: above 1: beam search, with so many beams.
            length_penalty, early_stopping: of beam search.
            do_sample: draw each token, instead of taking the best.
            temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: of sampling.
            seed: of sampling. A line's tokens depend on this seed, the line's own and its picture alone (as far as
                rounding lets the scores be the same in any batch).
            repetition_penalty, no_repeat_ngram_size: of any search.

        Raises:
            UsageError: a value out of its range; beams and sampling together; settings of beam search without beams, or
                of sampling without `do_sample`.
        """
        generation = self.model.config.generation
        try:
            sampling = Sampling(temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, seed)
            settings = SearchSettings(
                generation.decoder_start_token_id,
                generation.eos_token_ids,
                self.read_max_length(max_new_tokens),
                num_beams=num_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                processors=make_processors(repetition_penalty, no_repeat_ngram_size),
                sampling=sampling if do_sample else None,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        of_beams = {"length_penalty": (length_penalty, 1), "early_stopping": (early_stopping, False)}
        of_sampling = {f.name: (getattr(sampling, f.name), f.default) for f in fields(sampling) if f.name != "seed"}
        for needed, is_there, options in (
            ("num_beams above 1", num_beams > 1, of_beams),
            ("do_sample=True", do_sample, of_sampling),
        ):
            for name, (value, default) in options.items():
                if value != default and not is_there:
                    raise UsageError(f"{name}: expected {needed} beside it, got {name}={value!r} alone")
        return settings

    def read_max_length(self, max_new_tokens: int | None = None) -> int:
        """Total length, start token counted, at which `read` cuts a line."""
        limit = self.model.config.read_max_length
        if max_new_tokens is None:
            return limit
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: expected at least 1, got {max_new_tokens!r}")
        return min(max_new_tokens + 1, limit)

    def _read(
        self,
        pictures: Iterable[Picture],
        batch_size: int,
        settings: SearchSettings,
        num_workers: int | None,
        token_log_probs: bool,
    ) -> Iterator[Line]:
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

        count_pads, table = self.model.config.generation.use_cache, torch.from_numpy(self.images.table)
        with self._engines.lend(settings, batch_size, count_pads, table) as engine:
            for found in engine.decode(pixels()):
                path, error = taken.popleft()
                if error is not None:
                    yield Line(path=path, error=str(error))
                else:
                    yield self._line(path, *found, token_log_probs=token_log_probs)
        if failure is not None:
            raise failure

    def _line(self, path: str | None, found: Hypothesis, *, token_log_probs: bool = False) -> Line:
        if found.error is not None:
            return Line(path=path, error=found.error)
        (text,) = self.text.batch_decode([found.tokens])
        return Line(
            path=path,
            text=text,
            confidence=found.confidence,
            token_ids=found.tokens,
            truncated=not found.ended,
            token_log_probs=found.log_probs if token_log_probs else None,
        )

    def __call__(
        self,
        inputs: Picture | Iterable[Picture],
        *,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, str]] | list[list[dict[str, str]]]:
        """As the "image-to-text" pipeline of transformers 4, but that lines are read to their end by default.

        Args:
            inputs: a picture or several, as of `read`.
            batch_size, max_new_tokens: as of `read`.
            generate_kwargs: other arguments of `read`, such as {"num_beams": 4}.

        Returns:
            [{"generated_text": text}] of one picture, a list of such lists of several.

        Raises:
            PictureError: a picture can't be read.
            UsageError: as by `read`.
        """
        search = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in search:
                raise UsageError("max_new_tokens: expected an argument or one of generate_kwargs, got both")
            search["max_new_tokens"] = max_new_tokens
        single = isinstance(inputs, PICTURE_TYPES)
        pictures: Any = [inputs] if single else inputs
        if single and batch_size is None:
            batch_size = 1
        rows = []
        for number, line in enumerate(self.read(pictures, batch_size=batch_size, **search)):
            if line.text is None:
                raise PictureError(f"{f'picture {number}' if line.path is None else line.path}: {line.error}")
            rows.append([{"generated_text": line.text}])
        return rows[0] if single else rows

    def submit(self, picture: Picture, *, on_text: OnText | None = None, **search: Any) -> "Future[Line]":
        """Read one picture together with all others that are submitted meanwhile, from any thread.

        For another batch size or bound of waiting requests, make an `AsyncEngine`.

        Args:
            picture, on_text: as of `AsyncEngine.submit`.
            search: as of `search_settings`.

        Returns:
            The line, once it is read; see `AsyncEngine.submit`.

        Raises:
            UsageError: as by `search_settings`.
            RuntimeError: as by `AsyncEngine.submit`.
        """
        engine, settings = self._running(search)
        return engine.submit(picture, settings, on_text)

    async def submit_async(self, picture: Picture, *, on_text: OnText | None = None, **search: Any) -> Line:
        """`submit` in an event loop, which gives the line itself. Whoever cancels the task cancels the request."""
        engine, settings = self._running(search)
        return await engine.submit_async(picture, settings, on_text)

    def stream(self, picture: Picture, **search: Any) -> Generator[str, None, None]:
        """The text so far each time it has grown, and at last the whole text; see `AsyncEngine.stream`."""
        engine, settings = self._running(search)
        return engine.stream(picture, settings)

    def stream_async(self, picture: Picture, **search: Any) -> AsyncGenerator[str, None]:
        """`stream` in an event loop."""
        engine, settings = self._running(search)
        return engine.stream_async(picture, settings)

    def close(self) -> None:
        """Cancel what was submitted and has not ended, refuse more of it, and end the thread that reads it.

        `read` and `generate` are as before.
        """
        with self._opening:
            self._closed = True
        if self._async_engine is not None:
            self._async_engine.close()
        give_back()

    def __enter__(self) -> "TrOCR":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self, search: dict[str, Any]) -> tuple[AsyncEngine, SearchSettings]:
        """The engine of what is submitted, and how it is to choose tokens."""
        settings = self.search_settings(**search)
        self._warn_of_ignored(search, stacklevel=4)
        with self._opening:
            if self._closed:
                raise RuntimeError(CLOSED)
            if self._async_engine is None:
                self._async_engine = AsyncEngine(self)
            return self._async_engine, settings

    def load_pictures(
        self, pictures: Iterable[Picture], num_workers: int | None = None
    ) -> Iterator[tuple[str | None, np.ndarray | PictureError]]:
        """The path of each picture, if it came by one, and its uint8 pixels [3, H, W] or what is wrong with it."""
        paths: deque[str | None] = deque()

        def remember() -> Iterator[Picture]:
            for picture in pictures:
                paths.append(_path_of(picture))
                yield picture

        for pixels in self.images.load_many(remember(), num_workers):
            yield paths.popleft(), self._fitting(pixels)

    def load_picture(self, picture: Picture) -> tuple[str | None, np.ndarray | PictureError]:
        """`load_pictures` of one picture, in the thread that calls."""
        path = _path_of(picture)
        try:
            return path, self._fitting(self.images.load(picture))
        except PictureError as error:
            return path, error

    def _fitting(self, pixels: np.ndarray | PictureError) -> np.ndarray | PictureError:
        """Pixels of the model's size, or the error that they are not: some checkpoints do not resize."""
        expected = (3, *self.model.config.encoder.image_size)
        if isinstance(pixels, PictureError) or pixels.shape == expected:
            return pixels
        return PictureError(
            f"expected a picture of {expected[2]}x{expected[1]} pixels (width x height), since the "
            f"checkpoint does not resize, got {pixels.shape[2]}x{pixels.shape[1]}"
        )

    def pixel_values(self, pixels: list[np.ndarray]) -> Tensor:
        """uint8 pictures [3, H, W] -> normalised fp32 [batch, 3, H, W], on the model's device."""
        return self.images.normalise(torch.from_numpy(np.stack(pixels)).to(self.model.device))

    def generate(self, pixel_values: Tensor | None = None, *arguments: Any, **settings: Any) -> "Tensor | ModelOutput":
        """What `VisionEncoderDecoderModel.generate` of transformers 5 returns, for the same arguments.

        transformers resolves the arguments and the checkpoint's generation settings, so they mean what they mean there:
        lengths default to 20 new tokens unless the checkpoint says otherwise. The first call imports transformers.
        What differs is named in `trocr_fast.accelerate`.

        Args:
            pixel_values: floating-point [batch, 3, H, W], on any device; `inputs` is another name. `encoder_outputs`
                may take their place.
            arguments, settings: the others of `generate`: `generation_config`, `num_beams`, `do_sample`, `streamer`,
                `return_dict_in_generate` and so on.

        Returns:
            int64 [batch * num_return_sequences, longest], each row from the start token, filled up with the pad token
            after its end; or one of transformers' output classes, if asked for.

        Raises:
            ValueError: pixels of a wrong shape or dtype, a row beyond the position table.
            NotImplementedError: what the engine does not do, as attention outputs and assisted decoding; named.
            CheckpointError: transformers cannot make a model of the checkpoint's configuration.
            Whatever transformers raises for arguments that it refuses.
        """
        from trocr_fast.generate_call import Call

        if pixel_values is None:
            pixel_values = settings.pop("inputs", None)
        if pixel_values is None and settings.get("encoder_outputs") is None:
            raise ValueError("pixel_values: expected a floating-point tensor [batch, 3, H, W], got none")
        if pixel_values is not None:
            if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
                kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
                raise ValueError(f"pixel_values: expected a floating-point tensor [batch, 3, H, W], got {kind}")
            pixel_values = pixel_values.to(self.model.device)

        model = self._weightless_model
        call = Call.resolve(model, (pixel_values, *arguments), settings)
        if call is None:
            return model.generate(pixel_values, *arguments, **settings)  # raises
        if call.reason is not None:
            raise NotImplementedError(
                f"generate: not possible on this engine: {call.reason}. Load {self.folder} with transformers' "
                "VisionEncoderDecoderModel.from_pretrained and accelerate() that: such calls then go to transformers"
            )
        return call.run(self._engines)

    @cached_property
    def _weightless_model(self) -> Any:
        from trocr_fast.generate_call import WeightlessModel

        return WeightlessModel.from_folder(self.folder, self.model)


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
