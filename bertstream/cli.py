"""The command line: reads arguments, calls the library, prints the result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import encoder_of, make_parser, reading_of
from .caching.cache import EmbeddingCache
from .errors import BertstreamError, CacheError, ConfigError, ShardError
from .jobs.doctor import examine
from .jobs.embed import embed
from .jobs.inspection import Inspection, inspect_shards
from .jobs.tokenize import IDS, tokenize
from .jobs.warm import warm
from .pipeline.plots import check_plot, plot_lengths

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None reads `sys.argv`.
    Returns:
        The exit status.
    """
    options = make_parser(_VERBS).parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("bertstream")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if options.verbose else logging.WARNING)
    try:
        found, lines, status = options.run(options)
        print(json.dumps(found) if options.json else "\n".join(lines), flush=True)
        return int(status)
    except BrokenPipeError:  # the reader, `head` for example, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _failed(options, "interrupted", 128 + signal.SIGINT)
    except ConfigError as error:
        return _failed(options, str(error), 2)
    except ShardError as error:
        no_text = error.field is not None and error.field == options.text and "has no such " in str(error)
        return _failed(options, f"{error}{' (--text names the field of the text)' if no_text else ''}", 1)
    except (BertstreamError, OSError) as error:
        return _failed(options, str(error), 1)


def _failed(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"bertstream {options.verb}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _corpus(options: argparse.Namespace) -> dict[str, Any]:
    """What every pass over a corpus is told of it."""
    told = {"text": options.text, "pair": options.pair, "progress": options.progress}
    return told | {"reading": reading_of(options)}


# A verb's result: an object for --json, lines for people, and the exit status.
_Found = tuple[dict[str, Any], list[str], int]


def _inspect(options: argparse.Namespace) -> _Found:
    if options.plot is not None:
        check_plot(options.plot)
    encoder = encoder_of(options)
    found = inspect_shards(
        options.shards,
        encoder,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        **_corpus(options),
    )
    if options.plot is not None:
        plot_lengths(
            options.plot,
            edges=found.length_edges,
            counts=found.length_counts,
            max_length=found.max_length,
            padding=[
                ("file order, padded", found.padding_in_order),
                ("bucketed, padded", found.padding_bucketed),
                ("packed", 0.0),
            ],
        )
    return dataclasses.asdict(found), list(_inspection_lines(found)), 0


def _inspection_lines(found: Inspection) -> list[str]:
    lengths, texts, tokens = found.lengths, found.batch_texts, found.batch_tokens
    table = {
        "shards": f"{found.shards:,}" + (f", {_size(found.shard_bytes)}" if found.shard_bytes else ""),
        "texts": f"{found.texts:,}; {found.repeated_texts:,} repeat an earlier one",
        "broken": f"{found.bad_records:,} skipped"
        + (f"; {found.bad_shards:,} shards given up" if found.bad_shards else ""),
        "tokens": f"{found.tokens:,}; a text has {lengths.least:,} to {lengths.most:,}, "
        f"half of them {lengths.median:,} at most, 99 % {lengths.p99:,}",
        "too long": f"{found.long_texts:,} texts for this model's {found.max_length:,} tokens; {found.cut_tokens:,} "
        "tokens beyond that (--overflow truncate loses them, windows keeps them)",
        "batches": f"{found.batches:,} of {texts.least:,} to {texts.most:,} texts, {tokens.least:,} to {tokens.most:,} "
        "tokens",
        "padding": f"{found.padding_in_order:.1%} in file order, {found.padding_bucketed:.1%} bucketed, none packed",
        "encoder": found.batching,
        "an epoch": f"at least {_time(found.encode_s)} without a cache, at {found.tokens_per_s:,.0f} tokens/s",
        "cache": ", ".join(f"{_size(found.cache_bytes[name])} as {name}" for name in ("float32", "bfloat16", "int8")),
    }
    if not found.bad_records and not found.bad_shards:
        del table["broken"]
    if not found.long_texts:
        del table["too long"]
    lines = [f"{name:<9} {value}" for name, value in table.items()]
    lines += ["", "fields of the first record"] + [f"  {name}: {value}" for name, value in found.fields.items()]
    lines += ["", "tokens      texts"]
    widest = max(found.length_counts)
    for low, after, count in zip(found.length_edges, found.length_edges[1:], found.length_counts, strict=False):
        lines.append(f"{low:>5}-{after - 1:<5} {count:>8,} {'#' * round(50 * count / widest)}".rstrip())
    return lines


def _embed(options: argparse.Namespace) -> _Found:
    encoder = encoder_of(options)
    found = embed(
        options.shards,
        encoder,
        options.out,
        format=options.format,
        part_bytes=options.part_size,
        num_workers=options.num_workers,
        **_corpus(options),
    )
    line = (
        f"{found['texts']:,} texts, {found['tokens']:,} tokens: {found['rows']:,} vectors of {encoder.embedding_dim} "
    )
    line += _written(found, options)
    if found["cut_texts"]:
        line += f"; texts cut off: {found['cut_texts']:,}"
    return found, [line + _skipped(found)], 0


def _tokenize(options: argparse.Namespace) -> _Found:
    found = tokenize(
        options.shards,
        encoder_of(options),
        options.out,
        fields=options.fields,
        part_bytes=options.part_size,
        num_workers=options.num_workers,
        **_corpus(options),
    )
    line = f"{found['texts']:,} texts, {found['tokens']:,} tokens "
    line += _written(found, options, f" (text={IDS!r} reads them)")
    if found["long_texts"]:
        line += f"; texts that are longer than the model takes: {found['long_texts']:,}"
    return found, [line + _skipped(found)], 0


def _written(found: Mapping[str, int], options: argparse.Namespace, way_in: str = "") -> str:
    before = f"; {found['texts_before']:,} texts were there already" if found["texts_before"] else ""
    return f"in {found['parts']:,} file{'s' * (found['parts'] != 1)} in {options.out}{way_in}{before}"


def _skipped(found: Mapping[str, int]) -> str:
    return "".join(
        f"; {said}: {found[name]:,}"
        for name, said in (("bad_records", "broken records skipped"), ("bad_shards", "broken shards given up"))
        if found[name]
    )


def _warm(options: argparse.Namespace) -> _Found:
    encoder = encoder_of(options)
    with EmbeddingCache(0, options.cache, options.limit, dtype=options.storage) as cache:
        found: dict[str, Any] = dict(
            warm(options.shards, encoder, cache, num_workers=options.num_workers, **_corpus(options))
        )
        found |= {"fingerprint": cache.fingerprint(encoder), **cache.stats()}
    lines = [f"{found['texts']:,} texts, {found['computed']:,} of them computed now{_skipped(found)}"]
    lines.append(f"{options.cache}: {_size(found['disk_bytes'])}, {found['disk_texts']:,} texts in all")
    if found["not_kept"]:
        way_out = "make room on the disk" if found["disk_failed_writes"] else "raise --limit"
        lines.append(f"{found['not_kept']:,} found no room: {way_out}")
    return found, lines, 1 if len(lines) > 2 else 0


def _cache(options: argparse.Namespace) -> _Found:
    file = Path(options.folder, "data.mdb").expanduser()
    if not file.exists():
        raise CacheError(f"{options.folder} is no cache: `bertstream warm` or EmbeddingCache(disk=) makes one")
    changes = options.verify or options.drop
    with EmbeddingCache(0, options.folder, read_only=not changes) as cache:
        found: dict[str, Any] = {}
        lines = []
        if options.verify:
            found["wrong"] = wrong = cache.verify()
            lines.append(f"{wrong:,} entries were damaged, and were deleted" if wrong else "all entries are whole")
        names = list(cache.fingerprints()) if options.drop == ["all"] else options.drop or ()
        if names:
            found["dropped"] = {name: cache.drop(name) for name in names}
            lines += [f"{name}: {count:,} texts dropped" for name, count in found["dropped"].items()]
        stats = cache.stats()
        found |= {
            "bytes": stats["disk_bytes"],
            "file_bytes": file.stat().st_size,
            "texts": stats["disk_texts"],
            "fingerprints": cache.fingerprints(),
        }
    lines.append(f"{found['texts']:,} texts, {_size(found['bytes'])} in a file of {_size(found['file_bytes'])}")
    lines += [f"  {name}: {count:,} texts" for name, count in found["fingerprints"].items()]
    return found, lines, 1 if found.get("wrong") else 0


def _doctor(options: argparse.Namespace) -> _Found:
    found = examine(options.model or (), dtype=options.dtype, device=options.device)
    lines = [f"{name} {version}" for name, version in found["versions"].items()]
    lines += ["", "optional"] + [f"  {name}: {version}" for name, version in found["optional"].items()]
    for kind in ("devices", "models"):
        entries = found[kind]
        named = entries.items() if isinstance(entries, dict) else ((entry["device"], entry) for entry in entries)
        for name, about in named:
            lines += ["", name] + [
                f"  {key.replace('_', ' ')}: {value}" for key, value in about.items() if value != name
            ]
    lines += ["", "installed models: " + (", ".join(found["installed_models"]) or "none")]
    if found["next"]:
        lines += ["", "next", *(f"  {sentence}" for sentence in found["next"])]
    return found, lines, int(any("error" in about for about in found["models"].values()))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _time(seconds: float) -> str:
    for unit, size in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < size:
            return f"{seconds:.1f} {unit}"
        seconds /= size if unit != "h" else 24
    return f"{seconds:.1f} days"


_VERBS = {
    "inspect": _inspect,
    "embed": _embed,
    "tokenize": _tokenize,
    "warm": _warm,
    "cache": _cache,
    "doctor": _doctor,
}
