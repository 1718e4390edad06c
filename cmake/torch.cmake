# Target torch_stable: torch's headers and libtorch_cpu, for code written against the stable ABI of torch 2.11.
# find_package(Torch) is not used: its config stops when torch was built with CUDA and no toolkit is installed.

set(DEEP_EP_TORCH_MIN 2.11)

# scikit-build-core names the interpreter; a plain `cmake -S . -B build/dev` takes the one `make` has set up.
if(NOT Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS "${CMAKE_SOURCE_DIR}/.venv/bin/python")
  set(Python_EXECUTABLE "${CMAKE_SOURCE_DIR}/.venv/bin/python")
endif()
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c [[
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("torch")
if spec is None:
    raise SystemExit("no module named torch")
print(importlib.metadata.version("torch"), spec.submodule_search_locations[0], sep=";")
]]
  OUTPUT_VARIABLE torch_answer
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_result
  OUTPUT_STRIP_TRAILING_WHITESPACE
)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no torch to build with (pip install torch==2.13.0): ${torch_error}")
endif()
list(GET torch_answer 0 torch_version)
list(GET torch_answer 1 TORCH_DIR)
if(torch_version VERSION_LESS DEEP_EP_TORCH_MIN)
  message(FATAL_ERROR "torch ${torch_version} at ${TORCH_DIR} is too old: deep_ep needs torch >= ${DEEP_EP_TORCH_MIN}")
endif()
message(STATUS "torch ${torch_version}: ${TORCH_DIR}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(torch_stable INTERFACE "${TORCH_DIR}/lib")
target_link_libraries(torch_stable INTERFACE -Wl,--no-as-needed -ltorch_cpu -Wl,--as-needed)
