#include "torch_stand_in.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace {

using Sizes = std::vector<int64_t>;

struct Tensor {
  std::shared_ptr<void> memory;
  Sizes sizes, strides;
  int32_t dtype, device_type, device_index;

  int64_t numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>()); }
};

Tensor& of(AtenTensorHandle handle) { return *reinterpret_cast<Tensor*>(handle); }
AtenTensorHandle handle_of(Tensor tensor) { return reinterpret_cast<AtenTensorHandle>(new Tensor(std::move(tensor))); }

std::vector<StableIValue>& of(StableListHandle list) { return *reinterpret_cast<std::vector<StableIValue>*>(list); }
std::string& of(StringHandle text) { return *reinterpret_cast<std::string*>(text); }

std::map<std::string, stand_in::Kernel>& kernels() {
  static std::map<std::string, stand_in::Kernel> instance;
  return instance;
}

AOTITorchError library(const char* key, TorchLibraryHandle* made) {
  *made = reinterpret_cast<TorchLibraryHandle>(new std::string(key));
  return 0;
}

constexpr int kCPU = 0, kPrivateUse1 = 20;

}  // namespace

namespace stand_in {

Kernel find(const std::string& key, const std::string& op) {
  const auto found = kernels().find(key + "/" + op);
  if (found == kernels().end()) throw std::runtime_error("nothing is registered as " + op + " for " + key);
  return found->second;
}

}  // namespace stand_in

// What kernels do with tensors.
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete &of(tensor);
  return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* made) {
  *made = handle_of(of(tensor));
  return 0;
}
AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* made) {
  *made = handle_of({});
  return 0;
}
AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t,
                               int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* made,
                               int32_t, const uint8_t*, int64_t, void (*deleter)(void*, void*), void* context) {
  const auto drop = [deleter, context](void* memory) {
    if (deleter != nullptr) deleter(memory, context);
  };
  *made = handle_of({{data, drop}, {sizes, sizes + dims}, {strides, strides + dims}, dtype, device_type, device_index});
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* made) {
  Tensor tensor{nullptr, {sizes, sizes + dims}, {strides, strides + dims}, dtype, device_type, device_index};
  const size_t bytes = tensor.numel() * aoti_torch_dtype_element_size(dtype);
  tensor.memory = {std::aligned_alloc(512, (bytes + 512) / 512 * 512), std::free};
  *made = handle_of(std::move(tensor));
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dims) {
  *dims = static_cast<int64_t>(of(tensor).sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel) {
  *numel = of(tensor).numel();
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t dim, int64_t* size) {
  *size = of(tensor).sizes.at(dim);
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes) {
  *sizes = of(tensor).sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype) {
  *dtype = of(tensor).dtype;
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  *type = of(tensor).device_type;
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = of(tensor).device_index;
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool* is) {
  *is = true;  // all that is made here
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  *data = of(tensor).memory.get();
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  *data = of(tensor).memory.get();
  return 0;
}

// Lists and strings.
AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* made) {
  *made = reinterpret_cast<StableListHandle>(new std::vector<StableIValue>);
  return 0;
}
AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = of(list).size();
  return 0;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* item) {
  *item = of(list).at(index);
  return 0;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item) {
  of(list).push_back(item);
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete &of(list);
  return 0;
}
AOTITorchError torch_new_string_handle(const char* data, size_t length, StringHandle* made) {
  *made = reinterpret_cast<StringHandle>(new std::string(data, length));
  return 0;
}
AOTITorchError torch_string_length(StringHandle text, size_t* length) {
  *length = of(text).size();
  return 0;
}
AOTITorchError torch_string_c_str(StringHandle text, const char** data) {
  *data = of(text).c_str();
  return 0;
}
AOTITorchError torch_delete_string(StringHandle text) {
  delete &of(text);
  return 0;
}

// Registration.
AOTITorchError aoti_torch_library_init_impl(const char*, const char* key, const char*, uint32_t,
                                            TorchLibraryHandle* made) {
  return library(key, made);
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle* made) {
  return library("", made);
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name, stand_in::Kernel kernel, uint64_t) {
  kernels()[*reinterpret_cast<std::string*>(self) + "/" + name] = kernel;
  return 0;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle self) {
  delete reinterpret_cast<std::string*>(self);
  return 0;
}
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue*, uint64_t) {
  std::fprintf(stderr, "torch's own %s.%s is not in this stand-in\n", op, overload);
  return 1;
}
uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

// Numbers: those of c10, of what is used.
int32_t aoti_torch_device_type_cpu() { return kCPU; }
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_device_type_xpu() { return 12; }
int32_t aoti_torch_device_type_mps() { return 13; }
int32_t aoti_torch_device_type_meta() { return 14; }
int32_t aoti_torch_device_type_privateuse1() { return kPrivateUse1; }

#define DTYPES(each)                                                                                               \
  each(uint8, 0, 1) each(int8, 1, 1) each(int16, 2, 2) each(int32, 3, 4) each(int64, 4, 8) each(float16, 5, 2)     \
      each(float32, 6, 4) each(float64, 7, 8) each(complex32, 8, 4) each(complex64, 9, 8) each(complex128, 10, 16) \
          each(bool, 11, 1) each(bfloat16, 15, 2) each(float8_e5m2, 23, 1) each(float8_e4m3fn, 24, 1)              \
              each(float8_e5m2fnuz, 25, 1) each(float8_e4m3fnuz, 26, 1) each(uint16, 27, 2) each(uint32, 28, 4)    \
                  each(uint64, 29, 8)
#define NUMBER(name, number, bytes) \
  int32_t aoti_torch_dtype_##name() { return number; }
DTYPES(NUMBER)
int32_t torch_dtype_float8_e8m0fnu() { return 44; }
int32_t torch_dtype_float4_e2m1fn_x2() { return 45; }
#define BYTES(name, number, bytes) \
  case number:                     \
    return bytes;
size_t aoti_torch_dtype_element_size(int32_t dtype) {
  switch (dtype) { DTYPES(BYTES) }
  return 1;
}

#define CONSTANT(name) \
  int32_t name() { return __LINE__; }
CONSTANT(aoti_torch_layout_strided)
CONSTANT(aoti_torch_layout_sparse_coo)
CONSTANT(aoti_torch_layout_sparse_csr)
CONSTANT(aoti_torch_layout_sparse_csc)
CONSTANT(aoti_torch_layout_sparse_bsr)
CONSTANT(aoti_torch_layout_sparse_bsc)
CONSTANT(aoti_torch_layout__mkldnn)
CONSTANT(aoti_torch_layout_jagged)
CONSTANT(aoti_torch_memory_format_contiguous_format)
CONSTANT(aoti_torch_memory_format_channels_last)
CONSTANT(aoti_torch_memory_format_channels_last_3d)
CONSTANT(aoti_torch_memory_format_preserve_format)
