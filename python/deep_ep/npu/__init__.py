"""deep_ep on Huawei's Ascend NPUs. Importing it needs neither torch_npu nor CANN."""

from .backend import backend
from .training import grouped_matmul
from .windows import check, load_kernels, table

__all__ = ["backend", "check", "grouped_matmul", "load_kernels", "table"]
