# The NPU backend, with CANN: the operator package made of ops/, and libdeep_ep_kernels.so, which calls it. Both go into
# the wheel; libdeep_ep.so needs neither.

set(DEEP_EP_SOC ascend910_93 CACHE STRING "SoC of the kernels: ascend910b (A2), ascend910_93 (A3) or ascend950 (A5)")
set_property(CACHE DEEP_EP_SOC PROPERTY STRINGS ascend910b ascend910_93 ascend950)
if(NOT DEEP_EP_SOC MATCHES "^(ascend910b|ascend910_93|ascend950)$")
  message(FATAL_ERROR "DEEP_EP_SOC must be ascend910b (A2), ascend910_93 (A3) or ascend950 (A5), got '${DEEP_EP_SOC}'")
endif()

execute_process(
  COMMAND bash "${CMAKE_CURRENT_LIST_DIR}/find_cann.sh" "${DEEP_EP_SOC}"
  OUTPUT_VARIABLE cann_answer
  ERROR_VARIABLE cann_error
  RESULT_VARIABLE cann_result
)
if(NOT cann_result EQUAL 0)
  message(FATAL_ERROR "DEEP_EP_NPU=ON (${DEEP_EP_SOC}): ${cann_error}")
endif()
string(REGEX MATCH "dir ([^\n]+)\nversion ([0-9]+)[^\n]*\nasc ([^\n]+)\n" cann_matched "${cann_answer}")
set(cann_dir "${CMAKE_MATCH_1}")
set(cann_major "${CMAKE_MATCH_2}")
set(asc_dir "${CMAKE_MATCH_3}")
string(REGEX MATCHALL "kernel [^\n]+" kernels "${cann_answer}")
string(REPLACE ";" "|" kernels "${kernels}")
message(STATUS "CANN ${cann_major}: ${cann_dir}")

# A project of its own: CANN's functions write into the whole of a build, and need make for it.
include(ExternalProject)
set(package_dir "${CMAKE_BINARY_DIR}/operator_package")
ExternalProject_Add(deep_ep_operators
  SOURCE_DIR "${CMAKE_SOURCE_DIR}/ops"
  BINARY_DIR "${CMAKE_BINARY_DIR}/operators"
  CMAKE_GENERATOR "Unix Makefiles"
  LIST_SEPARATOR |
  CMAKE_ARGS
    -DDEEP_EP_KERNELS=${kernels}
    -DDEEP_EP_CANN_MAJOR=${cann_major}
    -DASC_DIR=${asc_dir}
    -DASCEND_CANN_PACKAGE_PATH=${cann_dir}
    -DASCEND_COMPUTE_UNIT=${DEEP_EP_SOC}
    -DCMAKE_BUILD_TYPE=Release
  BUILD_COMMAND "${CMAKE_COMMAND}" --build <BINARY_DIR> --target all binary
  INSTALL_COMMAND "${CMAKE_COMMAND}" --install <BINARY_DIR> --prefix "${package_dir}"
  BUILD_ALWAYS ON
)

# HCCL's way to windows (torch_library/npu/aclnn/windows.h).
if(cann_major LESS 9)
  set(windows tiling)
elseif(DEEP_EP_SOC STREQUAL "ascend950")
  set(windows channel)
else()
  set(windows ipc)
endif()
add_library(deep_ep_kernels MODULE
  torch_library/npu/aclnn/kernels.cpp
  torch_library/npu/aclnn/windows_${windows}.cpp
)
target_include_directories(deep_ep_kernels PRIVATE src torch_library)
target_include_directories(deep_ep_kernels SYSTEM PRIVATE "${cann_dir}/include")
target_compile_definitions(deep_ep_kernels PRIVATE DEEP_EP_SOC="${DEEP_EP_SOC}")
target_compile_options(deep_ep_kernels PRIVATE
  -fvisibility=hidden
  -fvisibility-inlines-hidden
  -Wall
  -Wextra
  -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=
)
# CANN 9 has HCCL in two libraries; c_sec is for functions in HCCL's headers.
foreach(library IN ITEMS ascendcl nnopbase hccl hccl_fwk c_sec)
  if(EXISTS "${cann_dir}/lib64/lib${library}.so")
    target_link_libraries(deep_ep_kernels PRIVATE "${cann_dir}/lib64/lib${library}.so")
  endif()
endforeach()
target_link_libraries(deep_ep_kernels PRIVATE ${CMAKE_DL_LIBS})
target_link_options(deep_ep_kernels PRIVATE -Wl,--no-undefined)

install(TARGETS deep_ep_kernels LIBRARY DESTINATION deep_ep COMPONENT npu)
install(DIRECTORY "${package_dir}/packages/vendors" DESTINATION deep_ep/opp COMPONENT npu)
