"""Hugging Face's Trainer: a callback with which `resume_from_checkpoint` continues exactly after the last batch.

    class StreamingTrainer(Trainer):
        def get_train_dataloader(self):
            return loader

    trainer = StreamingTrainer(model, arguments, callbacks=[LoaderState()], train_dataset=loader.dataset)
    trainer.train(resume_from_checkpoint=True)

By itself a Trainer resumes with another DataLoader, made of the loader's dataset, and skips batches of it. The loader
refuses that: the batches would have no vectors.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import pickle
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from ..errors import ConfigError, StateError, kind_of
from ..pipeline.embedding_loader import EmbeddingLoader

logger = logging.getLogger(__name__)

_NUMPY: list[Any] = [np.ndarray, np.dtype, np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
_NUMPY += {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
"""What pickled arrays and numbers of numpy are made of; objects ("O") may be anything."""


class LoaderState(TrainerCallback, ExportableState):
    """Keeps the training loader's state in a checkpoint's `trainer_state.json`, and sets `ignore_data_skip`.

    The loader is what the Trainer's `get_train_dataloader` returns. On several ranks the checkpoint holds rank 0's
    state; that of a `stream` names all ranks' lanes.
    """

    def __init__(self) -> None:
        self._loader: EmbeddingLoader | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the Trainer skip no batches: the loader continues where it was."""
        args.ignore_data_skip = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the loader's state, if the Trainer resumes.

        Raises:
            ConfigError: `wrap` or `stream` did not make the loader, or the callback was added too late.
            StateError: the loader has no state, or the checkpoint has none of it.
        """
        loader = kwargs.get("train_dataloader")
        if not isinstance(loader, EmbeddingLoader):
            raise ConfigError(
                f"LoaderState found {kind_of(loader)} as the Trainer's loader: have get_train_dataloader "
                "return one of bertstream.wrap or stream"
            )
        self._loader = loader
        loader.expect_callback()
        if not state.global_step:
            return
        if not args.ignore_data_skip:
            raise ConfigError("give LoaderState() to the Trainer's callbacks=, or set ignore_data_skip=True with it")
        callbacks: Any = state.stateful_callbacks  # here as `state` returned them
        found = callbacks.get("LoaderState", {}).get("attributes", {}).get("saved")
        if found is None:
            raise StateError(
                f"the checkpoint of step {state.global_step} has no state of the loader: LoaderState() has to be among "
                "the Trainer's callbacks when it saves",
                key="LoaderState",
            )
        found = _from_json(found)
        # Without a length, a Trainer takes all of its steps for one epoch, and counts epochs from 0 again. After the
        # last batch of an epoch its number is that of the next one, and the loader's state is still of this one.
        sized = has_length(loader)
        steps_an_epoch = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps)) if sized else None
        loader.load_state_dict(found, trainer_epoch=state.global_step // steps_an_epoch if steps_an_epoch else 0)
        if sized and len(loader) % args.gradient_accumulation_steps:
            logger.warning(
                "%d batches an epoch are no multiple of gradient_accumulation_steps=%d: the Trainer makes no step of "
                "the last %d batches of an epoch that it resumes",
                len(loader),
                args.gradient_accumulation_steps,
                len(loader) % args.gradient_accumulation_steps,
            )

    def state(self) -> dict[str, Any]:
        """The loader's state now, as `trainer_state.json` holds it.

        Raises:
            StateError: what the loader wraps has a state that `torch.load` refuses as unsafe.
        """
        state = None if self._loader is None else _to_json(self._loader.state_dict())
        return {"args": {}, "attributes": {"saved": state}}


def _to_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it is where JSON keeps it; else, with a shuffling DataLoader's tensors, as text of `torch.save`."""
    try:
        if json.loads(json.dumps(state)) == state:
            return state
    except (TypeError, ValueError):  # a tensor or bytes; an array, whose comparison is no bool
        pass
    file = io.BytesIO()
    torch.save(state, file)
    text = {"torch": base64.b64encode(file.getvalue()).decode()}
    try:
        _from_json(text)
    except pickle.UnpicklingError as error:
        raise StateError(
            "the state of what the loader wraps has objects that torch.load(weights_only=True) refuses, so no run can "
            "resume from this checkpoint: have its state_dict return numbers, strings, tensors and numpy arrays. "
            f"torch said: {error}",
            key="source",
        ) from error
    return text


def _from_json(saved: dict[str, Any]) -> dict[str, Any]:
    """The state that `_to_json` was given."""
    if "torch" not in saved:
        return saved
    with torch.serialization.safe_globals(_NUMPY):
        state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(saved["torch"])), weights_only=True)
    return state
