"""Tuning parameters of normal mode, as DeepEP's clients pass them."""

from dataclasses import dataclass

_NODE = 8
"""Ranks of a node in the size hints, as upstream DeepEP counts them."""

_METADATA = 256
"""Bytes for a token's ids, weights and source in the size hints."""


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
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of a window that holds the chunks which this rank may receive from up to 8 peers of its node at once.

        channels * min(num_ranks, 8) * num_max_nvl_chunked_recv_tokens * (hidden_bytes + 256), rounded up to a multiple
        of 128, where channels = num_sms // 2 and 256 bytes are for a token's ids, weights and source.

        ValueError: hidden_bytes or num_ranks is not positive.
        """
        return self._bytes(hidden_bytes, num_ranks, min(num_ranks, _NODE) * self.num_max_nvl_chunked_recv_tokens)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of a window that holds the chunks between this rank and all nodes, on the way there and back.

        0 for up to 8 ranks, which are one node. Otherwise
        2 * channels * ceil(num_ranks / 8) * num_max_rdma_chunked_recv_tokens * (hidden_bytes + 256), rounded up to a
        multiple of 128, with channels and 256 as in get_nvl_buffer_size_hint.

        ValueError: hidden_bytes or num_ranks is not positive.
        """
        nodes = (num_ranks + _NODE - 1) // _NODE
        tokens = 0 if num_ranks <= _NODE else 2 * nodes * self.num_max_rdma_chunked_recv_tokens
        return self._bytes(hidden_bytes, num_ranks, tokens)

    def _bytes(self, hidden_bytes: int, num_ranks: int, tokens: int) -> int:
        for name, value in (("hidden_bytes", hidden_bytes), ("num_ranks", num_ranks)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        return (max(self.num_sms // 2, 1) * tokens * (hidden_bytes + _METADATA) + 127) // 128 * 128
