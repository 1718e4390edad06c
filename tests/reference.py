"""What the normal-mode ops compute, for all ranks at once in one process: the model that tests compare with.

Lists hold one entry per rank; entry s belongs to rank s. Symbols: T local tokens, H hidden, K top-k,
E experts, R ranks, L = E/R local experts, N received rows, W num_worst_tokens (0 = exact mode).

Rows: every (token t, slot k) with topk_idx[t, k] >= 0 is one row of rank topk_idx[t, k] // L. A rank's rows
are ordered by local expert, source rank, source token, k. With W > 0 recv_x has W rows: those from index W on
are dropped, unused ones are 0 with the index -1. Nothing here checks its arguments.
"""

import torch
from torch import Tensor

from deep_ep import quantization
from deep_ep.kernels.results import DispatchResult


def get_dispatch_layout(
    topk_idx: Tensor, num_experts: int, num_ranks: int, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of one rank's tokens; a token counts once per rank and once per node.

    topk_idx: int64 [T, K]. Returns num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank int32 [num_nodes],
    num_tokens_per_expert int32 [E] (repeated ids count each time) and is_token_in_rank int32 [T, R]. Node n
    has the ranks from n * R / num_nodes on.
    """
    T, R = topk_idx.shape[0], num_ranks
    ranks = torch.div(topk_idx, num_experts // R, rounding_mode="floor")  # -1 stays -1
    in_rank = (ranks.unsqueeze(2) == torch.arange(R)).any(1)
    in_node = in_rank.view(T, num_nodes, R // num_nodes).any(2)
    per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
    return in_rank.sum(0).int(), in_node.sum(0).int(), per_expert.int(), in_rank.int()


def dispatch(
    xs: list[Tensor],
    topk_idxs: list[Tensor],
    topk_weights: list[Tensor],
    num_experts: int,
    num_worst_tokens: list[int],
) -> list[DispatchResult]:
    """Sends every (token, slot) row to the rank of its expert.

    xs: [T, H]; topk_idxs: int64 [T, K]; topk_weights: fp32 [T, K]; num_worst_tokens: W. T and W may differ
    from rank to rank.
    """
    R = len(xs)
    L = num_experts // R
    K = topk_idxs[0].shape[1]
    # asked[s, d, l]: rows that rank s asks local expert l of rank d to take.
    asked = torch.stack([torch.bincount(i[i >= 0], minlength=num_experts).view(R, L) for i in topk_idxs])
    channel_prefix = asked.cumsum(2).to(torch.int32)
    send_heads = [torch.full_like(i, -1, dtype=torch.int32) for i in topk_idxs]
    delivered = torch.zeros(R, R, dtype=torch.int64)
    received = []
    for d in range(R):
        rows = []
        for s in range(R):
            token, k = torch.nonzero(topk_idxs[s] // L == d, as_tuple=True)
            rows.append(torch.stack([torch.full_like(token, s), token, k, topk_idxs[s][token, k] % L], dim=1))
        source, token, k, expert = torch.cat(rows).unbind(1)
        order = torch.argsort(expert, stable=True)
        num_asked = order.numel()
        W = num_worst_tokens[d] or num_asked
        source, token, k, expert = (column[order[:W]] for column in (source, token, k, expert))

        recv_x = xs[d].new_zeros(W, xs[d].shape[1])
        recv_topk_idx = torch.full((W, K), -1)
        recv_topk_weights = torch.zeros(W, K)
        recv_src_idx = torch.full((W, 3), -1, dtype=torch.int32)
        row = torch.arange(source.numel())
        recv_topk_idx[row, k] = expert
        recv_src_idx[row] = torch.stack([source, token, k], dim=1).to(torch.int32)
        for s in range(R):
            mine = source == s
            recv_x[row[mine]] = xs[s][token[mine]]
            recv_topk_weights[row[mine], k[mine]] = topk_weights[s][token[mine], k[mine]]
            send_heads[s][token[mine], k[mine]] = row[mine].to(torch.int32)
            delivered[s, d] = mine.sum()
        received.append(
            (
                recv_x,
                recv_topk_idx,
                recv_topk_weights,
                torch.bincount(expert, minlength=L),
                torch.tensor(num_asked - source.numel()),
                asked[:, d].t().reshape(-1).cumsum(0).view(L, R).to(torch.int32),
                recv_src_idx,
            )
        )
    rank_prefix = delivered.cumsum(0).to(torch.int32)
    return [
        DispatchResult(*received[r][:5], rank_prefix, channel_prefix[r], *received[r][5:], send_heads[r])
        for r in range(R)
    ]


def combine(ys: list[Tensor], topk_weights: list[Tensor], recv_src_idxs: list[Tensor]) -> list[Tensor]:
    """Each token's weighted sum, in k order in fp32, rounded once: out[t] = Σ_k w[t, k] · row(t, k).

    ys: [N, H], in the row order of recv_x. Returns [T, H] per rank, in ys' dtype.
    """
    return [combine_on(s, ys, weights, recv_src_idxs) for s, weights in enumerate(topk_weights)]


def combine_on(rank: int, ys: list[Tensor], topk_weights: Tensor, recv_src_idxs: list[Tensor]) -> Tensor:
    """`combine` on this rank alone, for its own topk_weights."""
    T, K = topk_weights.shape
    acc = torch.zeros(T, ys[rank].shape[1])
    for k in range(K):
        for y, src in zip(ys, recv_src_idxs, strict=True):
            row = torch.nonzero((src[:, 0] == rank) & (src[:, 2] == k)).view(-1)
            token = src[row, 1].long()
            acc[token] = acc[token] + topk_weights[token, k].unsqueeze(1) * y[row].float()
    return acc.to(ys[rank].dtype)


def dispatch_backward(
    grad_recv_xs: list[Tensor],
    grad_recv_topk_weights: list[Tensor],
    recv_src_idxs: list[Tensor],
    tokens: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of dispatch: grad_x [T, H], a combine with weights 1, and grad_topk_weights fp32 [T, K].

    tokens: each rank's T.
    """
    by_rank = [
        dispatch_backward_on(s, grad_recv_xs, grad_recv_topk_weights, recv_src_idxs, T) for s, T in enumerate(tokens)
    ]
    return [grad_x for grad_x, _ in by_rank], [grad_topk_weights for _, grad_topk_weights in by_rank]


def dispatch_backward_on(
    rank: int,
    grad_recv_xs: list[Tensor],
    grad_recv_topk_weights: list[Tensor],
    recv_src_idxs: list[Tensor],
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """`dispatch_backward` on this rank alone, for its own number of tokens."""
    grad_topk_weights = torch.zeros(tokens, grad_recv_topk_weights[0].shape[1])
    for grad, src in zip(grad_recv_topk_weights, recv_src_idxs, strict=True):
        row = torch.nonzero(src[:, 0] == rank).view(-1)
        token, k = src[row, 1].long(), src[row, 2].long()
        grad_topk_weights[token, k] = grad[row, k]
    return combine_on(rank, grad_recv_xs, torch.ones_like(grad_topk_weights), recv_src_idxs), grad_topk_weights


def combine_backward(
    grad_outs: list[Tensor], xs: list[Tensor], topk_weights: list[Tensor], recv_src_idxs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of combine, grad_x [N, H] and grad_topk_weights fp32 [T, K].

    grad_x is w · grad_out[token] in fp32, rounded once; grad_topk_weights is the fp32 dot product of a row
    and its grad_out[token]. xs: [N, H], what combine was given.
    """
    grad_xs = [torch.zeros_like(x) for x in xs]
    grad_topk_weights = [torch.zeros_like(w) for w in topk_weights]
    for d, src in enumerate(recv_src_idxs):
        for s in range(len(xs)):
            row = torch.nonzero(src[:, 0] == s).view(-1)
            token, k = src[row, 1].long(), src[row, 2].long()
            grad = grad_outs[s][token].float()
            grad_xs[d][row] = (topk_weights[s][token, k].unsqueeze(1) * grad).to(xs[d].dtype)
            grad_topk_weights[s][token, k] = (xs[d][row].float() * grad).sum(1)
    return grad_xs, grad_topk_weights


def fused_deep_moe(
    xs: list[Tensor],
    topk_idxs: list[Tensor],
    topk_weights: list[Tensor],
    gate_ups: list[Tensor],
    downs: list[Tensor],
    gate_up_scales: list[Tensor] | None = None,
    down_scales: list[Tensor] | None = None,
) -> list[Tensor]:
    """Each token's weighted sum of its experts' results, [T, H] per rank: in k order in fp32, rounded once.

    Weights are ordinary ones, by rank: gate_ups [L, 2I, H], gate first, downs [L, H, I]. With scales [L, 2I] and [L, H]
    they are int8, and so are rows before either product. Without, autograd gives the gradients.
    """
    L = gate_ups[0].shape[0]
    outs = []
    for x, ids, weights in zip(xs, topk_idxs, topk_weights, strict=True):
        total = torch.zeros(x.shape)
        for k in range(ids.shape[1]):
            for e in ids[:, k].unique().tolist():
                if e < 0:
                    continue
                rank, local = divmod(e, L)
                token = torch.nonzero(ids[:, k] == e).view(-1)
                gate_up, down = gate_ups[rank][local], downs[rank][local]
                if gate_up_scales is None or down_scales is None:
                    gate, up = (x[token] @ gate_up.t()).float().chunk(2, 1)
                    y = (gate * gate.sigmoid() * up).to(x.dtype) @ down.t()
                else:
                    gate, up = _int8_linear(x[token], gate_up, gate_up_scales[rank][local]).chunk(2, 1)
                    y = _int8_linear(gate * gate.sigmoid() * up, down, down_scales[rank][local]).to(x.dtype)
                total = total.index_add(0, token, weights[token, k].unsqueeze(1) * y.float())
        outs.append(total.to(x.dtype))
    return outs


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 [n, N] of rows x [n, K], quantised by themselves, and int8 weight [N, K] with scale [N]."""
    q, s = quantization.quantize(x, "int8", low_latency=True)
    # The sums of products are integers that float64 holds.
    return (q.double() @ weight.double().t()).float() * scale * s.unsqueeze(1)
