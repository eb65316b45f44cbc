"""The command line: reads arguments, calls the library, prints the result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
import transformers

from .caching.cache import EmbeddingCache
from .caching.codec import Storage
from .embeddings import Output
from .encoding.encoder import Encoder
from .encoding.pooling import Combine
from .encoding.tokenizer import Overflow
from .encoding.word_cache import LIMIT
from .errors import BertstreamError, CacheError, ConfigError, ShardError
from .jobs.doctor import examine
from .jobs.embed import embed
from .jobs.inspection import Inspection, inspect_shards
from .jobs.warm import warm
from .jobs.writers import PartFormat
from .pipeline.plots import check_plot, plot_lengths
from .reading.access import Quoting
from .reading.config import StreamConfig

logger = logging.getLogger(__name__)

_EXIT_CODES = """exit status:
  0  done
  1  the data, the model, the cache or the disk is at fault, or a check found something
  2  an argument is at fault
  130  interrupted (Ctrl-C); call `embed` or `warm` again to continue
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None reads `sys.argv`.
    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
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


# A verb's result: an object for --json, lines for people, and the exit status.
_Found = tuple[dict[str, Any], list[str], int]


def _inspect(options: argparse.Namespace) -> _Found:
    if options.plot is not None:
        check_plot(options.plot)
    encoder = _encoder(options)
    found = inspect_shards(
        options.shards,
        encoder,
        text=options.text,
        pair=options.pair,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        reading=_reading(options),
        progress=options.progress,
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
        "broken": f"{found.bad_records:,} skipped",
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
    if not found.bad_records:
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
    encoder = _encoder(options)
    found = embed(
        options.shards,
        encoder,
        options.out,
        text=options.text,
        pair=options.pair,
        format=options.format,
        part_bytes=options.part_size,
        num_workers=options.num_workers,
        reading=_reading(options),
        progress=options.progress,
    )
    line = (
        f"{found['texts']:,} texts, {found['tokens']:,} tokens: {found['rows']:,} vectors of {encoder.embedding_dim} "
    )
    line += f"in {found['parts']:,} file{'s' * (found['parts'] != 1)} in {options.out}"
    if found["texts_before"]:
        line += f"; {found['texts_before']:,} texts were there already"
    if found["cut_texts"]:
        line += f"; texts cut off: {found['cut_texts']:,}"
    return found, [line + _skipped(found)], 0


def _skipped(found: Mapping[str, int]) -> str:
    return "".join(
        f"; {said}: {found[name]:,}"
        for name, said in (("bad_records", "broken records skipped"), ("bad_shards", "broken shards given up"))
        if found[name]
    )


def _warm(options: argparse.Namespace) -> _Found:
    encoder = _encoder(options)
    with EmbeddingCache(0, options.cache, options.limit, dtype=options.storage) as cache:
        found: dict[str, Any] = dict(
            warm(
                options.shards,
                encoder,
                cache,
                text=options.text,
                pair=options.pair,
                num_workers=options.num_workers,
                reading=_reading(options),
                progress=options.progress,
            )
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
    if not found["models"]:
        lines += ["", "How a model runs here: bertstream doctor --model NAME_OR_FOLDER"]
    return found, lines, int(any("error" in about for about in found["models"].values()))


_HUB_OPTIONS = {
    "revision": "a branch, tag or commit of the model on the hub",
    "subfolder": "where in the folder or repository the model is",
    "cache_dir": "where files of the hub are kept",
    "trust_remote_code": "run the code that comes with the model",
    "local_files_only": "do not ask the hub",
}


def _encoder(options: argparse.Namespace) -> Encoder:
    if not options.progress:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    names = ["output", "combine", "dtype", "device", "overflow", "stride", "max_length", "prompt", "max_forward_tokens"]
    names += ["word_cache", *_HUB_OPTIONS]
    chosen = {name: getattr(options, name) for name in names}
    chosen["pooling"] = options.pooling[0] if options.pooling and len(options.pooling) == 1 else options.pooling
    if options.normalize:
        chosen["normalize"] = True  # otherwise the model's folder decides
    return Encoder.from_pretrained(
        options.model,
        layers=tuple(options.layers),
        special_tokens=options.special_tokens,
        output_dtype=getattr(torch, options.output_dtype),
        **chosen,
    )


def _reading(options: argparse.Namespace) -> StreamConfig:
    names = ("max_bad_records", "shard_cache", "delimiter", "quoting", "header", "encoding", "max_record_bytes")
    return StreamConfig(**{name: getattr(options, name) for name in names if hasattr(options, name)})


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


# --- arguments --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """End the program; the verbs' parsers call it too."""
        self.exit(2, f"{self.prog}: {message} (--help says what it takes)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bertstream",
        description="Text shards in, BERT embeddings out.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace], _Found], about: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=run)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.add_argument("-v", "--verbose", action="store_true", help="say more, on standard error")
        return verb

    verb = add("inspect", _inspect, "lengths, batches, padding, time and cache size of a corpus")
    _add_shards(verb)
    budget = verb.add_mutually_exclusive_group()
    budget.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch (default: 32)")
    budget.add_argument("--max-tokens", type=int, metavar="N", help="tokens in a batch")
    verb.add_argument("--plot", metavar="FILE", help="draw the lengths and the padding (.png, .svg, .pdf)")
    _add_encoder(verb)

    verb = add("embed", _embed, "write the vectors of all texts to files; continues a stopped run")
    _add_shards(verb)
    verb.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, or that of a stopped run")
    verb.add_argument("--format", choices=get_args(PartFormat), default="parquet", help="(default: %(default)s)")
    verb.add_argument("--part-size", default="128MiB", metavar="SIZE", help="vectors in a file (default: %(default)s)")
    _add_workers(verb)
    _add_encoder(verb)

    verb = add("warm", _warm, "fill a cache ahead of training; continues a stopped run")
    _add_shards(verb)
    verb.add_argument("--cache", required=True, metavar="FOLDER", help="the cache's folder, on a local disk")
    verb.add_argument("--limit", default="100GiB", metavar="SIZE", help="size of the file (default: %(default)s)")
    verb.add_argument(
        "--storage", choices=get_args(Storage), default="auto", help="how vectors are stored (default: as they are)"
    )
    _add_workers(verb)
    _add_encoder(verb)

    verb = add("cache", _cache, "what a cache holds, by the fingerprints of encoders; check it, or drop some of it")
    verb.add_argument("folder", metavar="FOLDER")
    verb.add_argument("--verify", action="store_true", help="check every entry and delete the damaged ones")
    verb.add_argument(
        "--drop", nargs="+", metavar="FINGERPRINT", help="delete an encoder's vectors; `all` for those of all encoders"
    )

    verb = add("doctor", _doctor, "what is installed here, and how models run on this machine")
    verb.add_argument("--model", nargs="+", metavar="NAME_OR_FOLDER", help="load these and show how they run")
    verb.add_argument("--dtype", default="auto", help="of the forward (default: %(default)s)")
    verb.add_argument("--device", default="auto", help="(default: %(default)s)")
    return parser


def _add_shards(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("shards", nargs="+", metavar="SHARDS", help="paths or URLs; quoted braces and globs are expanded")
    verb.add_argument("--text", default="text", metavar="FIELD", help="field of the text (default: %(default)s)")
    verb.add_argument("--pair", metavar="FIELD", help="field of the second text, if records are pairs")
    verb.add_argument(
        "--max-bad-records", type=float, default=0, metavar="N", help="broken records to skip (default: 0)"
    )
    verb.add_argument("--shard-cache", metavar="FOLDER", help="keep copies of remote shards here")
    rows = verb.add_argument_group("rows of csv and tsv, as in StreamConfig", argument_default=argparse.SUPPRESS)
    rows.add_argument("--delimiter", type=lambda mark: mark.replace(r"\t", "\t"), help=r"such as ';' or '\t'")
    rows.add_argument("--quoting", choices=get_args(Quoting), help="whether quotes enclose fields (default: auto)")
    rows.add_argument("--header", type=lambda names: bool(names) and names.split(","), help="id,text for no header row")
    rows.add_argument("--encoding", help="also of txt (default: utf-8)")
    rows.add_argument("--max-record-bytes", type=int, metavar="N", help="of all formats (default: 64 MiB)")
    verb.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr is not None and sys.stderr.isatty(),
        help="show a bar on standard error (default: if that is a terminal)",
    )


def _add_workers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read and tokenize (default: 0)"
    )


def _add_encoder(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("encoder")
    group.add_argument("--model", required=True, metavar="NAME_OR_FOLDER")
    group.add_argument(
        "--output", choices=get_args(Output), default="tokens", help="one vector for each (default: %(default)s)"
    )
    group.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=[-1],
        metavar="N",
        help="0 is the embedding layer, -1 the last (default: -1)",
    )
    group.add_argument(
        "--combine", choices=get_args(Combine), default="concat", help="for several layers (default: %(default)s)"
    )
    group.add_argument(
        "--pooling", nargs="+", metavar="HOW", help="of a word's or text's tokens (default: mean, or the model's own)"
    )
    group.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include special tokens (default: yes)",
    )
    group.add_argument("--normalize", action="store_true", help="scale sentence vectors to length 1")
    group.add_argument(
        "--overflow",
        choices=get_args(Overflow),
        default="error",
        help="for texts that are too long (default: %(default)s)",
    )
    group.add_argument("--stride", type=int, default=0, metavar="N", help="overlap of windows in tokens (default: 0)")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a text or window (default: the model's limit)"
    )
    group.add_argument("--prompt", metavar="TEXT", help="put before each text; or the name of one of the model's own")
    for name, about in _HUB_OPTIONS.items():
        flag: dict[str, Any] = {"action": "store_true"} if name in ("trust_remote_code", "local_files_only") else {}
        group.add_argument(
            f"--{name.replace('_', '-')}", default="" if name == "subfolder" else None, help=about, **flag
        )
    group.add_argument("--max-forward-tokens", type=int, metavar="N", help="tokens of one forward (default: measured)")
    group.add_argument("--word-cache", type=int, default=LIMIT, metavar="BYTES", help="in each process; 0 keeps none")
    group.add_argument("--dtype", default="auto", help="of the forward (default: %(default)s)")
    group.add_argument("--device", default="auto", help="(default: %(default)s)")
    group.add_argument(
        "--output-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the vectors (default: %(default)s)",
    )
