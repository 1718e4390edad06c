"""MoE blocks of Hugging Face's transformers, made expert-parallel by examples/hugging_face.py, against the dense block.

Each rank has its own tokens. The dense block sees those of all ranks, one rank after the other, so that its experts
have the gradients of all. H hidden, I intermediate size, E experts, R ranks, L = E/R local experts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import hugging_face
import pytest
import torch
from hugging_face import ExpertParallel, expert_parallel
from ranks import RankContext, RankPool
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

pytestmark = pytest.mark.slow

H, I, E = 32, 16, 8
SIZES: dict[str, Any] = {"hidden_size": H, "num_hidden_layers": 1, "vocab_size": 32}


def mixtral() -> nn.Module:
    return MixtralSparseMoeBlock(MixtralConfig(**SIZES, intermediate_size=I, num_local_experts=E))


def qwen3_moe() -> nn.Module:
    """Weights in the dtype of the logits, not normalised."""
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=3, norm_topk_prob=False
    )
    return Qwen3MoeSparseMoeBlock(config)


def deepseek_v3() -> nn.Module:
    """Sigmoid scores with a bias in the choice, groups of experts, and shared experts beside them."""
    config = DeepseekV3Config(
        **SIZES, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=2,
    )  # fmt: skip
    return DeepseekV3MoE(config)


def gpt_oss() -> nn.Module:
    """Experts with biases and a clamped activation, a softmax after the choice."""
    return GptOssMLP(GptOssConfig(**SIZES, intermediate_size=I, num_local_experts=E, num_experts_per_tok=2))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
PRECISIONS = ("fp32", "bf16", "autocast")


def make_block(name: str, precision: str, implementation: str) -> nn.Module:
    """With the same random values wherever it is made; large enough for the clamp of gpt-oss to matter."""
    block = BLOCKS[name]()
    block.experts.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 if name == "gpt_oss" else 0.5))
    return block.bfloat16() if precision == "bf16" else block


def input_of(rank: int, precision: str) -> Tensor:
    """[batch, sequence, H]; sequences differ in length between ranks."""
    x = torch.randn(2, 3 + rank, H, generator=torch.Generator().manual_seed(20 + rank))
    return x.bfloat16() if precision == "bf16" else x


def step(block: nn.Module, fn: Callable[[Tensor], Any], x: Tensor, precision: str) -> list[Tensor]:
    """out and the gradient of x."""
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        out = fn(x)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    assert x.grad is not None
    return [out.detach(), x.grad]


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, precision: str) -> None:
    assert actual is not None and expected is not None, name
    assert actual.dtype == expected.dtype, name
    assert expected.any(), name
    scale = expected.float().abs().max()
    difference = (actual.float() - expected.float()).abs().max() / scale
    assert difference < (1e-5 if precision == "fp32" else 2e-2), f"{name}: {difference}"


def check_block(
    ctx: RankContext, name: str, precision: str, implementation: str, backend: str, strategy: str = "default"
) -> None:
    group = ctx.prepared_group(strategy)
    parallel = expert_parallel(make_block(name, precision, implementation), group)
    assert isinstance(parallel.experts, ExpertParallel)
    fn = parallel
    if backend != "eager":
        torch._dynamo.reset()
        fn = torch.compile(parallel, backend=backend, fullgraph=True)
    actual = step(parallel, fn, input_of(ctx.rank, precision), precision)

    dense = make_block(name, precision, implementation)
    steps, others = [], []
    for rank in range(ctx.size):
        for part, tensor in dense.named_parameters():
            if not part.startswith("experts."):
                tensor.grad = None
        steps.append(step(dense, dense, input_of(rank, precision), precision))
        others.append({part: tensor.grad for part, tensor in dense.named_parameters()})
    what = f"{name} in {precision}"
    for part, one, wanted in zip(("out", "grad_x"), actual, steps[ctx.rank], strict=True):
        assert_close(f"{what}: {part}", one, wanted, precision)
    L = E // ctx.size
    of_dense = dict(dense.named_parameters())
    for part, tensor in parallel.named_parameters():
        if part.startswith("experts."):
            wanted = of_dense[part.replace("experts.local.", "experts.")].grad[ctx.rank * L :][:L]
        else:
            wanted = others[ctx.rank][part]
        assert_close(f"{what}: gradient of {part}", tensor.grad, wanted, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(pool: RankPool, name: str, num_ranks: int, precision: str) -> None:
    pool.run(num_ranks, check_block, name, precision, "eager", "eager")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_in_one_graph(pool: RankPool, name: str, precision: str) -> None:
    pool.run(2, check_block, name, precision, "grouped_mm", "aot_eager")


@pytest.mark.parametrize(
    ("name", "backend", "strategy"), [("mixtral", "eager", "alltoall"), ("deepseek_v3", "inductor", "default")]
)
def test_block_otherwise(pool: RankPool, name: str, backend: str, strategy: str) -> None:
    pool.run(2, check_block, name, "bf16", "grouped_mm", backend, strategy)


def check_model(ctx: RankContext) -> None:
    """Logits and gradients of a language model, with checkpointing, and what it generates."""
    group = ctx.prepared_group("default")
    config = MixtralConfig(
        **SIZES, intermediate_size=I, num_local_experts=E, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    dense = MixtralForCausalLM(config)
    torch.manual_seed(0)
    model = expert_parallel(MixtralForCausalLM(config), group)
    ids = [torch.randint(32, (2, 5 + rank), generator=torch.Generator().manual_seed(rank)) for rank in range(ctx.size)]
    prompt, settings = ids[ctx.rank], {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    generated, wanted = (one.generate(prompt, attention_mask=mask, **settings) for one in (model, dense))
    assert torch.equal(generated, wanted)
    model.train()
    model.activation_checkpointing_enable()
    out = model(prompt, labels=prompt, use_cache=False)
    out.loss.backward()
    for rank in range(ctx.size):
        expected = dense(ids[rank], labels=ids[rank])
        expected.loss.backward()
        if rank == ctx.rank:
            assert_close("logits", out.logits.detach(), expected.logits.detach(), "fp32")
    L = E // ctx.size
    experts = model.model.layers[0].mlp.experts
    wanted = dense.model.layers[0].mlp.experts.down_proj.grad[ctx.rank * L :][:L]
    assert_close("gradient of experts", experts.local.down_proj.grad, wanted, "fp32")


def test_model(pool: RankPool) -> None:
    assert callable(hugging_face.main)
    pool.run(4, check_model)
