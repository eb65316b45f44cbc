"""A character map as SentencePiece writes it into its models, for `Precompiled`."""

from __future__ import annotations

import struct
from collections.abc import Mapping


def character_map(rules: Mapping[str, str]) -> bytes:
    """The map that puts values in place of keys: a double-array trie of the keys, and the values."""
    texts = b""
    values: dict[bytes, int] = {}
    for key, value in rules.items():
        values[key.encode()] = len(texts)
        texts += value.encode() + b"\0"
    units = {0: 0}
    blocks = 1

    def place(at: int, prefix: bytes, label: int) -> None:
        """A node: its children are in a block of their own, each at its byte, and its value at 0."""
        nonlocal blocks
        block, blocks = 256 * blocks, blocks + 1
        units[at] = label | (prefix in values) << 8 | (at ^ block) << 10
        if prefix in values:
            units[block] = values[prefix] | 1 << 31
        for byte in {key[len(prefix)] for key in values if key.startswith(prefix) and key != prefix}:
            place(block ^ byte, prefix + bytes([byte]), byte)

    place(0, b"", 0)
    trie = struct.pack(f"<{256 * blocks}I", *(units.get(i, 0xFF) for i in range(256 * blocks)))
    return struct.pack("<I", len(trie)) + trie + texts
