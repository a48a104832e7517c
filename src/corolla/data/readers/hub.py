"""Any dataset of the Hugging Face hub, by the `datasets` library, row by row; those that BLOOMChat was trained on have short names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from corolla.data.examples import Place
from corolla.data.readers.formats import Record
from corolla.errors import DataError

NAMES = {
    "dolly": "databricks/databricks-dolly-15k",
    "oasst1": "OpenAssistant/oasst1",
    "oig": "laion/OIG",
    "personachat": "bavard/personachat_truecased",
}


def dataset_named(name: str) -> str:
    """The dataset's id on the hub, where `name` is one of `NAMES`; else `name` itself."""
    return NAMES.get(name.lower(), name)


def rows(name: str, split: str) -> Iterator[Record]:
    """The rows of the dataset `name` (one of `NAMES`, or as `owner/name`), streamed.

    Raises `DataError` when the library is missing, or the dataset or its split cannot be opened.
    """
    name = dataset_named(name)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{name} is no file here; to read it as a dataset of the hub, install the library: pip install 'corolla[data]'"
        ) from None
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # the library's own errors for data are of these two
        said = " ".join(str(error).split())
        raise DataError(f"{name} (split {split}) cannot be opened as a dataset of the hub: {said}") from None
    for number, row in enumerate(stream, 1):
        yield Record(Place(name, number), row)
