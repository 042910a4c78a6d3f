# SPDX-License-Identifier: Apache-2.0
"""GGUF's quantised blocks against ggml's own quantisers (libggml-base of llama.cpp, scripts/setup.sh --oracle).

Golden: rows that are random, zeros, constant, denormal, large, of one sign, with one outlier and with both zeros, and the
bytes of every type that alambic writes, with and without importances.
"""
import ctypes

import numpy as np
import torch

import llamacpp
import oracle

SEED = 20261124
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "F16": 1, "BF16": 30}
LENGTH, SHORT = 512, 288  # two blocks of the _K types; nine blocks of 32, one more than fit side by side


def rows(rng, length):
    gauss = rng.standard_normal((6, length)).astype(np.float32)
    out = [gauss[0] * 0.02, gauss[1] ** 3, np.abs(gauss[2]), -np.abs(gauss[3]) - 1]
    out.append(np.zeros(length))
    out.append(np.full(length, 0.37))
    out.append(np.full(length, -1.5))
    out.append(rng.standard_normal(length) * 1e-41)               # denormals
    out.append(rng.standard_normal(length) * 1e-30)               # scales that a half cannot hold
    out.append(rng.standard_normal(length) * 1.2e4)                 # as large as halves allow
    outlier = gauss[4] * 1e-3
    outlier[7] = 40
    out.append(outlier)
    zeros = np.maximum(gauss[5], 0)
    zeros[1::3] = -0.0
    out.append(zeros)
    steps = np.round(rng.standard_normal(length) * 3) / 2         # ties of the integers, and of halves and bfloats
    odd = 2 * np.arange(length - length // 2) + 1
    steps[length // 2:] = np.where(odd % 4 == 1, 1 + odd * 2.0**-11, (1 + odd % 256 * 2.0**-8) * np.where(odd % 3, 1, 2.0**-24))
    out.append(steps)
    mixed = rng.standard_normal(length)
    mixed[: length // 2] = 0                                      # a block of zeros beside one that is none
    out.append(mixed)
    return np.stack(out).astype(np.float32)


def importance(rng, length):
    values = (rng.standard_normal(length) ** 2).astype(np.float32)
    values[3] = 0
    values[11] = 1000
    return values


def quantise(kind, values, weights):
    ggml = llamacpp.ggml()
    row_bytes = ggml.ggml_row_size(kind, values.shape[1])
    out = np.zeros((values.shape[0], row_bytes), dtype=np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    values = np.ascontiguousarray(values)
    used = ggml.ggml_quantize_chunk(kind, values.ctypes.data_as(floats), out.ctypes.data_as(ctypes.c_void_p), 0, values.shape[0], values.shape[1],
                                    None if weights is None else weights.ctypes.data_as(floats))
    assert used == out.size
    return out


def make(folder):
    rng = np.random.default_rng(SEED)
    tensors = {}
    for name, length in (("long", LENGTH), ("short", SHORT)):
        values, weights = rows(rng, length), importance(rng, length)
        tensors[name + ".values"], tensors[name + ".importance"] = torch.from_numpy(values), torch.from_numpy(weights)
        for kind, number in TYPES.items():
            if kind.endswith("_K") and length % 256 != 0:
                continue
            tensors[f"{name}.{kind}"] = torch.from_numpy(quantise(number, values, None))
            if kind not in ("Q8_0", "F16", "BF16"):
                tensors[f"{name}.{kind}.weighted"] = torch.from_numpy(quantise(number, values, weights))
    oracle.save_golden(folder / "gguf_quantise.safetensors", tensors, SEED, packages=("numpy",), llama_cpp=llamacpp.VERSION)


oracle.main(make)
