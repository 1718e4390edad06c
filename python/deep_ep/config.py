"""Tuning parameters of normal mode, as DeepEP's clients pass them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How a dispatch or combine may use its device.

    On CPU an op runs on the thread that calls it, in chunks as large as the windows allow, so nothing here changes
    what it does.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 128
