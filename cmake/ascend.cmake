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
string(REGEX MATCH "^dir ([^\n]+)" cann_matched "${cann_answer}")
set(cann_dir "${CMAKE_MATCH_1}")

# CANN's CMake functions hand paths to shells as they are: a toolkit with a space in its path is reached by a link.
if(CMAKE_BINARY_DIR MATCHES "[ \t]")
  message(FATAL_ERROR
    "CANN's CMake functions cannot build in a folder with a space in its path: ${CMAKE_BINARY_DIR}")
endif()
if(cann_dir MATCHES "[ \t]")
  set(cann_link "${CMAKE_BINARY_DIR}/cann")
  file(CREATE_LINK "${cann_dir}" "${cann_link}" SYMBOLIC)
  string(REPLACE "${cann_dir}" "${cann_link}" cann_answer "${cann_answer}")
  set(cann_dir "${cann_link}")
endif()

string(REGEX MATCH "version ([0-9]+)[^\n]*\nasc ([^\n]+)\n" cann_matched "${cann_answer}")
set(cann_major "${CMAKE_MATCH_1}")
set(asc_dir "${CMAKE_MATCH_2}")
foreach(kind IN ITEMS include library kernel)
  string(REGEX MATCHALL "\n${kind} [^\n]+" cann_${kind} "${cann_answer}")
endforeach()
list(TRANSFORM cann_include REPLACE "\ninclude " "")
list(TRANSFORM cann_library REPLACE "\nlibrary " "")
string(REPLACE "\n" "" kernels "${cann_kernel}")
string(REPLACE ";" "|" kernels "${kernels}")
message(STATUS "CANN ${cann_major}: ${cann_dir}")

# A project of its own: CANN's functions write into the whole of a build, and need make for it.
include(ExternalProject)
set(package_dir "${CMAKE_BINARY_DIR}/operator_package")
set(in_cann bash "${CMAKE_CURRENT_LIST_DIR}/in_cann.sh" "${cann_dir}" "${CMAKE_COMMAND}")
ExternalProject_Add(deep_ep_operators
  SOURCE_DIR "${CMAKE_SOURCE_DIR}/ops"
  BINARY_DIR "${CMAKE_BINARY_DIR}/operators"
  LIST_SEPARATOR |
  CONFIGURE_COMMAND ${in_cann} -S <SOURCE_DIR> -B <BINARY_DIR> -G "Unix Makefiles"
    -DDEEP_EP_KERNELS=${kernels}
    -DDEEP_EP_CANN_MAJOR=${cann_major}
    -DASC_DIR=${asc_dir}
    -DASCEND_CANN_PACKAGE_PATH=${cann_dir}
    -DASCEND_COMPUTE_UNIT=${DEEP_EP_SOC}
    -DCMAKE_BUILD_TYPE=Release
  BUILD_COMMAND ${in_cann} --build <BINARY_DIR> --target all binary
  INSTALL_COMMAND "${CMAKE_COMMAND}" -E rm -rf "${package_dir}"
    COMMAND "${CMAKE_COMMAND}" --install <BINARY_DIR> --prefix "${package_dir}"
  BUILD_ALWAYS ON
)

# HCCL's way to windows (ops/aclnn/windows.h).
if(cann_major LESS 9)
  set(windows tiling)
elseif(DEEP_EP_SOC STREQUAL "ascend950")
  set(windows channel)
else()
  set(windows ipc)
endif()
add_library(deep_ep_kernels MODULE
  ops/aclnn/kernels.cpp
  ops/aclnn/windows_${windows}.cpp
)
target_include_directories(deep_ep_kernels PRIVATE . src)
target_include_directories(deep_ep_kernels SYSTEM PRIVATE ${cann_include})
target_compile_definitions(deep_ep_kernels PRIVATE DEEP_EP_SOC="${DEEP_EP_SOC}")
target_compile_options(deep_ep_kernels PRIVATE
  -fvisibility=hidden
  -fvisibility-inlines-hidden
  -Wall
  -Wextra
  -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=
)
target_link_libraries(deep_ep_kernels PRIVATE ${cann_library} ${CMAKE_DL_LIBS})
target_link_options(deep_ep_kernels PRIVATE -Wl,--no-undefined)

install(TARGETS deep_ep_kernels LIBRARY DESTINATION deep_ep COMPONENT npu)
install(DIRECTORY "${package_dir}/packages/vendors" DESTINATION deep_ep/opp COMPONENT npu)
