"""The kernels of fused_deep_moe and of its backward, for every device: dispatch, the experts and combine in one op.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows ·
I intermediate size · M num_max_dispatch_tokens_per_rank.

Rows travel by the ops dispatch and combine of the strategy, in exact mode: what does not arrive is not computed. An
expert computes, for a row x [H], with W1 [H, 2I] and W2 [I, H]:

    quant_mode 0   h = x @ W1;  a = silu(h[:I]) * h[I:];  y = a @ W2     h, a and y rounded to x's dtype
    quant_mode 1   q, s = int8(x);  h = (q @ W1) * scale1 * s, with the sum in int32 and the products in fp32;
                   a = silu(h[:I]) * h[I:];  q, s = int8(a);  y = (q @ W2) * scale2 * s, rounded to x's dtype

int8 is `quantization.quantize` for low latency: of a row of zeros it makes zeros.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from . import alltoall, checks, quantization, reference, windows
from .fused_weights import bits_to_scale, places


class _Experts:
    """The experts of this rank, in the layout of the overload."""

    def __init__(self, overload: str, gmm1_weight: Tensor, gmm2_weight: Tensor) -> None:
        self.permuted = overload == "default"
        self.w1 = gmm1_weight  # [L, H, 2I]
        self.w2 = gmm2_weight.transpose(1, 2) if self.permuted else gmm2_weight  # [L, I, H]
        self._places = places(gmm1_weight.shape[2]).to(gmm1_weight.device) if self.permuted else None

    def gate_up(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up, fp32 [n, I], of what gmm1 gave, [n, 2I]."""
        h = h if self._places is None else h.index_select(1, self._places)
        gate, up = h.to(torch.float32).chunk(2, 1)
        return gate, up

    def columns(self, gate: Tensor, up: Tensor) -> Tensor:
        """[n, 2I] in the order of gmm1's columns."""
        h = torch.cat([gate, up], 1)
        return h if self._places is None else torch.empty_like(h).index_copy_(1, self._places, h)

    def compute(self, expert: int, rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """y of rows [n, H] with quant_mode 0, to out [n, H]. Returns h and a."""
        h = rows @ self.w1[expert]
        gate, up = self.gate_up(h)
        a = (silu(gate) * up).to(rows.dtype)
        torch.mm(a, self.w2[expert], out=out)
        return h, a


def _blocks(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which they are."""
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


def _agree(op: str, strategy: str, group: str, error: str | None, x: Tensor, topk_idx: Tensor, *sizes: int) -> None:
    """Raises the same on all ranks if `error`, or what ranks have given does not fit together.

    sizes: E, num_max_dispatch_tokens_per_rank, quant_mode.
    """
    if strategy == "alltoall":
        alltoall.agree(op, group, error, x, topk_idx, *sizes)
    elif x.device.type == "cpu":
        windows.agree(op, group, error, x.dtype, () if error else (x.shape[1], topk_idx.shape[1], *sizes))
    elif error:
        raise RuntimeError(f"deep_ep.{op}: {error}")


def _dispatch(
    strategy: str, rows: Tensor, topk_idx: Tensor, topk_weights: Tensor, E: int, R: int, group: str
) -> reference.DispatchResult:
    op = getattr(torch.ops.deep_ep.dispatch, strategy)
    return reference.DispatchResult(*op(rows, topk_idx, topk_weights, E, R, 0, group))


def forward(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm1_weight_scale: Tensor,
    gmm2_weight: Tensor,
    gmm2_weight_scale: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    quant_mode: int,
    group: str,
    strategy: str,
    *,
    overload: str,
) -> tuple[Tensor, Tensor]:
    """The kernel of fused_deep_moe."""
    op = "fused_deep_moe" if overload == "default" else f"fused_deep_moe.{overload}"
    weights = gmm1_weight, gmm1_weight_scale, gmm2_weight, gmm2_weight_scale
    M = num_max_dispatch_tokens_per_rank
    error = checks.fused_deep_moe(
        x, topk_idx, topk_weights, *weights, M, num_experts, num_ranks, quant_mode, strategy, overload
    )
    if not error and quant_mode == 1 and x.device.type != "cpu":
        error = f"quant_mode 1 on {x.device.type} needs an AscendC kernel for fused_deep_moe, which there is not yet"
    _agree(op, strategy, group, error, x, topk_idx, num_experts, M, quant_mode)

    sent = quantization.quantize(x, "int8", low_latency=True) if quant_mode == 1 else None
    rows = x if sent is None else quantization.pack(*sent)
    received = _dispatch(strategy, rows, topk_idx, topk_weights, num_experts, num_ranks, group)
    if overload == "dispatch_ffn_combine":  # all ranks know how many rows each receives
        most, rank = (int(v) for v in received.rank_prefix_matrix[-1].max(0))
        if most > M:
            raise RuntimeError(
                f"deep_ep.{op}: rank {rank} would compute {most} rows; allowed are at most "
                f"num_max_dispatch_tokens_per_rank = {M}"
            )
    experts = _Experts(overload, gmm1_weight, gmm2_weight)
    counts = received.num_recv_tokens_per_expert
    y = x.new_empty((received.recv_x.shape[0], x.shape[1]))
    if sent is None:
        for expert, block in _blocks(counts):
            experts.compute(expert, received.recv_x[block], y[block])
    else:
        scales = [gmm1_weight_scale, gmm2_weight_scale]
        if overload == "dispatch_ffn_combine":
            scales = [bits_to_scale(scale) for scale in scales]
        data, data_scales = quantization.unpack(received.recv_x, *sent)
        for expert, block in _blocks(counts):
            h = _int8_mm(data[block], experts.w1[expert], scales[0][expert], data_scales[block])
            gate, up = experts.gate_up(h)
            a, a_scales = quantization.quantize(silu(gate) * up, "int8", low_latency=True)
            y[block] = _int8_mm(a, experts.w2[expert], scales[1][expert], a_scales)
    combined = getattr(torch.ops.deep_ep.combine, strategy)(
        y, topk_idx, topk_weights, received.recv_src_idx, received.send_head, num_experts, num_ranks, group
    )
    if overload == "dispatch_ffn_combine":
        return combined, counts.to(torch.int32)
    running = received.recv_channel_prefix_matrix.view(-1)
    return combined, torch.diff(running, prepend=running.new_zeros(1))


def _int8_mm(a: Tensor, w: Tensor, w_scale: Tensor, a_scale: Tensor) -> Tensor:
    """fp32 [n, N] of int8 a [n, K] and w [K, N]."""
    return int8_product(a, w).to(torch.float32) * w_scale * a_scale.unsqueeze(1)


def int8_product(a: Tensor, w: Tensor) -> Tensor:
    """a @ w in int32, exactly, of int8 a [n, K] and w [K, N]."""
    # With K = 1 and both strides of w 1, torch 2.13's _int_mm is wrong.
    if a.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(a, w)
    product = a.new_zeros((a.shape[0], w.shape[1]), dtype=torch.int32)
    for a_part, w_part in zip(a.split(_EXACT, 1), w.split(_EXACT, 0), strict=True):
        product += (a_part.to(torch.float32) @ w_part.to(torch.float32)).to(torch.int32)
    return product


_EXACT = 1024
"""So many products of two int8, whatever their sum, are integers that fp32 holds."""


@functools.cache
def _int_mm_is_exact() -> bool:
    """Not on a CPU without VNNI, where pairs of products are added up in 16 bits, and saturate."""
    a = torch.full((16, 128), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(a, a.t().contiguous()) == 128 * 127 * 127).all())


def backward(
    grad_out: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm2_weight: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    strategy: str,
    *,
    overload: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel of fused_deep_moe_backward. Rows are dispatched and computed once more."""
    op, M = "fused_deep_moe_backward", num_max_dispatch_tokens_per_rank
    error = checks.fused_deep_moe_backward(
        grad_out, x, topk_idx, topk_weights, gmm1_weight, gmm2_weight, M, num_experts, num_ranks, strategy, overload
    )
    _agree(op, strategy, group, error, x, topk_idx, num_experts, M, 0)

    received = _dispatch(strategy, x, topk_idx, topk_weights, num_experts, num_ranks, group)
    experts = _Experts(overload, gmm1_weight, gmm2_weight)
    hs, acts, y = [], [], torch.empty_like(received.recv_x)
    for expert, block in _blocks(received.num_recv_tokens_per_expert):
        h, a = experts.compute(expert, received.recv_x[block], y[block])
        hs.append(h)
        acts.append(a)
    handle = received.recv_src_idx, received.send_head
    grad_y, grad_topk_weights = getattr(torch.ops.deep_ep.combine_backward, strategy)(
        grad_out, y, topk_idx, topk_weights, *handle, num_experts, num_ranks, group
    )
    grad_w1, grad_w2 = torch.zeros_like(experts.w1, memory_format=torch.contiguous_format), torch.zeros_like(experts.w2)
    grad_rows = torch.empty_like(received.recv_x)
    for (expert, block), h, a in zip(_blocks(received.num_recv_tokens_per_expert), hs, acts, strict=True):
        gate, up = experts.gate_up(h)
        grad_w2[expert] = a.t() @ grad_y[block]
        grad_a = (grad_y[block] @ experts.w2[expert].t()).to(torch.float32)
        sigmoid = gate.sigmoid()
        grad_gate = grad_a * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_h = experts.columns(grad_gate, grad_a * gate * sigmoid).to(x.dtype)
        grad_w1[expert] = received.recv_x[block].t() @ grad_h
        torch.mm(grad_h, experts.w1[expert].t(), out=grad_rows[block])
    grad_x, _ = getattr(torch.ops.deep_ep.dispatch_backward, strategy)(
        grad_rows,
        torch.zeros_like(received.recv_topk_weights),
        received.recv_src_idx,
        topk_idx,
        received.send_head,
        num_experts,
        num_ranks,
        group,
    )
    return grad_x, grad_topk_weights, grad_w1, (grad_w2.transpose(1, 2) if experts.permuted else grad_w2).contiguous()
