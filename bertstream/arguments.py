"""The arguments of the command line, and the encoder and reading that they describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, get_args

import torch
import transformers

from .caching.codec import Storage
from .embeddings import Output
from .encoding.encoder import Encoder
from .encoding.pooling import Combine
from .encoding.tokenizer import Overflow
from .encoding.word_cache import LIMIT
from .jobs.writers import PartFormat
from .reading.access import Quoting
from .reading.config import StreamConfig

_EXIT_CODES = """exit status:
  0  done
  1  the data, the model, the cache or the disk is at fault, or a check found something
  2  an argument is at fault
  130  interrupted (Ctrl-C); call `embed`, `tokenize` or `warm` again to continue
"""


_HUB_OPTIONS = {
    "revision": "a branch, tag or commit of the model on the hub",
    "subfolder": "where in the folder or repository the model is",
    "cache_dir": "where files of the hub are kept",
    "trust_remote_code": "run the code that comes with the model",
    "local_files_only": "do not ask the hub",
}


def encoder_of(options: argparse.Namespace) -> Encoder:
    """The encoder, loaded."""
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


def reading_of(options: argparse.Namespace) -> StreamConfig:
    """How shards are read."""
    names = ("max_bad_records", "shard_cache", "delimiter", "quoting", "header", "encoding", "max_record_bytes")
    return StreamConfig(**{name: getattr(options, name) for name in names if hasattr(options, name)})


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """End the program; the verbs' parsers call it too."""
        self.exit(2, f"{self.prog}: {message} (--help says what it takes)\n")


def make_parser(verbs: Mapping[str, Callable[[argparse.Namespace], Any]]) -> argparse.ArgumentParser:
    """The parser, whose options have as `run` the function of their verb."""
    parser = _Parser(
        prog="bertstream",
        description="Text shards in, BERT embeddings out.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        verb = parsers.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=verbs[name])
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.add_argument("-v", "--verbose", action="store_true", help="say more, on standard error")
        return verb

    verb = add("inspect", "lengths, batches, padding, time and cache size of a corpus")
    _add_shards(verb)
    budget = verb.add_mutually_exclusive_group()
    budget.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch (default: 32)")
    budget.add_argument("--max-tokens", type=int, metavar="N", help="tokens in a batch")
    verb.add_argument("--plot", metavar="FILE", help="draw the lengths and the padding (.png, .svg, .pdf)")
    _add_encoder(verb)

    verb = add("embed", "write the vectors of all texts to files; continues a stopped run")
    _add_shards(verb)
    verb.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, or that of a stopped run")
    verb.add_argument("--format", choices=get_args(PartFormat), default="parquet", help="(default: %(default)s)")
    verb.add_argument("--part-size", default="128MiB", metavar="SIZE", help="vectors in a file (default: %(default)s)")
    _add_workers(verb)
    _add_encoder(verb)

    verb = add("tokenize", "write the token ids of all texts to Parquet; continues a stopped run")
    _add_shards(verb)
    verb.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, or that of a stopped run")
    verb.add_argument("--fields", nargs="+", metavar="FIELD", help="other fields to keep (default: all)")
    verb.add_argument("--part-size", default="128MiB", metavar="SIZE", help="data in a file (default: %(default)s)")
    _add_workers(verb)
    _add_encoder(verb)
    verb.set_defaults(dtype="float32", device="cpu")  # nothing is encoded

    verb = add("warm", "fill a cache ahead of training; continues a stopped run")
    _add_shards(verb)
    verb.add_argument("--cache", required=True, metavar="FOLDER", help="the cache's folder, on a local disk")
    verb.add_argument("--limit", default="100GiB", metavar="SIZE", help="size of the file (default: %(default)s)")
    verb.add_argument(
        "--storage", choices=get_args(Storage), default="auto", help="how vectors are stored (default: as they are)"
    )
    _add_workers(verb)
    _add_encoder(verb)

    verb = add("cache", "what a cache holds, by the fingerprints of encoders; check it, or drop some of it")
    verb.add_argument("folder", metavar="FOLDER")
    verb.add_argument("--verify", action="store_true", help="check every entry and delete the damaged ones")
    verb.add_argument(
        "--drop", nargs="+", metavar="FINGERPRINT", help="delete an encoder's vectors; `all` for those of all encoders"
    )

    verb = add("doctor", "what is installed here, and how models run on this machine")
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
