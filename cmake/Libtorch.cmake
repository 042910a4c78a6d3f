# SPDX-License-Identifier: Apache-2.0
# alambic::libtorch: headers and the two CPU libraries of a libtorch, linked by name.
#
# The PyPI wheel is a CUDA build, and its own TorchConfig.cmake demands a CUDA toolkit even of a program that never
# touches a GPU; so that file is not used. A libtorch of one's own (CPU or CUDA) is found through CMAKE_PREFIX_PATH or
# -DALAMBIC_LIBTORCH=/path; otherwise the wheel that scripts/setup.sh installed is taken.
set(ALAMBIC_LIBTORCH "" CACHE PATH "A libtorch folder (holding include/ and lib/); empty: CMAKE_PREFIX_PATH, then .deps/libtorch")
if(NOT ALAMBIC_LIBTORCH)
  file(GLOB wheel_torch ${CMAKE_SOURCE_DIR}/.deps/libtorch/lib/python3.*/site-packages/torch)
  set(torch_hints ${CMAKE_PREFIX_PATH} ${wheel_torch})
else()
  set(torch_hints ${ALAMBIC_LIBTORCH})
endif()
find_path(TORCH_INCLUDE ATen/core/Tensor.h HINTS ${torch_hints} PATH_SUFFIXES include NO_DEFAULT_PATH)
find_library(TORCH_CPU_LIBRARY torch_cpu HINTS ${torch_hints} PATH_SUFFIXES lib NO_DEFAULT_PATH)
find_library(C10_LIBRARY c10 HINTS ${torch_hints} PATH_SUFFIXES lib NO_DEFAULT_PATH)
if(NOT TORCH_INCLUDE OR NOT TORCH_CPU_LIBRARY OR NOT C10_LIBRARY)
  message(FATAL_ERROR "libtorch was not found in: ${torch_hints}\nRun scripts/setup.sh, or pass -DALAMBIC_LIBTORCH=/path/to/libtorch.")
endif()
file(STRINGS ${TORCH_INCLUDE}/torch/headeronly/version.h torch_version_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" torch_version_lines "${torch_version_lines}")
list(JOIN torch_version_lines "." ALAMBIC_TORCH_VERSION)
message(STATUS "libtorch ${ALAMBIC_TORCH_VERSION}: ${TORCH_CPU_LIBRARY}")

add_library(alambic_libtorch INTERFACE)
add_library(alambic::libtorch ALIAS alambic_libtorch)
target_include_directories(alambic_libtorch SYSTEM INTERFACE ${TORCH_INCLUDE} ${TORCH_INCLUDE}/torch/csrc/api/include)
target_compile_definitions(alambic_libtorch INTERFACE AT_PER_OPERATOR_HEADERS _GLIBCXX_USE_CXX11_ABI=1)
get_filename_component(torch_lib_dir ${TORCH_CPU_LIBRARY} DIRECTORY)
# libgomp comes from libtorch's folder as well: two OpenMP runtimes would mean two thread pools.
target_link_libraries(alambic_libtorch INTERFACE ${TORCH_CPU_LIBRARY} ${C10_LIBRARY} -Wl,--no-as-needed)
target_link_options(alambic_libtorch INTERFACE -Wl,-rpath,${torch_lib_dir})
