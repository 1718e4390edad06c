// Communicators have names, by which operators take them. There are no collectives.
#include <third_party/hccl/inc/hccl/hccl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>

#include "stand_in.h"

namespace cann {
namespace {

auto& communicators = *new Handles<std::string>;  // their names

}  // namespace
}  // namespace cann

using namespace cann;

extern "C" {

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

// What the ranks pass on to each other is the name: of the make of HCCL's, and like those another one in every run.
HcclResult HcclGetRootInfo(HcclRootInfo* root) {
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  std::snprintf(root->internal, sizeof root->internal, "127.0.0.1%%lo_%d_%p_%lld", getpid(), new_handle(),
                static_cast<long long>(now));
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfoConfig(uint32_t, const HcclRootInfo* root, uint32_t, const HcclCommConfig* config,
                                      HcclComm* comm) {
  const char* const name = config->hcclCommName[0] != '\0' ? config->hcclCommName : root->internal;
  *comm = new_handle();
  communicators.add(*comm, std::make_shared<std::string>(name));
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  return call(__func__, [=] { std::strcpy(name, communicators.get(comm)->c_str()); }) ? HCCL_E_PARA : HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* error) {
  *error = HCCL_SUCCESS;
  return HCCL_SUCCESS;
}

HcclResult HcclCommDestroy(HcclComm comm) {
  return call(__func__, [=] { communicators.remove(comm); }) ? HCCL_E_PARA : HCCL_SUCCESS;
}
}
