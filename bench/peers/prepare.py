# SPDX-License-Identifier: Apache-2.0
"""JSONL with "text" to token ids on disk, with Hugging Face's tokenizers in Python: the usual script, batches of 1000.

    prepare.py TOKENIZER_JSON INPUT_JSONL OUTPUT_FOLDER
"""
import json
import pathlib
import sys

import numpy
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[1])
output = pathlib.Path(sys.argv[3])
output.mkdir(parents=True)
num_bytes, num_tokens, offsets = 0, 0, [0]
with open(sys.argv[2], encoding="utf-8") as lines, open(output / "ids.bin", "wb") as ids:
    batch = []

    def write():
        global num_tokens
        for encoding in tokenizer.encode_batch_fast(batch):
            ids.write(numpy.asarray(encoding.ids, dtype=numpy.uint16).tobytes())
            num_tokens += len(encoding.ids)
            offsets.append(num_tokens)
        batch.clear()

    for line in lines:
        batch.append(json.loads(line)["text"])
        num_bytes += len(batch[-1].encode())
        if len(batch) == 1000:
            write()
    write()
numpy.save(output / "offsets.npy", numpy.asarray(offsets))
print(json.dumps({"bytes": num_bytes, "tokens": num_tokens}))
