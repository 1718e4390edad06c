"""Beside other parts of torch: README's layer under DDP, FSDP2 and checkpoint; what the result of a token depends on.

T tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool
from test_readme_layer import Dense, E, Experts, close, grad_of, input_of, make_router, readme_layer, step
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import deep_ep


def dense_steps(size: int, precision: str) -> tuple[list[list[Tensor]], Dense]:
    """Of a dense layer: output and gradient of x of every rank, and the layer with the sums of its gradients."""
    total, steps = Dense(make_router(), Experts(slice(None))), []
    for rank in range(size):
        # What a layer holds in fp32 is bf16 while it runs, and its gradients are summed up in fp32.
        running = copy.deepcopy(total)
        running.zero_grad()
        steps.append(step(precision, running, input_of(rank), running))
        for of_all, of_one in zip(total.parameters(), running.parameters(), strict=True):
            grad = of_one.grad.float()
            of_all.grad = grad if of_all.grad is None else of_all.grad + grad
    return steps, total


def make_compiled(fn: Any, backend: str, fullgraph: bool = False) -> Any:
    torch._dynamo.reset()
    return fn if backend == "eager" else torch.compile(fn, backend=backend, fullgraph=fullgraph)


# FSDP2


def check_fsdp(ctx: RankContext, precision: str, backend: str) -> None:
    """Experts are sharded over pairs of ranks that have the same ones, the rest over all ranks."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    deep_ep.init(mesh["ep"])
    group = mesh["ep"].get_group()
    L = E // 2
    mine = slice(group.rank() * L, (group.rank() + 1) * L)
    layer = readme_layer()(make_router(), Experts(mine), E, group)
    low = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    fully_shard(layer.experts, mesh=mesh["fsdp"], mp_policy=policy)
    fully_shard(layer, mesh=dist.init_device_mesh("cpu", (4,)), mp_policy=policy)
    x = input_of(ctx.rank).requires_grad_()
    out = make_compiled(layer, backend)(x)
    out.backward(grad_of(out).to(out.dtype))

    steps, dense = dense_steps(ctx.size, precision)
    close(out.detach(), steps[ctx.rank][0], precision)
    close(x.grad.to(steps[ctx.rank][1].dtype), steps[ctx.rank][1], precision)
    # FSDP takes the mean over the ranks that it shards over.
    close(layer.router.weight.grad.full_tensor(), dense.router.weight.grad / 4, precision)
    close(layer.experts.up.grad.full_tensor(), dense.experts.up.grad[mine] / 2, precision)
    close(layer.experts.down.grad.full_tensor(), dense.experts.down.grad[mine] / 2, precision)
    deep_ep.destroy(group)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_fsdp(pool: RankPool, backend: str, precision: str) -> None:
    pool.run(4, check_fsdp, precision, backend)


# DistributedDataParallel


def check_ddp(ctx: RankContext, strategy: str, backend: str) -> None:
    """The router is everybody's, the experts are not."""
    group = ctx.prepared_group(strategy)
    L = E // ctx.size
    mine = slice(ctx.rank * L, (ctx.rank + 1) * L)
    layer = readme_layer()(make_router(), Experts(mine), E, group)
    own = [name for name, _ in layer.named_parameters() if name.startswith("experts")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, own)
    parallel = DistributedDataParallel(layer, process_group=group)
    actual = step("fp32", parallel, input_of(ctx.rank), make_compiled(parallel, backend))

    steps, dense = dense_steps(ctx.size, "fp32")
    for one, wanted in zip(actual, steps[ctx.rank], strict=True):
        close(one, wanted, "fp32")
    close(layer.router.weight.grad, dense.router.weight.grad / ctx.size, "fp32")
    close(layer.experts.up.grad, dense.experts.up.grad[mine], "fp32")
    close(layer.experts.down.grad, dense.experts.down.grad[mine], "fp32")


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_ddp(pool: RankPool, backend: str, strategy: str) -> None:
    pool.run(2, check_ddp, strategy, backend)


# torch.utils.checkpoint


def check_checkpoint(ctx: RankContext, strategy: str, use_reentrant: bool) -> None:
    group = ctx.prepared_group(strategy)
    L = E // ctx.size
    layer = readme_layer()(make_router(), Experts(slice(ctx.rank * L, (ctx.rank + 1) * L)), E, group)
    plain = copy.deepcopy(layer)
    again = partial(checkpoint, layer, use_reentrant=use_reentrant)
    actual = step("fp32", layer, input_of(ctx.rank), again)
    for one, wanted in zip(actual, step("fp32", plain, input_of(ctx.rank), plain), strict=True):
        assert_same("out and gradient of x", one, wanted)
    for one, wanted in zip(layer.parameters(), plain.parameters(), strict=True):
        assert_same("gradient of a parameter", one.grad, wanted.grad)


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(pool: RankPool, strategy: str, use_reentrant: bool) -> None:
    pool.run(2, check_checkpoint, strategy, use_reentrant)


# Batch invariance

H, K, OTHERS, PLACE = 24, 3, 512, 200


def random_batch(tokens: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """x [T, H], topk_idx and topk_weights [T, K], and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, tokens, H, generator=generator).to(dtype)
    weights, order = torch.rand(tokens, K, generator=generator), torch.rand(tokens, E, generator=generator)
    return [x, order.topk(K).indices, weights, grad]


def batch_with_token(rank: int, among: int, dtype: torch.dtype) -> list[Tensor]:
    """On rank 0 the token, in front of it PLACE tokens, if there are any, and the rest of them behind it."""
    others = random_batch(among, 100 + rank, dtype)
    if rank != 0:
        return others
    token = random_batch(1, 7, dtype)
    return [torch.cat([all[:PLACE], one, all[PLACE:]]) for one, all in zip(token, others, strict=True)]


def check_token(ctx: RankContext, strategy: str, mode: str, dtype: torch.dtype, backend: str) -> Any:
    """Output and gradients of the token, alone in the group, and among OTHERS of every rank.

    Experts differ, and multiply once: a function such as tanh is other code in the tail of a vector, and what compilers
    fuse is rounded less often.
    """
    group, L = ctx.prepared_group(strategy), E // ctx.size
    factors = torch.linspace(0.3, 1.7, E)[ctx.rank * L :][:L]

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        expert = torch.searchsorted(counts.cumsum(0), torch.arange(rows.shape[0]), right=True).clamp(max=L - 1)
        return rows * factors[expert][:, None].to(rows.dtype)

    def layer(x: Tensor, topk_idx: Tensor, weights: Tensor) -> Tensor:
        if mode == "low latency":
            low = deep_ep.low_latency_dispatch(x, topk_idx, OTHERS + 1, E, group=group)
            y = experts(low.recv_x, low.recv_count)
            return deep_ep.low_latency_combine(y, topk_idx, weights, low.handle, group=group)
        sent = deep_ep.dispatch(x, topk_idx, weights, num_experts=E, group=group)
        return deep_ep.combine(experts(sent.recv_x, sent.num_recv_tokens_per_expert), sent.handle, group=group)

    fn, results = make_compiled(layer, backend, fullgraph=True), []
    for among in (0, OTHERS):
        x, topk_idx, weights, grad = batch_with_token(ctx.rank, among, dtype)
        out = fn(x.requires_grad_(), topk_idx, weights.requires_grad_())
        values = [out, *torch.autograd.grad(out, (x, weights), grad)]
        if ctx.rank == 0:
            results.append([value[min(among, PLACE)].tolist() for value in values])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["normal", "low latency"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_token_does_not_depend_on_others(pool: RankPool, backend: str, mode: str, dtype: torch.dtype) -> None:
    """Nor on the number of ranks, on the strategy, or on whether it is compiled. Strategies have each its own order of
    sums for the gradient of the weights.
    """
    everywhere = []
    for strategy in STRATEGIES:
        results = []
        for size, of_size in ((1, "eager"), (2, backend), (4, "eager")):
            results += pool.run(size, check_token, strategy, mode, dtype, of_size)[0]
        assert all(result == results[0] for result in results)
        everywhere += results
    assert all(any(value) for value in everywhere[0])
    assert all(result[:2] == everywhere[0][:2] for result in everywhere)
