# SPDX-License-Identifier: Apache-2.0
"""The safetensors package's own file of one tensor of each type: alambic must read it and write the same bytes."""
import torch

import oracle


def make(folder):
    numbers = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    types = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64, "i32": torch.int32,
             "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8}
    tensors = {name: numbers.to(kind) for name, kind in types.items()}
    tensors |= {"bool": numbers > 2, "scalar": torch.tensor(7.0), "none": torch.empty(0, 3)}
    oracle.save_golden(folder / "safetensors_reference.safetensors", tensors, 0, packages=("torch", "safetensors"))


oracle.main(make)
