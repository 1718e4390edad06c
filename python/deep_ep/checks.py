"""Argument checks, for fakes and for the `.alltoall` kernels; those at the end look at values of tensors.

Each function has the arguments of the op of its name and returns the message for the first bad one, or None. The
native kernels check the same and more (torch_library/arguments.cpp).
"""

from typing import Any

import torch
from torch import Tensor

from ._library import library
from .fused_options import FORMATS, Format, FusedOptions, in_tiles, quant_mode_of

MAX_ROWS = 2**31 - 1
"""Rows are numbered in int32."""

MAX_EXPERTS = 1 << 15
"""Counts per expert are published in a space of fixed size."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

TILE: int = library.deep_ep_fused_tile()
"""Columns of a tile of fused_deep_moe's first weights under FUSED_DEEP_MOE: half of gate, half of up."""


def differ(a: Any, b: Any) -> bool:
    """a != b, as far as that is known while shapes are symbolic."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a != b)


def exceeds(a: Any, b: Any) -> bool:
    """a > b, in the same way."""
    if isinstance(a, int) and isinstance(b, int):
        return a > b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a > b)


def _tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    shape: dict[str, Any],
    any_strides: bool = False,
) -> str | None:
    """`shape` names the dimensions and says how long they must be, if that is given."""
    names = f"[{', '.join(shape)}]"
    if tensor.dim() != len(shape):
        return f"{name} must have the shape {names}, got {list(tensor.shape)}"
    for (dim, wanted), size in zip(shape.items(), tensor.shape, strict=True):
        if wanted is not None and differ(size, wanted):
            return f"{name} must have the shape {names} with {dim} = {wanted}, got {list(tensor.shape)}"
    if tensor.dtype not in dtypes:
        *others, last = map(str, dtypes)
        allowed = f"{', '.join(others)} or {last}" if others else last
        return f"{name} must be {allowed}, got {tensor.dtype}"
    if tensor.device != device:
        return f"{name} must be on {device}, got {tensor.device}"
    if not any_strides and not torch.compiler.is_compiling() and not tensor.is_contiguous():
        return f"{name} must be contiguous, got the strides {list(tensor.stride())}"
    return None


def _rows(name: str, rows: Tensor, shape: dict[str, Any]) -> str | None:
    if error := _tensor(name, rows, FLOATS, rows.device, shape):
        return error
    if not differ(rows.shape[1], 0):
        return f"{name} must have a hidden size of at least 1"
    return None


def _experts(num_experts: int, num_ranks: int) -> str | None:
    if num_ranks < 1:
        return f"num_ranks must be at least 1, got {num_ranks}"
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"num_experts must be 1..{MAX_EXPERTS}, got {num_experts}"
    if num_experts % num_ranks:
        return f"num_experts ({num_experts}) must be divisible by num_ranks ({num_ranks})"
    return None


def group_size(num_ranks: int, size: int) -> str | None:
    """num_ranks must be the size of the group."""
    return None if num_ranks == size else f"num_ranks is {num_ranks}, but the group has {size} ranks"


def _topk_idx(topk_idx: Tensor, device: torch.device, T: Any = None) -> str | None:
    if error := _tensor("topk_idx", topk_idx, (torch.int64,), device, {"T": T, "K": None}):
        return error
    if not differ(topk_idx.shape[1], 0):
        return "topk_idx must have at least one column"
    if isinstance(topk_idx.numel(), int) and topk_idx.numel() > MAX_ROWS:
        return f"topk_idx must have at most {MAX_ROWS} ids, got {topk_idx.numel()}"
    return None


def get_dispatch_layout(topk_idx: Tensor, num_experts: int, num_ranks: int, num_nodes: int) -> str | None:
    if error := _experts(num_experts, num_ranks) or _topk_idx(topk_idx, topk_idx.device):
        return error
    if num_nodes < 1 or num_ranks % num_nodes:
        return f"num_ranks ({num_ranks}) must be divisible by num_nodes ({num_nodes})"
    return None


def _topk_weights(topk_weights: Tensor, topk_idx: Tensor) -> str | None:
    T, K = topk_idx.shape
    return _tensor("topk_weights", topk_weights, (torch.float32,), topk_idx.device, {"T": T, "K": K})


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: int,
) -> str | None:
    if num_worst_tokens < 0 or (isinstance(num_worst_tokens, int) and num_worst_tokens > MAX_ROWS):
        return f"num_worst_tokens must be 0 (exact) or a number of rows up to {MAX_ROWS}, got {num_worst_tokens}"
    return (
        _rows("x", x, {"T": None, "H": None})
        or _topk_idx(topk_idx, x.device, x.shape[0])
        or _topk_weights(topk_weights, topk_idx)
        or _experts(num_experts, num_ranks)
    )


def low_latency_dispatch(
    x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int, num_ranks: int
) -> str | None:
    error = (
        _rows("x", x, {"T": None, "H": None})
        or _topk_idx(topk_idx, x.device, x.shape[0])
        or _experts(num_experts, num_ranks)
    )
    if error:
        return error
    M, most = (
        num_max_dispatch_tokens_per_rank,
        MAX_ROWS // num_ranks // min(topk_idx.shape[1], num_experts // num_ranks),
    )
    if not 1 <= M <= most:
        return f"num_max_dispatch_tokens_per_rank must be 1..{most}, got {M}"
    if isinstance(x.shape[0], int) and x.shape[0] > M:
        return f"x has {x.shape[0]} tokens; allowed are at most num_max_dispatch_tokens_per_rank = {M}"
    return None


def ticket(ticket: Tensor) -> str | None:
    """The argument `ticket` of wait."""
    return _tensor("ticket", ticket, (torch.float64,), torch.device("cpu"), {"1": 1})


def _handle(
    name: str,
    rows: Tensor,
    topk_idx: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    """`rows`, the argument called `name`, stands in the row order of recv_x."""
    device = rows.device
    if error := (
        _rows(name, rows, {"N": None, "H": None}) or _topk_idx(topk_idx, device) or _experts(num_experts, num_ranks)
    ):
        return error
    N, (T, K) = rows.shape[0], topk_idx.shape
    return _tensor("recv_src_idx", recv_src_idx, (torch.int32,), device, {"N": N, "3": 3}) or _tensor(
        "send_head", send_head, (torch.int32,), device, {"T": T, "K": K}
    )


def combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    return _handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks) or _topk_weights(
        topk_weights, topk_idx
    )


def low_latency_combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    layout_range: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    return combine(x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks) or _tensor(
        "layout_range", layout_range, (torch.int32,), x.device, {"E": num_experts}
    )


def low_latency_combine_padded(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    layout_range: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    device = x.device
    if error := _experts(num_experts, num_ranks) or _topk_idx(topk_idx, device):
        return error
    if error := _tensor("x", x, FLOATS, device, {"L": num_experts // num_ranks, "R·M": None, "H": None}):
        return error
    if not differ(x.shape[2], 0):
        return "x must have a hidden size of at least 1"
    T, K = topk_idx.shape
    return (
        _tensor("recv_src_idx", recv_src_idx, (torch.int32,), device, {"N": None, "3": 3})
        or _tensor("send_head", send_head, (torch.int32,), device, {"T": T, "K": K})
        or _topk_weights(topk_weights, topk_idx)
        or _tensor("layout_range", layout_range, (torch.int32,), device, {"E": num_experts})
    )


def dispatch_backward(
    grad_recv_x: Tensor,
    grad_recv_topk_weights: Tensor,
    recv_src_idx: Tensor,
    topk_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    if error := _handle("grad_recv_x", grad_recv_x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks):
        return error
    shape = {"N": grad_recv_x.shape[0], "K": topk_idx.shape[1]}
    return _tensor("grad_recv_topk_weights", grad_recv_topk_weights, (torch.float32,), grad_recv_x.device, shape)


def combine_backward(
    grad_out: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    if error := combine(x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks):
        return error
    shape = {"T": topk_idx.shape[0], "H": x.shape[1]}
    return _tensor("grad_out", grad_out, (x.dtype,), x.device, shape)


def fused_deep_moe(
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
    strategy: str,
    overload: str,
    options: FusedOptions,
) -> str | None:
    if quant_mode not in range(len(FORMATS)):
        names = ", ".join(f"{number} ({form.quant_mode})" for number, form in enumerate(FORMATS))
        return f"quant_mode must be one of {names}, got {quant_mode}"
    form, sizes = FORMATS[quant_mode], (num_max_dispatch_tokens_per_rank, num_experts, num_ranks)
    error = _fused(x, topk_idx, topk_weights, gmm1_weight, gmm2_weight, *sizes, strategy, overload, form, options)
    if error:
        return error
    weights: list[tuple[str, Tensor, Tensor | None, Tensor | None]] = [
        ("", gmm1_weight, gmm1_weight_scale, gmm2_weight_scale)
    ]
    if options.shared_gmm1_weight is not None:
        scales = options.shared_gmm1_weight_scale, options.shared_gmm2_weight_scale
        weights.append(("shared_", options.shared_gmm1_weight, *scales))
    for prefix, weight, scale1, scale2 in weights:
        L, H, columns = weight.shape[0], x.shape[1], weight.shape[2] * form.packed
        if error := (
            _fused_scale(f"{prefix}gmm1_weight_scale", scale1, form, overload, x.device, L, "2I", columns, H)
            or _fused_scale(f"{prefix}gmm2_weight_scale", scale2, form, overload, x.device, L, "H", H, columns // 2)
        ):
            return error
    return None


def _fused_scale(
    name: str,
    scale: Tensor | None,
    form: Format,
    overload: str,
    device: torch.device,
    L: int,
    N: str,
    width: int,
    K: int,
) -> str | None:
    """Of weights with `width` columns, which are called `N`, and K rows."""
    is_missing = scale is None or not differ(scale.numel(), 0)
    if form.dtype is None:
        if scale is None or is_missing:
            return None
        return f"{name} must be None or empty with quant_mode 0, got {list(scale.shape)}"
    dtype = torch.float32 if overload == "default" else torch.int64
    shape: dict[str, Any] = {"L": L, N: width}
    if form.is_mx:
        blocks = "I/64" if N == "H" else "H/64"
        dtype, shape = torch.float8_e8m0fnu, {"L": L, blocks: -(-K // 64), N: width, "2": 2}
    if scale is None or is_missing:
        return f"{name} is missing: weights of {form.dtype} need {dtype} {list(shape.values())}"
    return _tensor(name, scale, (dtype,), device, shape, any_strides=True)


def fused_deep_moe_backward(
    grad_out: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm2_weight: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    strategy: str,
    overload: str,
    options: FusedOptions,
) -> str | None:
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    weights = gmm1_weight, gmm2_weight
    return _fused(x, topk_idx, topk_weights, *weights, *sizes, strategy, overload, FORMATS[0], options) or _tensor(
        "grad_out", grad_out, (x.dtype,), x.device, {"T": x.shape[0], "H": x.shape[1]}
    )


def _fused(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm2_weight: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    strategy: str,
    overload: str,
    form: Format,
    options: FusedOptions,
) -> str | None:
    """All but scales. `form`: that of the weights."""
    if strategy not in ("default", "alltoall"):
        return f"strategy must be default or alltoall, got {strategy!r}"
    if error := dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, 0):
        return error
    M = num_max_dispatch_tokens_per_rank
    if not 1 <= M <= MAX_ROWS:
        return f"num_max_dispatch_tokens_per_rank must be 1..{MAX_ROWS}, got {M}"
    if overload == "default" and isinstance(x.shape[0], int) and x.shape[0] > M:
        return f"x has {x.shape[0]} tokens; allowed are at most num_max_dispatch_tokens_per_rank = {M}"
    L, H = num_experts // num_ranks, x.shape[1]
    if form.quant_mode == "int8" and quant_mode_of(gmm1_weight) == 0:
        allowed = ", ".join(str(one.dtype) for one in FORMATS if one.dtype is not None)
        return f"gmm1_weight must be one of {allowed} with quant_mode 1, got {gmm1_weight.dtype}"
    if form.is_mx and H % 32:
        return f"x must have a hidden size that is divisible by 32 for weights of {form.dtype}, got {H}"
    tiles = in_tiles(overload, form)
    if error := _fused_weights("", x, gmm1_weight, gmm2_weight, L, form, tiles):
        return error
    columns = gmm1_weight.shape[2] * form.packed
    for name, bias, shape in (
        ("gmm1_bias", options.gmm1_bias, {"L": L, "2I": columns}),
        ("gmm2_bias", options.gmm2_bias, {"L": L, "H": H}),
    ):
        if bias is not None and (error := _tensor(name, bias, (torch.float32,), x.device, shape, any_strides=True)):
            return error
    shared = options.shared_gmm1_weight, options.shared_gmm2_weight
    if shared[0] is not None and shared[1] is not None:
        if error := _fused_weights("shared_", x, shared[0], shared[1], 1, form, tiles):
            return error
        if num_experts + num_ranks > MAX_EXPERTS:
            return f"num_experts must be 1..{MAX_EXPERTS - num_ranks} beside a shared expert, got {num_experts}"
    elif shared != (None, None) or options.shared_gmm1_weight_scale is not None:
        return "shared_gmm1_weight and shared_gmm2_weight must both be given, or neither of them and no scale"
    mask = options.x_active_mask
    if mask is not None and (error := _tensor("x_active_mask", mask, (torch.bool,), x.device, {"T": x.shape[0]})):
        return error
    # A comparison with NaN is false.
    if not 0 <= options.swiglu_limit < float("inf"):
        return f"swiglu_limit must be 0 (none) or a positive number, got {options.swiglu_limit}"
    for name, number in (("swiglu_alpha", options.swiglu_alpha), ("swiglu_beta", options.swiglu_beta)):
        if not -float("inf") < number < float("inf"):
            return f"{name} must be a finite number, got {number}"
    return None


def _fused_weights(
    prefix: str, x: Tensor, gmm1_weight: Tensor, gmm2_weight: Tensor, L: int, form: Format, tiles: bool
) -> str | None:
    """`prefix`: of the names of the arguments."""
    H, dtypes, packed = x.shape[1], (form.dtype or x.dtype,), form.packed
    name, per = f"{prefix}gmm1_weight", f"/{packed}" if packed > 1 else ""
    if error := _tensor(name, gmm1_weight, dtypes, x.device, {"L": L, "H": H, f"2I{per}": None}, any_strides=True):
        return error
    columns = gmm1_weight.shape[2] * packed
    if columns < 2 or columns % 2:
        return f"{name} must have an even number of columns (2I), I of gate and I of up, got {columns}"
    multiple = TILE if tiles else 64 if form.is_mx else 2
    if columns % multiple:
        why = "tiles of gate and up" if tiles else "in blocks of 32"
        return f"{name} must have a multiple of {multiple} columns (2I), {why}, got {columns}"
    I = columns // 2
    shape = {"L": L, "H": H, "I": I} if tiles else {"L": L, "I": I, f"H{per}": H // packed}
    return _tensor(f"{prefix}gmm2_weight", gmm2_weight, dtypes, x.device, shape, any_strides=True)


# What only the values in tensors show


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def range_error(name: str, what: str, tensor: Tensor, bound: int) -> str | None:
    """The message for the first value that is not in -1..bound-1."""
    if tensor.numel() == 0:
        return None
    least, most = tensor.aminmax()
    if least >= -1 and most < bound:
        return None
    at = ((tensor < -1) | (tensor >= bound)).nonzero()[0].tolist()
    allowed = f"-1 and 0..{bound - 1}" if bound > 0 else "-1"
    return f"{name} has the {what} {int(tensor[tuple(at)])} at {at}; allowed are {allowed}"


def ids_error(topk_idx: Tensor, num_experts: int) -> str | None:
    return range_error("topk_idx", "id", topk_idx, num_experts)


def repeated_error(topk_idx: Tensor) -> str | None:
    """Where every expert has room for a token once."""
    ids = topk_idx.unsqueeze(2)
    wrong = ((ids == topk_idx.unsqueeze(1)).tril(-1) & (ids >= 0)).nonzero()
    if not wrong.numel():
        return None
    t, k, _ = wrong[0].tolist()
    return f"topk_idx has the id {int(topk_idx[t, k])} of token {t} twice; a token's ids must be distinct"


def crowded_error(topk_idx: Tensor, L: int) -> str | None:
    """With ids that repeat, a token may want more rows of a rank than low latency has room for."""
    K = topk_idx.shape[1]
    if K <= L:
        return None
    rank = topk_idx // L
    rows = ((rank.unsqueeze(1) == rank.unsqueeze(2)) & (topk_idx >= 0).unsqueeze(1)).sum(2)
    wrong = ((rows > L) & (topk_idx >= 0)).nonzero()
    if not wrong.numel():
        return None
    t, k = wrong[0].tolist()
    return (
        f"topk_idx sends token {t} to rank {int(rank[t, k])} {int(rows[t, k])} times; allowed are {L}: ids may not "
        f"repeat where K exceeds the {L} experts of a rank"
    )
