from torch.utils import cpp_extension

__all__ = ["cpp_extension"]
