"""Contextual BERT embeddings, streamed into PyTorch training loops."""

from .cache import EmbeddingCache
from .collate import TokenCollate
from .dataset import StreamConfig, TextStream
from .encoder import Encoder
from .errors import (
    BertstreamError,
    CacheError,
    ConfigError,
    EncoderError,
    LoaderClosedError,
    ShardError,
    StateError,
)
from .export import embed
from .loader import EmbeddingLoader, stream, wrap
from .module import BertEmbedding, UnfreezeSchedule
from .pooling import ScalarMix
from .precompute import warm
from .types import Embeddings, TokenBatch

__version__ = "0.1.0"

__all__ = [
    "BertEmbedding",
    "BertstreamError",
    "CacheError",
    "ConfigError",
    "EmbeddingCache",
    "EmbeddingLoader",
    "Embeddings",
    "Encoder",
    "EncoderError",
    "LoaderClosedError",
    "ScalarMix",
    "ShardError",
    "StateError",
    "StreamConfig",
    "TextStream",
    "TokenBatch",
    "TokenCollate",
    "UnfreezeSchedule",
    "embed",
    "stream",
    "warm",
    "wrap",
]


def __dir__() -> list[str]:
    """What a prompt offers behind `bertstream.`: not the modules that it is made of."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
