// gert::Shape, StorageShape and Range of CANN, as far as ops/ uses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace gert {

class Shape {
 public:
  static constexpr size_t kMaxDimNum = 25;

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    for (const int64_t dim : dims) AppendDim(dim);
  }

  size_t GetDimNum() const { return dim_num_; }
  void SetDimNum(size_t dim_num) { dim_num_ = dim_num; }
  int64_t GetDim(size_t index) const { return dims_[index]; }
  void SetDim(size_t index, int64_t dim) { dims_[index] = dim; }
  Shape& AppendDim(int64_t dim) {
    dims_[dim_num_++] = dim;
    return *this;
  }

 private:
  size_t dim_num_ = 0;
  int64_t dims_[kMaxDimNum] = {};
};

class StorageShape {
 public:
  StorageShape() = default;
  explicit StorageShape(const Shape& shape) : shape_(shape) {}

  const Shape& GetOriginShape() const { return shape_; }
  Shape& MutableOriginShape() { return shape_; }

 private:
  Shape shape_;
};

template <typename T>
class Range {
 public:
  Range() = default;
  Range(T* min, T* max) : min_(min), max_(max) {}

  const T* GetMin() const { return min_; }
  const T* GetMax() const { return max_; }
  T* GetMin() { return min_; }
  T* GetMax() { return max_; }

 private:
  T* min_ = nullptr;
  T* max_ = nullptr;
};

}  // namespace gert
