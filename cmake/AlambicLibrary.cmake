# SPDX-License-Identifier: Apache-2.0
# alambic_library(folder [DEPENDS targets...]): every .cpp below the folder as the static library alambic_<folder>, and
# every tests/<folder>/**_test.cpp as the program <folder>_tests, known to ctest under the label <folder>.
include(GoogleTest)

# Compiles core/pch.h once; all tensor code reuses it.
add_library(alambic_pch OBJECT ${CMAKE_SOURCE_DIR}/cmake/pch.cpp)
target_include_directories(alambic_pch PUBLIC ${CMAKE_SOURCE_DIR})
target_link_libraries(alambic_pch PUBLIC alambic_flags alambic::libtorch)
target_precompile_headers(alambic_pch PRIVATE ${CMAKE_SOURCE_DIR}/core/pch.h)

function(alambic_library folder)
  cmake_parse_arguments(arg "NO_TENSORS" "" "DEPENDS" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${folder}/*.cpp)
  list(FILTER sources EXCLUDE REGEX "/main\\.cpp$|/text_bridge/target/")
  add_library(alambic_${folder} STATIC ${sources})
  target_include_directories(alambic_${folder} PUBLIC ${CMAKE_SOURCE_DIR})
  target_link_libraries(alambic_${folder} PUBLIC alambic_flags ${arg_DEPENDS})

  file(GLOB_RECURSE tests CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/${folder}/*_test.cpp)
  if(tests)
    add_executable(${folder}_tests ${tests})
    target_link_libraries(${folder}_tests PRIVATE alambic_${folder} alambic_test_support GTest::gtest_main)
    # Goldens and sample texts are found in the source tree; scratch files go to the test's working folder.
    target_compile_definitions(${folder}_tests PRIVATE ALAMBIC_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    gtest_discover_tests(${folder}_tests DISCOVERY_MODE PRE_TEST PROPERTIES LABELS ${folder} TIMEOUT 300)
    target_precompile_headers(${folder}_tests REUSE_FROM alambic_pch)
  endif()
  if(NOT arg_NO_TENSORS)
    target_link_libraries(alambic_${folder} PUBLIC alambic::libtorch)
    target_precompile_headers(alambic_${folder} REUSE_FROM alambic_pch)
  endif()
endfunction()
