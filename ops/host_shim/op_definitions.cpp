// The operator definitions of this library, for ctypes: what they say, and what their functions infer.
//
// Texts are JSON, valid until the next call with the same argument. A shape may have dimensions of -1, or be [-2].
// `dtype` is a ge::DataType.
#include <sstream>

#include "c_boundary.h"
#include "register/op_def_registry.h"

namespace {

// Names and values of ours need no escapes.
std::string quoted(const std::string& text) { return '"' + text + '"'; }

template <typename Items, typename Text>
std::string list(const Items& items, Text&& text, const char* brackets = "[]") {
  std::string result(1, brackets[0]);
  for (const auto& item : items) {
    if (result.size() > 1) result += ", ";
    result += text(item);
  }
  return result + brackets[1];
}

template <typename Value>
std::string pair(const char* key, const Value& value) {
  std::ostringstream out;
  out << quoted(key) << ": " << value;
  return out.str();
}

std::string object(std::initializer_list<std::string> pairs) {
  return list(pairs, [](const std::string& text) { return text; }, "{}");
}

std::string numbers(const auto& values) {
  return list(values, [](auto value) { return std::to_string(value); });
}

std::string boolean(bool value) { return value ? "true" : "false"; }

std::string name_of(ops::Option option) {
  constexpr const char* names[] = {"ignore", "optional", "required", "dynamic"};
  return quoted(names[option]);
}

std::string param(const ops::OpParamDef& param) {
  return object({pair("name", quoted(param.name())), pair("type", name_of(param.type())),
                 pair("dtypes", numbers(param.dtypes())), pair("formats", numbers(param.formats())),
                 pair("auto_contiguous", boolean(param.auto_contiguous())),
                 pair("value_depend", name_of(param.value_depend())),
                 pair("shape_depends_on_compute", boolean(param.shape_depends_on_compute()))});
}

std::string attr(const ops::OpAttrDef& attr) {
  return object({pair("name", quoted(attr.name())), pair("kind", quoted(attr.kind())),
                 pair("required", boolean(attr.required()))});
}

std::string definition(const ops::OpDef& def) {
  const auto setting = [](const auto& item) { return pair(item.first.c_str(), quoted(item.second)); };
  const auto config = [&](const auto& item) {
    return pair(item.first.c_str(), list(item.second.settings(), setting, "{}"));
  };
  return object({pair("inputs", list(def.inputs(), param)), pair("outputs", list(def.outputs(), param)),
                 pair("attrs", list(def.attrs(), attr)), pair("socs", list(def.aicore().configs(), config, "{}"))});
}

// A call of an operator.
struct Call {
  ops::OpDef* def;
  gert::Node node;
  std::string text;
};

std::string tensors(const gert::Node& node) {
  return list(node.outputs, [](const gert::Tensor& output) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < output.GetOriginShape().GetDimNum(); ++i) shape.push_back(output.GetOriginShape().GetDim(i));
    return object({pair("dtype", static_cast<int>(output.GetDataType())), pair("shape", numbers(shape))});
  });
}

gert::Shape shape_of(const int64_t* dims, int rank) {
  gert::Shape shape;
  for (int i = 0; i < rank; ++i) shape.AppendDim(dims[i]);
  return shape;
}

const char* answer(Call* call, std::initializer_list<std::string> pairs) {
  call->text = object(pairs);
  return call->text.c_str();
}

}  // namespace

// {type: {inputs, outputs, attrs, socs}}
DEEP_EP_API const char* deep_ep_op_definitions() noexcept {
  static std::string text;
  text = list(
      ops::OpDefFactory::definitions(),
      [](const auto& item) { return pair(item.first.c_str(), definition(item.second)); }, "{}");
  return text.c_str();
}

// nullptr: no such type.
DEEP_EP_API Call* deep_ep_op_call(const char* type) noexcept {
  auto& definitions = ops::OpDefFactory::definitions();
  const auto found = definitions.find(type);
  if (found == definitions.end()) return nullptr;
  auto* call = new Call{&found->second, {type, {}, {}, {}}, {}};
  call->node.outputs.resize(call->def->outputs().size());
  call->node.attrs.values().resize(call->def->attrs().size());
  return call;
}

DEEP_EP_API void deep_ep_op_free(Call* call) noexcept { delete call; }

// The next input. Its value, one int64, is known if `value` is not null.
DEEP_EP_API void deep_ep_op_input(Call* call, int dtype, const int64_t* dims, int rank, const int64_t* value) noexcept {
  std::vector<int64_t> data;
  const size_t index = call->node.inputs.size();
  const bool depends = index < call->def->inputs().size() && call->def->inputs()[index].value_depend() != ops::IGNORE;
  if (value && depends) data = {*value};
  call->node.inputs.emplace_back(shape_of(dims, rank), static_cast<ge::DataType>(dtype), std::move(data));
}

// For the tiling, after inference: the shape that an output has when the operator is launched.
DEEP_EP_API void deep_ep_op_output(Call* call, int index, const int64_t* dims, int rank) noexcept {
  call->node.outputs[index].mutable_shape() = shape_of(dims, rank);
}

// Attribute `index` of the definition; `text` where it is a string, else null.
DEEP_EP_API void deep_ep_op_attr(Call* call, int index, int64_t number, const char* text) noexcept {
  auto& value = call->node.attrs.values()[index];
  if (text)
    value = std::string(text);
  else
    value = number;
}

// {status, outputs: [{dtype, shape}]}
DEEP_EP_API const char* deep_ep_op_infer(Call* call) noexcept {
  gert::InferDataTypeContext dtypes(&call->node);
  gert::InferShapeContext shapes(&call->node);
  ge::graphStatus status = call->def->GetInferDataType()(&dtypes);
  if (status == ge::GRAPH_SUCCESS) status = call->def->GetInferShape()(&shapes);
  return answer(call, {pair("status", status), pair("outputs", tensors(call->node))});
}

// {status, min: [...], max: [...]}: the outputs at their smallest and at their largest. nullptr: no such function.
DEEP_EP_API const char* deep_ep_op_infer_range(Call* call) noexcept {
  if (!call->def->GetInferShapeRange()) return nullptr;
  gert::InferDataTypeContext dtypes(&call->node);
  call->def->GetInferDataType()(&dtypes);
  gert::Node min = call->node, max = call->node;
  gert::InferShapeRangeContext context(&min, &max);
  const ge::graphStatus status = call->def->GetInferShapeRange()(&context);
  return answer(call, {pair("status", status), pair("min", tensors(min)), pair("max", tensors(max))});
}

// {status, block_dim, schedule_mode, workspaces, tiling}: tiling in bytes.
DEEP_EP_API const char* deep_ep_op_tile(Call* call, uint32_t vector_cores, uint64_t unified_buffer_bytes) noexcept {
  fe::PlatFormInfos platform{vector_cores, unified_buffer_bytes};
  gert::TilingContext context(&call->node, &platform);
  const ge::graphStatus status = call->def->AICore().GetTiling()(&context);
  const std::vector<int> bytes(context.tiling, context.tiling + context.tiling_bytes);
  return answer(
      call, {pair("status", status), pair("block_dim", context.block_dim), pair("schedule_mode", context.schedule_mode),
             pair("workspaces", numbers(context.workspaces)), pair("tiling", numbers(bytes))});
}
