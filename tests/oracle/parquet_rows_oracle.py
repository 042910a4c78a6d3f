# SPDX-License-Identifier: Apache-2.0
"""Parquet files that pyarrow wrote, and the rows that our reader must give for them."""
import datetime
import decimal
import json

import oracle

ROWS = [
    {"text": f"row {i} ü \"q\" \\ \n\t\x01 日本 😀", "i": i - 2, "f": i / 4, "b": i % 2 == 0, "none": None,
     "messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": None}][: i % 3],
     "nested": {"tags": [[1, 2], [], [i]], "deep": {"x": float(i)}}, "map": [("k", i), ("l", None)], "raw": bytes([255, i])}
    for i in range(7)
]


def expected(row):
    import base64
    return {**row, "map": dict(row["map"]), "raw": base64.b64encode(row["raw"]).decode()}


def make(folder):
    import pyarrow
    import pyarrow.parquet
    schema = pyarrow.schema([
        ("text", pyarrow.string()), ("i", pyarrow.int64()), ("f", pyarrow.float64()), ("b", pyarrow.bool_()), ("none", pyarrow.string()),
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
        ("nested", pyarrow.struct([("tags", pyarrow.list_(pyarrow.list_(pyarrow.int32()))), ("deep", pyarrow.struct([("x", pyarrow.float32())]))])),
        ("map", pyarrow.map_(pyarrow.string(), pyarrow.int64())), ("raw", pyarrow.binary())])
    folder = folder / "parquet"
    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(ROWS, schema)
    for codec in ("none", "snappy", "gzip", "zstd", "lz4", "brotli"):
        pyarrow.parquet.write_table(table, folder / f"{codec}.parquet", compression=codec, row_group_size=3, data_page_version="2.0" if codec == "zstd" else "1.0")
    more = pyarrow.table({"day": pyarrow.array([datetime.date(2026, 1, 31)]), "time": pyarrow.array([datetime.datetime(2026, 1, 31, 12, 30, 1)], pyarrow.timestamp("ms")),
                          "money": pyarrow.array([decimal.Decimal("12.50")], pyarrow.decimal128(8, 2)), "u": pyarrow.array([2**64 - 1], pyarrow.uint64()), "nan": pyarrow.array([float("nan")])})
    pyarrow.parquet.write_table(more, folder / "types.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(expected(row), ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8", newline="")
    (folder / "README.txt").write_text(f"Written by tests/oracle/parquet_rows_oracle.py with {oracle.versions('pyarrow')}.\n")


if __name__ == "__main__":
    oracle.main(make)
