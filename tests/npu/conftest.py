import os

from cann import stand_in

if stand_in.in_use():
    # The ranks inherit it.
    os.environ.setdefault("DEEP_EP_KERNELS", str(stand_in.BUILD / "lib" / "libhost_kernels.so"))
