# SPDX-License-Identifier: Apache-2.0
# With ALAMBIC_CUDA: alambic::cuda (the CUDA runtime and c10_cuda, by name), alambic::nccl (NCCL and libtorch_cuda, which holds c10d's
# ProcessGroupNCCL) and alambic_cuda_sources(), which compiles .cu files by nvcc. CMake's own CUDA language wants a whole toolkit; the wheels of scripts/setup.sh --cuda hold the compiler alone.
# A toolkit of one's own is named with -DALAMBIC_CUDA_TOOLKIT=/usr/local/cuda.
set(ALAMBIC_CUDA_TOOLKIT "" CACHE PATH "A CUDA 13 toolkit (holding bin/nvcc); empty: .deps/cuda")
set(ALAMBIC_CUDA_ARCHITECTURES 80 90 100 CACHE STRING "Compute capabilities that kernels are compiled for; the last one also as PTX, for later ones")
set(cuda_folder ${ALAMBIC_CUDA_TOOLKIT})
if(NOT cuda_folder)
  file(GLOB cuda_folder ${CMAKE_SOURCE_DIR}/.deps/cuda/lib/python3.*/site-packages/nvidia/cu13)
endif()
if(NOT EXISTS ${cuda_folder}/bin/nvcc)
  message(FATAL_ERROR "No nvcc in '${cuda_folder}'. Run scripts/setup.sh --cuda, or pass -DALAMBIC_CUDA_TOOLKIT=/path/to/cuda.")
endif()
if(NOT EXISTS ${torch_folder}/lib/libc10_cuda.so)
  message(FATAL_ERROR "${torch_folder} is a libtorch without CUDA (it has no lib/libc10_cuda.so): name one with CUDA by -DALAMBIC_LIBTORCH.")
endif()
set(cuda_nvcc ${cuda_folder}/bin/nvcc)
file(GLOB cuda_runtime ${cuda_folder}/lib/libcudart.so.13 ${cuda_folder}/lib64/libcudart.so.13)
if(NOT cuda_runtime)
  message(FATAL_ERROR "${cuda_folder}: no libcudart.so.13")
endif()
message(STATUS "CUDA: ${cuda_folder}, for sm_${ALAMBIC_CUDA_ARCHITECTURES}")

add_library(alambic_cuda INTERFACE)
add_library(alambic::cuda ALIAS alambic_cuda)
target_include_directories(alambic_cuda SYSTEM INTERFACE ${cuda_folder}/include)
target_link_libraries(alambic_cuda INTERFACE ${torch_folder}/lib/libc10_cuda.so ${cuda_runtime})
get_filename_component(cuda_runtime_folder ${cuda_runtime} DIRECTORY)
target_link_options(alambic_cuda INTERFACE -Wl,-rpath,${cuda_runtime_folder})

# NCCL of the wheels lies beside the toolkit's folder; of a toolkit of one's own, in it or in the system.
set(ALAMBIC_NCCL "" CACHE PATH "A folder with include/nccl.h and lib/libnccl.so.2; empty: beside the CUDA toolkit, in it, or the system's")
set(nccl_folders ${ALAMBIC_NCCL})
if(NOT nccl_folders)
  set(nccl_folders ${cuda_folder}/../nccl ${cuda_folder} /usr)
endif()
unset(nccl_library)
foreach(folder IN LISTS nccl_folders)
  file(GLOB libraries ${folder}/lib/libnccl.so.2 ${folder}/lib64/libnccl.so.2 ${folder}/lib/*-linux-gnu/libnccl.so.2)
  if(NOT nccl_library AND libraries AND EXISTS ${folder}/include/nccl.h)
    list(GET libraries 0 nccl_library)
    set(nccl_include ${folder}/include)
  endif()
endforeach()
if(NOT nccl_library OR NOT EXISTS ${torch_folder}/lib/libtorch_cuda.so)
  list(JOIN nccl_folders ", " nccl_folders)
  message(FATAL_ERROR "No include/nccl.h with lib/libnccl.so.2 in ${nccl_folders}, or no libtorch_cuda.so in ${torch_folder}/lib. Run scripts/setup.sh --cuda, or pass -DALAMBIC_NCCL=/path/to/nccl.")
endif()
message(STATUS "NCCL: ${nccl_library}")
add_library(alambic_nccl INTERFACE)
add_library(alambic::nccl ALIAS alambic_nccl)
target_include_directories(alambic_nccl SYSTEM INTERFACE ${nccl_include})
target_link_libraries(alambic_nccl INTERFACE alambic::cuda ${torch_folder}/lib/libtorch_cuda.so ${nccl_library})
# libtorch_cuda.so looks for its libraries beside itself, where a CPU installation has none. DT_RPATH, unlike DT_RUNPATH, also holds for what a
# library asks for.
get_filename_component(nccl_library_folder ${nccl_library} DIRECTORY)
file(GLOB cuda_library_folders ${cuda_folder}/../cudnn/lib ${cuda_folder}/../cusparselt/lib ${cuda_folder}/../nvshmem/lib)
target_link_options(alambic_nccl INTERFACE -Wl,--disable-new-dtags -Wl,-rpath,${nccl_library_folder})
foreach(folder IN LISTS cuda_library_folders)
  target_link_options(alambic_nccl INTERFACE -Wl,-rpath,${folder})
endforeach()

# Compiles .cu files of the current folder into `target`. -fmad=false: a product and a sum stay two roundings, as on the processor.
function(alambic_cuda_sources target)
  set(codes)
  foreach(architecture IN LISTS ALAMBIC_CUDA_ARCHITECTURES)
    list(APPEND codes -gencode arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  list(GET ALAMBIC_CUDA_ARCHITECTURES -1 last)
  list(APPEND codes -gencode arch=compute_${last},code=compute_${last})
  foreach(source ${ARGN})
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${source}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${cuda_nvcc} -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 -O3 -fmad=false -Werror all-warnings ${codes}
              -I${CMAKE_SOURCE_DIR} -isystem ${torch_folder}/include -DAT_PER_OPERATOR_HEADERS -D_GLIBCXX_USE_CXX11_ABI=1
              -MD -MF ${object}.d -c ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object}
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${source} DEPFILE ${object}.d
      COMMENT "Compiling ${source} (nvcc)" VERBATIM)
    target_sources(${target} PRIVATE ${object})
    set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  endforeach()
  target_link_libraries(${target} PUBLIC alambic::cuda)
endfunction()
