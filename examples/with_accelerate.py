"""Streamed vectors in an Accelerate loop (pip install accelerate torchdata).

python examples/with_accelerate.py --out checkpoints
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

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

accelerator = Accelerator(cpu=True)
# Do not prepare the loader: its vectors are on the device already, and `stream` shares out shards to ranks itself.
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
accelerator.register_for_checkpointing(loaders["train"])  # and do not skip batches: the loader continues by itself
if args.out and Path(args.out).exists():
    accelerator.load_state(args.out)
while loaders["train"].epoch < args.epochs:
    for step, batch in enumerate(loaders["train"]):
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        if args.out and step % 10 == 9:
            accelerator.save_state(args.out)

with torch.no_grad():
    right = sum(int((model(**batch)["logits"].argmax(1) == batch["labels"]).sum()) for batch in loaders["test"])
print(f"accuracy {right / len(sets['test']):.4f} on {len(sets['test'])} held-out sentences")
