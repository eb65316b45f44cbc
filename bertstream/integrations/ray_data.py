"""Ray Data: encoders as actors on several machines, for corpora and training runs too large for one machine.

Vectors travel through Ray's object store, so this pays off if encoding takes much longer than moving its result; see
`bertstream.stream` for encoding in the training process.

    import ray
    from bertstream.integrations.ray_data import Embed, padded

    texts = ray.data.read_parquet("s3://bucket/corpus/")
    vectors = texts.map_batches(
        Embed,
        fn_constructor_kwargs={"model": "all-MiniLM-L6-v2", "text": "sentence", "output": "words"},
        compute=ray.data.ActorPoolStrategy(size=4),
        num_gpus=1,
        batch_size=1024,
    )
    vectors.write_parquet("s3://bucket/vectors/")

Feed training workers while the actors encode; each gets its share. Ray repeats the whole pipeline for each epoch: to
encode once, use a cache on disk, or `vectors.materialize()` if the vectors fit into the object store.

    shares = vectors.streaming_split(2, equal=True)  # one for each worker

    def train(share):
        for epoch in range(3):
            for batch in share.iter_batches(batch_size=32):
                x, mask = padded(batch["vectors"])  # [B, T, H], [B, T]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..caching.cache import EmbeddingCache
from ..encoding.encoder import Encoder
from ..encoding.texts import text_list
from ..errors import ConfigError, shortened
from ..pipeline.coalesce import encode_together


class Embed:
    """Add a column with the vectors of a text column; a callable class for `Dataset.map_batches`.

    Use large batches, `batch_size=1024` for example: each is encoded as a whole, with as many texts in a forward as fit
    and each distinct text once. Rows keep their other columns. The vectors do not depend on the number of actors,
    except for rounding, which depends on the texts that share a forward. Ray decides the order, so keep an id column.

    Ray replaces an actor that dies and repeats its batch.

    Args:
        model: a name or folder, as for `Encoder.from_pretrained`; every actor loads it.
        text: the column of the texts, strings or lists of words.
        pair: the column of the second text, if a row is a pair.
        into: the column for the vectors: [H] per row for sentence output, else [L, H].
        cache: arguments of an `EmbeddingCache` that each actor makes, such as {"memory": "2GiB", "disk": "/tmp/cache"};
            actors of one machine may share the folder. None uses no cache.
        options: of `Encoder.from_pretrained`. `output_dtype` must be one that numpy has, as Ray's columns are numpy's.
    Raises:
        ConfigError: an argument is out of range, or `output_dtype` is bfloat16.
        EncoderError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        text: str = "text",
        pair: str | None = None,
        into: str = "vectors",
        cache: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if options.get("output_dtype") == torch.bfloat16:
            raise ConfigError("output_dtype=torch.bfloat16: numpy has none, take torch.float32 or torch.float16")
        self.encoder = Encoder.from_pretrained(model, **options)
        self._text = text
        self._pair = pair
        self._into = into
        cached = None if cache is None else EmbeddingCache(**cache).of(self.encoder)
        self._encode = self.encoder.encode if cached is None else cached.encode

    def __repr__(self) -> str:
        return f"Embed(text={self._text!r}, into={self._into!r}, output={self.encoder.output!r})"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with the new column.

        Raises:
            ConfigError: the text column is missing, or the name of the new one is taken.
            EncoderError: a text has a wrong type or is too long.
        """
        for name in (self._text, self._pair):
            if name is not None and name not in batch:
                raise ConfigError(f"no column is called {name!r}: this batch has {shortened(sorted(batch))}")
        if self._into in batch:
            raise ConfigError(f"a column is called {self._into!r} already: name another with into=")
        texts = text_list(batch[self._text])
        if self._pair is not None:
            texts = list(zip(texts, text_list(batch[self._pair]), strict=True))
        (found,), _ = encode_together(self._encode, [self.encoder.tokenizer.batch(texts)])
        rows = [row.numpy() for row in found.to("cpu")]
        return {**batch, self._into: np.stack(rows) if found.output == "sentence" and rows else as_column(rows)}


def padded(column: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Pad a column of vectors of different lengths.

    Args:
        column: [L, H] for each of B rows.
    Returns:
        [B, T, H], padded with zeros, and the mask [B, T] bool, True where a row has a vector.
    Raises:
        ConfigError: the column has no row, so H is unknown.
    """
    if not len(column):
        raise ConfigError("the column has no row, so H is unknown: skip batches of length 0")
    rows = [torch.from_numpy(np.array(row)) for row in column]
    lengths = torch.tensor([len(row) for row in rows])
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return values, torch.arange(values.shape[1]) < lengths[:, None]


def as_column(rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Put arrays of different lengths into one object array [B], which Ray turns into a column of tensors."""
    column = np.empty(len(rows), dtype=object)
    column[:] = rows
    return column
