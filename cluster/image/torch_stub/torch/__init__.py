"""Stub of torch for building Detectron2's wheel without compiled extensions."""

from torch import cuda, utils, version

__version__ = "2.13.0"
__all__ = ["cuda", "utils", "version"]
