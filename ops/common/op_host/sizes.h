// The sizes of a call by their symbols, gathered from shapes, attributes and values. What is not known is -1.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>

#include "register/op_def_registry.h"

namespace deep_ep {

class Sizes {
 public:
  static constexpr int64_t kUnknown = -1;      // a dimension
  static constexpr int64_t kUnknownRank = -2;  // the only dimension of a shape with any number of them
  static constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();  // rows are numbered in int32

  // A digit is its own size.
  int64_t operator[](char symbol) const {
    if (symbol >= '0' && symbol <= '9') return symbol - '0';
    const auto found = known_.find(symbol);
    return found == known_.end() ? kUnknown : found->second;
  }

  // The product of the sizes, if all are known.
  int64_t product(const char* symbols) const {
    int64_t result = 1;
    for (; *symbols; ++symbols) {
      if ((*this)[*symbols] == kUnknown) return kUnknown;
      result *= (*this)[*symbols];
    }
    return result;
  }

  // `where` is what has the size: a tensor or an attribute. An unknown size says nothing.
  void set(char symbol, int64_t size, const char* where) {
    const int64_t known = (*this)[symbol];
    if (size == kUnknown || size == known) return;
    if (known == kUnknown)
      known_[symbol] = size;
    else
      fail(where, std::string(1, symbol) + " is " + std::to_string(size) + " here and " + std::to_string(known) +
                      " elsewhere");
  }

  void set_all(const char* symbols, const gert::Shape& shape, const char* where) {
    if (*symbols == '*' || *symbols == '=') return;
    if (shape.GetDimNum() == 1 && shape.GetDim(0) == kUnknownRank) return;
    const size_t rank = std::char_traits<char>::length(symbols);
    if (shape.GetDimNum() != rank)
      fail(where, "must have " + std::to_string(rank) + " dimensions, got " + std::to_string(shape.GetDimNum()));
    for (size_t i = 0; i < rank && ok(); ++i) set(symbols[i], shape.GetDim(i), where);
  }

  gert::Shape shape(const char* symbols) const {
    gert::Shape shape;
    for (; *symbols; ++symbols) shape.AppendDim((*this)[*symbols]);
    return shape;
  }

  void require(bool fulfilled, const char* where, const char* text) {
    if (!fulfilled) fail(where, text);
  }

  // The first failure is the error.
  void fail(const char* where, const std::string& text) {
    if (error_.empty()) error_ = std::string(where) + ": " + text;
  }

  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }

 private:
  std::map<char, int64_t> known_;
  std::string error_;
};

}  // namespace deep_ep
