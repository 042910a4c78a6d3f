# SPDX-License-Identifier: Apache-2.0
# alambic::text_bridge: the Rust static library behind data/text_bridge/text_bridge.h.
find_program(CARGO_PROGRAM cargo HINTS $ENV{HOME}/.cargo/bin)
if(NOT CARGO_PROGRAM)
  message(FATAL_ERROR "cargo (Rust 1.85 or newer) was not found. Run scripts/setup.sh, or pass -DCARGO_PROGRAM=/path/to/cargo.")
endif()
set(bridge_dir ${CMAKE_SOURCE_DIR}/data/text_bridge)
set(bridge_target_dir ${CMAKE_BINARY_DIR}/text_bridge)
set(bridge_library ${bridge_target_dir}/release/libalambic_text_bridge.a)
file(GLOB bridge_sources CONFIGURE_DEPENDS ${bridge_dir}/src/*.rs)
add_custom_command(OUTPUT ${bridge_library}
  COMMAND ${CMAKE_COMMAND} -E env CARGO_TARGET_DIR=${bridge_target_dir} ${CARGO_PROGRAM} build --release --locked --quiet
  WORKING_DIRECTORY ${bridge_dir}
  DEPENDS ${bridge_sources} ${bridge_dir}/Cargo.toml ${bridge_dir}/Cargo.lock
  COMMENT "Building the text bridge (Rust)" VERBATIM)
add_custom_target(alambic_text_bridge_build DEPENDS ${bridge_library})
add_library(alambic_text_bridge INTERFACE)
add_library(alambic::text_bridge ALIAS alambic_text_bridge)
add_dependencies(alambic_text_bridge alambic_text_bridge_build)
target_link_libraries(alambic_text_bridge INTERFACE ${bridge_library} pthread dl m)
