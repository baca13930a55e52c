"""The device of a process' tensors."""

import socket

import torch

from carclass.errors import UserError


def choose_device(use_gpu: bool) -> torch.device:
    """Return this process' GPU, or the CPU. Raise UserError for a GPU that PyTorch cannot use.

    CUDA is initialised here: a driver that is too old would otherwise fail at the first tensor, with a traceback.
    """
    if not use_gpu:
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise UserError(
            f"{socket.gethostname()}: this PyTorch is for CPUs only. Build the image with DEVICE=cuda, the default, or "
            "set `use_gpu: false`."
        )
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"{socket.gethostname()}: its GPU cannot be used ({reason}). This PyTorch needs CUDA {torch.version.cuda}: "
            "`nvidia-smi` on the node shows the newest CUDA that its driver supports. Choose a machine image with a "
            "newer driver, or set `use_gpu: false`."
        ) from error
    return torch.device("cuda")
