"""Any picture (path, bytes, PIL image, array) -> uint8 pixels [3, H, W] -> normalised pixels [B, 3, H, W].

For RGB pictures the result is to the bit that of transformers' `ViTImageProcessorPil` or
`DeiTImageProcessorPil` with the checkpoint's configuration. Other pictures are made RGB or grey first, by the
rules of `image_modes`.

Pictures travel as uint8 and are normalised by a table of 256 values a channel: exact, because every step
before ends in uint8. Pillow decodes and resizes without the GIL, so a pool of threads uses all cores.

Of files with several frames or pages (GIF, APNG, WebP, TIFF) the first is read; a PIL image is read at the
frame it stands at. Nothing here imports transformers or torchvision, and only `normalise` imports torch.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trocr_fast.errors import PictureError, UsageError
from trocr_fast.image_config import ImageConfig
from trocr_fast.image_modes import array_size, sane_array, sane_image, stock_array, stock_image

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_FORMATS", "ImageConfig", "ImageProcessor", "Picture"]

# Pillow's names. PostScript and other formats that start programs or hold no pixels stay out.
DEFAULT_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")
DEFAULT_MAX_MPIXELS = 50.0  # an A4 page scanned at 600 dpi is 35
DEFAULT_MAX_FILE_BYTES = 64 * 2**20

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

_FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class ImageProcessor:
    """Turns pictures into pixels; one object serves any number of threads.

    Args:
        config: the checkpoint's picture settings.
        pixels: "sane" or "stock"; see `image_modes`.
        max_mpixels: the largest picture in million pixels, judged by its header before anything is decoded.
        max_file_bytes: the largest file or byte string.
        formats: Pillow's names of the formats that files and byte strings may have. A PIL image is not held
            to them: whoever opened it has chosen.

    Raises:
        UsageError: an option with an unknown or impossible value.
    """

    def __init__(
        self,
        config: ImageConfig,
        pixels: str = "sane",
        max_image_mpixels: float = DEFAULT_MAX_MPIXELS,
        max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
        formats: Sequence[str] = DEFAULT_FORMATS,
    ) -> None:
        if pixels not in ("sane", "stock"):
            raise UsageError(f"pixels: expected sane or stock, got {pixels!r}")
        # Pillow refuses twice its own limit, and no argument of ours can lift that.
        limit = float("inf") if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS / 1e6
        if not 0 < max_image_mpixels <= limit:
            raise UsageError(f"max_image_mpixels: expected above 0 and at most {limit:g}, got {max_image_mpixels!r}")
        if max_file_bytes < 1:
            raise UsageError(f"max_file_bytes: expected at least 1, got {max_file_bytes!r}")
        Image.init()  # registers all formats now, and not in the first thread that meets an unusual one
        if isinstance(formats, str) or not formats or not set(formats) <= set(Image.OPEN):
            known = ", ".join(sorted(Image.OPEN))
            raise UsageError(f"formats: expected some of {known}, got {formats!r}")
        self.config = config
        self.pixels = pixels
        self.max_image_mpixels = max_image_mpixels
        self.max_file_bytes = max_file_bytes
        self.formats = tuple(formats)
        self.table = config.table()  # float32 [3, 256]
        self._decoding = Lock()

    def load(self, picture: Picture) -> np.ndarray:
        """One picture as uint8 [3, H, W], C-contiguous, resized and cropped; (H, W) is `config.pixel_size`.

        Raises:
            PictureError: the picture can't be had; says what was expected and what came. The message holds
                neither the path nor another library's text, so a client may see it; the cause is chained.
        """
        try:
            if isinstance(picture, Image.Image):
                with self._decoding:  # the same lazily opened image may be in the hands of several threads
                    self._decode(picture)
                return self._load_image(picture)
            if isinstance(picture, np.ndarray):
                return self._load_array(picture)
            if isinstance(picture, bytes | bytearray | memoryview):
                return self._load_bytes(bytes(picture))
            if isinstance(picture, str | os.PathLike):
                return self._load_bytes(self._read(picture))
        except MemoryError as error:
            raise PictureError("expected a picture that fits in memory, got a larger one") from error
        raise PictureError(
            "expected a path, bytes, a PIL.Image.Image or a numpy.ndarray, got an object of type "
            f"{type(picture).__name__}"
        )

    def load_many(
        self, pictures: Iterable[Picture], num_workers: int | None = None
    ) -> Iterator[np.ndarray | PictureError]:
        """`load` of each picture on a pool of threads, in order; a bad picture gives its error as a value.

        At most 2 x `num_workers` pictures are taken ahead of the results that were asked for, so `pictures`
        may be endless. Closing the iterator early drops what has not begun and waits for what has.

        Args:
            pictures: any iterable; what it raises is raised here, after the results of what came before.
            num_workers: threads; by default one for each core this process may use, at most 16.

        Raises:
            UsageError: `num_workers` below 1; raised at once.
        """
        if num_workers is None:
            num_workers = min(16, _num_cores())
        if num_workers < 1:
            raise UsageError(f"num_workers: expected at least 1, got {num_workers}")
        return self._load_many(pictures, num_workers)

    def normalise(self, batch: "np.ndarray | torch.Tensor") -> "torch.Tensor":
        """uint8 [B, 3, H, W] -> float32 [B, 3, H, W] on the same device, by table look-up.

        Raises:
            ValueError: another dtype or shape.
        """
        import torch

        from trocr_fast import ops

        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(batch)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
            raise ValueError(f"batch: expected uint8 [B, 3, H, W], got {batch.dtype} {list(batch.shape)}")
        return ops.normalise_pixels(batch, torch.from_numpy(self.table).to(batch.device))

    def _load_many(self, pictures: Iterable[Picture], num_workers: int) -> Iterator[np.ndarray | PictureError]:
        pending: deque[Future[np.ndarray | PictureError]] = deque()
        pool = ThreadPoolExecutor(num_workers, thread_name_prefix="pictures")
        failure: Exception | None = None
        rest = iter(pictures)
        try:
            while True:
                try:
                    pending.append(pool.submit(self._load_or_error, next(rest)))
                except StopIteration:
                    break
                except Exception as error:  # raised below, once all that came before it is given
                    failure = error
                    break
                if len(pending) >= 2 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load_or_error(self, picture: Picture) -> np.ndarray | PictureError:
        try:
            return self.load(picture)
        except PictureError as error:
            # As a value it may live long; its traceback and causes would keep the picture's bytes alive.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return error

    def _read(self, path: str | os.PathLike[str]) -> bytes:
        # Never waits: a pipe that nobody writes to opens at once with O_NONBLOCK, and is then refused.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            path = os.fspath(path)
        except Exception as error:  # somebody's own kind of path
            raise PictureError("expected a path, got an object that gives none") from error
        try:
            with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    found = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
                    raise PictureError(f"expected a regular file, got {found}")
                self._check_bytes(status.st_size)
                return file.read(status.st_size)  # no more than this, should the file grow meanwhile
        except PictureError:
            raise
        except FileNotFoundError as error:
            raise PictureError("expected a picture file, got a path where there is none") from error
        except IsADirectoryError as error:
            raise PictureError("expected a regular file, got a folder") from error
        except PermissionError as error:
            raise PictureError("expected a readable file, got one that may not be read") from error
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "an unnamed error")
            raise PictureError(f"expected a readable file, got {name} from the system") from error
        except ValueError as error:
            raise PictureError("expected a path, got text with a character that no path can hold") from error

    def _load_bytes(self, data: bytes) -> np.ndarray:
        if not data:
            raise PictureError("expected a picture, got 0 bytes")
        self._check_bytes(len(data))
        known = ", ".join(self.formats)
        with _refusing(f"expected a whole picture in a format of {known}, got {len(data)} other bytes"):
            try:
                image = Image.open(BytesIO(data), formats=self.formats)
            except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
                # Pillow's own limits, above our default; the second is raised under `python -W error` only.
                limit = f"{self.max_image_mpixels:g} million pixels"
                raise PictureError(f"expected at most {limit}, got more") from error
        with image:
            return self._load_image(image)

    def _load_image(self, image: Image.Image) -> np.ndarray:
        self._decode(image)
        with _refusing(f"expected a picture that converts to RGB, got a {_describe(image)}, which does not"):
            stock = self.pixels == "stock"
            return self._finish(stock_image(image, self.config) if stock else sane_image(image))

    def _decode(self, image: Image.Image) -> None:
        """Have Pillow read all that it reads lazily; nothing is left to do the second time."""
        self._check_size(image.height, image.width)
        with _refusing(f"expected a whole {_describe(image)}, got data that is damaged or breaks off"):
            image.load()
        with suppress(Exception):  # a damaged EXIF block of a good picture counts as none
            image.getexif()

    def _load_array(self, array: np.ndarray) -> np.ndarray:
        self._check_size(*array_size(array))
        stock = self.pixels == "stock"
        return self._finish(stock_array(array, self.config) if stock else sane_array(array))

    def _finish(self, image: Image.Image) -> np.ndarray:
        """Mode RGB or L -> uint8 [3, H, W]. Channels never mix, so grey is resized once and repeated."""
        if self.config.do_resize:
            height, width = self.config.size
            image = image.resize((width, height), Image.Resampling(self.config.resample))
        pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)  # [3 or 1, H, W]
        pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:]))  # [3, H, W]
        if self.config.do_center_crop and self.config.crop_size is not None:
            pixels = _center_crop(pixels, *self.config.crop_size)
        return np.array(pixels, order="C")  # a copy in any case: it shares nothing and can be written to

    def _check_bytes(self, num_bytes: int) -> None:
        if num_bytes > self.max_file_bytes:
            raise PictureError(f"expected at most {self.max_file_bytes} bytes, got {num_bytes}")

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise PictureError(f"expected at least one pixel, got {width} x {height} pixels")
        if height * width > self.max_image_mpixels * 1e6:
            limit = f"{self.max_image_mpixels:g} million pixels"
            raise PictureError(f"expected at most {limit}, got {width} x {height} pixels")


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Pillow raises OSError, ValueError, SyntaxError, struct.error and more: all become one PictureError."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except Exception as error:
        raise PictureError(message) from error


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [3, H, W] -> [3, height, width]; a side that is too short gets zeros on both ends."""
    pad_h, pad_w = max(0, height - pixels.shape[1]), max(0, width - pixels.shape[2])
    if pad_h or pad_w:
        top, left = -(-pad_h // 2), -(-pad_w // 2)  # an odd row or column goes first, as in transformers
        pixels = np.pad(pixels, ((0, 0), (top, pad_h - top), (left, pad_w - left)))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _describe(image: Image.Image) -> str:
    return f"{image.format or 'PIL'} picture of {image.width} x {image.height} pixels, mode {image.mode}"
