# CANN's CMake package ASC under its name of CANN 8.5.
include("${CMAKE_CURRENT_LIST_DIR}/../../compiler/tikcpp/ascendc_kernel_cmake/functions.cmake")
