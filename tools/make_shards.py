"""Turn CSV, TSV, jsonl or text files into WebDataset tars, which `bertstream.stream` and webdataset read.

    python tools/make_shards.py train.csv --out shards/train-%06d.tar --label category --shuffle
    python tools/make_shards.py test.csv --out shards/test-%06d.tar --label category --labels shards/labels.json

A record becomes the members `txt` (its text), `cls` (its class, an integer) and `json` (its other fields, and its text
if that is a list of words). Classes that are not integers are numbered in sorted order, and the numbers are written to
`labels.json` next to the shards. The same input gives the same bytes. Shards get their names once all are written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from webdataset import ShardWriter

from bertstream.errors import BertstreamError, ConfigError, ShardError
from bertstream.reading.options import ReadOptions
from bertstream.reading.records import read_records
from bertstream.reading.shards import Piece, expand_shards
from bertstream.tokens import Record


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an error ends it with one line and status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files or URLs; braces and globs are expanded")
    parser.add_argument("--out", required=True, help="a pattern such as a/b-%%06d.tar, a folder, or a/prefix")
    parser.add_argument("--text", default="text", help="the field that holds the text (default: %(default)s)")
    parser.add_argument("--label", help="the field that holds the class")
    parser.add_argument("--labels", type=Path, help="a labels.json that numbers the classes, instead of a new one")
    parser.add_argument("--per-shard", type=int, default=2000, help="records of a shard (default: %(default)s)")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the records, which must all fit into memory")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace all shards that match the pattern")
    args = parser.parse_args(argv)
    try:
        print(make_shards(args))
    except (BertstreamError, OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"make_shards: {error}") from error


def make_shards(args: argparse.Namespace) -> str:
    """Write the shards; return a sentence about them."""
    if args.labels and not args.label:
        raise ConfigError("--labels numbers the classes of a field: name the field with --label")
    if args.per_shard < 1:
        raise ConfigError(f"--per-shard is at least 1; got {args.per_shard}")
    pattern = shard_pattern(args.out)
    folder = pattern.parent
    own_name = re.compile(re.sub(r"%(0\d+)?d", r"\\d+", re.escape(pattern.name)))
    old = [path for path in sorted(folder.glob("*")) if own_name.fullmatch(path.name)]
    if old and not args.overwrite:
        raise ConfigError(f"{old[0]} is there already: pass --overwrite to replace it, or choose another name")

    paths = expand_shards(args.inputs)
    options = ReadOptions(text=args.text)
    shuffled: list[Record] = []

    def records() -> Iterator[Record]:
        return iter(shuffled or chain.from_iterable(read_records(Piece(path), options) for path in paths))

    if args.shuffle:
        shuffled = list(records())
        random.Random(args.seed).shuffle(shuffled)
    classes = number_classes(records(), args.label, args.labels) if args.label else None
    labels = folder / "labels.json" if classes and not args.labels else None
    if labels and labels.exists() and json.loads(labels.read_bytes()) != classes:
        raise ConfigError(f"{labels} numbers other classes: reuse it with --labels {labels}, or delete it")

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".make_shards-") as draft:
        template = os.path.join(draft.replace("%", "%%"), pattern.name)
        count = 0
        with ShardWriter(template, maxcount=args.per_shard, verbose=0, mtime=0) as writer:
            for record in records():
                writer.write({"__key__": f"{count:08}", **members(record, args, classes)})
                count += 1
        shards = sorted(os.listdir(draft))
        if labels:
            Path(draft, labels.name).write_text(json.dumps(classes, ensure_ascii=False, indent=1), "utf-8")
        for name in os.listdir(draft):
            os.replace(os.path.join(draft, name), folder / name)
    for path in old:
        if path.name not in shards:
            path.unlink()
    numbered = f", {len(classes)} classes numbered in {labels or args.labels}" if classes else ""
    return f"{count} records in {len(shards)} shards, from {folder / shards[0]} on{numbered}"


def shard_pattern(out: str) -> Path:
    """The path pattern of the shards, with one %d in the name."""
    pattern = Path(out)
    if out.endswith(("/", os.sep)) or pattern.is_dir():
        pattern /= "%06d.tar"
    elif "%" not in out and pattern.suffix != ".tar":
        pattern = pattern.with_name(f"{pattern.name}-%06d.tar")
    if not re.fullmatch(r"[^%]*%(0\d+)?d[^%]*\.tar", pattern.name) or "://" in out:
        raise ConfigError(f"--out is a local path with a name such as train-%06d.tar; got {out!r}")
    return pattern


def class_name(record: Record, label: str) -> str:
    """A record's class as written in the data."""
    name = record.fields.get(label)
    if not isinstance(name, (str, int)) or name == "":
        raise broken(record, label, f"a class is a string or an integer, not {name!r}")
    return str(name)


def number_classes(records: Iterable[Record], label: str, labels: Path | None) -> dict[str, int] | None:
    """Class name -> number, read from a file or made here; None if every class is an integer already."""
    if labels:
        classes = json.loads(labels.read_bytes())
        if not isinstance(classes, dict) or not all(isinstance(number, int) for number in classes.values()):
            raise ConfigError(f"{labels} is not an object of classes and their numbers")
        return classes
    names = {class_name(record, label) for record in records}
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return None
    return {name: number for number, name in enumerate(sorted(names))}


def members(record: Record, args: argparse.Namespace, classes: dict[str, int] | None) -> dict[str, Any]:
    """A record's members by name, for webdataset to encode."""
    found: dict[str, Any] = {}
    fields = dict(record.fields)
    if args.label:
        name = class_name(record, args.label)
        if classes is not None and name not in classes:
            raise broken(record, args.label, f"class {name!r} is not in {args.labels}")
        found["cls"] = classes[name] if classes is not None else int(name)
        del fields[args.label]
    if isinstance(record.text, str):
        found["txt"] = record.text
    else:
        fields[args.text] = record.text
    for name in found.keys() & fields.keys():
        raise broken(record, name, "a field of this name would hide the member: rename it")
    return {**found, "json": fields} if fields else found


def broken(record: Record, field: str, message: str) -> ShardError:
    """The error for one record's field."""
    message = f"{record.shard}, record {record.index}, field {field!r}: {message}"
    return ShardError(message, path=record.shard, index=record.index, field=field)


if __name__ == "__main__":
    main()
