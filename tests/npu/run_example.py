"""Runs examples/train_moe.py with graphs for NPUs, without CANN: with the options of the command line.

deep_ep's ops run behind NPU tensors, by the AscendC kernels on the twin.
"""

import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]
EXAMPLE = TESTS.parent / "examples" / "train_moe.py"

if __name__ == "__main__":
    sys.path += [str(TESTS), str(TESTS.parent)]
    import ge_graphs  # noqa: F401  (lets torchair work)
    import kernel_route

    kernel_route.open_route(int(os.environ.get("LOCAL_RANK", "0")))
    init = dist.init_process_group
    dist.init_process_group = lambda _, **options: init(kernel_route.BACKEND, **options)
    sys.argv[:1] = [str(EXAMPLE), "--compile", "npu"]
    runpy.run_path(str(EXAMPLE), run_name="__main__")
