// Devices, and what there is to know and to set about them.
#include <acl/acl_op_compiler.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "stream.h"

namespace cann {
namespace {

struct State {
  std::mutex mutex;
  std::map<aclSysParamOpt, int64_t> parameters;
  std::map<aclCompileOpt, std::string> compile_options{{ACL_OP_JIT_COMPILE, "disable"}};
  uint32_t op_timeout = 0;  // ms; 0: not set
};

auto& state = *new State;
thread_local int device = -1;  // -1: none was set

std::string setting(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

int count_devices() {
  static const int count = std::stoi(setting("CANN_STAND_IN_DEVICES", "4"));
  return count;
}

void check_device(int id) {
  if (id < 0 || id >= count_devices()) {
    throw Error{ACL_ERROR_RT_INVALID_DEVICEID, "there is no device " + std::to_string(id)};
  }
}

int check_is_set() { return device != -1 ? device : throw Error{ACL_ERROR_RT_CONTEXT_NULL, "no device is set"}; }

}  // namespace

int current_device() { return device == -1 ? 0 : device; }

}  // namespace cann

using namespace cann;

extern "C" {

// Where libopapi has no operator, torch_npu falls back on an older kind of operator. Its errors come from torch_npu's
// queue and leave the process without streams. In mode 2 there is no such kind, and the error is raised at once.
aclError aclInit(const char*) {
  setenv("ACL_OP_INIT_MODE", "2", 0);
  return ACL_SUCCESS;
}

aclError aclFinalize() {
  drain(-1);
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = count_devices();
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t id) {
  return call(__func__, [=] {
    check_device(id);
    device = id;
  });
}

aclError aclrtGetDevice(int32_t* id) {
  *id = device;
  return device == -1 ? ACL_ERROR_RT_CONTEXT_NULL : ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t id) {
  drain(id);
  return ACL_SUCCESS;
}

// The context of device n is n + 1.
aclError aclrtGetCurrentContext(aclrtContext* context) {
  return call(__func__, [=] { *context = reinterpret_cast<aclrtContext>(intptr_t{check_is_set()} + 1); });
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  return aclrtSetDevice(static_cast<int32_t>(reinterpret_cast<intptr_t>(context) - 1));
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

const char* aclrtGetSocName() {
  static const std::string name = setting("CANN_STAND_IN_SOC", "Ascend910_9391");
  return name.c_str();
}

aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion* version) {
  *version = {};
  std::snprintf(version->version, sizeof version->version, package == ACL_PKG_NAME_DRIVER ? "25.5.0" : "8.5.0");
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t* value) {
  const std::string soc = aclrtGetSocName();
  const int64_t cube_cores = soc.starts_with("Ascend950") ? 32 : soc.starts_with("Ascend910B4") ? 20 : 24;
  *value = what == ACL_DEVICE_INFO_AI_CORE_NUM       ? cube_cores
           : what == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 2 * cube_cores
                                                     : int64_t{192} << 20;
  return ACL_SUCCESS;
}

// No stream is limited: each may use all cores of its kind.
aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) {
  int64_t cores = 0;
  const bool cube = type == ACL_RT_DEV_RES_CUBE_CORE;
  const aclError status =
      aclGetDeviceCapability(0, cube ? ACL_DEVICE_INFO_AI_CORE_NUM : ACL_DEVICE_INFO_VECTOR_CORE_NUM, &cores);
  *value = static_cast<uint32_t>(cores);
  return status;
}

// Options are kept and have no effect.
aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
  const std::lock_guard lock(state.mutex);
  state.compile_options[option] = value;
  return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt option) {
  const std::lock_guard lock(state.mutex);
  return state.compile_options[option].size() + 1;
}

aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t length) {
  const std::lock_guard lock(state.mutex);
  std::snprintf(value, length, "%s", state.compile_options[option].c_str());
  return ACL_SUCCESS;
}

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  const std::lock_guard lock(state.mutex);
  state.parameters[option] = value;
  return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  const std::lock_guard lock(state.mutex);
  *value = state.parameters[option];
  return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }

aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) {
  const std::lock_guard lock(state.mutex);
  state.op_timeout = seconds * 1000;
  return ACL_SUCCESS;
}

aclError aclrtGetOpExecuteTimeout(uint32_t* milliseconds) {
  const std::lock_guard lock(state.mutex);
  *milliseconds = state.op_timeout;
  return ACL_SUCCESS;
}

aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return ACL_SUCCESS; }
}
