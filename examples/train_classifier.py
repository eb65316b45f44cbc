"""Train a linear classifier on sentence vectors that stream from shards: tar, jsonl or CSV files.

python examples/train_classifier.py --train 'shards/train-*.tar' --test 'shards/test-*.tar' --text txt --label cls
python examples/train_classifier.py --train train.csv --test test.csv --text text --label category
"""

import argparse
import itertools

import torch
from torch import nn
from tqdm import tqdm

import bertstream


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="shards; globs and {000..146} are expanded")
    parser.add_argument("--test", nargs="+", required=True, help="shards")
    parser.add_argument("--text", default="txt", help="the field that holds the text (default: %(default)s)")
    parser.add_argument("--label", default="cls", help="the field that holds the class (default: %(default)s)")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--bucket-size", type=int, default=16384, help="records mixed together; raise for sorted data")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read and tokenize")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    encoder = bertstream.Encoder.from_pretrained(args.model, output="sentence", pooling="mean")

    # Read the data once without encoding it, to collect the classes.
    labelled = bertstream.TextStream(args.train, encoder, text=args.text, fields=[args.label])
    classes = sorted(set(itertools.chain.from_iterable(batch.fields[args.label] for batch in labelled)))
    index = {name: i for i, name in enumerate(classes)}

    settings = {"text": args.text, "fields": {args.label: index.__getitem__}, "num_workers": args.num_workers}
    mixing = {"shuffle": True, "seed": args.seed, "reading": bertstream.StreamConfig(bucket_size=args.bucket_size)}
    train = bertstream.stream(args.train, encoder, **settings, batch_size=args.batch_size, **mixing)
    test = bertstream.stream(args.test, encoder, **settings)

    classifier = nn.Linear(encoder.embedding_dim, len(classes)).to(encoder.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    for epoch in range(args.epochs):
        for batch in tqdm(train, desc=f"epoch {epoch}", unit="batch"):
            logits = classifier(batch[args.text].vectors)
            loss = nn.functional.cross_entropy(logits, batch[args.label].to(encoder.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    right = total = 0
    with torch.no_grad():
        for batch in tqdm(test, desc="test", unit="batch"):
            predicted = classifier(batch[args.text].vectors).argmax(1)
            right += int((predicted == batch[args.label].to(encoder.device)).sum())
            total += len(predicted)
    print(f"test accuracy {right / total:.4f} of {total} texts in {len(classes)} classes")


if __name__ == "__main__":
    main()
