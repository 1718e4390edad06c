"""The kernels of fused_deep_moe and of its backward, for every device: dispatch, the experts and combine in one op.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows ·
I intermediate size · M num_max_dispatch_tokens_per_rank.

Rows travel by the ops dispatch and combine of the strategy, in exact mode: what does not arrive is not computed. An
expert computes, for a row x [H], with W1 [H, 2I] and W2 [I, H], biases b1 [2I] and b2 [H], or 0:

    none   h = x @ W1 + b1;  a = act(h);  y = a @ W2 + b2                x @ W1, a and y rounded to x's dtype
    int8   q, s = int8(x);  h = (q @ W1) * scale1 * s + b1, with the sum in int32 and the rest in fp32;  a = act(h);
           q, s = int8(a);  y = (q @ W2) * scale2 * s + b2               y rounded to x's dtype
    MX     h = mx(x) @ mx(W1) + b1;  a = act(h);  y = mx(a) @ mx(W2) + b2, of numbers times their scales, in fp32;
                                                                         mx(x) @ mx(W1), a and y rounded to x's dtype

    act(h) = gate * sigmoid(swiglu_alpha * gate) * (up + swiglu_beta), with gate = min(h[:I], swiglu_limit) and
             up = h[I:] cut to -swiglu_limit..swiglu_limit               in fp32

int8 and mx are `quantization.quantize` for low latency: of a row of zeros they make zeros.

A shared expert is one more local expert of every rank, which each of the rank's own tokens goes to with the weight 1.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, quantization, windows
from ..fused_options import FORMATS, Format, FusedOptions, in_tiles
from ..process_groups import process_group
from ..weights import bits_to_scale, places
from . import alltoall
from .results import DispatchResult


class _Expert(NamedTuple):
    """One expert of this rank, or the gradients of its parts. What it does not have is None."""

    w1: Tensor  # [H, 2I], in float4 [H, I]
    w2: Tensor  # [I, H], in float4 [I, H/2]
    scale1: Tensor | None  # fp32 [2I], or for MX float8_e8m0fnu [H/32, 2I]
    scale2: Tensor | None  # fp32 [H], or for MX float8_e8m0fnu [I/32, H]
    b1: Tensor | None  # fp32 [2I]
    b2: Tensor | None  # fp32 [H]


class _Experts:
    """The experts of this rank, the shared one behind the others, in the layout of the overload."""

    def __init__(
        self,
        overload: str,
        form: Format,
        gmm1_weight: Tensor,
        gmm2_weight: Tensor,
        scales: tuple[Tensor | None, Tensor | None],
        options: FusedOptions,
    ) -> None:
        self._form, self._options = form, options
        self._tiles = in_tiles(overload, form)
        self._bits = overload == "dispatch_ffn_combine"
        self.all = self._of(gmm1_weight, gmm2_weight, *scales, options.gmm1_bias, options.gmm2_bias)
        if options.shared_gmm1_weight is not None and options.shared_gmm2_weight is not None:
            shared_scales = options.shared_gmm1_weight_scale, options.shared_gmm2_weight_scale
            self.all += self._of(options.shared_gmm1_weight, options.shared_gmm2_weight, *shared_scales, None, None)

    def _of(
        self,
        gmm1: Tensor,
        gmm2: Tensor,
        scale1: Tensor | None,
        scale2: Tensor | None,
        bias1: Tensor | None,
        bias2: Tensor | None,
    ) -> list[_Expert]:
        scales = [self._scale(scale1, gmm1.shape[1]), self._scale(scale2, gmm1.shape[2] * self._form.packed // 2)]
        stacks = gmm1, gmm2.transpose(1, 2) if self._tiles else gmm2, *scales, bias1, bias2
        return [
            _Expert(*(None if stack is None else stack[i] for stack in stacks))  # type: ignore[arg-type]
            for i in range(gmm1.shape[0])
        ]

    def _scale(self, scale: Tensor | None, K: int) -> Tensor | None:
        """That of weights with K rows: [L, N] or [L, K/32, N]."""
        if scale is None or self._form.dtype is None:
            return None
        if self._form.is_mx:  # [L, K/64, N, 2], where the last block may be there for the shape alone
            return scale.transpose(2, 3).flatten(1, 2)[:, : K // quantization.MX_BLOCK]
        return bits_to_scale(scale) if self._bits else scale

    def gradients(self, *like: Tensor | None) -> list[_Expert]:
        """Places for the gradients of all, which are views of `like`, the gradients of the op's arguments gmm1_weight,
        gmm2_weight, gmm1_bias, gmm2_bias, shared_gmm1_weight and shared_gmm2_weight."""
        gmm1, gmm2, bias1, bias2, shared1, shared2 = like
        assert gmm1 is not None and gmm2 is not None
        own = self._of(gmm1, gmm2, None, None, bias1, bias2)
        if shared1 is None or shared2 is None:
            return own
        return own + self._of(shared1, shared2, None, None, None, None)

    def _places(self, columns: int, device: torch.device) -> Tensor | None:
        return places(columns).to(device) if self._tiles else None

    def gate_up(self, expert: _Expert, h: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up, fp32 [n, I], of what the product with w1 gave, [n, 2I]."""
        h = h.to(torch.float32)
        h = h if expert.b1 is None else h + expert.b1
        where = self._places(h.shape[1], h.device)
        gate, up = (h if where is None else h.index_select(1, where)).chunk(2, 1)
        return gate, up

    def columns(self, gate: Tensor, up: Tensor) -> Tensor:
        """[n, 2I] in the order of w1's columns."""
        h = torch.cat([gate, up], 1)
        where = self._places(h.shape[1], h.device)
        return h if where is None else torch.empty_like(h).index_copy_(1, where, h)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        """fp32 [n, I]."""
        gate, up = self._clamped(gate, up)
        return gate * (self._options.swiglu_alpha * gate).sigmoid() * (up + self._options.swiglu_beta)

    def act_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up, where `grad` is that of act."""
        alpha, beta, limit = self._options.swiglu_alpha, self._options.swiglu_beta, self._options.swiglu_limit
        clamped_gate, clamped_up = self._clamped(gate, up)
        sigmoid = (alpha * clamped_gate).sigmoid()
        grad_gate = grad * (clamped_up + beta) * sigmoid * (1 + alpha * clamped_gate * (1 - sigmoid))
        grad_up = grad * clamped_gate * sigmoid
        if limit:
            grad_gate, grad_up = grad_gate.where(gate <= limit, 0), grad_up.where(up.abs() <= limit, 0)
        return grad_gate, grad_up

    def _clamped(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        limit = self._options.swiglu_limit
        return (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit else (gate, up)

    def compute(self, expert: _Expert, rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """y of rows [n, H], which are not quantised, to out [n, H]. Returns x @ w1 and a."""
        h = rows @ expert.w1
        a = self.act(*self.gate_up(expert, h)).to(rows.dtype)
        torch.mm(a, expert.w2, out=out)
        if expert.b2 is not None:
            out += expert.b2
        return h, a

    def compute_quantised(self, expert: _Expert, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """y, fp32 [n, H], of data and scales of n rows, where x had `dtype`."""
        assert expert.scale1 is not None and expert.scale2 is not None
        between = dtype if self._form.is_mx else torch.float32
        h = self._product(rows, expert.w1, expert.scale1).to(between)
        a = self.act(*self.gate_up(expert, h)).to(between)
        quantised = quantization.quantize(a, self._form.quant_mode, low_latency=True)
        y = self._product(quantised, expert.w2, expert.scale2)
        return y if expert.b2 is None else y + expert.b2

    def _product(self, rows: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor) -> Tensor:
        """fp32 [n, N] of data and scales of n rows, and weight [K, N] with its scale."""
        data, scales = rows
        if self._form.is_mx:
            return quantization.dequantize(data, scales) @ quantization.dequantize_columns(weight, scale)
        return int8_product(data, weight).to(torch.float32) * scale * scales.unsqueeze(1)


class _Routing(NamedTuple):
    """What dispatch and combine are given: routing without inactive tokens, and with the shared expert."""

    topk_idx: Tensor
    topk_weights: Tensor
    num_experts: int


def _active(topk_idx: Tensor, options: FusedOptions) -> Tensor:
    """topk_idx, without experts for inactive tokens."""
    mask = options.x_active_mask
    return topk_idx if mask is None else topk_idx.masked_fill(~mask.unsqueeze(1), -1)


def _routing(
    active: Tensor, topk_weights: Tensor, num_experts: int, num_ranks: int, group: str, options: FusedOptions
) -> _Routing:
    """`active`: what _active gives. The shared expert is expert L of the rank, in column K."""
    if not options.has_shared_expert:
        return _Routing(active, topk_weights, num_experts)
    L, T = num_experts // num_ranks, active.shape[0]
    ids = torch.where(active < 0, active, active + active // L)
    shared = ids.new_full((T, 1), process_group(group).rank() * (L + 1) + L)
    if options.x_active_mask is not None:
        shared = shared.masked_fill(~options.x_active_mask.unsqueeze(1), -1)
    ones = topk_weights.new_ones((T, 1))
    return _Routing(torch.cat([ids, shared], 1), torch.cat([topk_weights, ones], 1), num_experts + num_ranks)


def _blocks(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which they are."""
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


def _agree(
    op: str,
    strategy: str,
    group: str,
    error: str | None,
    x: Tensor,
    topk_idx: Tensor,
    *sizes: int,
    options: FusedOptions,
) -> Tensor:
    """What _active gives. Raises the same on all ranks if `error`, or what ranks have given does not fit together.

    sizes: E, num_max_dispatch_tokens_per_rank, quant_mode.
    """
    active = topk_idx if error else _active(topk_idx, options)
    if not error and checks.has_values(active):
        error = checks.ids_error(active, sizes[0])
    if strategy == "alltoall":
        alltoall.agree(op, group, error, x, topk_idx, *sizes)
    elif x.device.type == "cpu":
        windows.agree(op, group, error, x.dtype, () if error else (x.shape[1], topk_idx.shape[1], *sizes))
    elif error:
        raise RuntimeError(f"deep_ep.{op}: {error}")
    return active


def _dispatch(strategy: str, rows: Tensor, routing: _Routing, R: int, group: str) -> DispatchResult:
    op = getattr(torch.ops.deep_ep.dispatch, strategy)
    ids, weights, num_experts = routing
    return DispatchResult(*op(rows, ids, weights, num_experts, R, 0, group))


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
    *given: Any,
    overload: str,
) -> tuple[Tensor, Tensor]:
    """The kernel of fused_deep_moe."""
    op = "fused_deep_moe" if overload == "default" else f"fused_deep_moe.{overload}"
    weights = gmm1_weight, gmm1_weight_scale, gmm2_weight, gmm2_weight_scale
    M, options = num_max_dispatch_tokens_per_rank, FusedOptions(*given)
    error = checks.fused_deep_moe(
        x, topk_idx, topk_weights, *weights, M, num_experts, num_ranks, quant_mode, strategy, overload, options
    )
    if not error and quant_mode != 0 and x.device.type != "cpu":
        error = (
            f"quant_mode {quant_mode} on {x.device.type} needs an AscendC kernel for fused_deep_moe, which there is "
            "not yet"
        )
    sizes = num_experts, M, quant_mode
    active = _agree(op, strategy, group, error, x, topk_idx, *sizes, options=options)

    form, L = FORMATS[quant_mode], num_experts // num_ranks
    sent = quantization.quantize(x, form.quant_mode, low_latency=True) if quant_mode else None
    rows = x if sent is None else quantization.pack(*sent)
    routing = _routing(active, topk_weights, num_experts, num_ranks, group, options)
    received = _dispatch(strategy, rows, routing, num_ranks, group)
    if overload == "dispatch_ffn_combine":  # all ranks know how many rows each receives
        most, rank = (int(v) for v in received.rank_prefix_matrix[-1].max(0))
        if most > M:
            raise RuntimeError(
                f"deep_ep.{op}: rank {rank} would compute {most} rows; allowed are at most "
                f"num_max_dispatch_tokens_per_rank = {M}"
            )
    experts = _Experts(overload, form, gmm1_weight, gmm2_weight, (gmm1_weight_scale, gmm2_weight_scale), options)
    counts = received.num_recv_tokens_per_expert
    y = x.new_empty((received.recv_x.shape[0], x.shape[1]))
    if sent is None:
        for expert, block in _blocks(counts):
            experts.compute(experts.all[expert], received.recv_x[block], y[block])
    else:
        data, scales = quantization.unpack(received.recv_x, *sent)
        for expert, block in _blocks(counts):
            y[block] = experts.compute_quantised(experts.all[expert], (data[block], scales[block]), x.dtype)
    ids, weights_of_rows, all_experts = routing
    combined = getattr(torch.ops.deep_ep.combine, strategy)(
        y, ids, weights_of_rows, received.recv_src_idx, received.send_head, all_experts, num_ranks, group
    )
    if not in_tiles(overload, form):
        return combined, counts[:L].to(torch.int32)
    running = received.recv_channel_prefix_matrix[:L].reshape(-1)
    return combined, torch.diff(running, prepend=running.new_zeros(1))


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
    *given: Any,
    overload: str,
) -> tuple[Tensor, ...]:
    """The kernel of fused_deep_moe_backward, and of fused_deep_moe_options_backward, which gives the gradients of those
    options that are given as well. Rows are dispatched and computed once more."""
    op, M, options = "fused_deep_moe_backward", num_max_dispatch_tokens_per_rank, FusedOptions(*given)
    error = checks.fused_deep_moe_backward(
        *(grad_out, x, topk_idx, topk_weights, gmm1_weight, gmm2_weight),
        *(M, num_experts, num_ranks, strategy, overload, options),
    )
    active = _agree(op, strategy, group, error, x, topk_idx, num_experts, M, 0, options=options)

    routing = _routing(active, topk_weights, num_experts, num_ranks, group, options)
    received = _dispatch(strategy, x, routing, num_ranks, group)
    experts = _Experts(overload, FORMATS[0], gmm1_weight, gmm2_weight, (None, None), options)
    hs, acts, y = [], [], torch.empty_like(received.recv_x)
    for i, block in _blocks(received.num_recv_tokens_per_expert):
        h, a = experts.compute(experts.all[i], received.recv_x[block], y[block])
        hs.append(h)
        acts.append(a)
    ids, weights, all_experts = routing
    handle = received.recv_src_idx, received.send_head
    grad_y, grad_weights = getattr(torch.ops.deep_ep.combine_backward, strategy)(
        grad_out, y, ids, weights, *handle, all_experts, num_ranks, group
    )
    grads = [
        None if like is None else torch.zeros_like(like, memory_format=torch.contiguous_format)
        for like in (gmm1_weight, gmm2_weight, *options.differentiable)
    ]
    gradients = experts.gradients(*grads)
    grad_rows = torch.empty_like(received.recv_x)
    for (i, block), h, a in zip(_blocks(received.num_recv_tokens_per_expert), hs, acts, strict=True):
        expert, gradient = experts.all[i], gradients[i]
        torch.mm(a.t(), grad_y[block], out=gradient.w2)
        grad_a = (grad_y[block] @ expert.w2.t()).to(torch.float32)
        grad_h = experts.columns(*experts.act_backward(grad_a, *experts.gate_up(expert, h)))
        for bias, grad in ((gradient.b1, grad_h), (gradient.b2, grad_y[block])):
            if bias is not None:
                torch.sum(grad, 0, dtype=torch.float32, out=bias)
        grad_h = grad_h.to(x.dtype)
        torch.mm(received.recv_x[block].t(), grad_h, out=gradient.w1)
        torch.mm(grad_h, expert.w1.t(), out=grad_rows[block])
    grad_x, _ = getattr(torch.ops.deep_ep.dispatch_backward, strategy)(
        grad_rows,
        torch.zeros_like(received.recv_topk_weights),
        received.recv_src_idx,
        ids,
        received.send_head,
        all_experts,
        num_ranks,
        group,
    )
    grad_topk_weights = grad_weights[:, : topk_idx.shape[1]].contiguous()
    return grad_x, grad_topk_weights, *(grad for grad in grads if grad is not None)
