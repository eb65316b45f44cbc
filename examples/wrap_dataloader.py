"""An ordinary Dataset with DataLoaders, and the one line that puts sentence vectors into their batches.

python examples/wrap_dataloader.py
python examples/wrap_dataloader.py --train train.csv --test test.csv --text text --label category
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import bertstream

DATA = Path(__file__).parent / "data"


class LabelledTexts(Dataset):
    """The rows of a CSV or jsonl file; in jsonl a text may be a list of words."""

    def __init__(self, path, text, label):
        with open(path, encoding="utf-8", newline="") as file:
            rows = [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))
        self.texts = [row[text] if isinstance(row[text], str) else " ".join(row[text]) for row in rows]
        self.labels = [row[label] for row in rows]
        self.classes = sorted(set(self.labels))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"text": self.texts[index], "label": self.classes.index(self.labels[index])}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", type=Path, default=DATA / "senses-train.jsonl")
parser.add_argument("--test", type=Path, default=DATA / "senses-test.jsonl")
parser.add_argument("--text", default="words", help="the field that holds the text (default: %(default)s)")
parser.add_argument("--label", default="sense", help="the field that holds the class (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

dataset = LabelledTexts(args.train, args.text, args.label)
held_out = LabelledTexts(args.test, args.text, args.label)
held_out.classes = dataset.classes
train = DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
test = DataLoader(held_out, batch_size=args.batch_size)

encoder = bertstream.Encoder.from_pretrained("all-MiniLM-L6-v2", output="sentence", pooling="mean")
train = bertstream.wrap(train, encoder, text="text")  # the one line: batch["text"] now holds vectors
test = bertstream.wrap(test, encoder, text="text")

classifier = nn.Linear(encoder.embedding_dim, len(dataset.classes)).to(encoder.device)
optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.lr)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

for epoch in range(args.epochs):
    for batch in tqdm(train, desc=f"epoch {epoch}", unit="batch"):
        loss = nn.functional.cross_entropy(classifier(batch["text"].vectors), batch["label"].to(encoder.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()

right = 0
with torch.no_grad():
    for batch in tqdm(test, desc="test", unit="batch"):
        right += int((classifier(batch["text"].vectors).argmax(1).cpu() == batch["label"]).sum())
print(f"test accuracy {right / len(held_out):.4f} of {len(held_out)} texts in {len(dataset.classes)} classes")
