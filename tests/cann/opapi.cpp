// The operators with which torch_npu moves and clears tensors: without them there is no A5, and no tensor that is not
// contiguous. The rest of libopapi is missing, which torch_npu says at each call. There are no headers for it in the
// wheel; the types are those of op_plugin/utils/op_api_common_base.h.
#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "stream.h"

struct aclTensor {
  char* data;
  aclDataType dtype;
  size_t item;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in bytes
};

// What the first of the two calls of an operator hands to the second.
struct aclOpExecutor {
  cann::Task task;
};

namespace cann {
namespace {

size_t size_of(aclDataType dtype) {
  switch (dtype) {
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16:
    case ACL_UINT16:
      return 2;
    case ACL_FLOAT:
    case ACL_INT32:
    case ACL_UINT32:
      return 4;
    case ACL_INT64:
    case ACL_UINT64:
    case ACL_DOUBLE:
    case ACL_COMPLEX64:
      return 8;
    case ACL_COMPLEX128:
      return 16;
    default:
      return 1;
  }
}

void check_bounds(const aclTensor& tensor) {
  size_t bytes = tensor.item;
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    bytes += (tensor.sizes[i] - 1) * tensor.strides[i];
  }
  check_range(tensor.data, bytes, true);
}

// Calls visit(to, from) for every item. `from` has the sizes of `to`.
template <typename Visit>
void for_each(const aclTensor& to, const aclTensor& from, size_t axis, char* to_item, const char* from_item,
              const Visit& visit) {
  if (axis == to.sizes.size()) {
    visit(to_item, from_item);
    return;
  }
  for (int64_t i = 0; i < to.sizes[axis]; ++i) {
    for_each(to, from, axis + 1, to_item + i * to.strides[axis], from_item + i * from.strides[axis], visit);
  }
}

aclTensor broadcast(const aclTensor& tensor, const std::vector<int64_t>& sizes) {
  aclTensor result{tensor.data, tensor.dtype, tensor.item, sizes, std::vector<int64_t>(sizes.size())};
  const size_t added = sizes.size() - tensor.sizes.size();
  for (size_t i = added; i < sizes.size(); ++i) {
    result.strides[i] = tensor.sizes[i - added] == 1 ? 0 : tensor.strides[i - added];
  }
  return result;
}

void copy(const aclTensor& to, const aclTensor& from) {
  check_bounds(to);
  check_bounds(from);
  for_each(to, from, 0, to.data, from.data, [&](char* a, const char* b) { std::memmove(a, b, to.item); });
}

void zero(const aclTensor& to) {
  check_bounds(to);
  for_each(to, to, 0, to.data, to.data, [&](char* a, const char*) { std::memset(a, 0, to.item); });
}

int execute(aclOpExecutor* executor, aclrtStream stream) {
  const std::unique_ptr<aclOpExecutor> owner(executor);
  return call(executor->task.name.c_str(), [=] { launch(stream, executor->task); });
}

}  // namespace
}  // namespace cann

using namespace cann;

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, aclDataType dtype, const int64_t* strides,
                           int64_t offset, aclFormat, const int64_t*, uint64_t, void* data) {
  const size_t item = size_of(dtype);
  auto* const tensor = new aclTensor{
      static_cast<char*>(data) + offset * item, dtype, item, {sizes, sizes + rank}, {strides, strides + rank}};
  for (int64_t& stride : tensor->strides) {
    stride *= item;
  }
  return tensor;
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return ACL_SUCCESS;
}

int aclnnInplaceCopyGetWorkspaceSize(aclTensor* to, const aclTensor* from, uint64_t* bytes, aclOpExecutor** executor) {
  return call(__func__, [=] {
    if (to->dtype != from->dtype) {
      throw Error{ACL_ERROR_UNSUPPORTED_DATA_TYPE, "the stand-in copies without changing the dtype"};
    }
    *bytes = 0;
    const auto run = [to = *to, from = broadcast(*from, to->sizes)] { copy(to, from); };
    *executor = new aclOpExecutor{{"aclnnInplaceCopy", run}};
  });
}

int aclnnInplaceCopy(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) { return execute(executor, stream); }

int aclnnInplaceZeroGetWorkspaceSize(aclTensor* to, uint64_t* bytes, aclOpExecutor** executor) {
  *bytes = 0;
  *executor = new aclOpExecutor{{"aclnnInplaceZero", [to = *to] { zero(to); }}};
  return ACL_SUCCESS;
}

int aclnnInplaceZero(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) { return execute(executor, stream); }
}
