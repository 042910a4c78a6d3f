# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts, from the top folder: configures and builds build/release, or $targets of it.
export PATH="$PATH:$HOME/.cargo/bin"
mkdir -p build
cmake --preset release >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
cmake --build --preset release ${targets:+--target $targets}
