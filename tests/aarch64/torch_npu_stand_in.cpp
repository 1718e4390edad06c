// A stand-in for what libdeep_ep.so looks up in libtorch_npu.so: a stream on which everything runs at once.
#include <cstdint>
#include <functional>
#include <string>

extern "C" int32_t aoti_torch_get_current_npu_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace at_npu::native {

struct OpCommand {
  static void RunOpApiV2(const std::string& name, const std::function<int()>& launch, bool sync);
};

void OpCommand::RunOpApiV2(const std::string&, const std::function<int()>& launch, bool) { launch(); }

}  // namespace at_npu::native

namespace c10_npu {

int captureStatusMayInitCtx(void*) { return 0; }

}  // namespace c10_npu
