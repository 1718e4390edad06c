"""Train a byte-level Mixture-of-Experts transformer on the sources of Python's standard library.

    torchrun --standalone --nproc-per-node=4 examples/train_moe.py
    python examples/train_moe.py --compile none --steps 50

The E experts of every layer are sharded over the R ranks: deep_ep.dispatch and deep_ep.combine carry tokens
to their experts and back. Everything else is replicated; each rank works on its slice of the global batch.
Initialisation and batches do not depend on R: any R that divides --experts and --batch trains the same model.

Model and loss are compiled into one forward and one backward graph, with deep_ep's ops and their backward ops
inside. By default a rank receives exactly the rows that are sent to it. Their number depends on data, so this
needs torch.compile(fullgraph=True), as below, or torch._dynamo.config.capture_dynamic_output_shape_ops=True;
without either, the graph breaks at every dispatch. With --num-worst-tokens the number of rows is static; what
does not fit is dropped and counted.

--compile npu builds the graphs for Huawei's NPUs with torch_npu's torchair. The tensors of this example are on the
CPU, so what is in these graphs runs there, operation by operation.

Prints the held-out loss, the number of graphs and the deep_ep overloads in them; writes metrics.json and
loss.png.

Symbols: B global batch, S sequence length, T = B / R * S local tokens, D model width, F width of an expert,
E experts, L = E / R local experts, N rows received by this rank.
"""

import argparse
import json
import math
import os
import sysconfig
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from tqdm import tqdm

import deep_ep


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    """One field for each command-line option."""

    compile: str = option("inductor", "torch.compile backend", ("none", "aot_eager", "inductor", "npu"))
    strategy: str = option("default", "deep_ep's strategy", ("default", "alltoall"))
    dtype: str = option("float32", "dtype of activations; parameters are float32", ("float32", "bfloat16"))
    steps: int = option(300, "training steps")
    batch: int = option(16, "sequences per step, all ranks together")
    seq: int = option(256, "sequence length in bytes")
    dim: int = option(128, "model width")
    layers: int = option(2, "transformer blocks")
    heads: int = option(4, "attention heads")
    experts: int = option(8, "experts per layer, all ranks together")
    topk: int = option(2, "experts per token")
    lr: float = option(4e-3, "peak learning rate")
    balance: float = option(0.01, "coefficient of the balancing loss")
    seed: int = option(0, "seed of initialisation and batches")
    num_worst_tokens: int = option(0, "rows a rank can receive per layer; 0: exactly as many as are sent")
    out: str = option("runs/train_moe", "folder for loss.png and metrics.json")
    quiet: bool = option(False, "print nothing")


@torch.library.custom_op("train_moe::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [N, D] @ weight [L, D, F] -> [N, F], or x [D, N] @ weight [N, F] -> [L, D, F], group by group.

    Group l ends at index offsets[l] of N (int32 [L]) and may be empty; what is behind the last is ignored.
    An op of its own because the fake kernel of torch's grouped_mm accepts bfloat16 only.
    """
    return F.grouped_mm(x, weight, offs=offsets)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if weight.dim() == 2:
        return x.new_empty(offsets.shape[0], x.shape[0], weight.shape[1])
    return x.new_empty(x.shape[0], weight.shape[2])


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, weight.transpose(1, 2), offsets), grouped_mm(x.t(), grad, offsets), None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_operands)


class Linear(nn.Linear):
    """A linear map without bias that computes in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal self-attention with rotary positions: [B / R, S, D] -> [B / R, S, D]."""

    rotation: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.project = Linear(config.dim, config.dim)
        pairs = config.dim // config.heads // 2
        angles = torch.outer(torch.arange(config.seq), 100.0 ** (-torch.arange(pairs) / pairs))
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]))

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.rotation.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.project(y.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """The feed-forward networks of this rank's L experts, each initialised from its global id."""

    def __init__(self, config: Config, layer: int, local_experts: range) -> None:
        super().__init__()
        num_local, dim, width = len(local_experts), config.dim, 4 * config.dim
        self.up = nn.Parameter(torch.empty(num_local, dim, width))
        self.down = nn.Parameter(torch.empty(num_local, width, dim))
        for i, expert in enumerate(local_experts):
            seed = (config.seed * config.layers + layer) * config.experts + expert
            generator = torch.Generator().manual_seed(seed)
            nn.init.uniform_(self.up.data[i], -(dim**-0.5), dim**-0.5, generator=generator)
            nn.init.uniform_(self.down.data[i], -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, x: Tensor, num_rows_per_expert: Tensor) -> Tensor:
        """x [N, D], its rows sorted by local expert; num_rows_per_expert int64 [L] -> [N, D]."""
        offsets = num_rows_per_expert.cumsum(0).to(torch.int32)
        hidden = F.gelu(grouped_mm(x, self.up.to(x.dtype), offsets))
        return grouped_mm(hidden, self.down.to(x.dtype), offsets)


class MoE(nn.Module):
    """A router and the experts it chooses from, sharded over the ranks of group."""

    num_dropped: Tensor

    def __init__(self, config: Config, layer: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.config = config
        self.group_name = group.group_name
        num_local = config.experts // group.size()
        first = group.rank() * num_local
        self.router = Linear(config.dim, config.experts)
        self.experts = Experts(config, layer, range(first, first + num_local))
        self.register_buffer("num_dropped", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> weighted sum of the experts [T, D], balancing loss [] (1 if all are used equally)."""
        config, group = self.config, self.group_name
        probabilities = self.router(x.float()).softmax(dim=-1)
        weights, expert_ids = probabilities.topk(config.topk)
        weights = weights / weights.sum(dim=-1, keepdim=True)

        sizes = {"num_experts": config.experts, "num_worst_tokens": config.num_worst_tokens}
        rows = deep_ep.dispatch(x, expert_ids, weights, group=group, **sizes)
        y = self.experts(rows.recv_x, rows.num_recv_tokens_per_expert)
        y = deep_ep.combine(y, rows.handle, group=group)
        self.num_dropped += rows.num_dropped

        # An expert's share of all ranks' choices, times its mean probability on this rank's tokens.
        choices = (expert_ids.unsqueeze(-1) == torch.arange(config.experts, device=x.device)).sum(dim=(0, 1))
        choices = funcol.all_reduce(choices, "sum", group)
        share = choices / (config.batch * config.seq * config.topk)
        return y, config.experts * (share * probabilities.mean(dim=0)).sum()


class Block(nn.Module):
    """Attention and MoE: float32 [B / R, S, D] -> float32 [B / R, S, D] and the balancing loss []."""

    def __init__(self, config: Config, layer: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.dtype = getattr(torch, config.dtype)
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.dim)
        self.moe = MoE(config, layer, group)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x).to(self.dtype))
        y, balance = self.moe(self.moe_norm(x).to(self.dtype).flatten(0, 1))
        return x + y.view_as(x), balance


class Transformer(nn.Module):
    """Language model and its loss: tokens and targets int64 [B / R, S] -> mean cross-entropy, float32 [].

    The balancing loss adds to the gradient and not to the value.
    """

    def __init__(self, config: Config, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.dtype = getattr(torch, config.dtype)
        self.balance = config.balance
        self.embedding = nn.Embedding(256, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(config, layer, group) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = Linear(config.dim, 256)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        balance = x.new_zeros(())
        for block in self.blocks:
            x, block_balance = block(x)
            balance = balance + self.balance * block_balance
        logits = self.head(self.norm(x).to(self.dtype)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss + (balance - balance.detach())


def build_model(config: Config, group: dist.ProcessGroup) -> Transformer:
    """The model of this rank: all replicated parameters and the experts that the rank holds."""
    for name, value in (("experts", config.experts), ("batch", config.batch)):
        if value % group.size():
            raise ValueError(f"--{name} {value} is not a multiple of the number of ranks, {group.size()}")
    torch.manual_seed(config.seed)
    return Transformer(config, group)


class Backend:
    """The backend aot_eager, inductor or npu for torch.compile; notes the graphs and their deep_ep overloads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.graphs = 0
        self.overloads: dict[str, set[str]] = {"forward": set(), "backward": set()}

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        if self.name == "inductor":
            return compile_fx(module, inputs, inner_compile=self.compile_inductor)
        if self.name == "npu":
            return self.compile_npu(module, inputs)
        forward, backward = (partial(self.compile_eager, direction=d) for d in self.overloads)
        partition = min_cut_rematerialization_partition
        return aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=partition)(module, inputs)

    def compile_inductor(self, module: torch.fx.GraphModule, inputs: list[Tensor], **kwargs: Any) -> Any:
        self.note(module, "backward" if kwargs.get("is_backward") else "forward")
        return compile_fx_inner(module, inputs, **kwargs)

    def compile_npu(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        import torch_npu  # noqa: F401  (brings torchair)
        import torchair

        def note(module: torch.fx.GraphModule, *_: Any) -> None:
            backward = any(node.op == "placeholder" and "tangents" in node.name for node in module.graph.nodes)
            self.note(module, "backward" if backward else "forward")

        config = torchair.CompilerConfig()
        config.debug.run_eagerly = True
        config.post_grad_custom_pre_pass = note
        torchair.register_fx_node_ge_converter(torch.ops.train_moe.grouped_mm.default)(deep_ep.npu.grouped_matmul)
        return deep_ep.npu.backend(config)(module, inputs)

    def compile_eager(self, module: torch.fx.GraphModule, inputs: list[Tensor], *, direction: str) -> Any:
        self.note(module, direction)
        return make_boxed_func(module.forward)

    def note(self, module: torch.fx.GraphModule, direction: str) -> None:
        names = (str(node.target) for node in module.graph.nodes)
        self.overloads[direction] |= {name for name in names if name.startswith("deep_ep.")}


def load_text(train_bytes: int = 16 << 20, held_out_bytes: int = 2 << 20) -> tuple[Tensor, Tensor]:
    """Training and held-out text, uint8: every tenth file of the standard library is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - skipped
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()

    def read(paths: list[Path], limit: int) -> Tensor:
        text = b"".join(path.read_bytes() for path in paths)
        return torch.frombuffer(bytearray(text[:limit]), dtype=torch.uint8)

    return read([p for i, p in enumerate(files) if i % 10], train_bytes), read(files[::10], held_out_bytes)


class Batches:
    """Random windows of text: this rank's slice of global batches that do not depend on R."""

    def __init__(self, text: Tensor, config: Config, group: dist.ProcessGroup) -> None:
        self.text, self.config, self.group = text, config, group
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 [B / R, S]."""
        size = (self.group.size(), self.config.batch // self.group.size())
        starts = torch.randint(len(self.text) - self.config.seq, size, generator=self.generator)
        local = starts[self.group.rank()].unsqueeze(1)
        windows = self.text[local + torch.arange(self.config.seq + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> float:
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total.item()


def average_gradients(model: Transformer, loss: Tensor, group: dist.ProcessGroup) -> float:
    """Make every gradient that of the mean loss over all ranks, and return that loss; one all_reduce.

    The gradient of an expert already sums over the tokens of all ranks: it is divided by R only.
    """
    expert_grads, grads = [], []
    for name, parameter in model.named_parameters():
        (expert_grads if ".experts." in name else grads).append(parameter.grad)
    torch._foreach_div_(expert_grads, group.size())

    flat = torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat, group=group)
    flat /= group.size()
    mean_loss, *means = flat.split([1, *(grad.numel() for grad in grads)])
    torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads, strict=True)])
    return mean_loss.item()


# A cached graph would not come by the backend, which looks for the overloads in it.
@torch._functorch.config.patch(enable_autograd_cache=False)
def train(config: Config, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Train on the ranks of group (None: WORLD) and return the metrics. Collective; writes no file."""
    group = group or dist.group.WORLD
    assert group is not None, "no process group"
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // group.size()))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    model = build_model(config, group)
    deep_ep.init(group, strategy=config.strategy)
    backend = Backend(config.compile)
    compute_loss: Any = model
    if config.compile != "none":
        compute_loss = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), fused=True)
    text, held_out_text = load_text()
    batches = Batches(text, config, group)

    def held_out_loss(num_batches: int = 4) -> float:
        # With gradients on, although none are taken: one graph serves training and evaluation.
        held_out_batches = Batches(held_out_text, config, group)
        total = sum(compute_loss(*held_out_batches()).detach() for _ in range(num_batches))
        return sum_over_ranks(total, group) / (num_batches * group.size())

    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    begin = time.perf_counter()
    seconds_in_steps = tokens_per_second = 0.0
    bar = tqdm(range(1, config.steps + 1), desc="compiling", disable=config.quiet or group.rank() > 0)
    for step in bar:
        step_begin = time.perf_counter()
        warmup, decay = min(1, step / 20), 0.55 + 0.45 * math.cos(math.pi * step / config.steps)
        optimizer.param_groups[0]["lr"] = config.lr * warmup * decay
        loss = compute_loss(*batches())
        loss.backward()
        losses.append(average_gradients(model, loss, group))
        optimizer.step()
        optimizer.zero_grad()
        if step > 1:
            seconds_in_steps += time.perf_counter() - step_begin
            tokens_per_second = (step - 1) * config.batch * config.seq / seconds_in_steps
        bar.set_description("training", refresh=False)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {tokens_per_second:.0f} tokens/s", refresh=False)
        if step % max(1, config.steps // 10) == 0 or step == config.steps:
            held_out.append((step, held_out_loss()))

    counts = held_out_text.bincount().double()
    num_dropped = sum(block.moe.num_dropped for block in model.blocks)
    metrics = {
        "config": asdict(config),
        "ranks": group.size(),
        "losses": losses,
        "held_out": held_out,
        "held_out_loss": held_out[-1][1],
        "bits_per_byte": held_out[-1][1] / math.log(2),
        "unigram_entropy": torch.distributions.Categorical(counts).entropy().item(),
        "graphs": backend.graphs,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "overloads": {direction: sorted(names) for direction, names in backend.overloads.items()},
        "num_dropped": sum_over_ranks(num_dropped, group),
        "tokens_per_second": tokens_per_second,
        "seconds": time.perf_counter() - begin,
    }
    deep_ep.destroy(group)
    return metrics


def print_report(metrics: dict[str, Any]) -> None:
    print(f"held-out loss {metrics['held_out_loss']:.3f} nats, {metrics['bits_per_byte']:.3f} bits per byte")
    print(f"unigram entropy {metrics['unigram_entropy']:.3f} nats")
    print(f"{metrics['seconds']:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s after the first step")
    print(f"{metrics['graphs']} graph(s), {metrics['graph_breaks']} graph breaks")
    for direction, names in metrics["overloads"].items():
        print(f"{direction}: {', '.join(names) or 'not compiled'}")
    if metrics["num_dropped"]:
        print(f"{metrics['num_dropped']} rows did not fit, evaluation included")


def write_report(metrics: dict[str, Any], out: Path) -> None:
    """Write metrics.json and loss.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(metrics["losses"]) + 1), metrics["losses"], linewidth=1, label="training")
    axes.plot(*zip(*metrics["held_out"], strict=True), marker="o", label="held-out")
    axes.axhline(metrics["unigram_entropy"], color="grey", linestyle="--", label="unigram entropy (held-out)")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=f"{metrics['ranks']} ranks")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)


def parse_config(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": "store_true"}
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **kind)
    return Config(**vars(parser.parse_args(arguments)))


def main() -> None:
    config = parse_config()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    metrics = train(config)
    if dist.get_rank() == 0:
        write_report(metrics, Path(config.out))
        if not config.quiet:
            print_report(metrics)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
