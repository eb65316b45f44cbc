"""Train a classifier on frozen, cached BERT vectors for some epochs, then fine-tune BERT too, in one training loop.

python examples/finetune.py
python examples/finetune.py --train train.csv --test test.csv --text text --label category --frozen 2 --epochs 4
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import bertstream

DATA = Path(__file__).parent / "data"


class Classifier(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        self.embed = bertstream.BertEmbedding(encoder)  # embeds tokens if BERT is trained; vectors pass unchanged
        self.head = nn.Linear(encoder.embedding_dim, classes)

    def forward(self, texts):
        return self.head(self.embed(texts).vectors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=str(DATA / "senses-train.jsonl"))
    parser.add_argument("--test", default=str(DATA / "senses-test.jsonl"))
    parser.add_argument("--text", default="words", help="the field that holds the text (default: %(default)s)")
    parser.add_argument("--label", default="sense", help="the field that holds the class (default: %(default)s)")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--frozen", type=int, default=2, help="epochs before the encoder is trained too")
    parser.add_argument("--layers-every", type=int, help="epochs between layers to unfreeze; default: all together")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of the head")
    parser.add_argument("--encoder-lr", type=float, default=1e-4, help="learning rate of the encoder's top layer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    # Train float32 weights: bfloat16 rounds small updates away. On a GPU, use torch.autocast for speed.
    encoder = bertstream.Encoder.from_pretrained(args.model, output="sentence", normalize=False, dtype="float32")
    labelled = bertstream.TextStream(args.train, encoder, text=args.text, fields=[args.label])
    classes = sorted(set(itertools.chain.from_iterable(batch.fields[args.label] for batch in labelled)))
    settings = {"text": args.text, "fields": {args.label: classes.index}, "cache": bertstream.EmbeddingCache("1GiB")}
    train = bertstream.stream(args.train, encoder, **settings, shuffle=True, seed=args.seed)
    test = bertstream.stream(args.test, encoder, **settings)

    model = Classifier(encoder, len(classes)).to(encoder.device)
    groups = [{"params": model.head.parameters(), "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups + encoder.parameter_groups(args.encoder_lr, layer_decay=0.9))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / args.epochs, total_iters=args.epochs - 1)
    unfreezing = bertstream.UnfreezeSchedule(encoder, start=args.frozen, every=args.layers_every)

    for epoch in range(args.epochs):
        unfreezing.set(epoch)
        model.train()
        for batch in tqdm(train, desc=f"epoch {epoch}, {'trained' if encoder.trainable else 'frozen'}", unit="batch"):
            loss = nn.functional.cross_entropy(model(batch[args.text]), batch[args.label].to(encoder.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()

    encoder.freeze()  # the loader then yields vectors again
    right = total = 0
    with torch.no_grad():
        for batch in tqdm(test, desc="test", unit="batch"):
            predicted = model.eval()(batch[args.text]).argmax(1).cpu()
            right, total = right + int((predicted == batch[args.label]).sum()), total + len(predicted)
    print(f"test accuracy {right / total:.4f} of {total} texts in {len(classes)} classes")


if __name__ == "__main__":
    main()
