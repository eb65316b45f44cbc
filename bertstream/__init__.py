"""Contextual BERT embeddings, streamed into PyTorch training loops."""

from .caching.cache import EmbeddingCache
from .embeddings import Embeddings
from .encoding.encoder import Encoder
from .encoding.pooling import ScalarMix
from .errors import BertstreamError, CacheError, ConfigError, EncoderError, LoaderClosedError, ShardError, StateError
from .jobs.embed import embed
from .jobs.tokenize import tokenize
from .jobs.warm import warm
from .loader import stream, wrap
from .module import BertEmbedding, UnfreezeSchedule
from .pipeline.collate import TokenCollate
from .pipeline.embedding_loader import EmbeddingLoader
from .reading.config import StreamConfig
from .reading.dataset import TextStream
from .reading.mixture import Mixture
from .tokens import TokenBatch

__version__ = "0.2.0"

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
    "Mixture",
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
    "tokenize",
    "warm",
    "wrap",
]


def __dir__() -> list[str]:
    """List the public names, which a prompt completes, without the submodules."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
