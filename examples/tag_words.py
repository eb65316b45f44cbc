"""A part-of-speech tagger: one BERT vector per word instead of GloVe, a BiLSTM, a plain training loop.

    python examples/tag_words.py --train dev.conllu --test test.conllu --layer 2

Takes files of Universal Dependencies (CoNLL-U). Accuracy depends most on the layer that the vectors come from.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import bertstream

UPOS = ["ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ"]
UPOS += ["SYM", "VERB", "X"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--train", type=Path, required=True)
parser.add_argument("--test", type=Path, required=True)
parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder")
parser.add_argument("--layer", type=int, default=2, help="0 is the embedding layer, -1 the last")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--seeds", type=int, default=1, help="number of runs to average")
args = parser.parse_args()


def read(path):
    """The sentences of a CoNLL-U file: their words, and the index of each word's tag."""
    sentences = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if line[:1].isdigit()]
        rows = [row for row in rows if row[0].isdigit()]  # without "8-9" and "8.1", which are not words
        if rows:
            sentences.append({"words": [row[1] for row in rows], "tags": [UPOS.index(row[3]) for row in rows]})
    return sentences


class Tagger(nn.Module):
    """Scores each tag for each word, [B, T, 17]."""

    def __init__(self, size):
        super().__init__()
        self.lstm = nn.LSTM(size, 128, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, len(UPOS))

    def forward(self, vectors):
        packed, _ = self.lstm(vectors.packed_sequence())
        return self.head(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0])


encoder = bertstream.Encoder.from_pretrained(args.model, output="words", layers=args.layer, overflow="windows")
collate = bertstream.TokenCollate(encoder, text="words")  # tags stay one tensor per sentence
train, test = (DataLoader(read(path), 32, shuffle=True, collate_fn=collate) for path in (args.train, args.test))
train, test = (bertstream.wrap(loader, encoder, text="words") for loader in (train, test))

accuracies = []
for seed in range(args.seeds):
    torch.manual_seed(seed)
    tagger = Tagger(encoder.embedding_dim).to(encoder.device)
    optimizer = torch.optim.Adam(tagger.parameters(), 2e-3)
    for _ in tqdm(range(args.epochs), desc=f"seed {seed}", unit="epoch"):
        for batch in train:
            tags = batch["words"].align(batch["tags"])  # [B, T], -100 after a sentence's end
            loss = nn.functional.cross_entropy(tagger(batch["words"]).flatten(0, 1), tags.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = total = 0
    with torch.no_grad():
        for batch in test:
            tags = batch["words"].align(batch["tags"])
            right += int((tagger(batch["words"]).argmax(-1) == tags).sum())
            total += int((tags >= 0).sum())
    accuracies.append(right / total)
print(f"accuracy with layer {args.layer}: {sum(accuracies) / len(accuracies):.4f} (mean of {args.seeds})")
