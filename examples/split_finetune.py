"""Train BERT's upper layers; the frozen lower ones are computed once and then read from a cache.

python examples/split_finetune.py
python examples/split_finetune.py --train train.csv --test test.csv --text text --label category --at 4
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import bertstream

DATA = Path(__file__).parent / "data"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=str(DATA / "senses-train.jsonl"))
    parser.add_argument("--test", default=str(DATA / "senses-test.jsonl"))
    parser.add_argument("--text", default="words", help="the field that holds the text (default: %(default)s)")
    parser.add_argument("--label", default="sense", help="the field that holds the class (default: %(default)s)")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder (default: %(default)s)")
    parser.add_argument("--at", type=int, default=4, help="number of frozen layers")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of the head")
    parser.add_argument("--encoder-lr", type=float, default=2e-4, help="learning rate of the upper layers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # Train float32 weights: bfloat16 rounds small updates away. On a GPU, use torch.autocast for speed.
    encoder = bertstream.Encoder.from_pretrained(args.model, output="sentence", normalize=False, dtype="float32")
    lower, upper = encoder.split(at=args.at)
    labelled = bertstream.TextStream(args.train, lower, text=args.text, fields=[args.label])
    classes = sorted(set(itertools.chain.from_iterable(batch.fields[args.label] for batch in labelled)))

    settings = {"text": args.text, "fields": {args.label: classes.index}, "cache": bertstream.EmbeddingCache("1GiB")}
    train = bertstream.stream(args.train, lower, **settings, shuffle=True, seed=args.seed)
    test = bertstream.stream(args.test, lower, **settings)

    head = nn.Linear(upper.embedding_dim, len(classes)).to(upper.device)
    groups = [{"params": head.parameters(), "lr": args.lr}]
    optimizer = torch.optim.AdamW([*groups, {"params": upper.parameters(), "lr": args.encoder_lr}])
    for epoch in range(args.epochs):
        started = time.perf_counter()
        upper.train()
        for batch in tqdm(train, desc=f"epoch {epoch}", unit="batch"):
            scores = head(upper(batch[args.text]).vectors)
            loss = nn.functional.cross_entropy(scores, batch[args.label].to(scores.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: {time.perf_counter() - started:.1f} s")

    right = total = 0
    upper.eval()
    with torch.no_grad():
        for batch in tqdm(test, desc="test", unit="batch"):
            predicted = head(upper(batch[args.text]).vectors).argmax(1).cpu()
            right, total = right + int((predicted == batch[args.label]).sum()), total + len(predicted)
    print(f"test accuracy {right / total:.4f} of {total} texts in {len(classes)} classes")


if __name__ == "__main__":
    main()
