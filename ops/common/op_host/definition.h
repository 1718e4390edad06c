// From the signature of an operator to its definition, its inferences and its tiling.
//
// An operator is a class DeepEpX : Operator<DeepEpX> with `static Signature signature()`. CANN copies definitions as
// ops::OpDef and calls plain functions, so that it has no state: each function asks for the signature again.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>

#include "device/tiling.h"
#include "register/op_def_registry.h"
#include "signature.h"
#include "sizes.h"
#include "tiling/platform/platform_ascendc.h"

// Set by the build for CANN.
#ifndef DEEP_EP_CANN_MAJOR
#define DEEP_EP_CANN_MAJOR 9
#endif

namespace deep_ep {

// One column per dtype of rows, in this order for all parameters.
inline std::vector<ge::DataType> columns(Elements elements) {
  switch (elements) {
    case Elements::rows:
    case Elements::weights:
      return {ge::DT_FLOAT, ge::DT_FLOAT16, ge::DT_BF16};
    case Elements::f32:
      return {ge::DT_FLOAT, ge::DT_FLOAT, ge::DT_FLOAT};
    case Elements::i8:
      return {ge::DT_INT8, ge::DT_INT8, ge::DT_INT8};
    case Elements::i32:
      return {ge::DT_INT32, ge::DT_INT32, ge::DT_INT32};
    default:
      return {ge::DT_INT64, ge::DT_INT64, ge::DT_INT64};
  }
}

// What does not fit together is printed, which works with every version of CANN, and without it.
template <typename Context>
ge::graphStatus status(const Context& context, const std::string& error) {
  if (error.empty()) return ge::GRAPH_SUCCESS;
  std::fprintf(stderr, "%s: %s\n", context.GetNodeType(), error.c_str());
  return ge::GRAPH_FAILED;
}

// Everything that the context knows of the inputs. `shape_of(i)` and `value_of(i)` are pointers to the shape of input i
// and to the value that it has on the host; nullptr: not known.
template <typename Context, typename ShapeOf, typename ValueOf>
Sizes sizes_of(const Context& context, const Signature& signature, ShapeOf&& shape_of, ValueOf&& value_of) {
  Sizes sizes;
  for (size_t i = 0; i < signature.attrs.size(); ++i) {
    const AttrDef& attr = signature.attrs[i];
    if (!attr.symbol || attr.symbol == AttrDef::kNumber) continue;
    const int64_t* value = context.GetAttrs()->GetInt(i);
    sizes.require(value && *value > 0, attr.name, "must be at least 1");
    if (sizes.ok()) sizes.set(attr.symbol, *value, attr.name);
  }
  sizes.require(!sizes.ok() || sizes['E'] % sizes['R'] == 0, "num_experts", "must be divisible by num_ranks");
  if (sizes.ok()) sizes.set('L', sizes['E'] / sizes['R'], "num_experts");

  for (size_t i = 0; i < signature.inputs.size(); ++i) {
    const TensorDef& input = signature.inputs[i];
    if (const gert::Shape* shape = shape_of(i)) sizes.set_all(input.shape, *shape, input.name);
    if (*input.shape != '=') continue;
    if (const int64_t* value = value_of(i)) {
      sizes.require(*value > 0 && *value <= Sizes::kMaxRows, input.name, "must be 1 to 2147483647");
      sizes.set(input.shape[1], *value, input.name);
    }
  }
  if (signature.num_rows && sizes.ok()) sizes.set('N', signature.num_rows(sizes), "the number of rows");
  if (signature.require && sizes.ok()) signature.require(sizes);
  return sizes;
}

template <typename Op>
ge::graphStatus infer_shape(gert::InferShapeContext* context) {
  const Signature signature = Op::signature();
  const Sizes sizes = sizes_of(
      *context, signature, [&](size_t i) { return context->GetInputShape(i); },
      [&](size_t i) {
        const gert::Tensor* tensor = context->GetInputTensor(i);
        return tensor ? tensor->template GetData<int64_t>() : nullptr;
      });
  for (size_t i = 0; i < signature.outputs.size() && sizes.ok(); ++i)
    *context->GetOutputShape(i) = sizes.shape(signature.outputs[i].shape);
  return status(*context, sizes.error());
}

// Where the kernel alone knows N, GE takes memory for the most rows before it runs, and reads the shapes afterwards.
template <typename Op>
ge::graphStatus infer_shape_range(gert::InferShapeRangeContext* context) {
  const Signature signature = Op::signature();
  const auto infer = [&](bool most) {
    Sizes sizes = sizes_of(
        *context, signature,
        [&](size_t i) {
          const gert::Range<gert::Shape>* range = context->GetInputShapeRange(i);
          return most ? range->GetMax() : range->GetMin();
        },
        [](size_t) -> const int64_t* { return nullptr; });
    sizes.set('N', most ? signature.most_rows(sizes) : 0, "the number of rows");
    for (size_t i = 0; i < signature.outputs.size() && sizes.ok(); ++i) {
      gert::Range<gert::Shape>* range = context->GetOutputShapeRange(i);
      *(most ? range->GetMax() : range->GetMin()) = sizes.shape(signature.outputs[i].shape);
    }
    return status(*context, sizes.error());
  };
  const ge::graphStatus least = infer(false);
  return least == ge::GRAPH_SUCCESS ? infer(true) : least;
}

template <typename Op>
ge::graphStatus infer_data_type(gert::InferDataTypeContext* context) {
  const Signature signature = Op::signature();
  ge::DataType rows = ge::DT_UNDEFINED;
  for (size_t i = 0; i < signature.inputs.size(); ++i) {
    if (signature.inputs[i].elements != Elements::rows) continue;
    const ge::DataType given = context->GetInputDataType(i);
    if (rows != ge::DT_UNDEFINED && given != rows)
      return status(*context, std::string(signature.inputs[i].name) + ": all rows of a call have one dtype");
    rows = given;
  }
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    const Elements elements = signature.outputs[i].elements;
    context->SetOutputDataType(i, elements == Elements::rows ? rows : columns(elements).front());
  }
  return ge::GRAPH_SUCCESS;
}

inline bool zero_unused(const gert::TilingContext& context, const Signature& signature) {
  for (size_t i = 0; i < signature.attrs.size(); ++i)
    if (signature.attrs[i].name == kZeroUnused.name) return *context.GetAttrs()->GetInt(i) != 0;
  return true;
}

// The tensors have their shapes by now, and outputs know N.
template <typename Op>
ge::graphStatus tile(gert::TilingContext* context) {
  const Signature signature = Op::signature();
  if (!signature.has_kernel) return status(*context, "this version has no kernel for this operator");
  Sizes sizes = sizes_of(
      *context, signature, [&](size_t i) { return &context->GetInputShape(i)->GetOriginShape(); },
      [](size_t) -> const int64_t* { return nullptr; });
  for (size_t i = 0; i < signature.outputs.size(); ++i)
    sizes.set_all(signature.outputs[i].shape, context->GetOutputShape(i)->GetOriginShape(), signature.outputs[i].name);
  if (!sizes.ok()) return status(*context, sizes.error());

  const platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
  uint64_t unified_buffer = 0;
  platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, unified_buffer);
  const Soc soc{platform.GetCoreNumAiv(), static_cast<int64_t>(unified_buffer)};
  Work work{};
  work.tokens = sizes['T'];
  work.top_k = sizes['K'];
  work.experts = sizes['E'];
  work.ranks = sizes['R'];
  work.nodes = std::max(sizes['S'], int64_t{0});
  if (signature.max_tokens) work.max_tokens = signature.max_tokens(sizes);
  if (signature.rows != Rows::none) {
    work.hidden = sizes['H'];
    work.rows = sizes['N'];
    work.element_bytes = context->GetInputDesc(0)->GetDataType() == ge::DT_FLOAT ? 4 : 2;
    work.sent_bytes = signature.rows == Rows::quantised ? 1 : work.element_bytes;
    work.copied = signature.rows == Rows::copied || signature.rows == Rows::multiplied;
    work.arithmetic = signature.rows == Rows::summed || signature.rows == Rows::multiplied;
    work.answers = signature.answers;
    work.zero_unused = zero_unused(*context, signature);
  }

  static_assert(sizeof(Tiling) <= 2048, "CANN reserves that much");
  Tiling* tiling = context->GetTilingData<Tiling>();
  const std::string error = make_tiling(work, soc, tiling);
  if (!error.empty()) return status(*context, error);
  context->SetBlockDim(static_cast<uint32_t>(tiling->blocks));
  context->SetScheduleMode(1);  // all blocks start together: they wait for each other
  context->GetWorkspaceSizes(1)[0] = platform.GetLibApiWorkSpaceSize() + tiling->workspace_bytes;
  return ge::GRAPH_SUCCESS;
}

// Weights have the columns of rows, and as many of int8, for which everything else repeats itself. CANN compiles a
// kernel for each column, and no two are equal: without rows there is one.
inline ops::OpParamDef& define(ops::OpParamDef& param, const TensorDef& tensor, bool has_rows, bool has_weights) {
  std::vector<ge::DataType> types = columns(tensor.elements);
  if (!has_rows) types.resize(1);
  if (has_weights) {
    const auto again = columns(tensor.elements == Elements::weights ? Elements::i8 : tensor.elements);
    types.insert(types.end(), again.begin(), again.end());
  }
  return param.ParamType(ops::REQUIRED).DataType(types).Format(std::vector<ge::Format>(types.size(), ge::FORMAT_ND));
}

template <typename Op>
void define(ops::OpDef& def) {
  const Signature signature = Op::signature();
  const auto has = [&](Elements elements) {
    const auto& inputs = signature.inputs;
    return std::any_of(inputs.begin(), inputs.end(), [&](const TensorDef& one) { return one.elements == elements; });
  };
  const bool has_rows = has(Elements::rows);
  const bool has_weights = has(Elements::weights);
  for (const TensorDef& input : signature.inputs) {
    ops::OpParamDef& param = define(def.Input(input.name), input, has_rows, has_weights);
    if (*input.shape == '=')
      param.ValueDepend(ops::OPTIONAL);  // where it is not known in time, dimensions are -1
    else
      param.AutoContiguous();
  }
  for (const TensorDef& output : signature.outputs) {
    ops::OpParamDef& param = define(def.Output(output.name), output, has_rows, has_weights);
    // Of all outputs if of any: GE reads the shapes of all, other parts of CANN those of outputs that are marked.
    if (signature.most_rows) param.OutputShapeDependOnCompute();
  }
  for (const AttrDef& attr : signature.attrs) {
    ops::OpAttrDef& param = def.Attr(attr.name).AttrType(ops::REQUIRED);
    if (attr.symbol)
      param.Int();
    else
      param.String();
  }
  def.SetInferShape(infer_shape<Op>).SetInferDataType(infer_data_type<Op>);
  if (signature.most_rows) def.SetInferShapeRange(infer_shape_range<Op>);

  ops::OpAICoreConfig config;
  config.DynamicCompileStaticFlag(true)
      .DynamicFormatFlag(false)
      .DynamicRankSupportFlag(true)
      .DynamicShapeSupportFlag(true)
      .NeedCheckSupportFlag(false)
      .PrecisionReduceFlag(false)
      .ExtendCfgInfo("aclnnSupport.value", "support_aclnn")
      .ExtendCfgInfo("jitCompile.flag", "static_false")  // the package's binaries: users need no compiler
      .ExtendCfgInfo("multiKernelSupportDynamicGraph.value", "multi_kernel");
  def.AICore().SetTiling(tile<Op>);
  def.AICore().AddConfig("ascend910b", config);
  def.AICore().AddConfig("ascend910_93", config);
  def.AICore().AddConfig(DEEP_EP_CANN_MAJOR < 9 ? "ascend910_95" : "ascend950", config);
}

template <typename Op>
class Operator : public ops::OpDef {
 public:
  explicit Operator(const char* type) : ops::OpDef(type) { define<Op>(*this); }
};

}  // namespace deep_ep
