// What all contexts of CANN's runtime give: the node, its attributes and the dtypes of its tensors.
//
// CANN lays contexts over its own memory; here they stand on a gert::Node, which is the shim's own.
#pragma once

#include <graph/ge_error_codes.h>
#include <graph/types.h>

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "exe_graph/runtime/shape.h"

namespace gert {

class Tensor {
 public:
  Tensor() = default;
  // `value` is what the tensor holds on the host, empty when that is not known.
  Tensor(const Shape& shape, ge::DataType dtype, std::vector<int64_t> value)
      : shape_(shape), dtype_(dtype), value_(std::move(value)) {}

  const Shape& GetOriginShape() const { return shape_.GetOriginShape(); }
  ge::DataType GetDataType() const { return dtype_; }
  template <typename T>
  const T* GetData() const {
    return value_.empty() ? nullptr : reinterpret_cast<const T*>(value_.data());
  }

  // The shim's own.
  const StorageShape& storage_shape() const { return shape_; }
  Shape& mutable_shape() { return shape_.MutableOriginShape(); }
  void set_dtype(ge::DataType dtype) { dtype_ = dtype; }

 private:
  StorageShape shape_;
  ge::DataType dtype_ = ge::DT_UNDEFINED;
  std::vector<int64_t> value_;
};

class CompileTimeTensorDesc {
 public:
  explicit CompileTimeTensorDesc(ge::DataType dtype) : dtype_(dtype) {}
  ge::DataType GetDataType() const { return dtype_; }

 private:
  ge::DataType dtype_;
};

class RuntimeAttrs {
 public:
  using Value = std::variant<std::monostate, int64_t, std::string>;

  // nullptr: there is no such attribute, or it has another type.
  const int64_t* GetInt(size_t index) const {
    return index < values_.size() ? std::get_if<int64_t>(&values_[index]) : nullptr;
  }
  const char* GetStr(size_t index) const {
    const auto* text = index < values_.size() ? std::get_if<std::string>(&values_[index]) : nullptr;
    return text ? text->c_str() : nullptr;
  }

  std::vector<Value>& values() { return values_; }  // the shim's own

 private:
  std::vector<Value> values_;
};

struct Node {
  std::string type;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  RuntimeAttrs attrs;
};

class ExtendedKernelContext {
 public:
  explicit ExtendedKernelContext(Node* node) : node_(node) {
    for (const Tensor& input : node->inputs) descs_.emplace_back(input.GetDataType());
  }

  const char* GetNodeType() const { return node_->type.c_str(); }
  const RuntimeAttrs* GetAttrs() const { return &node_->attrs; }
  const CompileTimeTensorDesc* GetInputDesc(size_t index) const {
    return index < descs_.size() ? &descs_[index] : nullptr;
  }

 protected:
  const Tensor* input(size_t index) const { return index < node_->inputs.size() ? &node_->inputs[index] : nullptr; }
  Tensor* output(size_t index) const { return index < node_->outputs.size() ? &node_->outputs[index] : nullptr; }

 private:
  Node* node_;
  std::vector<CompileTimeTensorDesc> descs_;
};

}  // namespace gert
