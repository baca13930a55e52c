"""Stands in for torch while Detectron2's wheel is built: answers what its setup.py asks, compiles nothing."""

from torch import cuda, utils, version

__version__ = "2.13.0"
__all__ = ["cuda", "utils", "version"]
