"""`wrap` and `stream`: batches of text or tokens go in, an `EmbeddingLoader` comes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .caching.cache import EmbeddingCache
from .embeddings import Layout, SupportsEncode
from .errors import ConfigError, check_at_least, check_flag, shortened
from .pipeline.checks import check_batches, check_encoder, check_not_replicated
from .pipeline.embedding_loader import EmbeddingLoader
from .pipeline.fields import Field, as_fields, check_pair
from .pipeline.progress import text_stream
from .reading.config import StreamConfig
from .reading.dataset import Shards, TextStream
from .reading.functions import Keep, Map
from .reading.messages import StreamLoader
from .reading.options import Fields


def wrap(
    loader: Iterable[Any],
    encoder: SupportsEncode,
    *,
    text: Field | Sequence[Field] | None = None,
    pair: Field | None = None,
    mask: Field | Sequence[Field] | None = None,
    token_type_ids: Field | Sequence[Field] | None = None,
    into: Field | Sequence[Field] | None = None,
    layout: Layout | None = None,
    prefetch: int | None = None,
    cache: EmbeddingCache | None = None,
    deterministic: bool = False,
    allow_replicated: bool = False,
) -> EmbeddingLoader:
    """Put embeddings into the batches of a loader you already have.

    All other fields, the order and the batch boundaries stay as they are.

    Args:
        loader: a DataLoader, or any iterable of batches: dicts, tuples, lists, namedtuples or dataclasses that hold
            texts, or bare lists of texts. A text is a string or a list of words; arrays of strings (numpy, Arrow) and
            columns of pandas or polars are lists too. Texts that `TokenCollate` has already tokenized are used as they
            are. Padded `input_ids` [B, T] work in a dict that also holds their `attention_mask` (and `token_type_ids`,
            for pairs), and anywhere with `mask`.
        encoder: turns the texts into vectors.
        text: the key, position or attribute of the texts, or a path of them ("in.text", "0.text"), or several; None if
            a batch is the bare texts. A key that has a dot itself wins over a path.
        pair: the field of the second texts, if they form pairs with those at `text`; they stay in the batch.
        mask: the field of the mask [B, T] of padded ids at `text`, 0 for padding; one for each of `text`.
        token_type_ids: the field of their segment ids [B, T], likewise.
        into: where the vectors go instead, one for each of `text`: a new key of the dict that holds the texts, which
            then stay.
        layout: None yields `Embeddings`; "padded", "nested", "packed_sequence" or "flat" yield plain tensors. In a dict
            the padded mask is under the vectors' key plus `_mask`; elsewhere the field holds (values, mask). "flat" is
            (values, cu_seqlens). Sentence output is one tensor [B, H] in every layout.
        prefetch: how far the encoder runs ahead in its thread, in forwards' worth of tokens
            (`encoder.max_forward_tokens`); at least one group of batches. 0 encodes batch by batch in `next()`, without
            a thread. None is 2 for an encoder on CUDA. On a CPU, None encodes in `next()`, several batches in one call,
            until the loop leaves the processor idle (because its step waits for a GPU or for I/O, say), and is 8 from
            then on: two threads that both compute on all cores are slower than one. The thread also reads a DataLoader
            without workers, except for an epoch's first batch: if its dataset is bound to your thread (a sqlite
            connection) or draws from torch's global generator, give it `num_workers=1`, or write 0 here.
        cache: keeps vectors, so that none is computed twice; several loaders may share it.
        deterministic: whether the data alone decides which texts share a forward. If False, batches that are ready at
            the same time are encoded together; how many depends on timing, and two runs may differ in the last bits.
            True also takes the encoder's default forward size instead of a measured one; the encoder stays as it is.
            Two whole runs then have equal vectors. A run that resumes groups its batches from there on, so its vectors
            equal those of a run that was never stopped to the last bit only with `prefetch=0` as well, and without a
            cache; its records, batches and their order always do.
        allow_replicated: accept that every rank reads all of the data (not checked for an IterableDataset, which
            divides its data among ranks itself).
    Raises:
        ConfigError: an argument is out of range, or several ranks would each read all of the data.
    """
    check_batches(loader)
    check_flag("allow_replicated", allow_replicated)
    fields, targets = as_fields(text), as_fields(into, "into")
    masks, segments = as_fields(mask, "mask"), as_fields(token_type_ids, "token_type_ids")
    check_pair(pair, fields)
    if text_stream(loader) is not None:
        for name, value in (("pair", pair), ("mask", masks), ("token_type_ids", segments)):
            if value is not None:
                way_out = "pass it there" if name == "pair" else "leave it out"
                raise ConfigError(f"{name}={value!r} has no effect on a TextStream, which tokenizes: {way_out}")
    elif targets is not None and fields is None:
        raise ConfigError(f"into={into!r} has no effect on batches of bare texts: name the texts' field with text=")
    for name, named in (("mask", masks), ("token_type_ids", segments)):
        if named is not None and (pair is not None or len(named) != len(fields or ())):
            raise ConfigError(f"{name}={named!r} for text={text!r}: name one field for each field of padded ids")
    if targets is not None and len(targets) != len(fields or (None,)):
        raise ConfigError(f"into={into!r} for text={text!r}: name one key for each text")
    if not allow_replicated:
        check_not_replicated(loader)
    return EmbeddingLoader(
        loader,
        encoder,
        text=fields,
        pair=pair,
        mask=masks,
        token_type_ids=segments,
        into=targets,
        layout=layout,
        prefetch=prefetch,
        cache=cache,
        deterministic=deterministic,
    )


def stream(
    shards: Shards,
    encoder: SupportsEncode,
    *,
    text: str = "text",
    pair: str | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    drop_last: bool = False,
    shuffle: bool = False,
    seed: int = 0,
    fields: Fields = None,
    keep: Keep | None = None,
    map: Map | None = None,
    num_workers: int = 0,
    into: str | None = None,
    layout: Layout | None = None,
    prefetch: int | None = None,
    cache: EmbeddingCache | None = None,
    deterministic: bool = False,
    steps_per_epoch: int | None = None,
    reading: StreamConfig | None = None,
) -> EmbeddingLoader:
    """Read text shards, bucket the records by length, and yield batches with embeddings.

    A batch is a dict: the records' fields, `__key__`, `__shard__` and `__index__`, and the vectors under the text's
    name. Numbers are tensors [B] of int64, float64 or bool, whatever their width in the data; anything else, lists of
    numbers included, is a list with one entry per text, and so are numbers of which one is missing, which is None.

    Args:
        shards: paths or URLs of WebDataset tars, jsonl (also as ndjson or json), csv, tsv, txt or Parquet files, all
            but Parquet also with `.gz`, `.zst`, `.bz2` or `.xz`; braces (`train-{000..146}.tar`), globs, or a list of
            them. Or a dataset of rows: a Hugging Face `Dataset` or `IterableDataset`, a DataFrame of pandas or polars,
            an Arrow table, or a list or map-style dataset of dicts. Or a `bertstream.Mixture` of several of these by
            weight.
        encoder: turns texts into vectors.
        text: the field that holds the text: a member of a tar or a key of its json member, a key of a json line, a
            column; lines of a txt file have the one field "text". A path with dots leads into nested objects, as in
            "data.text" or "messages.0.content", here and in `pair` and `fields`.
        pair: the field that holds the second text, if a record is a pair of texts; the vectors of both are under
            `text`, with segment ids.
        batch_size: texts in a batch, of about equal length; 32 if neither this nor `max_tokens` is given.
        max_tokens: the most tokens in a batch, with special tokens and without padding. A text that is longer is a
            batch of its own.
        drop_last: whether every batch has `batch_size` texts: buckets then hold whole batches, and the last texts of
            each lane, fewer than a batch, are dropped and counted in `dropped_records`.
        shuffle: whether to shuffle, by seed and epoch; each full iteration advances the epoch.
        seed: of the shuffle.
        fields: which other fields a batch carries: names, or name -> function of the raw value (`{"label": int}`), or
            in its place labels, which become numbers from 0 (`{"label": ["ham", "spam"]}`, also an array or a
            `ClassLabel`) or those of a mapping (`{"label": {"ham": 0, "spam": 1}}`), or None, which keeps the value
            (`{"label": ["ham", "spam"], "id": None}`); None carries all as they are. The raw value in csv is a str, in
            a tar the member's bytes, except that txt, text and transcript are str, json and jsn parsed, cls, cls2,
            class, count, index, inx and id int, and float, score and weight float. `__key__`, `__shard__` and
            `__index__` come along, unless some of them are among the names: then only these do (`["label",
            "__index__"]` leaves out the two lists of strings), and none with "__none__" (`["label", "__none__"]`, or in
            a mapping `"__none__": None`).
        keep: a function of a record, a dict of all its fields, that says whether to read it. It is called in the
            workers, so where those are spawned it must be importable.
        map: a function from a record that is kept to the one to read instead, a dict with the fields that `text` and
            `fields` name; or to None, which drops it. Called as `keep` is. To resume exactly, both must depend on the
            record alone. `stats()` counts `dropped_records`.
        num_workers: processes that read and tokenize; 0 does both in the thread that encodes. The batches and their
            order do not depend on it.
        into: the key for the vectors; the text then stays under its own, and `Embeddings.spans` knows it.
        layout: as for `wrap`.
        prefetch: as for `wrap`.
        cache: as for `wrap`.
        deterministic: as for `wrap`.
        steps_per_epoch: batches in an epoch, on each rank; None makes an epoch of a pass over the data. With it each
            iteration continues after the last batch that was received, over as many passes as that takes, and a loop
            that is left early ends its epoch. `loader.epoch` and `set_epoch` count epochs, `loader.passes` passes.
        reading: how shards are read, as in `StreamConfig(bucket_size=4096, lanes=16)`; None is `StreamConfig()`.
    Raises:
        ConfigError: an argument is out of range, or a rank would have no data.
        ShardError: a shard is missing or holds no record.
    """
    check_at_least("num_workers", num_workers, 0)
    if reading is not None and not isinstance(reading, StreamConfig):
        raise ConfigError(f"reading={shortened(reading)}: pass a bertstream.StreamConfig")
    check_encoder(encoder)
    dataset = TextStream(
        shards,
        encoder,
        text=text,
        pair=pair,
        batch_size=batch_size,
        max_tokens=max_tokens,
        drop_last=drop_last,
        shuffle=shuffle,
        seed=seed,
        fields=fields,
        keep=keep,
        map=map,
        keep_text_as=text if into is not None else None,
        reading=reading,
    )
    targets = None if into is None else (into,)
    return EmbeddingLoader(
        StreamLoader(dataset, num_workers),
        encoder,
        text=(text,),
        into=targets,
        layout=layout,
        prefetch=prefetch,
        cache=cache,
        deterministic=deterministic,
        steps_per_epoch=steps_per_epoch,
    )
