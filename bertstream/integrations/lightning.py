"""Lightning: a callback with which a Trainer resumes exactly after the batch that its loop had.

    loader = bertstream.stream("shards/*.tar", encoder, text="txt")
    trainer = lightning.Trainer(callbacks=[LoaderState(loader)])
    trainer.fit(module, loader, ckpt_path="last")

Lightning saves and loads a loader's state by itself, but takes one batch more from a loader without a length than its
loop has: without the callback each resume would lose one. So the loader refuses a state that Lightning asked it for.

Start several processes with torchrun. Those that Lightning starts itself learn their rank only in `fit`: make the
loader and the callback there, in the module.

    def setup(self, stage):
        self.loader = bertstream.stream("shards/*.tar", encoder, text="txt")
        self.trainer.callbacks.append(LoaderState(self.loader))

    def train_dataloader(self):
        return self.loader
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..errors import ConfigError, kind_of
from ..pipeline.embedding_loader import EmbeddingLoader


class LoaderState(Callback):
    """Keeps a training loader's state in Lightning's checkpoints, as of the batch that the loop has trained on.

    On several ranks the checkpoint holds rank 0's state; that of a `stream` names all ranks' lanes.

    Args:
        loader: the one that `fit` trains on, or that a module's or datamodule's `train_dataloader` returns.
    Raises:
        ConfigError: `wrap` or `stream` did not make it.
    """

    def __init__(self, loader: EmbeddingLoader) -> None:
        if not isinstance(loader, EmbeddingLoader):
            raise ConfigError(f"LoaderState takes a loader of bertstream.wrap or stream, not {kind_of(loader)}")
        self._loader = loader
        self._trained = 0  # batches of the loader's iteration that the loop has trained on
        self._epoch_is_new = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become the first of the callbacks: others that save after a batch have to find it counted."""
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loop has no batch of the iteration, though Lightning may hold one.

        Raises:
            StateError: what the loader wraps has no state.
        """
        self._loader.expect_callback()
        self._trained = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last iteration is the loader's until Lightning begins the next one."""
        self._epoch_is_new = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The iteration has started."""
        if self._epoch_is_new:
            self._epoch_is_new, self._trained = False, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, before any callback that saves."""
        self._trained += 1

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the batch that the loop trained on last."""
        return self._loader.state_dict(after=self._trained)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there; Lightning calls this before it takes a batch."""
        self._loader.load_state_dict(state_dict, trainer_epoch=state_dict.get("steps", state_dict).get("epoch"))
