# SPDX-License-Identifier: Apache-2.0
# alambic::libtorch: headers and the two CPU libraries of a libtorch, linked by name.
#
# The PyPI wheel is a CUDA build, and its own TorchConfig.cmake demands a CUDA toolkit even of a program that never
# touches a GPU; so that file is not used. A libtorch of one's own (CPU or CUDA) is named with -DALAMBIC_LIBTORCH=/path or
# found through CMAKE_PREFIX_PATH (its top folder, or share/cmake in it, as torch.utils.cmake_prefix_path prints);
# otherwise the wheel that scripts/setup.sh installed is taken.
set(ALAMBIC_LIBTORCH "" CACHE PATH "A libtorch folder (holding include/ and lib/); empty: CMAKE_PREFIX_PATH, then .deps/libtorch")
if(ALAMBIC_LIBTORCH)
  set(torch_folders ${ALAMBIC_LIBTORCH})
else()
  file(GLOB torch_wheel ${CMAKE_SOURCE_DIR}/.deps/libtorch/lib/python3.*/site-packages/torch)
  string(REPLACE ":" ";" torch_environment "$ENV{CMAKE_PREFIX_PATH}")
  set(torch_folders ${CMAKE_PREFIX_PATH} ${torch_environment} ${torch_wheel})
endif()
# Looked for by hand and in one folder: find_library() would keep an answer in the cache when another libtorch is named,
# and could take headers from one folder and a library from the next.
unset(torch_folder)
foreach(prefix IN LISTS torch_folders)
  foreach(folder ${prefix} ${prefix}/../..)
    if(NOT torch_folder AND EXISTS ${folder}/include/ATen/core/Tensor.h AND EXISTS ${folder}/lib/libtorch_cpu.so AND EXISTS ${folder}/lib/libc10.so)
      get_filename_component(torch_folder ${folder} REALPATH)
    endif()
  endforeach()
endforeach()
if(NOT torch_folder)
  list(JOIN torch_folders ", " torch_folders)
  message(FATAL_ERROR "No libtorch (include/ATen/core/Tensor.h, lib/libtorch_cpu.so, lib/libc10.so) in: ${torch_folders}\n"
                      "Run scripts/setup.sh, or pass -DALAMBIC_LIBTORCH=/path/to/libtorch.")
endif()
set(torch_version_file ${torch_folder}/include/torch/headeronly/version.h)
if(NOT EXISTS ${torch_version_file})
  message(FATAL_ERROR "${torch_folder}: a libtorch older than this code can use (it has no include/torch/headeronly/version.h); take 2.15.")
endif()
file(STRINGS ${torch_version_file} torch_version_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" torch_version_lines "${torch_version_lines}")
list(JOIN torch_version_lines "." ALAMBIC_TORCH_VERSION)
message(STATUS "libtorch ${ALAMBIC_TORCH_VERSION}: ${torch_folder}")

add_library(alambic_libtorch INTERFACE)
add_library(alambic::libtorch ALIAS alambic_libtorch)
target_include_directories(alambic_libtorch SYSTEM INTERFACE ${torch_folder}/include ${torch_folder}/include/torch/csrc/api/include)
target_compile_definitions(alambic_libtorch INTERFACE AT_PER_OPERATOR_HEADERS _GLIBCXX_USE_CXX11_ABI=1)
# at::parallel_for() is OpenMP in a header: without this flag it runs on one thread and says nothing. The runtime must be the
# one that libtorch uses, as two would mean two thread pools: its own libgomp where it brings one, else the system's.
target_compile_options(alambic_libtorch INTERFACE -fopenmp)
if(EXISTS ${torch_folder}/lib/libgomp.so.1)
  set(torch_openmp ${torch_folder}/lib/libgomp.so.1)
else()
  set(torch_openmp gomp)
endif()
target_link_libraries(alambic_libtorch INTERFACE ${torch_folder}/lib/libtorch_cpu.so ${torch_folder}/lib/libc10.so ${torch_openmp})
target_link_options(alambic_libtorch INTERFACE -Wl,-rpath,${torch_folder}/lib)
