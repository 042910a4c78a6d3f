# SPDX-License-Identifier: Apache-2.0
# Flags of our own code, a compiler cache and a fast linker where they are installed.
find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  # Precompiled headers need these two allowances (ccache manual, "Precompiled headers").
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE_PROGRAM})
endif()
find_program(MOLD_PROGRAM mold)
if(MOLD_PROGRAM)
  add_link_options(-fuse-ld=mold)
endif()

add_library(alambic_flags INTERFACE)
target_compile_options(alambic_flags INTERFACE -Wall -Wextra -Wshadow -Wconversion -Werror
  # Floating-point exceptions and errno are never read; both only stop vectorisation. NaN and infinity keep their meaning.
  -fno-math-errno -fno-trapping-math)
# g++ 12 takes std::string's own copying for an overflow where it inlines much, as in  "literal" + text  or  text = "x"
# (GCC bugs 105329 and 105651, fixed in 13). Which files are hit changes with every edit.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(alambic_flags INTERFACE -Wno-restrict -Wno-stringop-overflow -Wno-array-bounds)
endif()
if(ALAMBIC_SANITIZE)
  target_compile_options(alambic_flags INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
    -Wno-maybe-uninitialized) # g++ finds such uses in instrumented code of std::regex that has none (GCC bug 105562)
  target_link_options(alambic_flags INTERFACE -fsanitize=address,undefined)
endif()
