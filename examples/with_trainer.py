"""Streamed vectors in a Hugging Face Trainer, through its `get_train_dataloader` (pip install accelerate).

python examples/with_trainer.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import bertstream

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


class StreamingTrainer(Trainer):
    def get_train_dataloader(self):
        return loaders["train"]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
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
    plain = DataLoader(data, 16, shuffle=part == "train", collate_fn=collate)
    # "padded" puts vectors [B, T, H] under the text's name, and their mask [B, T] under that name plus "_mask".
    loaders[part] = bertstream.wrap(plain, encoder, text="inputs_embeds", layout="padded", cache=cache)
model = Classifier(encoder.embedding_dim, len(senses)).to(encoder.device)

with tempfile.TemporaryDirectory() as folder:
    settings = {"num_train_epochs": args.epochs, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(folder, use_cpu=True, disable_tqdm=True, **settings)
    StreamingTrainer(model, arguments, train_dataset=loaders["train"].dataset).train()

with torch.no_grad():
    right = sum(int((model(**batch)["logits"].argmax(1) == batch["labels"]).sum()) for batch in loaders["test"])
print(f"accuracy {right / len(sets['test']):.4f} on {len(sets['test'])} held-out sentences")
