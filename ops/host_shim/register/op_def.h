// ops::OpDef of CANN and its parts, as far as ops/ uses them. Getters are the shim's own: CANN's are for its tools.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "exe_graph/runtime/infer_datatype_context.h"
#include "exe_graph/runtime/infer_shape_context.h"
#include "exe_graph/runtime/infer_shape_range_context.h"
#include "exe_graph/runtime/tiling_context.h"

namespace gert {

class OpImplRegisterV2 {
 public:
  using InferShapeKernelFunc = ge::graphStatus (*)(InferShapeContext*);
  using InferShapeRangeKernelFunc = ge::graphStatus (*)(InferShapeRangeContext*);
  using InferDataTypeKernelFunc = ge::graphStatus (*)(InferDataTypeContext*);
  using TilingKernelFunc = ge::graphStatus (*)(TilingContext*);
};

}  // namespace gert

namespace ops {

enum Option { IGNORE = 0, OPTIONAL = 1, REQUIRED = 2, DYNAMIC = 3 };

class OpParamDef {
 public:
  explicit OpParamDef(const char* name) : name_(name) {}

  OpParamDef& ParamType(Option type) { return type_ = type, *this; }
  // One entry per column; the columns of all parameters are the combinations that the operator supports.
  OpParamDef& DataType(std::vector<ge::DataType> types) { return dtypes_ = std::move(types), *this; }
  OpParamDef& Format(std::vector<ge::Format> formats) { return formats_ = std::move(formats), *this; }
  OpParamDef& AutoContiguous() { return auto_contiguous_ = true, *this; }
  // The functions below get the input's value where it is known.
  OpParamDef& ValueDepend(Option depend) { return value_depend_ = depend, *this; }
  OpParamDef& OutputShapeDependOnCompute() { return shape_depends_on_compute_ = true, *this; }

  const std::string& name() const { return name_; }
  Option type() const { return type_; }
  const std::vector<ge::DataType>& dtypes() const { return dtypes_; }
  const std::vector<ge::Format>& formats() const { return formats_; }
  bool auto_contiguous() const { return auto_contiguous_; }
  Option value_depend() const { return value_depend_; }
  bool shape_depends_on_compute() const { return shape_depends_on_compute_; }

 private:
  std::string name_;
  Option type_ = REQUIRED;
  std::vector<ge::DataType> dtypes_;
  std::vector<ge::Format> formats_;
  bool auto_contiguous_ = false;
  Option value_depend_ = IGNORE;
  bool shape_depends_on_compute_ = false;
};

class OpAttrDef {
 public:
  explicit OpAttrDef(const char* name) : name_(name) {}

  OpAttrDef& AttrType(Option type) { return required_ = type == REQUIRED, *this; }
  OpAttrDef& Int() { return kind_ = "VT_INT", *this; }
  OpAttrDef& String() { return kind_ = "VT_STRING", *this; }

  const std::string& name() const { return name_; }
  const std::string& kind() const { return kind_; }
  bool required() const { return required_; }

 private:
  std::string name_;
  std::string kind_;
  bool required_ = true;
};

class OpAICoreConfig {
 public:
  OpAICoreConfig& DynamicCompileStaticFlag(bool on) { return flag("dynamicCompileStatic.flag", on); }
  OpAICoreConfig& DynamicFormatFlag(bool on) { return flag("dynamicFormat.flag", on); }
  OpAICoreConfig& DynamicRankSupportFlag(bool on) { return flag("dynamicRankSupport.flag", on); }
  OpAICoreConfig& DynamicShapeSupportFlag(bool on) { return flag("dynamicShapeSupport.flag", on); }
  OpAICoreConfig& NeedCheckSupportFlag(bool on) { return flag("needCheckSupport.flag", on); }
  OpAICoreConfig& PrecisionReduceFlag(bool on) { return flag("precision_reduce.flag", on); }
  OpAICoreConfig& ExtendCfgInfo(const char* key, const char* value) { return settings_[key] = value, *this; }

  const std::map<std::string, std::string>& settings() const { return settings_; }

 private:
  OpAICoreConfig& flag(const char* key, bool on) { return ExtendCfgInfo(key, on ? "true" : "false"); }

  std::map<std::string, std::string> settings_;
};

class OpAICoreDef {
 public:
  OpAICoreDef& SetTiling(gert::OpImplRegisterV2::TilingKernelFunc tiling) { return tiling_ = tiling, *this; }
  OpAICoreDef& AddConfig(const char* soc, OpAICoreConfig& config) { return configs_[soc] = config, *this; }

  gert::OpImplRegisterV2::TilingKernelFunc& GetTiling() { return tiling_; }
  const std::map<std::string, OpAICoreConfig>& configs() const { return configs_; }

 private:
  gert::OpImplRegisterV2::TilingKernelFunc tiling_ = nullptr;
  std::map<std::string, OpAICoreConfig> configs_;
};

class OpDef {
 public:
  explicit OpDef(const char* type) : type_(type) {}

  // Finds the parameter, or adds it behind the others. The reference stays valid.
  OpParamDef& Input(const char* name) { return find_or_add(inputs_, name); }
  OpParamDef& Output(const char* name) { return find_or_add(outputs_, name); }
  OpAttrDef& Attr(const char* name) { return find_or_add(attrs_, name); }
  OpDef& SetInferShape(gert::OpImplRegisterV2::InferShapeKernelFunc f) { return infer_shape_ = f, *this; }
  OpDef& SetInferShapeRange(gert::OpImplRegisterV2::InferShapeRangeKernelFunc f) { return infer_range_ = f, *this; }
  OpDef& SetInferDataType(gert::OpImplRegisterV2::InferDataTypeKernelFunc f) { return infer_dtype_ = f, *this; }
  OpAICoreDef& AICore() { return aicore_; }

  gert::OpImplRegisterV2::InferShapeKernelFunc& GetInferShape() { return infer_shape_; }
  gert::OpImplRegisterV2::InferShapeRangeKernelFunc& GetInferShapeRange() { return infer_range_; }
  gert::OpImplRegisterV2::InferDataTypeKernelFunc& GetInferDataType() { return infer_dtype_; }
  const OpAICoreDef& aicore() const { return aicore_; }
  const std::deque<OpParamDef>& inputs() const { return inputs_; }
  const std::deque<OpParamDef>& outputs() const { return outputs_; }
  const std::deque<OpAttrDef>& attrs() const { return attrs_; }

 private:
  template <typename Def>
  static Def& find_or_add(std::deque<Def>& defs, const char* name) {
    for (Def& def : defs)
      if (def.name() == name) return def;
    return defs.emplace_back(name);
  }

  std::string type_;
  std::deque<OpParamDef> inputs_, outputs_;
  std::deque<OpAttrDef> attrs_;
  gert::OpImplRegisterV2::InferShapeKernelFunc infer_shape_ = nullptr;
  gert::OpImplRegisterV2::InferShapeRangeKernelFunc infer_range_ = nullptr;
  gert::OpImplRegisterV2::InferDataTypeKernelFunc infer_dtype_ = nullptr;
  OpAICoreDef aicore_;
};

}  // namespace ops
