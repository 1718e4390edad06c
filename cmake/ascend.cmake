# The NPU backend: CANN's toolkit, and the custom operator package made of ops/.

set(DEEP_EP_SOC ascend910_93 CACHE STRING "SoC of the kernels: ascend910b (A2), ascend910_93 (A3) or ascend950 (A5)")

if(DEFINED ENV{ASCEND_HOME_PATH})
  set(cann_dir "$ENV{ASCEND_HOME_PATH}")
else()
  set(cann_dir /usr/local/Ascend/ascend-toolkit/latest)
endif()
if(NOT EXISTS "${cann_dir}/include/acl/acl.h")
  message(FATAL_ERROR
    "DEEP_EP_NPU=ON (${DEEP_EP_SOC}) needs the CANN toolkit, and ${cann_dir}/include/acl/acl.h does not exist. "
    "Install CANN and source its set_env.sh, which sets ASCEND_HOME_PATH, or build for the CPU, without DEEP_EP_NPU.")
endif()
message(FATAL_ERROR
  "DEEP_EP_NPU=ON (${DEEP_EP_SOC}): CANN is at ${cann_dir}, but this version of deep_ep has no AscendC kernels (ops/) "
  "and no NPU registrations (torch_library/npu/). Build for the CPU, without DEEP_EP_NPU.")
