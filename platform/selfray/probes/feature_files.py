"""Reads folders of embeddings: labels and keys at once, features mapped from a scratch file."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from selfray.probes.embedding import EMBEDDING, KEY, LABEL, PATCH_MEAN, part_name
from selfray.storage import Location

IN_MEMORY = 2**28
"""Up to this many bytes, features are held in memory; larger ones are mapped from a file."""
READERS = 8


@dataclass(frozen=True)
class FeatureFiles:
    """The complete files of a folder of embeddings."""

    folder: Location
    blocks: int

    def labels_and_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """(labels int64 [n], -1 for none; keys uint64 [n])."""
        tables = self._tables([LABEL, KEY])
        labels = [t[LABEL].fill_null(-1).to_numpy() for t in tables]
        keys = [t[KEY].to_numpy() for t in tables]
        return np.concatenate(labels), np.concatenate(keys)

    def counts(self) -> list[int]:
        """Images of each file."""
        return [table.num_rows for table in self._tables([LABEL])]

    def features(
        self, columns: Sequence[str] = (EMBEDDING, PATCH_MEAN), kept: np.ndarray | None = None
    ) -> torch.Tensor:
        """The existing ones of `columns`, side by side: float32 [n, sum of widths].

        `kept`, bool [n], selects rows. Features larger than IN_MEMORY are memory-mapped from an
        unnamed temporary file.
        """
        first = self._schema()
        wanted = [name for name in columns if name in first.names]
        width = sum(first.field(name).type.list_size for name in wanted)
        rows = int(kept.sum()) if kept is not None else self._count()
        found = scratch(rows, width)
        at = seen = 0
        for block in range(self.blocks):
            table = self._table(block, wanted)
            parts = [matrix(table[name].combine_chunks()) for name in wanted]
            values = np.concatenate(parts, axis=1)
            if kept is not None:
                values = values[kept[seen : seen + len(values)]]
            seen += table.num_rows
            found[at : at + len(values)] = values
            at += len(values)
        return torch.from_numpy(found)

    def has(self, column: str) -> bool:
        return column in self._schema().names

    def _schema(self) -> pa.Schema:
        return self._table(0, None, schema_only=True).schema

    def _count(self) -> int:
        return sum(self.counts())

    def _tables(self, columns: list[str]) -> list[pa.Table]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda block: self._table(block, columns), range(self.blocks)))

    def _table(self, block: int, columns: list[str] | None, schema_only: bool = False) -> pa.Table:
        return read_part(self.folder / part_name(block), columns, schema_only)


def read_part(
    place: Location, columns: list[str] | None = None, schema_only: bool = False
) -> pa.Table:
    """A block's file, or some of its columns."""
    with place.filesystem.open_input_file(place.path) as file:
        parquet = pq.ParquetFile(file)
        if schema_only:
            return parquet.schema_arrow.empty_table()
        return parquet.read(columns=columns)


def scratch(rows: int, width: int) -> np.ndarray:
    """An array float32 [rows, width] to be filled: in memory, or mapped from an unnamed temporary
    file if it is larger than IN_MEMORY."""
    if rows * width * 4 <= IN_MEMORY:
        return np.empty((rows, width), np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=(rows, width))


def matrix(values: pa.FixedSizeListArray | pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as an array [n, width]."""
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
