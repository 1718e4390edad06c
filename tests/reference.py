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
    per_rank, per_node, per_expert, in_rank = [0] * R, [0] * num_nodes, [0] * num_experts, [[0] * R for _ in range(T)]
    for t, ids in enumerate(topk_idx.tolist()):
        experts = [e for e in ids if e >= 0]
        ranks = {e // (num_experts // R) for e in experts}
        for e in experts:
            per_expert[e] += 1
        for rank in ranks:
            per_rank[rank] += 1
            in_rank[t][rank] = 1
        for node in {rank // (R // num_nodes) for rank in ranks}:
            per_node[node] += 1
    counts = (torch.tensor(count, dtype=torch.int32) for count in (per_rank, per_node, per_expert))
    return *counts, torch.tensor(in_rank, dtype=torch.int32).view(T, R)


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
    R, tokens = len(xs), [len(ids) for ids in topk_idxs]
    L = num_experts // R
    # asked[s, d, l]: rows that rank s asks local expert l of rank d to take.
    asked = torch.stack([torch.bincount(i[i >= 0], minlength=num_experts).view(R, L) for i in topk_idxs])
    channel_prefix = asked.cumsum(2).to(torch.int32)
    # All ranks' tokens and rows, one rank's after another's.
    x, ids, weights = torch.cat(xs), torch.cat(topk_idxs), torch.cat(topk_weights)
    source_of = torch.arange(R).repeat_interleave(torch.tensor(tokens))
    first = torch.tensor([0, *tokens]).cumsum(0)
    send_head = torch.full_like(ids, -1, dtype=torch.int32)
    delivered = torch.zeros(R, R, dtype=torch.int64)
    place = torch.nonzero(ids >= 0)  # (token, k)
    place = place[torch.argsort(ids[place[:, 0], place[:, 1]], stable=True)]
    received = []
    for d, of_rank in enumerate(place.split(asked.sum((0, 2)).tolist())):
        num_asked = len(of_rank)
        W = num_worst_tokens[d] or num_asked
        token, k = of_rank[:W].unbind(1)
        source, expert, row = source_of[token], ids[token, k] % L, torch.arange(len(token))

        recv_x = x.new_zeros(W, x.shape[1])
        recv_topk_idx = torch.full((W, ids.shape[1]), -1)
        recv_topk_weights = torch.zeros(recv_topk_idx.shape)
        recv_src_idx = torch.full((W, 3), -1, dtype=torch.int32)
        recv_x[row] = x[token]
        recv_topk_idx[row, k] = expert
        recv_topk_weights[row, k] = weights[token, k]
        recv_src_idx[row] = torch.stack([source, token - first[source], k], dim=1).to(torch.int32)
        send_head[token, k] = row.to(torch.int32)
        delivered[:, d] = torch.bincount(source, minlength=R)
        received.append(
            (
                recv_x,
                recv_topk_idx,
                recv_topk_weights,
                torch.bincount(expert, minlength=L),
                torch.tensor(num_asked - len(token)),
                asked[:, d].t().reshape(-1).cumsum(0).view(L, R).to(torch.int32),
                recv_src_idx,
            )
        )
    rank_prefix = delivered.cumsum(0).to(torch.int32)
    return [
        DispatchResult(*received[r][:5], rank_prefix, channel_prefix[r], *received[r][5:], head)
        for r, head in enumerate(send_head.split(tokens))
    ]


def combine(ys: list[Tensor], topk_weights: list[Tensor], recv_src_idxs: list[Tensor]) -> list[Tensor]:
    """Each token's weighted sum, in k order in fp32, rounded once: out[t] = Σ_k w[t, k] · row(t, k).

    ys: [N, H], in the row order of recv_x. Returns [T, H] per rank, in ys' dtype.
    """
    return _sum_rows(ys, topk_weights, recv_src_idxs)


def dispatch_backward(
    grad_recv_xs: list[Tensor],
    grad_recv_topk_weights: list[Tensor],
    recv_src_idxs: list[Tensor],
    tokens: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of dispatch: grad_x [T, H], a combine with weights 1, and grad_topk_weights fp32 [T, K].

    tokens: each rank's T.
    """
    K = grad_recv_topk_weights[0].shape[1]
    rows, token, k = _rows(recv_src_idxs, tokens)
    grad_topk_weights = torch.zeros(sum(tokens), K)
    grad_topk_weights[token, k] = torch.cat(grad_recv_topk_weights)[rows, k]
    ones = [torch.ones(T, K) for T in tokens]
    return _sum_rows(grad_recv_xs, ones, recv_src_idxs), list(grad_topk_weights.split(tokens))


def combine_backward(
    grad_outs: list[Tensor], xs: list[Tensor], topk_weights: list[Tensor], recv_src_idxs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of combine, grad_x [N, H] and grad_topk_weights fp32 [T, K].

    grad_x is w · grad_out[token] in fp32, rounded once; grad_topk_weights is the fp32 dot product of a row
    and its grad_out[token]. xs: [N, H], what combine was given.
    """
    weights, tokens = torch.cat(topk_weights), [len(w) for w in topk_weights]
    x, grad_topk_weights = torch.cat(xs), torch.zeros_like(weights)
    rows, token, k = _rows(recv_src_idxs, tokens)
    grad, grad_x = torch.cat(grad_outs)[token].float(), torch.zeros_like(x)
    grad_x[rows] = (weights[token, k].unsqueeze(1) * grad).to(x.dtype)
    grad_topk_weights[token, k] = (x[rows].float() * grad).sum(1)
    return list(grad_x.split([len(x) for x in xs])), list(grad_topk_weights.split(tokens))


def _rows(recv_src_idxs: list[Tensor], tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that hold something, by their places in all ranks' rows, one rank's after another's; the place of each one's
    token in all ranks' tokens; and its k."""
    first = torch.tensor([0, *tokens]).cumsum(0)
    source, token, k = torch.cat(recv_src_idxs).long().unbind(1)
    rows = torch.nonzero(source >= 0).view(-1)
    return rows, first[source[rows]] + token[rows], k[rows]


def _sum_rows(ys: list[Tensor], weights: list[Tensor], recv_src_idxs: list[Tensor]) -> list[Tensor]:
    y, weight, tokens = torch.cat(ys), torch.cat(weights), [len(w) for w in weights]
    rows, tokens_of, k_of = _rows(recv_src_idxs, tokens)
    total = torch.zeros(sum(tokens), y.shape[1])
    for k in range(weight.shape[1]):
        token, row = tokens_of[k_of == k], rows[k_of == k]  # one row at most of each token
        total[token] += weight[token, k].unsqueeze(1) * y[row].float()
    return list(total.to(y.dtype).split(tokens))


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
