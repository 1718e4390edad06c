"""What torchair lacks for MoE transformers and quantised rows: decompositions, and converters of some ops."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def decompositions() -> dict[Any, Callable[..., Any]]:
    """By op: what it is made of."""
    known = get_decompositions(
        [
            aten.silu_backward.default,
            aten.softplus.default,
            aten.softplus_backward.default,
            aten.binary_cross_entropy_with_logits.default,
        ]
    )
    return known | {
        aten.index_put.default: _index_put,
        aten.amax.default: _amax,
        aten.amin.default: _amin,
        aten.var.correction: _var,
        aten.bitwise_and.Scalar: lambda x, number: aten.bitwise_and(x, torch.full_like(x, number)),
        aten.bitwise_or.Scalar: lambda x, number: aten.bitwise_or(x, torch.full_like(x, number)),
        aten.__lshift__.Scalar: lambda x, bits: x * (1 << bits),
        aten.__rshift__.Scalar: lambda x, bits: aten.floor_divide(x, 1 << bits),
        aten.signbit.default: lambda x: x.to(torch.float32).view(torch.int32) < 0,
    }


def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """With one index, of one dimension: x[:, index] = values, and the gradient of x[:, index]."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dim() != 1 or given[0][1].dtype != torch.int64:
        return NotImplemented
    ((dim, index),) = given
    shape = [*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :]]
    values = values.expand(shape)
    if accumulate:
        return aten.index_add(x, dim, index, values)
    return aten.scatter(x, dim, index.view([-1 if d == dim else 1 for d in range(x.dim())]).expand(shape), values)


def _amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    for d in sorted((d % x.dim() for d in (dim or range(x.dim()))), reverse=True):
        x = aten.max.dim(x, d, keepdim)[0]
    return x


def _amin(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return aten.neg(_amax(aten.neg(x), dim, keepdim))


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count = functools.reduce(lambda n, d: n * x.shape[d], dims, 1)
    difference = x - x.mean(dims, keepdim=True)
    freedom = count - (1 if correction is None else correction)
    return (difference * difference).sum(dims, keepdim=keepdim) / freedom


@functools.cache
def register() -> None:
    """Gives torchair the converters."""
    import torchair

    # The results' shapes are those of the fakes.
    torchair.register_fx_node_ge_converter(aten._grouped_mm.default)(_aten_grouped_mm)
    torchair.register_fx_node_ge_converter(aten.view.dtype)(_view)
    torchair.register_fx_node_ge_converter(torch.ops.deep_ep._reinterpret.default)(_reinterpret)
    npu = torch.ops.npu
    if hasattr(npu, "npu_fusion_attention_v3"):
        torchair.register_fx_node_ge_converter(npu.npu_fusion_attention_v3.default)(_attention)
        torchair.register_fx_node_ge_converter(npu.npu_fusion_attention_grad_v3.default)(_attention_backward)


def grouped_matmul(x: Any, weight: Any, offsets: Any, meta_outputs: Any = None) -> Any:
    """GroupedMatmul: a converter for ops with the arguments of torch.nn.functional.grouped_mm.

    x [N, D] by weight [L, D, F], the rows in groups; or x [D, N] by weight [N, F], the columns of x and the rows of
    weight in groups. Group l ends at offsets[l], int32 [L].
    """
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge import DataType

    def nothing(dtype: Any) -> list[Any]:
        return [ge_apis.Fill([0], ge_apis.Cast(0.0, dst_type=dtype))]

    (out,) = ge_apis.GroupedMatmul(
        [x],
        [weight],
        nothing(DataType.DT_FLOAT),
        nothing(DataType.DT_UINT64),
        nothing(DataType.DT_FLOAT),
        nothing(DataType.DT_FLOAT16),
        nothing(DataType.DT_FLOAT16),
        ge_apis.Cast(offsets, dst_type=DataType.DT_INT64),
        None,
        split_item=3,
        dtype=-1,
        group_type=0 if weight.rank == 3 else 2,
        group_list_type=0,
    )
    return out


def _aten_grouped_mm(
    x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None, meta_outputs: Any = None
) -> Any:
    if offs is None or bias is not None or out_dtype is not None:
        raise NotImplementedError("torch._grouped_mm converts with offs, and without bias and out_dtype")
    return grouped_matmul(x, weight, offs)


def _view(x: Any, dtype: torch.dtype, meta_outputs: Any = None) -> Any:
    """Bitcast, whose result has one more dimension where x is wider, and takes the last one of x where it is narrower.
    torchair's own converter leaves it at that."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge import DataType
    from torchair.ge._ge_graph import torch_type_to_ge_type

    def const(*values: int) -> Any:
        return ge_apis.Const(list(values), dtype=DataType.DT_INT64)

    ge_dtype, size, new_size = torch_type_to_ge_type(dtype), x.meta.dtype.itemsize, dtype.itemsize
    if size == new_size:
        return ge_apis.Bitcast(x, type=ge_dtype)
    sizes, parts = ge_apis.Shape(x, dtype=DataType.DT_INT64), const(max(size, new_size) // min(size, new_size))
    rows = ge_apis.Slice(sizes, const(0), const(x.rank - 1))
    width = ge_apis.Slice(sizes, const(x.rank - 1), const(1))
    if size > new_size:
        shape = ge_apis.ConcatV2([rows, ge_apis.Mul(width, parts)], concat_dim=0, N=2)
        return ge_apis.Reshape(ge_apis.Bitcast(x, type=ge_dtype), shape)
    shape = ge_apis.ConcatV2([rows, ge_apis.FloorDiv(width, parts), parts], concat_dim=0, N=3)
    return ge_apis.Bitcast(ge_apis.Reshape(x, shape), type=ge_dtype)


def _reinterpret(x: Any, dtype: torch.dtype, meta_outputs: Any = None) -> Any:
    """Bitcast."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge._ge_graph import torch_type_to_ge_type

    return ge_apis.Bitcast(x, type=torch_type_to_ge_type(dtype))


_ATTENTION = ("scale", "keep_prob", "pre_tockens", "next_tockens", "inner_precise", "sparse_mode")


def _options(scale: float, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("keep_prob", 1.0) != 1.0:
        raise NotImplementedError("attention converts without dropout: keep_prob must be 1")
    defaults = {"keep_prob": 1.0, "pre_tockens": 2**31 - 1, "next_tockens": 2**31 - 1, "inner_precise": 0}
    given = {name: options[name] for name in _ATTENTION if name in options}
    return {"scale_value": scale, "sparse_mode": 0} | defaults | given


def _attention(
    query: Any,
    key: Any,
    value: Any,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    scale: float = 1.0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    meta_outputs: Any = None,
    **options: Any,
) -> Any:
    """npu_fusion_attention_v3, which torch's scaled_dot_product_attention is on NPUs: FlashAttentionScore."""
    from torchair import ge
    from torchair._ge_concrete_graph import ge_apis

    largest, total, softmax, out = ge_apis.FlashAttentionScore(
        query,
        key,
        value,
        pse,
        None,
        padding_mask,
        atten_mask,
        prefix,
        actual_seq_qlen,
        actual_seq_kvlen,
        None,
        None,
        head_num=head_num,
        input_layout=input_layout,
        **_options(scale, options),
    )

    def zeros(spec: Any) -> Any:  # seed and offset of a dropout that is none
        return ge.Const([0] * math.prod(spec.size) if spec.size else 0, dtype=spec.dtype)

    return out, largest, total, softmax, zeros(meta_outputs[4]), zeros(meta_outputs[5])


def _attention_backward(
    query: Any,
    key: Any,
    value: Any,
    dy: Any,
    head_num: int,
    input_layout: str,
    *,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    softmax_max: Any = None,
    softmax_sum: Any = None,
    softmax_in: Any = None,
    attention_in: Any = None,
    scale_value: float = 1.0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    meta_outputs: Any = None,
    **options: Any,
) -> Any:
    """npu_fusion_attention_grad_v3: FlashAttentionScoreGrad."""
    from torchair import ge
    from torchair._ge_concrete_graph import ge_apis

    gradients = ge_apis.FlashAttentionScoreGrad(
        query,
        key,
        value,
        dy,
        pse,
        None,
        padding_mask,
        atten_mask,
        softmax_max,
        softmax_sum,
        softmax_in,
        attention_in,
        prefix,
        actual_seq_qlen,
        actual_seq_kvlen,
        None,
        None,
        head_num=head_num,
        input_layout=input_layout,
        **_options(scale_value, options),
    )
    sink = meta_outputs[4].dtype
    return *gradients, None if sink is None else ge.Const([], dtype=sink)
