"""A Hugging Face dataset as vectors in a Lightning Trainer (pip install lightning torchdata datasets).

python examples/with_lightning.py --out checkpoints
"""

import argparse
from pathlib import Path

import datasets
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import bertstream
from bertstream.integrations.lightning import LoaderState

DATA = Path(__file__).parent / "data"


class Classifier(lightning.LightningModule):
    """Tells the sense of a sentence from the mean of its words' vectors."""

    def __init__(self, size, classes):
        super().__init__()
        self.head = nn.Linear(size, classes)

    def forward(self, batch):
        vectors, mask = batch["words"], batch["words_mask"][..., None]  # [B, T, H], [B, T, 1]
        return self.head((vectors * mask).sum(1) / mask.sum(1))

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self(batch), batch["label"])
        # Say the batch size: from the vectors' shapes Lightning may guess another.
        self.log("loss", loss, batch_size=len(batch["label"]))
        return loss

    def validation_step(self, batch, index):
        right = (self(batch).argmax(1) == batch["label"]).float().mean()
        self.log("accuracy", right, batch_size=len(batch["label"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--out", help="folder of checkpoints; a run that was interrupted continues from the last one")
args = parser.parse_args()
torch.manual_seed(0)
encoder = bertstream.Encoder.from_pretrained("all-MiniLM-L6-v2")
cache = bertstream.EmbeddingCache("1GiB")  # later epochs read the vectors from it
splits = {part: str(DATA / f"senses-{part}.jsonl") for part in ("train", "test")}
splits = datasets.load_dataset("json", data_files=splits).select_columns(["words", "sense"])
senses = sorted(set(splits["train"]["sense"]))
splits = splits.map(lambda row: {"label": senses.index(row["sense"])}, remove_columns="sense")
loaders = {}
for part, rows in splits.items():
    collate = bertstream.TokenCollate(encoder, text="words")
    plain = StatefulDataLoader(rows, 16, shuffle=part == "train", collate_fn=collate)
    # "padded" puts vectors [B, T, H] under the text's name, and their mask [B, T] under that name plus "_mask".
    loaders[part] = bertstream.wrap(plain, encoder, text="words", layout="padded", cache=cache)

callbacks = [LoaderState(loaders["train"])]  # keeps the loader's state in the checkpoints: without it none resumes
if args.out:
    callbacks.append(ModelCheckpoint(args.out, save_last=True, every_n_train_steps=10))
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(
    max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks, enable_checkpointing=bool(args.out), **quiet
)
model = Classifier(encoder.embedding_dim, len(senses))
trainer.fit(model, loaders["train"], loaders["test"], ckpt_path="last" if args.out else None)
print(f"accuracy {trainer.callback_metrics['accuracy']:.4f} on {len(splits['test'])} held-out sentences")
