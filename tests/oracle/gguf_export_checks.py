# SPDX-License-Identifier: Apache-2.0
"""What the comparisons of exported GGUF files share."""
import numpy as np
import torch
from gguf import GGUFReader

import oracle


def export(alambic, folder, gguf, kind="f32", *more):
    gguf.with_suffix(".md").unlink(missing_ok=True)  # the card of an earlier one
    return oracle.run_json(alambic, "export", folder, gguf, "--type", kind, *more)


def fields_of(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def tensors_of(path):
    return {t.name: (t.tensor_type.name, [int(n) for n in t.shape], t.data.tobytes()) for t in GGUFReader(path).tensors}


def assert_same_tensors(actual, expected, what, but=frozenset()):
    a, e = ({name: tensor for name, tensor in tensors_of(path).items() if name not in but} for path in (actual, expected))
    assert a.keys() == e.keys(), f"{what}: other tensors: {sorted(a.keys() ^ e.keys())[:10]}"
    for name in e:
        assert a[name][:2] == e[name][:2], f"{what}: {name} is {a[name][:2]}, llama.cpp makes {e[name][:2]}"
        if a[name][2] != e[name][2]:
            ours, theirs = np.frombuffer(a[name][2], np.uint8), np.frombuffer(e[name][2], np.uint8)
            raise AssertionError(f"{what}: {name} ({e[name][0]}): {int((ours != theirs).sum())} of {len(theirs)} bytes differ, the first at {int(np.argmax(ours != theirs))}")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
