"""A folder of tables (parquet) and arrays (npz) that were saved together: each file is written whole or not at all, and files of two saves, as an
interrupted second save leaves them, are refused."""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class CaptureError(LookupError):
    """Something a record or a folder does not hold: the message names what was asked for and what there is."""


def write(folder: Path, tables: Mapping[str, Mapping[str, Any]], name: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> Path:
    """Write `<table>.parquet` for each table (by columns) and `<name>.npz`, which also holds the notes (anything JSON knows). Returns the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    save = uuid.uuid4().hex
    for table, columns in tables.items():
        pq.write_table(pa.table(columns).replace_schema_metadata({"save": save}), folder / f"{table}.part")
    with open(folder / f"{name}.part", "wb") as file:
        np.savez_compressed(file, notes=np.frombuffer(json.dumps({**notes, "save": save}).encode(), np.uint8), **arrays)
    for file, suffix in (*((table, "parquet") for table in tables), (name, "npz")):
        os.replace(folder / f"{file}.part", folder / f"{file}.{suffix}")
    return folder


@contextmanager
def reading(folder: Path, tables: Sequence[str], name: str, what: str, by: str) -> Iterator[tuple[list[Any], dict[str, np.ndarray], dict[str, Any]]]:
    """The tables, arrays and notes that `write` wrote. Raises `CaptureError` for a folder that holds no `what` (which `by` writes), or a damaged one, also
    where it is inside the block that they turn out to be damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    missing = [file for file in (*(f"{table}.parquet" for table in tables), f"{name}.npz") if not (folder / file).is_file()]
    if missing:
        raise CaptureError(f"{folder} holds no {what}: {', '.join(missing)} missing. Give a folder that {by} wrote.")
    try:
        with np.load(folder / f"{name}.npz") as store:
            arrays = {key: store[key] for key in store.files}
        notes, read = json.loads(arrays.pop("notes").tobytes()), [pq.read_table(folder / f"{table}.parquet") for table in tables]
        if any((table.schema.metadata or {}).get(b"save", b"").decode() != notes.get("save", "") for table in read):
            raise ValueError("its files are of different saves")
        yield read, arrays, notes
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, OSError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise CaptureError(f"{folder} cannot be read as an {what} ({type(error).__name__}: {error}). Save it again.") from error
