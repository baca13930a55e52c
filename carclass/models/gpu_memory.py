"""Out-of-memory errors of a GPU as user errors with advice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from carclass.errors import UserError


@contextmanager
def report_out_of_memory(remedy: str) -> Iterator[None]:
    """Raise UserError, with a remedy, instead of PyTorch's error if a GPU's memory is too small."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"the memory of a GPU is too small ({cause}). {remedy}") from error
