"""Streamed vectors in a Lightning Trainer, which takes the loader as it is (pip install lightning torchdata).

python examples/with_lightning.py --out checkpoints
"""

import argparse
import json
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import bertstream
from bertstream.integrations.lightning import LoaderState

DATA = Path(__file__).parent / "data"


class Classifier(nn.Module):
    """Takes plain tensors, vectors [B, T, H] and mask [B, T]; with labels it returns its loss too."""

    def __init__(self, size, classes):
        super().__init__()
        self.head = nn.Linear(size, classes)

    def forward(self, inputs_embeds, inputs_embeds_mask, labels=None):
        mask = inputs_embeds_mask[..., None]
        logits = self.head((inputs_embeds * mask).sum(1) / mask.sum(1))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--out", help="folder of checkpoints; a run that was interrupted continues from the last one")
args = parser.parse_args()
torch.manual_seed(0)
encoder = bertstream.Encoder.from_pretrained("all-MiniLM-L6-v2")
cache = bertstream.EmbeddingCache("1GiB")  # later epochs read the vectors from it
lines = {part: (DATA / f"senses-{part}.jsonl").read_text("utf-8").splitlines() for part in ("train", "test")}
sets = {part: list(map(json.loads, found)) for part, found in lines.items()}
senses = sorted({row["sense"] for row in sets["train"]})
loaders = {}
for part, rows in sets.items():
    data = [{"inputs_embeds": row["words"], "labels": senses.index(row["sense"])} for row in rows]
    collate = bertstream.TokenCollate(encoder, text="inputs_embeds")
    plain = StatefulDataLoader(data, 16, shuffle=part == "train", collate_fn=collate)
    # "padded" puts vectors [B, T, H] under the text's name, and their mask [B, T] under that name plus "_mask".
    loaders[part] = bertstream.wrap(plain, encoder, text="inputs_embeds", layout="padded", cache=cache)
model = Classifier(encoder.embedding_dim, len(senses)).to(encoder.device)

callbacks = [LoaderState(loaders["train"])]  # keeps the loader's state in the checkpoints: without it none resumes
if args.out:
    callbacks.append(ModelCheckpoint(args.out, save_last=True, every_n_train_steps=10))
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(
    max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks, enable_checkpointing=bool(args.out), **quiet
)
trainer.fit(Module(model), loaders["train"], ckpt_path="last" if args.out else None)

with torch.no_grad():
    right = sum(int((model(**batch)["logits"].argmax(1) == batch["labels"]).sum()) for batch in loaders["test"])
print(f"accuracy {right / len(sets['test']):.4f} on {len(sets['test'])} held-out sentences")
