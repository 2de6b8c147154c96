"""Files with the embeddings of images."""

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from widefield.writing import replacing, write_torch_file

EmbeddingFormat = Literal["torch", "csv", "lightly_csv", "parquet"]


def check_format(format: EmbeddingFormat) -> None:
    """Raises ValueError if a package that `format` needs is not installed."""
    if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError('format="parquet" needs the package pyarrow, which is not installed; pip install pyarrow')


def write_embeddings(path: Path, names: Sequence[str], embeddings: Tensor, format: EmbeddingFormat) -> None:
    """Write a row per image, whole or not at all.

    Args:
        path: The file.
        names: Of the images.
        embeddings: float32 (N, D).
        format: "torch": {"filenames": list, "embeddings": tensor}; "csv": columns filename, embedding_0, ...; "lightly_csv":
            columns filenames, embedding_0, ..., labels, as the tools of `lightly` read it, all labels 0; "parquet": columns
            filename and embedding, a list of fixed length.
    """
    if format == "torch":
        write_torch_file({"filenames": list(names), "embeddings": embeddings}, path)
        return
    with replacing(path) as partial:
        if format == "parquet":
            _write_parquet(partial, names, embeddings)
        else:
            _write_csv(partial, names, embeddings, with_labels=format == "lightly_csv")


def _write_csv(path: Path, names: Sequence[str], embeddings: Tensor, with_labels: bool) -> None:
    numbers = [f"embedding_{k}" for k in range(embeddings.shape[1])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["filenames", *numbers, "labels"] if with_labels else ["filename", *numbers])
        for name, row in zip(names, embeddings.numpy(), strict=True):
            writer.writerow([name, *map(str, row), *(["0"] if with_labels else [])])


def _write_parquet(path: Path, names: Sequence[str], embeddings: Tensor) -> None:
    import pyarrow
    from pyarrow import parquet

    values: Any = pyarrow.array(embeddings.reshape(-1).numpy())
    vectors = pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    parquet.write_table(pyarrow.table({"filename": list(names), "embedding": vectors}), path)
