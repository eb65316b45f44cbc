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
    "subfolder": "the folder inside the repository that holds the model",
    "cache_dir": "the folder that keeps downloads from the hub",
    "trust_remote_code": "run Python code that comes with the model",
    "local_files_only": "never download",
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
    # `--format` is that of the files that `embed` writes.
    chosen = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return StreamConfig(format=options.shard_format, **chosen)


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """End the program; the verbs' parsers call it too."""
        self.exit(2, f"{self.prog}: {message} (--help says what it takes)\n")


def make_parser(verbs: Mapping[str, Callable[[argparse.Namespace], Any]]) -> argparse.ArgumentParser:
    """The parser, whose options have as `run` the function of their verb."""
    parser = _Parser(
        prog="bertstream",
        description="BERT embeddings of text shards: what they cost, as files, or in a cache that training reads.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, about: str, takes: str | None = None) -> argparse.ArgumentParser:
        verb = parsers.add_parser(
            name,
            usage=takes and f"%(prog)s {takes}",  # all options by name would fill the screen
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=verbs[name])
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.add_argument("-v", "--verbose", action="store_true", help="log more to standard error")
        return verb

    verb = add(
        "inspect",
        "show a corpus's lengths, batches and padding, and what encoding it would cost",
        "SHARDS... --model NAME_OR_FOLDER [options]",
    )
    _add_shards(verb)
    budget = verb.add_mutually_exclusive_group()
    budget.add_argument("--batch-size", type=int, metavar="N", help="texts per batch (default: 32)")
    budget.add_argument("--max-tokens", type=int, metavar="N", help="tokens per batch, instead of --batch-size")
    verb.add_argument("--plot", metavar="FILE", help="draw lengths and padding into this .png, .svg or .pdf")
    _add_encoder(verb)

    verb = add(
        "embed",
        "write the vectors of all texts to files; continues a stopped run",
        "SHARDS... --model NAME_OR_FOLDER --out FOLDER [options]",
    )
    _add_shards(verb)
    _add_out(verb)
    verb.add_argument(
        "--format", choices=get_args(PartFormat), default="parquet", help="of the files (default: %(default)s)"
    )
    _add_workers(verb)
    _add_encoder(verb)

    verb = add(
        "tokenize",
        "write the token ids of all texts to Parquet; continues a stopped run",
        "SHARDS... --model NAME_OR_FOLDER --out FOLDER [options]",
    )
    _add_shards(verb)
    _add_out(verb)
    verb.add_argument("--fields", nargs="+", metavar="FIELD", help="other fields to keep (default: all)")
    _add_workers(verb)
    _add_encoder(verb)
    verb.set_defaults(dtype="float32", device="cpu")  # nothing is encoded

    verb = add(
        "warm",
        "fill a cache before training; continues a stopped run",
        "SHARDS... --model NAME_OR_FOLDER --cache FOLDER [options]",
    )
    _add_shards(verb)
    verb.add_argument("--cache", required=True, metavar="FOLDER", help="the cache's folder, on a local disk")
    verb.add_argument(
        "--limit", default="100GiB", metavar="SIZE", help="largest size of the cache (default: %(default)s)"
    )
    verb.add_argument(
        "--storage", choices=get_args(Storage), default="auto", help="dtype of stored vectors (default: as computed)"
    )
    _add_workers(verb)
    _add_encoder(verb)

    verb = add("cache", "show what a cache holds for each encoder; check it, or delete some of it", "FOLDER [options]")
    verb.add_argument("folder", metavar="FOLDER", help="the cache's folder")
    verb.add_argument("--verify", action="store_true", help="check every entry and delete the damaged ones")
    verb.add_argument("--drop", nargs="+", metavar="FINGERPRINT", help="delete the vectors of these encoders, or `all`")

    verb = add("doctor", "show what is installed, and how models run on this machine", "[options]")
    verb.add_argument("--model", nargs="+", metavar="NAME_OR_FOLDER", help="load these models and show how they run")
    verb.add_argument("--dtype", default="auto", help="precision of the model (default: %(default)s)")
    verb.add_argument("--device", default="auto", help="such as cpu, cuda or cuda:1 (default: %(default)s)")
    return parser


def _add_shards(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("shards", nargs="+", metavar="SHARDS", help="paths or URLs; quoted braces and globs are expanded")
    verb.add_argument(
        "--text", default="text", metavar="FIELD", help="field of the text, or data.text in data (default: %(default)s)"
    )
    verb.add_argument("--pair", metavar="FIELD", help="field that holds the second text, if records are pairs")
    verb.add_argument(
        "--max-bad-records",
        type=float,
        default=0,
        metavar="N",
        help="broken records to skip: a count, or a share below 1 (default: 0)",
    )
    verb.add_argument("--shard-format", metavar="ENDING", help="jsonl, txt.gz ... (default: what each name says)")
    verb.add_argument("--shard-cache", metavar="FOLDER", help="download each remote shard once, to here")
    rows = verb.add_argument_group("csv and tsv", argument_default=argparse.SUPPRESS)
    rows.add_argument(
        "--delimiter", type=lambda mark: mark.replace(r"\t", "\t"), help=r"between fields, such as ';' or '\t'"
    )
    rows.add_argument("--quoting", choices=get_args(Quoting), help="whether quotes may enclose fields (default: auto)")
    rows.add_argument(
        "--header",
        type=lambda names: bool(names) and names.split(","),
        help="column names of files without a header row, such as id,text",
    )
    rows.add_argument("--encoding", help="of csv, tsv and txt files (default: utf-8)")
    rows.add_argument(
        "--max-record-bytes", type=int, metavar="N", help="longest record, in any format (default: 64 MiB)"
    )
    verb.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr is not None and sys.stderr.isatty(),
        help="show a progress bar (default: if standard error is a terminal)",
    )


def _add_out(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, or the folder of a stopped run")
    verb.add_argument("--part-size", default="128MiB", metavar="SIZE", help="of one file (default: %(default)s)")


def _add_workers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read and tokenize (default: 0)"
    )


def _add_encoder(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("encoder")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="a name on the hub, of an installed package, or a folder",
    )
    group.add_argument(
        "--output", choices=get_args(Output), default="tokens", help="what gets a vector (default: %(default)s)"
    )
    group.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=[-1],
        metavar="N",
        help="layers to read; 0 is the embedding layer, -1 the last (default: -1)",
    )
    group.add_argument(
        "--combine",
        choices=get_args(Combine),
        default="concat",
        help="how to join several layers (default: %(default)s)",
    )
    group.add_argument(
        "--pooling", nargs="+", metavar="HOW", help="how tokens become one vector (default: mean, or the model's own)"
    )
    group.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether [CLS], [SEP] and the like count (default: yes)",
    )
    group.add_argument("--normalize", action="store_true", help="scale sentence vectors to length 1")
    group.add_argument(
        "--overflow",
        choices=get_args(Overflow),
        default="error",
        help="what to do with texts that are too long (default: %(default)s)",
    )
    group.add_argument(
        "--stride", type=int, default=0, metavar="N", help="tokens that neighbouring windows share (default: 0)"
    )
    group.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of a text or window (default: the model's limit)"
    )
    group.add_argument(
        "--prompt", metavar="TEXT", help="text to put before each text, or the name of one of the model's prompts"
    )
    for name, about in _HUB_OPTIONS.items():
        flag: dict[str, Any] = {"action": "store_true"} if name in ("trust_remote_code", "local_files_only") else {}
        group.add_argument(
            f"--{name.replace('_', '-')}", default="" if name == "subfolder" else None, help=about, **flag
        )
    group.add_argument(
        "--max-forward-tokens", type=int, metavar="N", help="most tokens of one forward (default: measured)"
    )
    group.add_argument(
        "--word-cache",
        type=int,
        default=LIMIT,
        metavar="BYTES",
        help="memory for known words, in each process; 0: none",
    )
    group.add_argument("--dtype", default="auto", help="precision of the model (default: %(default)s)")
    group.add_argument("--device", default="auto", help="such as cpu, cuda or cuda:1 (default: %(default)s)")
    group.add_argument(
        "--output-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype of the vectors (default: %(default)s)",
    )
