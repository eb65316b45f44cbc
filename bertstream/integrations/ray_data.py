"""Ray Data: encoders as actors on machines of their own, for corpora and trainings that one machine is too small for.

The vectors go through Ray's object store to whoever wants them, so this pays where encoding takes much longer than
moving its result; see `bertstream.stream` for encoding beside the training step.

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

Into training workers, each of which gets its share while the actors encode. Ray runs the whole again for each epoch: a
cache on disk, or `vectors.materialize()` where they fit into the object store, saves the encoding.

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
from ..errors import ConfigError, shortened
from ..pipeline.coalesce import encode_together
from ..tokens import TokenBatch


class Embed:
    """What an actor does to a batch of rows: the vectors of one column become another; for `Dataset.map_batches`.

    A batch is encoded as a whole, as many texts in a forward as fit and each distinct one once, so let it be large:
    `batch_size=1024`, say. Rows keep their other columns. Vectors do not depend on the number of actors, but for the
    last bits, in which a row depends on the texts it was encoded with; their order is Ray's, so carry an id.

    An actor that dies is replaced by Ray, and its batch done again.

    Args:
        model: a name or folder, as for `Encoder.from_pretrained`; every actor loads it.
        text: the column that holds the texts, strings or lists of words.
        pair: the column of the second text, where a row is a pair.
        into: the column for the vectors: [H] for each row of sentence output, else [L, H].
        cache: arguments of an `EmbeddingCache` that each actor makes, such as {"memory": "2GiB", "disk": "/tmp/cache"};
            actors of one machine may share the folder. None for none.
        options: of `Encoder.from_pretrained`; an `output_dtype` that numpy has, as Ray's columns are numpy's.
    Raises:
        ConfigError: an argument is out of range, or `output_dtype` is bfloat16.
        EncoderError: the model cannot be had.
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
        """The batch with one column more.

        Raises:
            ConfigError: there is no such column, or the vectors' one is taken.
            EncoderError: a text is of another type, or too long.
        """
        for name in (self._text, self._pair):
            if name is not None and name not in batch:
                raise ConfigError(f"no column is called {name!r}: this batch has {shortened(sorted(batch))}")
        if self._into in batch:
            raise ConfigError(f"a column is called {self._into!r} already: name another with into=")
        texts: list[Any] = _texts(batch[self._text])
        if self._pair is not None:
            texts = list(zip(texts, _texts(batch[self._pair]), strict=True))
        tokens = TokenBatch.from_texts(self.encoder.tokenizer(texts))
        (found,), _ = encode_together(self._encode, [tokens])
        rows = [row.numpy() for row in found.to("cpu")]
        return {**batch, self._into: np.stack(rows) if found.output == "sentence" and rows else as_column(rows)}


def padded(column: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """A column of vectors of different lengths, as a training step takes them.

    Args:
        column: [L, H] for each of B rows.
    Returns:
        [B, T, H], filled up with zeros, and the mask [B, T] bool, True where a row has a vector.
    Raises:
        ConfigError: the column has no row, so that H is not known.
    """
    if not len(column):
        raise ConfigError("the column has no row, and so no H: pass over batches of length 0")
    rows = [torch.from_numpy(np.array(row)) for row in column]
    lengths = torch.tensor([len(row) for row in rows])
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return values, torch.arange(values.shape[1]) < lengths[:, None]


def as_column(rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Arrays of different lengths as one object array [B], which is what Ray makes a column of tensors of."""
    column = np.empty(len(rows), dtype=object)
    column[:] = rows
    return column


def _texts(column: Any) -> list[Any]:
    """Strings as they are; lists of words, which come as arrays, as lists."""
    return [list(text) if isinstance(text, np.ndarray) else text for text in column]
