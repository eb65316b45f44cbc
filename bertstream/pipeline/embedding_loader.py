"""The iterable that a training loop holds: its epochs, its state, its figures, its end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from ..caching.cache import EmbeddingCache
from ..embeddings import Layout, SupportsEncode, SupportsTraining
from ..errors import ConfigError, LoaderClosedError, check_at_least, check_choice, check_flag, kind_of
from .checks import check_cacheable, check_encoder
from .clocks import StageClocks
from .encode import BatchEncoder
from .epoch import Counts, Epochs, Parts
from .fields import Field
from .loader_stats import LoaderStats
from .progress import OwnLoader, Progress, ProgressInStream, text_stream
from .source_progress import ProgressInSource, has_state
from .stats import Stats
from .steps import ProgressInSteps, StepEpochs
from .trainers import REBUILT, SeenTrainer, asked_by_lightning, within_trainer

logger = logging.getLogger(__name__)


class EmbeddingLoader(OwnLoader):
    """Yields batches with embeddings, encoded ahead of the training loop where that pays; made by `wrap` and `stream`.

    Iterate it once per epoch. One iteration runs at a time: a new one ends the previous one, whose loop then gets a
    `LoaderClosedError`. Leaving a loop early stops the worker and its processes; so do `close()` and the end of a
    `with` block. Workers of a wrapped DataLoader with `persistent_workers` belong to it and keep running.
    """

    def __init__(
        self,
        source: Iterable[Any],
        encoder: SupportsEncode,
        *,
        text: tuple[Field, ...] | None,
        into: tuple[Field, ...] | None,
        layout: Layout | None,
        pair: Field | None = None,
        mask: tuple[Field, ...] | None = None,
        token_type_ids: tuple[Field, ...] | None = None,
        prefetch: int | None = None,
        cache: EmbeddingCache | None = None,
        deterministic: bool = False,
        steps_per_epoch: int | None = None,
    ) -> None:
        check_encoder(encoder)
        if layout is not None:
            check_choice("layout", layout, Layout)
        if prefetch is not None:
            check_at_least("prefetch", prefetch, 0)
        check_flag("deterministic", deterministic)
        self.encoder = encoder
        self._source = source
        self._stream = text_stream(source)
        if self._stream is not None and text is None:
            text = (self._stream.text,)
        if cache is not None and not isinstance(cache, EmbeddingCache):
            raise ConfigError(f"cache={cache!r} is {kind_of(cache)}: pass a bertstream.EmbeddingCache")
        self._cache = cache
        cached = None if cache is None else cache.of(encoder)
        if cached is not None:
            check_cacheable(encoder, cached)
        clocks = StageClocks()
        self._steps_per_epoch = steps_per_epoch
        in_steps: ProgressInSteps | None = None
        self._progress: Progress
        if self._stream is None:
            self._progress = ProgressInSource(source)
        elif steps_per_epoch is None:
            self._progress = ProgressInStream(source, self._stream)
        else:
            self._progress = in_steps = ProgressInSteps(source, self._stream, steps_per_epoch)
        mixture = None if self._stream is None else self._stream.mixture
        self._parts = Parts(
            progress=self._progress,
            stream=self._stream,
            encoder=BatchEncoder(encoder, cached, clocks, deterministic=deterministic),
            tokenizer=encoder.tokenizer,
            text=text,
            pair=pair,
            mask=mask,
            token_type_ids=token_type_ids,
            into=into,
            layout=layout,
            prefetch=prefetch,
            deterministic=deterministic,
            clocks=clocks,
            counts=Counts(source_texts=[0] * (len(mixture.sources) if mixture else 0)),
        )
        self._join_ranks()
        self._epochs = Epochs(self._parts) if in_steps is None else StepEpochs(self._parts, in_steps)
        num_workers: int = getattr(source, "num_workers", 0)
        self._stats = LoaderStats(self._parts, self._epochs, num_workers, cache, cached)
        self._closed = False
        self._said: set[str] = set()
        self._trainer = SeenTrainer()

    def __repr__(self) -> str:
        state = (
            "closed" if self._closed else f"epoch {self.epoch}, {self._parts.counts.batches} batches since it was made"
        )
        return f"EmbeddingLoader({type(self._source).__name__}, {state})"

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch.

        Raises:
            LoaderClosedError: the loader was closed.
            ConfigError: the wrapped iterable can be read only once, and was; or the stream belongs to another rank.
        """
        if self._closed:
            raise LoaderClosedError("this EmbeddingLoader was closed: make a new one with wrap or stream")
        self._epochs.make_way()
        self._join_ranks()
        if isinstance(self.encoder, SupportsTraining) and not self._parts.deterministic:
            self.encoder.calibrate()
        self._progress.await_iteration()
        self._stats.begin_iteration()
        self._say_what_has_no_effect()
        self._trainer.begins(self.epoch, holds_a_batch=asked_by_lightning() and not self._has_length())
        return self._not_empty(self._epochs.begin()) if self._trainer.has_resumed else self._epochs.begin()

    def _say_what_has_no_effect(self) -> None:
        """Warn once about options that have no effect: an error at this point would end a run."""
        found = []
        if self._cache is not None and self._cache.is_closed:
            found.append("the cache was closed, so every text is encoded again: close it after the last epoch")
        layout = self._parts.layout
        if layout is not None and isinstance(self.encoder, SupportsTraining) and self.encoder.trainable:
            found.append(
                f"layout={layout!r} has no effect while the encoder is trained, because batches then hold tokens: "
                "give it to BertEmbedding(encoder, layout=)"
            )
        for message in found:
            if message not in self._said:
                self._said.add(message)
                logger.warning(message)

    def _not_empty(self, rest: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """The rest of an epoch, or the next epoch if nothing is left: trainers cope badly with an empty epoch.

        Lightning makes an iterator to see that it can, which it drops: until one is used, a loaded state waits.
        """
        self._trainer.has_resumed = False
        received = self._parts.counts.batches
        yield from rest
        if self._parts.counts.batches == received:
            self._trainer.epochs_before += 1
            yield from self._epochs.begin()

    def __len__(self) -> int:
        """The number of batches in an epoch: `steps_per_epoch`, or those of the wrapped loader.

        Of a stream it is counted for the next epoch, where `count_records` can do that, or there are several ranks. It
        is that of a whole epoch also where a loaded state leaves fewer.
        Epochs of a shuffled stream may have a few more or fewer, so Trainers of Lightning and Hugging Face, which take
        one length for all epochs, are told none.

        Raises:
            TypeError: the number is not known; the message says why.
        """
        if self._steps_per_epoch is not None:
            return self._steps_per_epoch
        if self._stream is not None:
            if self._stream.shuffle and self._stream.num_lanes > 1 and within_trainer():
                raise TypeError(
                    "the epochs of a shuffled stream differ by a few batches, and a Trainer takes one length for all "
                    "of them: write steps_per_epoch="
                )
            return self._stream.count_batches()
        return len(self._source)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """True: otherwise `if loader:` would ask for its length, which may be unknown."""
        return True

    def count_records(self) -> int | None:
        """Records in a stream's epoch, with broken ones, if counting is much faster than reading; else None.

        See `TextStream.count_records`. None for a wrapped DataLoader too.
        """
        return None if self._stream is None else self._stream.count_records()

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration, counted from 0; each full iteration advances it by one.

        A `TextStream` follows it. A wrapped DataLoader's samplers do not: call `set_epoch`, as without bertstream. With
        `steps_per_epoch` each iteration of at least one batch advances it, and nothing follows it.
        """
        return self._progress.epoch

    @property
    def passes(self) -> int:
        """How many passes over the data are complete, those before a loaded state included: the number of this one.

        That is `epoch`, except with `steps_per_epoch`.
        """
        return self._progress.epoch if self._stream is None else self._stream.epoch

    @property
    def can_resume(self) -> bool:
        """Whether `state_dict` works: for a stream, and if what is wrapped has a `state_dict` itself."""
        return self._stream is not None or has_state(self._source)

    def expect_callback(self) -> None:
        """A trainer's callback keeps the state; StateError, with the way out, unless `can_resume`."""
        self._progress.check_can_resume()
        self._trainer.expect_callback()

    @property
    def dataset(self) -> Any:
        """The wrapped loader's dataset."""
        return self._of_source("dataset")

    @property
    def sampler(self) -> Any:
        """The wrapped loader's sampler."""
        return self._of_source("sampler")

    @property
    def batch_sampler(self) -> Any:
        """The wrapped loader's batch sampler."""
        return self._of_source("batch_sampler")

    @property
    def collate_fn(self) -> Any:
        """ConfigError: who asks for it is about to build another DataLoader, whose batches would have no vectors."""
        raise ConfigError(REBUILT)

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch, and pass it to every part of the wrapped loader that has `set_epoch`.

        During iteration it applies to the next epoch. A loaded state is kept only if its epoch matches. With
        `steps_per_epoch` it is a number alone: what is read continues where the last iteration stopped.
        """
        check_at_least("epoch", epoch, 0)
        self._progress.set_epoch(epoch + self._trainer.epochs_before)

    def state_dict(self, after: int | None = None) -> dict[str, Any]:
        """The state after the last batch that the loop received, whatever was read ahead: small, plain JSON.

        For a `stream` it holds the lanes' cursors, and loads with any number of workers and ranks and any prefetch. For
        a wrapped DataLoader it holds the DataLoader's own state (torchdata's `StatefulDataLoader` has one).

        Args:
            after: how many batches of this iteration the loop has, if something between it and the loader holds up to
                eight more: the state is that after as many. After a resume it counts from the resume.
        Raises:
            StateError: what is wrapped has no `state_dict`; or `after` is not given, and Lightning holds a batch.
            ConfigError: the iteration has yielded fewer than `after` batches, or many more.
        """
        if after is None and asked_by_lightning():
            return self._trainer.unusable_state()
        if after is None:
            self._trainer.check_holds_none(self.epoch)
        return self._progress.state_dict(after)

    def load_state_dict(self, state: dict[str, Any], *, trainer_epoch: int | None = None) -> None:
        """Continue the next iteration after the batch at which the state was taken; end a running one.

        Args:
            state: of `state_dict`.
            trainer_epoch: the state's epoch as a trainer counts it. `set_epoch` then takes the trainer's numbers, and
                if the state's epoch has no batch left, the next iteration is the epoch after it.
        Raises:
            StateError: the state does not fit this loader; `.key` names the difference, and nothing changes.
        """
        if self._trainer.brings_unusable(state):
            return
        load = self._progress.loading(state)
        self._epochs.stop("a state was loaded while this loop ran")
        load()
        self._trainer.loaded(self.epoch, trainer_epoch)

    def loading(self, state: Any) -> Callable[[], None]:
        """Check a state, StateError if it does not fit, and return what loads it."""
        return self._progress.loading(state)

    def stats(self) -> Stats:
        """Counts and seconds since the loader was made: a dict of numbers, which `print` shows as a table.

        The loop received `epochs`, `batches`, `texts` and `tokens`; with `steps_per_epoch`, `passes` counts those over
        the data. Of the texts, `cut_texts` were truncated, by `cut_words` (known where texts are lists of words) and
        `cut_tokens` in all. `bad_records` and `bad_shards` were skipped, as `max_bad_records` allows; the log names
        them. `dropped_records` were dropped by `keep=`, `map=` or `drop_last`. `left_texts` reached no loop, because
        another rank had finished and `uneven="stop"`; they are counted for two seconds, so there may be more.
        `encoded_tokens` went to the encoder in `encode_calls`. Not in them are texts found in a cache, and
        `repeated_texts`, which were in the same call already (a cache counts its own). `padding_share` is the share of
        padding if each batch were padded to its longest text. `known_words_share` of the words came from the word cache
        (those of `TokenCollate` are not counted). A stream has `workers`, and `lanes` of this rank: no more workers
        than lanes have work. Of a `Mixture`, `source_0_texts` is how many of the texts are of the first source, and so
        on.

        Seconds: `read_s` waiting for the wrapped loader, or for the shards, which are tokenized as they are read;
        `tokenize_s` tokenizing a wrapped loader's texts; `lookup_s` in the cache; `encode_s` encoding (on CUDA:
        queueing); `hand_over_s` putting vectors into batches; `room_wait_s` the worker waiting because it is far enough
        ahead (added when an iteration ends); `wait_s` the training loop waiting for a batch; `step_s` what it does
        between two. Where no worker runs ahead, `wait_s` includes all but `step_s`. `texts_per_s` and `tokens_per_s`
        are over `wait_s` plus `step_s`. `peak_ahead_tokens` is the most tokens that were encoded and not yet received.

        Entries named `cache_` are those of `EmbeddingCache.stats`, and cover all loaders that share the cache.
        """
        return self._stats.stats()

    def bottleneck(self) -> str:
        """Say in one sentence what the training loop waits for, and what would help.

        It is about the last iteration, from its start on; `stats()` covers all of them. Further sentences say so where
        that was too short to judge by, or other processes hold the cores (on Linux).
        """
        return self._stats.bottleneck(getattr(self.encoder, "dtype", None))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace of the stages, the last 20,000 spans, for chrome://tracing or ui.perfetto.dev.

        The stages are "read", "tokenize", "encode" (with a cache's look-up), "hand_over", "wait" and "step", as in
        `stats`. `torch.profiler` shows the first four too, as "bertstream.encode" and so on, and those of the worker
        thread if it profiles all threads
        (`experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)`).

        Args:
            path: of a .json file.
        Raises:
            OSError: the file cannot be written.
        """
        self._parts.clocks.save_trace(path)

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Plot where the time of a step goes: the seconds of `stats` as milliseconds per batch.

        The upper part is the training loop, its step and its waiting. The lower part is the work on a batch, which the
        loop waits for. Where a worker runs ahead, all of it but "hand_over" overlaps the step, and the loop waits for
        the rest.

        Args:
            path: of a .png, .svg or .pdf file.
        Raises:
            ConfigError: matplotlib is not installed, or does not know the file's ending.
            OSError: the file cannot be written.
        """
        self._stats.save_plot(path)

    def close(self) -> None:
        """Stop the worker thread and the processes it reads from; the loader cannot be iterated again.

        May be called from any thread, and more than once.
        """
        self._closed = True
        self._epochs.stop("the loader was closed while this loop ran")

    def __enter__(self) -> EmbeddingLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _of_source(self, name: str) -> Any:
        try:
            return getattr(self._source, name)
        except AttributeError as error:
            raise AttributeError(f"{kind_of(self._source)} has no {name!r}; {REBUILT}") from error

    def _has_length(self) -> bool:
        try:
            return len(self) >= 0
        except TypeError:
            return False

    def _join_ranks(self) -> None:
        """Connect to a stream's other ranks once they can be reached: torch.distributed may be initialised late."""
        peers = self._progress.join_ranks()
        self._parts.peers = self._parts.peers or peers
