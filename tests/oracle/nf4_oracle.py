# SPDX-License-Identifier: Apache-2.0
"""NF4 and int8 weights against bitsandbytes: every code, every scale, every de-quantised value, bit for bit.

Golden nf4.safetensors: "<case>.weight"; "<case>.double." and "<case>.single." with packed, absmax, (nested_absmax, offset,
nested_map), dense_f32, dense_bf16; "<case>.int8." with codes, scale, dense.

live() sends larger and stranger weights to the test Nf4.EqualsBitsandbytesOnWhateverTheOracleSends. All with one thread: the
offset is a mean, and torch cuts the sum of more than 32,768 scales differently for each number of threads.
"""
import json
import pathlib
import tempfile

import torch

import oracle

SEED = 20261104


def cases():
    torch.manual_seed(SEED)
    yield "even", torch.randn(8, 128)
    yield "short_block", torch.randn(33, 40) * 0.02                             # the last block has 40 values
    yield "odd", (torch.randn(7, 37) * 0.05).bfloat16()                          # an odd number of values: half a byte is left
    yield "rows_of_half_a_block", torch.randn(6, 32)
    yield "one_value", torch.tensor([[-0.25]])
    yield "half", (torch.randn(5, 64) * 3).half()
    yield "two_nested_blocks", (torch.randn(130, 140) * torch.rand(130, 1)).bfloat16()  # 285 scales
    strange = torch.randn(6, 64)
    strange[0] = 0                           # a block of zeros
    strange[1] *= 1e-39                      # below the normal numbers
    strange[2] = 1.5                         # the maximum everywhere
    strange[3] = torch.linspace(-1, 1, 64)
    strange[4] *= 1e30
    yield "strange", strange
    yield "alike", torch.sign(torch.randn(8, 64)) * 0.5    # all scales equal: nothing is left after the offset
    code = torch.tensor([float(value) for value in bitsandbytes().functional.get_4bit_type("nf4", device="cpu")])
    middle = (code[1:] + code[:-1]) / 2
    around = torch.cat([torch.nextafter(middle, torch.tensor(-2.0)), middle, torch.nextafter(middle, torch.tensor(2.0))])
    yield "midpoints", torch.cat([torch.ones(1), around, torch.zeros(18)]).reshape(1, 64)
    # A short block is divided by its maximum, a whole one multiplied with the reciprocal: values where that decides the code.
    largest, found = torch.tensor(1.7), []
    while len(found) < 3:
        largest = largest * 1.001
        value = torch.cat([middle * largest, around[:15] * largest])
        other = torch.bucketize(value / largest, middle) != torch.bucketize(value * (1 / largest), middle)
        found += [torch.stack([largest, *value[other]])] if bool(other.any()) else []
    for number, block in enumerate(found):
        yield f"divided_{number}", block.reshape(1, -1)
    # Three scales of which one is coded otherwise when its place among the 65,536 steps is cut off rather than rounded.
    levels = bitsandbytes().functional.create_dynamic_map()
    code_of_step = torch.bucketize(torch.linspace(-1, 1, 65536, dtype=torch.float64), ((levels[1:] + levels[:-1]) / 2).double())
    while True:
        scales = torch.rand(3) + 0.5
        place = ((scales - scales.mean()) / (scales - scales.mean()).abs().max() + 1) * 0.5 * 65535
        if bool((code_of_step[place.long()] != code_of_step[(place + 0.5).long()]).any()):
            break
    yield "rounded_steps", torch.cat([scales[:, None], torch.rand(3, 63) * 0.5], 1)


def bitsandbytes():
    import bitsandbytes as module
    return module


def quantised(weight, double):
    functional = bitsandbytes().functional
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    parts = {"packed": packed.flatten(), "absmax": state.absmax}
    if double:
        parts |= {"nested_absmax": state.state2.absmax, "offset": state.offset.float(), "nested_map": state.state2.code}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        # As one row: where rows are a multiple of 16 long and none of 64, bitsandbytes 0.50.2 on a processor with AVX-512 takes
        # the scales of wrong blocks.
        state.dtype, state.shape = dtype, torch.Size([1, weight.numel()])
        parts[f"dense_{name}"] = functional.dequantize_4bit(packed, state).reshape(weight.shape)
    # With AVX512-BF16 its bf16 are made by an instruction that takes numbers below the normal ones for 0; ours are on no processor.
    tiny = parts["dense_f32"].abs() < torch.finfo(torch.float32).tiny
    parts["dense_bf16"] = torch.where(tiny, parts["dense_f32"].bfloat16(), parts["dense_bf16"])
    return parts


def as_int8(weight):
    functional = bitsandbytes().functional
    codes, scale, _ = functional.int8_vectorwise_quant(weight.clone())
    return {"codes": codes, "scale": scale, "dense": functional.int8_vectorwise_dequant(codes, scale)}


def everything(name, weight):
    tensors = {f"{name}.weight": weight}
    for kind, parts in (("double", quantised(weight, True)), ("single", quantised(weight, False)), ("int8", as_int8(weight))):
        # A row of zeros has no scale to divide by: what becomes of the NaN there is the compiler's choice.
        if kind == "int8" and bool((weight.abs().amax(1) < 1e-36).any()):
            continue
        tensors |= {f"{name}.{kind}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def make(folder):
    torch.set_num_threads(1)
    tensors = {}
    for name, weight in cases():
        made = everything(name, weight)
        if weight.numel() > 10000:  # what double quantisation adds is what this one is for
            made = {key: value for key, value in made.items() if ".single." not in key and ".int8." not in key and not key.endswith("dense_f32")}
        tensors |= {key: value for key, value in made.items() if name == "even" or not key.endswith("nested_map")}  # it is always the same
    oracle.save_golden(folder / "nf4.safetensors", tensors, SEED, packages=("torch", "bitsandbytes"))


def live(alambic):
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    torch.manual_seed(SEED + 1)
    tensors = {}
    heavy = torch.distributions.StudentT(3.0)
    weights = {
        "large": heavy.sample((2400, 1000)) * 0.02,            # 37,500 scales
        "rows_of_three_quarters": torch.randn(50, 48),
        "large_bf16": (heavy.sample((1536, 576)) * 0.02).bfloat16(),
        "rows_of_scales": torch.randn(512, 64) * torch.logspace(-6, 6, 512)[:, None],
        "uniform_scales": torch.cat([torch.rand(30000, 1), torch.rand(30000, 63) * 1e-3], 1),
    }
    for size in range(1, 200):
        weights[f"size_{size}"] = torch.randn(1, size)
    for number, (name, weight) in enumerate(weights.items()):
        tensors |= everything(name, weight)
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "nf4.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(path))
        oracle.run_test_program(alambic, "lora", "Nf4.EqualsBitsandbytesOnWhateverTheOracleSends", json.dumps({"path": str(path)}))
    print(f"{len(weights)} weights quantised and made dense as bitsandbytes does it")


if __name__ == "__main__":
    oracle.main(make, live)
