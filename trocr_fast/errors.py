"""The errors a user can meet; each message says what was expected and what came."""


class TrocrFastError(Exception):
    """Base of all errors raised on purpose by trocr_fast."""


class CheckpointError(TrocrFastError, ValueError):
    """A checkpoint folder cannot be run: which file, which field or tensor, what was expected, what was found."""


class PictureError(TrocrFastError, ValueError):
    """One picture cannot be read; the pictures beside it are not touched."""


class UsageError(TrocrFastError, ValueError):
    """The command or function was asked for something that makes no sense; nothing was read or written."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or csrc could not have the memory that it asked for; PyTorch has no error for that on a CPU."""
    of_cpu = "not enough memory", "can't allocate memory"
    is_named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return is_named or any(words in str(error) for words in of_cpu)
