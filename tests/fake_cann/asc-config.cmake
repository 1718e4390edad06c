# CANN's CMake package ASC under its name from CANN 9 on. It goes by the environment.
if(NOT DEFINED ENV{ASCEND_HOME_PATH})
  message(FATAL_ERROR "ASCEND_HOME_PATH is not set")
endif()
include("$ENV{ASCEND_HOME_PATH}/compiler/tikcpp/ascendc_kernel_cmake/functions.cmake")
