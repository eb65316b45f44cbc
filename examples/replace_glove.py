"""A tagger written for GloVe vectors, and the lines to change for BERT.

python examples/replace_glove.py --vectors static
python examples/replace_glove.py --vectors bert
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

import bertstream

DATA = Path(__file__).parent / "data"


class SenseTagger(nn.Module):
    """The unchanged model: a BiLSTM over one vector per word. Of its embedding it needs only `embedding_dim`."""

    def __init__(self, embedding, senses):
        super().__init__()
        self.embedding = embedding
        self.lstm = nn.LSTM(embedding.embedding_dim, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, senses)

    def forward(self, words):
        x, mask = self.embedding(words)  # [B, T, H] and [B, T]
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


class StaticEmbedding(nn.Embedding):
    """The embedding before: one vector per word of a vocabulary, trained here where GloVe's would be loaded."""

    def __init__(self, vocabulary, size):
        super().__init__(len(vocabulary) + 1, size)
        self.vocabulary = {word: number for number, word in enumerate(vocabulary, 1)}

    def forward(self, words):
        rows = [torch.tensor([self.vocabulary.get(word.lower(), 0) for word in text]) for text in words]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return super().forward(pad_sequence(rows, batch_first=True)), mask


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--vectors", choices=["static", "bert"], default="bert")
parser.add_argument("--epochs", type=int, default=6)
args = parser.parse_args()
torch.manual_seed(0)
lines = [(DATA / f"senses-{part}.jsonl").read_text("utf-8").splitlines() for part in ("train", "test")]
train, test = (list(map(json.loads, found)) for found in lines)
senses = sorted({row["sense"] for row in train})

if args.vectors == "static":
    embedding = StaticEmbedding(sorted({word.lower() for row in train for word in row["words"]}), 100)
else:  # these two lines are the change
    encoder = bertstream.Encoder.from_pretrained("all-MiniLM-L6-v2", output="words", layers=4)
    embedding = bertstream.BertEmbedding(encoder, layout="padded")

model = SenseTagger(embedding, len(senses))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
for _ in range(args.epochs):
    for rows in DataLoader(train, 16, shuffle=True, collate_fn=list):
        scores = model([row["words"] for row in rows])[torch.arange(len(rows)), [row["position"] for row in rows]]
        loss = nn.functional.cross_entropy(scores, torch.tensor([senses.index(row["sense"]) for row in rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

with torch.no_grad():
    scores = model.eval()([row["words"] for row in test])[torch.arange(len(test)), [row["position"] for row in test]]
right = sum(senses[i] == row["sense"] for i, row in zip(scores.argmax(1).tolist(), test, strict=True))
print(f"{args.vectors} vectors: accuracy {right / len(test):.4f} on {len(test)} held-out sentences")
