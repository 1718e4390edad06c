// What the opaque types of aclnn are here, for the generated aclnn functions (tests/package/test_build.py).
#pragma once

#include <aclnn/acl_meta.h>

#include <string>
#include <vector>

struct aclTensor {
  int dtype;
  std::vector<int64_t> sizes, strides;
  void* data;
};

struct aclIntArray {
  std::vector<int64_t> values;
};

// What an argument is, as a word or a list.
inline std::string described(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (int64_t value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + "]";
}

inline std::string described(const aclTensor* tensor) {
  return "tensor " + std::to_string(tensor->dtype) + " " + described(tensor->sizes) + " " + described(tensor->strides) +
         " " + std::to_string(reinterpret_cast<uint64_t>(tensor->data));
}

inline std::string described(const aclIntArray* array) { return "numbers " + described(array->values); }
inline std::string described(const char* text) { return std::string("text ") + text; }
inline std::string described(int64_t number) { return "number " + std::to_string(number); }
