# CANN's functions for operator packages, as far as ops/CMakeLists.txt goes: they take the same arguments, write down
# what they are called with (operators/calls.txt), and make a package of aclnn functions alone.
# OPAPI in the environment names the source that CANN's generator would have made.

function(record)
  string(JOIN " " text ${ARGV})
  file(APPEND "${CMAKE_BINARY_DIR}/calls.txt" "${text}\n")
endfunction()

file(WRITE "${CMAKE_BINARY_DIR}/calls.txt" "")
file(WRITE "${CMAKE_BINARY_DIR}/empty.cpp" "")
add_custom_target(binary)

function(npu_op_package)
  record(npu_op_package ${ARGV})
endfunction()

function(npu_op_code_gen)
  record(npu_op_code_gen ${ARGV})
  cmake_parse_arguments(GEN "" "PACKAGE;OUT_DIR" "SRC;COMPILE_OPTIONS" ${ARGV})
  configure_file("$ENV{OPAPI}" "${GEN_OUT_DIR}/aclnn_deep_ep.cpp" COPYONLY)
endfunction()

function(npu_op_library name type)
  record(npu_op_library ${ARGV})
  if(type STREQUAL "ACLNN")
    add_library(${name} OBJECT ${ARGN})
  else()
    add_library(${name} OBJECT "${CMAKE_BINARY_DIR}/empty.cpp")
  endif()
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
endfunction()

function(npu_op_kernel_sources)
  record(npu_op_kernel_sources ${ARGV})
endfunction()

function(npu_op_kernel_options)
  record(npu_op_kernel_options ${ARGV})
endfunction()

function(npu_op_kernel_library)
  record(npu_op_kernel_library ${ARGV})
endfunction()

function(npu_op_package_add package)
  record(npu_op_package_add ${ARGV})
  add_library(package_opapi SHARED $<TARGET_OBJECTS:cust_opapi>)
  set_target_properties(package_opapi PROPERTIES OUTPUT_NAME cust_opapi)
  install(TARGETS package_opapi LIBRARY DESTINATION packages/vendors/${package}/op_api/lib)
endfunction()
