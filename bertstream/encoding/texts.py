"""What is a list of texts: anything else is refused before its entries are read as texts."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigError, kind_of, shortened, table_columns


def text_list(texts: Any) -> list[Any]:
    """Texts as a list of Python's values, from a list or tuple, an array of numpy or Arrow, or a column of a table.

    Raises:
        ConfigError: as for `check_texts`.
    """
    if not isinstance(texts, (list, tuple)):
        check_texts(texts)
        for name in ("to_pylist", "to_list", "tolist"):  # Arrow's; pandas' and polars'; numpy's
            if hasattr(texts, name):
                texts = getattr(texts, name)()
                break
    return [text if isinstance(text, str) else _listed(text) for text in texts]


def _listed(text: Any) -> Any:
    """A text, or both of a pair, whose words are a list where they come as an array."""
    if isinstance(text, tuple):
        return tuple(map(_listed, text))
    return text.tolist() if isinstance(text, np.ndarray) else text


def check_texts(texts: Any) -> None:
    """Refuse anything but a list of texts, and say what to pass; a dict would otherwise be read as its keys.

    Raises:
        ConfigError: `texts` is one string, a mapping, a table, a set, or nothing that has a length and an order.
    """
    if isinstance(texts, (str, bytes)):
        raise ConfigError(f"texts={shortened(texts)}, one string: pass a list of texts, [text] for a single one")
    kind = kind_of(texts)
    if isinstance(texts, Mapping):
        way_out = "pass the list of texts under one of its keys"
        if "input_ids" in texts:
            parts = ("input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in texts else []))
            way_out = (
                f"tokenize with padding=True, return_tensors='pt', and pass TokenBatch.from_padded({', '.join(parts)})"
            )
        raise ConfigError(f"texts is {kind} with the keys {shortened(list(texts))}: {way_out}")
    columns = table_columns(texts)
    if columns is not None:
        raise ConfigError(
            f"texts is {kind} with the columns {shortened(columns)}: pass the list of texts in one of its columns"
        )
    in_order = hasattr(texts, "__len__") and hasattr(texts, "__getitem__") and getattr(texts, "ndim", 1) == 1
    if isinstance(texts, (Set, Tensor)) or not in_order:
        raise ConfigError(
            f"texts is {kind}: pass a list of texts (strings, lists of words, or pairs of either as tuples) or a "
            "TokenBatch"
        )
