"""Writes JSON Lines as Parquet files with `datasets`, as data sets on the hub are, and as pyarrow writes tables with other codecs.

    tables.py LINES FOLDER

For each name below, FOLDER/NAME.parquet holds the records of LINES.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, List


def main(lines: str, folder: str) -> None:
    records = [json.loads(line) for line in Path(lines).read_text().splitlines() if line]
    out = Path(folder)
    # The hub's own form: snappy, a struct column for messages, in which every record has every field.
    Dataset.from_list(records).to_parquet(out / "hub.parquet")
    # The type that `datasets` gives to values of mixed types: JSON as text.
    features = Features({"input": Json(), "preferred_output": List(Json()), "non_preferred_output": Json()})
    Dataset.from_list(records, features=features).to_parquet(out / "json.parquet")
    table = pa.Table.from_pylist(records)
    for codec in ["none", "gzip", "zstd", "snappy"]:
        pq.write_table(table, out / f"{codec}.parquet", compression=codec, row_group_size=3)
    # Other encodings and page layouts of the same table.
    pq.write_table(table, out / "plain.parquet", use_dictionary=False, data_page_version="2.0", version="1.0")
    pq.write_table(table, out / "legacy.parquet", use_compliant_nested_type=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
