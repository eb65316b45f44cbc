"""Trainer, Lightning, Accelerate and plain loops stop anywhere and resume: each step once, with the same loss."""

from __future__ import annotations

import gc
import json
import logging
import random
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import bertstream
from bertstream import ConfigError, EmbeddingLoader, StateError, StreamConfig
from bertstream.testing import FakeEncoder, write_shards

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from bertstream.integrations import lightning as for_lightning  # noqa: E402
from bertstream.integrations import transformers as for_trainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
]

TEXTS = [f"bank {i}" for i in range(16)]
BATCHES = 8
STEPS = 2 * BATCHES + 3
"""Two whole epochs, and some of a third."""
STOPS = [1, 5, BATCHES, BATCHES + 1, 2 * BATCHES]
"""In the middle of an epoch, at its end, and right after."""

Make = Callable[[], EmbeddingLoader]
Step = tuple[list[int], float]


@pytest.fixture
def streamed(tmp_path: Path) -> Make:
    """Without a length, in another order each epoch."""
    shards = write_shards(tmp_path / "shards", TEXTS, shards=2)
    reading = StreamConfig(lanes=2)
    return lambda: bertstream.stream(
        shards, FakeEncoder(), batch_size=2, shuffle=True, layout="padded", reading=reading
    )


@pytest.fixture
def stepped(tmp_path: Path) -> Make:
    """Of five steps an epoch, so that passes and epochs end apart."""
    shards = write_shards(tmp_path / "shards", TEXTS, shards=2)
    options: dict[str, Any] = {"shuffle": True, "layout": "padded", "reading": StreamConfig(lanes=2)}
    return lambda: bertstream.stream(shards, FakeEncoder(), batch_size=2, steps_per_epoch=5, **options)


@pytest.fixture
def in_order(tmp_path: Path) -> Make:
    """A stream with a length, because all of its epochs have as many batches."""
    shards = write_shards(tmp_path / "shards", TEXTS, shards=2)
    options: dict[str, Any] = {"layout": "padded", "reading": StreamConfig(lanes=2)}
    return lambda: bertstream.stream(shards, FakeEncoder(), batch_size=2, **options)


@pytest.fixture
def wrapped() -> Make:
    """With a length."""
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    return lambda: bertstream.wrap(StatefulDataLoader(rows, 2), FakeEncoder(), text="text", layout="padded")


@pytest.fixture(params=["streamed", "wrapped"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_to_collect() -> Iterator[None]:
    """A Trainer collects garbage when it starts: among all that is imported, that takes longer than its steps."""
    gc.freeze()
    yield
    gc.unfreeze()


class Model(nn.Module):
    """Its dropout shows whether the random numbers are those of the undisturbed run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.steps: list[Step] = []

    def forward(self, text: torch.Tensor, id: torch.Tensor, **others: Any) -> dict[str, torch.Tensor]:
        loss = self.dropout(self.linear(text / 30_000)).square().mean()
        self.steps.append((id.tolist(), round(loss.item(), 6)))
        return {"loss": loss}


def same_steps(first: list[Step], rest: list[Step], whole: list[Step], stop: int) -> None:
    """The resumed run does the steps that the stopped one did not, in order, with the losses of the undisturbed run."""
    assert len(whole) == STEPS
    assert first == whole[:stop]
    assert rest == whole[stop:]


# Trainer


class SaveAtStops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_save = state.global_step in STOPS


def trained(
    make: Make, folder: Path, *, callbacks: bool = True, resume: int | None = None, **options: Any
) -> list[Step]:
    """The steps of a run of Hugging Face's Trainer, which saves at the steps that the tests resume from."""

    class StreamingTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return loader

    settings = {"max_steps": STEPS, "save_strategy": "no", "learning_rate": 0.1, "logging_strategy": "no"} | options
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    model = Model()
    with make() as loader:
        mine = [for_trainer.LoaderState()] if callbacks else []
        trainer = StreamingTrainer(model, arguments, train_dataset=TEXTS, callbacks=[*mine, SaveAtStops()])
        trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return model.steps


@pytest.mark.parametrize(("make", "ignore_data_skip"), [("streamed", False), ("wrapped", True)], indirect=["make"])
def test_a_trainer_resumes_exactly_from_each_of_its_checkpoints(
    make: Make, tmp_path: Path, ignore_data_skip: bool
) -> None:
    whole = trained(make, tmp_path, ignore_data_skip=ignore_data_skip)
    for stop in STOPS:
        rest = trained(make, tmp_path, resume=stop, ignore_data_skip=ignore_data_skip)
        same_steps(whole[:stop], rest, whole, stop)


@pytest.mark.parametrize("limit", [{}, {"max_steps": -1, "num_train_epochs": 4}], ids=["max_steps", "epochs"])
def test_a_trainer_resumes_epochs_of_n_steps_exactly(stepped: Make, tmp_path: Path, limit: Any) -> None:
    whole = trained(stepped, tmp_path, **limit)
    assert len(whole) == (20 if limit else STEPS)
    assert sorted(i for ids, _ in whole[:BATCHES] for i in ids) == list(range(len(TEXTS)))
    for stop in STOPS:
        assert trained(stepped, tmp_path, resume=stop, **limit) == whole[stop:], stop


def test_a_trainer_takes_the_length_of_a_stream_in_order(in_order: Make, tmp_path: Path) -> None:
    limit: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 3}
    whole = trained(in_order, tmp_path, **limit)
    assert [ids for ids, _ in whole] == 3 * [ids for ids, _ in whole[:BATCHES]] and len(whole) == 3 * BATCHES
    for stop in (5, 8, 9, 16):
        assert trained(in_order, tmp_path, resume=stop, **limit) == whole[stop:], stop


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Odd(StatefulDataLoader):
        def state_dict(self) -> Any:
            return {"at": Path("here")}

    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    with pytest.raises(StateError, match="so no run can resume from this checkpoint"):
        trained(lambda: bertstream.wrap(Odd(rows, 2), FakeEncoder(), text="text", layout="padded"), tmp_path)


def test_a_trainer_that_accumulates_gradients_resumes_exactly(streamed: Make, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 6}
    whole = trained(streamed, tmp_path, **options)
    assert len(whole) == 12
    for stop in (1, 5):
        assert trained(streamed, tmp_path, resume=stop, **options) == whole[2 * stop :]


def test_a_trainer_resumes_a_second_time(streamed: Make, tmp_path: Path) -> None:
    whole = trained(streamed, tmp_path, max_steps=BATCHES + 4)
    assert trained(streamed, tmp_path, resume=5, max_steps=BATCHES + 4) == whole[5:]
    assert trained(streamed, tmp_path, resume=BATCHES + 1, max_steps=BATCHES + 4) == whole[BATCHES + 1 :]


def test_a_trainer_without_the_callback_says_so_when_it_resumes(make: Make, tmp_path: Path) -> None:
    trained(make, tmp_path, callbacks=False, max_steps=5)
    with pytest.raises(ConfigError, match=r"integrations.transformers.LoaderState\(\)"):
        trained(make, tmp_path, callbacks=False, resume=5, max_steps=6)
    with pytest.raises(StateError, match="the checkpoint of step 5 has no state of the loader"):
        trained(make, tmp_path, resume=5, max_steps=6)


class Rows(torch.utils.data.Dataset[Any]):
    """Its state is `kept`, and goes into the DataLoader's."""

    def __init__(self, kept: Any) -> None:
        self.kept, self.loaded = kept, None

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": TEXTS[index], "id": index}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["kept"]


def shuffled(rows: Any, **options: Any) -> EmbeddingLoader:
    """Its state holds the tensor of a generator."""
    return bertstream.wrap(
        StatefulDataLoader(rows, 2, shuffle=True, **options), FakeEncoder(), text="text", layout="padded"
    )


def test_a_trainer_resumes_a_wrapped_dataloader_that_shuffles(tmp_path: Path) -> None:
    whole = trained(lambda: shuffled(Rows(None)), tmp_path)
    for stop in STOPS:
        same_steps(whole[:stop], trained(lambda: shuffled(Rows(None)), tmp_path, resume=stop), whole, stop)


def test_a_trainer_resumes_a_wrapped_dataloader_with_a_generator_of_its_own(tmp_path: Path) -> None:
    def make() -> EmbeddingLoader:
        return shuffled(Rows(None), generator=torch.Generator().manual_seed(3))

    # Up to the end of the epoch: torchdata keeps no state of the generator beyond it.
    whole = trained(make, tmp_path, max_steps=BATCHES)
    assert trained(make, tmp_path, resume=5, max_steps=BATCHES) == whole[5:]


@pytest.mark.parametrize(
    "kept", [{3: (1, 2)}, float("nan"), b"bytes", np.arange(3), np.random.RandomState(0).get_state(), random.getstate()]
)
def test_what_a_datasets_state_holds_comes_back_unchanged_from_a_trainers_checkpoint(tmp_path: Path, kept: Any) -> None:
    trained(lambda: shuffled(Rows(kept)), tmp_path, max_steps=1)
    rows = Rows(kept)
    trained(lambda: shuffled(rows), tmp_path, resume=1, max_steps=2)
    np.testing.assert_equal(rows.loaded, kept)
    assert type(rows.loaded) is type(kept)


def test_a_checkpoint_with_a_state_in_plain_json_is_still_read(wrapped: Make, tmp_path: Path) -> None:
    whole = trained(wrapped, tmp_path, max_steps=6)
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert "source" in saved["stateful_callbacks"]["LoaderState"]["attributes"]["saved"]
    assert trained(wrapped, tmp_path, resume=5, max_steps=6) == whole[5:]


def test_a_loader_that_cannot_resume_is_refused_before_the_first_step(tmp_path: Path) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    with pytest.raises(StateError, match="a DataLoader cannot say where it is"):
        trained(lambda: bertstream.wrap(DataLoader(rows, 2), FakeEncoder(), text="text", layout="padded"), tmp_path)


# Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(lightning.Callback):
    """Saves after these steps, with the state of torch's generator, which Lightning leaves to its users."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["generator"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.generator = checkpoint["generator"]

    def on_train_start(self, *others: Any) -> None:
        if hasattr(self, "generator"):
            torch.set_rng_state(self.generator)


def fitted(
    make: Make, folder: Path, *, callbacks: bool = True, resume: int | None = None, module: Any = None, **options: Any
) -> list[Any]:
    """The steps of a run of Lightning's Trainer, which saves at each of STOPS.

    A resumed run with `max_epochs` saves nothing: 2.6 counts its epochs wrong at the next last batch, with any loader.
    """
    stops = [] if resume is not None and "max_epochs" in options else STOPS
    module = module or Module()
    settings: dict[str, Any] = {"max_steps": STEPS, "enable_checkpointing": False, "logger": False, **options}
    with make() as loader, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = [for_lightning.LoaderState(loader)] if callbacks else []
        trainer = lightning.Trainer(
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*mine, SaveAt(folder, stops)],
            **settings,
        )
        path = None if resume is None else folder / f"{resume}.ckpt"
        trainer.fit(module, loader, ckpt_path=path, weights_only=False)
    return getattr(module, "seen", None) or module.model.steps


@pytest.mark.parametrize("limit", [{}, {"max_steps": -1, "max_epochs": 3}], ids=["max_steps", "max_epochs"])
def test_lightning_resumes_exactly_from_each_of_its_checkpoints(make: Make, tmp_path: Path, limit: Any) -> None:
    whole = fitted(make, tmp_path, **limit)
    assert len(whole) == (3 * BATCHES if limit else STEPS)
    for stop in STOPS:
        assert fitted(make, tmp_path, resume=stop, **limit) == whole[stop:], stop


@pytest.mark.parametrize("limit", [{}, {"max_steps": -1, "max_epochs": 4}], ids=["max_steps", "max_epochs"])
def test_lightning_resumes_epochs_of_n_steps_exactly(stepped: Make, tmp_path: Path, limit: Any) -> None:
    whole = fitted(stepped, tmp_path, **limit)
    assert len(whole) == (20 if limit else STEPS)
    assert sorted(i for ids, _ in whole[:BATCHES] for i in ids) == list(range(len(TEXTS)))
    for stop in STOPS:
        assert fitted(stepped, tmp_path, resume=stop, **limit) == whole[stop:], stop


def test_lightning_takes_the_length_of_a_stream_in_order_and_its_epochs_are_counted(
    in_order: Make, tmp_path: Path
) -> None:
    limit: dict[str, Any] = {"max_steps": -1, "max_epochs": 3}
    loaders: list[EmbeddingLoader] = []

    def make() -> EmbeddingLoader:
        loaders.append(in_order())
        return loaders[-1]

    whole = fitted(make, tmp_path, **limit)
    assert len(whole) == 3 * BATCHES and loaders[-1].epoch == 3
    for stop in (5, 8, 9, 16):
        assert fitted(make, tmp_path, resume=stop, **limit) == whole[stop:], stop
        assert loaders[-1].epoch == 3


def test_a_callback_that_saves_before_the_loaders_own_is_called_saves_the_same_state(
    streamed: Make, tmp_path: Path
) -> None:
    whole = fitted(streamed, tmp_path, max_steps=7)

    class Late(Module):
        """Makes the loader where several processes of Lightning's launcher have to make it."""

        def setup(self, stage: str) -> None:
            self.loader = streamed()
            self.trainer.callbacks.append(for_lightning.LoaderState(self.loader))

        def train_dataloader(self) -> EmbeddingLoader:
            return self.loader

        def teardown(self, stage: str) -> None:
            self.loader.close()

    for stop in (None, 5):
        module = Late()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=7,
            callbacks=[SaveAt(tmp_path, [5])],
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        )
        trainer.fit(module, ckpt_path=None if stop is None else tmp_path / "5.ckpt", weights_only=False)
        assert module.model.steps == whole[stop:]


def test_a_trainer_is_told_no_length_that_holds_for_one_epoch_alone(streamed: Make) -> None:
    class Asking(lightning.Callback):
        def on_train_start(self, *others: Any) -> None:
            with pytest.raises(TypeError, match="differ by a few batches.*steps_per_epoch="):
                len(loader)

    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    with streamed() as loader:
        assert len(loader) == BATCHES
        lightning.Trainer(accelerator="cpu", max_steps=1, callbacks=[Asking()], **quiet).fit(Module(), loader)


def test_lightning_without_the_callback_says_so_when_it_resumes(make: Make, tmp_path: Path) -> None:
    fitted(make, tmp_path, callbacks=False, max_steps=6)
    for callbacks in (False, True):
        with pytest.raises(StateError, match=r"integrations.lightning.LoaderState\(loader\)"):
            fitted(make, tmp_path, callbacks=callbacks, resume=5, max_steps=8)


def test_lightning_resumes_with_the_state_of_a_run_that_had_the_callback_or_says_so(
    streamed: Make, tmp_path: Path
) -> None:
    fitted(streamed, tmp_path, max_steps=6)
    with pytest.raises(StateError, match=r"integrations.lightning.LoaderState\(loader\)"):
        fitted(streamed, tmp_path, callbacks=False, resume=5, max_steps=8)


def test_lightning_says_once_that_its_checkpoints_cannot_resume(
    streamed: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for callbacks, said in ((True, 0), (False, 1)):
        caplog.clear()
        fitted(streamed, tmp_path, callbacks=callbacks, max_steps=6)
        assert sum("no run can resume from this checkpoint" in record.message for record in caplog.records) == said


class Forwarding:
    """A user's wrapper, with the state of what it wraps."""

    def __init__(self, loader: EmbeddingLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader

    def state_dict(self) -> Any:
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


class SavesItself(lightning.LightningModule):
    """Asks the loader for its state after two steps, and iterates another loader in a hook."""

    def __init__(self, taken: EmbeddingLoader, other: EmbeddingLoader) -> None:
        super().__init__()
        self.taken, self.other, self.model = taken, other, Model()
        self.others: list[Any] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(**batch)["loss"]

    def on_train_batch_end(self, *others: Any) -> None:
        for batch in self.other:
            self.others = [batch["id"].tolist(), self.other.state_dict()]
            break
        with pytest.raises(StateError, match=r"state_dict\(after=n\)") as caught:
            self.taken.state_dict()
        assert caught.value.key == "after"

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_state_that_a_user_asks_for_while_lightning_holds_a_batch_is_refused(
    streamed: Make, is_wrapped: bool
) -> None:
    """Directly and through a wrapper; loaders that a hook iterates, and loops after the fit, are the user's own."""
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    quiet |= {"accelerator": "cpu", "enable_model_summary": False}
    with streamed() as loader, streamed() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = SavesItself(loader, other)
        lightning.Trainer(max_steps=2, **quiet).fit(module, Forwarding(loader) if is_wrapped else loader)
        assert len(module.others) == 2
        with pytest.raises(StateError, match=r"state_dict\(after=n\)"):
            loader.state_dict()  # Lightning has taken three batches, its loop two
        assert loader.state_dict(after=2) != loader.state_dict(after=3)
        lightning.Trainer(max_epochs=1, **quiet).fit(Module(), loader)
        assert loader.state_dict()["epoch"] == loader.epoch == 1  # a whole epoch was trained on
        for _ in loader:
            assert loader.state_dict() == loader.state_dict(after=1)
            break


def test_a_loader_that_another_one_wraps_is_asked_by_that_one(streamed: Make, tmp_path: Path) -> None:
    def make() -> EmbeddingLoader:
        return bertstream.wrap(streamed(), FakeEncoder(), text="__key__", into="keys")

    whole = fitted(make, tmp_path, max_steps=BATCHES)
    assert len(whole) == BATCHES
    assert fitted(make, tmp_path, resume=5, max_steps=BATCHES) == whole[5:]


Pair = namedtuple("Pair", ["text", "id"])


@dataclass
class Example:
    text: Any
    id: Any


@pytest.mark.parametrize("kind", [tuple, Pair, Example, list])
def test_nothing_is_put_into_batches_so_all_kinds_resume_in_lightning(kind: Any, tmp_path: Path) -> None:
    """Tuples, namedtuples, dataclasses and bare lists go to the device through Lightning and come out as they were."""

    def collate(rows: list[int]) -> Any:
        texts = [TEXTS[i] for i in rows]
        return texts if kind is list else kind((texts, rows)) if kind is tuple else kind(texts, rows)

    class Unsized(bertstream.EmbeddingLoader):
        __len__ = None  # type: ignore[assignment]

    class Seeing(Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            vectors = batch if kind is list else batch[0] if isinstance(batch, tuple) else batch.text
            assert kind is list or type(batch) is kind
            self.seen.append(vectors.values[:, 0].tolist())
            return self.model.linear(vectors.values / 30_000).mean()

    def make() -> EmbeddingLoader:
        source = StatefulDataLoader(range(16), 2, collate_fn=collate)  # type: ignore[arg-type]
        text = None if kind is list else 0 if kind is tuple else "text"
        loader = bertstream.wrap(source, FakeEncoder(), text=text)
        loader.__class__ = Unsized  # so Lightning holds a batch
        return loader

    whole = fitted(make, tmp_path, module=Seeing(), max_steps=BATCHES)
    assert len(whole) == BATCHES
    assert fitted(make, tmp_path, module=Seeing(), resume=5, max_steps=BATCHES) == whole[5:]


# Accelerate


def accelerated(make: Make, folder: Path, *, stop: int = STEPS, resume: bool = False) -> list[Step]:
    """The steps of a loop that prepares its model and optimizer, registers its loader, and saves when it stops."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with make() as loader:
        accelerator.register_for_checkpointing(loader)
        if resume:
            accelerator.load_state(str(folder))
        done = int((folder / "done").read_text()) if resume else 0
        while done < STEPS:
            for batch in loader:
                optimizer.zero_grad()
                accelerator.backward(wrapped(**batch)["loss"])
                optimizer.step()
                done += 1
                if done == stop and not resume:
                    accelerator.save_state(str(folder))
                    (folder / "done").write_text(str(done))
                    return model.steps
                if done == STEPS:
                    break
    return model.steps


@pytest.mark.parametrize("stop", STOPS)
def test_accelerate_resumes_a_registered_loader_exactly(make: Make, tmp_path: Path, stop: int) -> None:
    whole = accelerated(make, tmp_path / "whole", stop=STEPS + 1)
    first = accelerated(make, tmp_path / "first", stop=stop)
    same_steps(first, accelerated(make, tmp_path / "first", resume=True), whole, stop)


def test_accelerate_resumes_epochs_of_n_steps_exactly(stepped: Make, tmp_path: Path) -> None:
    whole = accelerated(stepped, tmp_path / "whole", stop=STEPS + 1)
    first = accelerated(stepped, tmp_path / "first", stop=9)
    same_steps(first, accelerated(stepped, tmp_path / "first", resume=True), whole, 9)


@pytest.mark.parametrize("count", [1, 3])
def test_batches_are_not_skipped_by_another_loader(make: Make, count: int) -> None:
    with make() as loader:
        with pytest.raises(ConfigError, match=r"register_for_checkpointing\(loader\)"):
            accelerate.skip_first_batches(loader, count)
        assert accelerate.Accelerator(cpu=True).prepare(loader) is loader
    with pytest.raises(AttributeError, match="a list has no 'dataset'; this loader cannot be rebuilt"):
        accelerate.skip_first_batches(bertstream.wrap([["a"]], FakeEncoder()), count)


# A plain loop


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_whole_checkpoint_of_a_plain_loop_repeats_the_losses(
    streamed: Make, tmp_path: Path, num_workers: int, shuffle: bool
) -> None:
    """As the cookbook has it: model, optimizer, generator and loader in one file."""
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]

    def wrapped() -> EmbeddingLoader:
        loader = StatefulDataLoader(rows, 2, shuffle=True, num_workers=num_workers)
        return bertstream.wrap(loader, FakeEncoder(), text="text", layout="padded")

    make = wrapped if shuffle else streamed
    path = tmp_path / "whole.pt"

    def run(stop: int, resume: bool = False) -> list[Step]:
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        with make() as loader:
            if resume:
                saved = torch.load(path, weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                loader.load_state_dict(saved["loader"])
                torch.set_rng_state(saved["generator"])
            for batch in loader:
                optimizer.zero_grad()
                model(**batch)["loss"].backward()
                optimizer.step()
                if len(model.steps) == stop:
                    parts = {"model": model, "optimizer": optimizer, "loader": loader}
                    states = {name: part.state_dict() for name, part in parts.items()}
                    torch.save(states | {"generator": torch.get_rng_state()}, path)
                    break
        return model.steps

    whole = run(BATCHES + 1)
    assert len(whole) == BATCHES
    for stop in (1, 4):
        assert run(stop) + run(BATCHES + 1, resume=True) == whole


# What the loader itself says


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_draws_nothing_from_the_global_generator(tmp_path: Path, num_workers: int) -> None:
    shards = write_shards(tmp_path, TEXTS)
    before = torch.get_rng_state()
    with bertstream.stream(shards, FakeEncoder(), batch_size=4, shuffle=True, num_workers=num_workers) as loader:
        for _ in range(2):
            assert sum(len(batch["id"]) for batch in loader) == len(TEXTS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("held", range(9))
def test_the_state_after_a_batch_is_known_while_a_few_more_are_held(make: Make, held: int) -> None:
    with make() as loader:
        taken = iter(loader)
        states = [json.loads(json.dumps(loader.state_dict()))] if loader._stream is not None else [None]
        for _ in range(BATCHES):
            next(taken)
            states.append(json.loads(json.dumps(loader.state_dict())))
        after = BATCHES - held
        if states[after] is None:
            with pytest.raises(StateError, match="does not know the state before it"):
                loader.state_dict(after=after)
        else:
            assert json.loads(json.dumps(loader.state_dict(after=after))) == states[after]


def test_states_that_are_not_kept_are_refused_with_the_numbers(tmp_path: Path) -> None:
    loader = bertstream.stream(write_shards(tmp_path, TEXTS), FakeEncoder(), batch_size=1)
    for _, _ in zip(range(12), loader, strict=False):
        pass
    for after in (3, 13):
        with pytest.raises(ConfigError, match=f"after={after}: this iteration has yielded 12 batches"):
            loader.state_dict(after=after)
    with pytest.raises(ConfigError, match="after=-1"):
        loader.state_dict(after=-1)
    loader.close()


def test_a_trainer_may_count_epochs_from_another_number(streamed: Make) -> None:
    with streamed() as loader:
        loader.set_epoch(2)
        orders = [[batch["id"].tolist() for batch in loader] for _ in range(3)]
        loader.set_epoch(2)
        taken = iter(loader)
        next(taken)
        state = loader.state_dict()
    with streamed() as loader:
        loader.load_state_dict(state, trainer_epoch=0)
        found = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            found.append([batch["id"].tolist() for batch in loader])
        assert found == [orders[0][1:], orders[1], orders[2]] and loader.epoch == 5
