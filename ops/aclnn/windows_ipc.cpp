// A2 and A3 with CANN 9: a context for vector cores connects the ranks, then HCCL has the address of every buffer.
#include "windows.h"

// Exported by HCCL for operators like ours, but its headers have moved between versions.
extern "C" {
HcclResult HcclCommGetHandleWithName(const char* name, HcclComm* comm);
HcclResult HcclKfcAllocOpArgs(void** args);
HcclResult HcclKfcFreeOpArgs(void* args);
HcclResult HcclKfcOpArgsSetAlgConfig(void* args, char* config);
HcclResult HcclKfcOpArgsSetCommEngine(void* args, uint8_t engine);
HcclResult HcclCreateOpResCtx(HcclComm comm, uint8_t op_type, void* args, void** context);
HcclResult HcclGetHcclBuffer(HcclComm comm, void** address, uint64_t* bytes);
HcclResult HcclGetRemoteIpcHcclBuf(HcclComm comm, uint64_t rank, void** address, uint64_t* bytes);
}

namespace deep_ep::aclnn {
namespace {

constexpr uint8_t kVectorCores = 4;  // the engine: no task for an AICPU is made
constexpr uint8_t kAllToAll = 8;     // the kind of operator, which says who is connected with whom: all with all

class Arguments {
 public:
  Arguments() { check(HcclKfcAllocOpArgs(&arguments_), "HcclKfcAllocOpArgs"); }
  ~Arguments() { HcclKfcFreeOpArgs(arguments_); }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  void* get() const { return arguments_; }

 private:
  void* arguments_ = nullptr;
};

}  // namespace

std::vector<Window> find_windows(const std::string& communicator, uint32_t rank, uint32_t size) {
  HcclComm comm = nullptr;
  check(HcclCommGetHandleWithName(communicator.c_str(), &comm), "HcclCommGetHandleWithName");
  check_ranks(comm, rank, size);

  const Arguments arguments;
  std::string algorithm = "AlltoAll=level0:fullmesh;level1:pairwise";
  check(HcclKfcOpArgsSetAlgConfig(arguments.get(), algorithm.data()), "HcclKfcOpArgsSetAlgConfig");
  check(HcclKfcOpArgsSetCommEngine(arguments.get(), kVectorCores), "HcclKfcOpArgsSetCommEngine");
  void* context = nullptr;
  check(HcclCreateOpResCtx(comm, kAllToAll, arguments.get(), &context), "HcclCreateOpResCtx");

  std::vector<Window> windows;
  for (uint32_t r = 0; r < size; ++r) {
    void* address = nullptr;
    uint64_t bytes = 0;
    if (r == rank)
      check(HcclGetHcclBuffer(comm, &address, &bytes), "HcclGetHcclBuffer");
    else
      check(HcclGetRemoteIpcHcclBuf(comm, r, &address, &bytes), "HcclGetRemoteIpcHcclBuf");
    windows.push_back({reinterpret_cast<uint64_t>(address), bytes});
  }
  return windows;
}

}  // namespace deep_ep::aclnn
