"""Encoders as Ray actors feed two training workers: on this machine, or on all machines of a cluster.

Each worker trains a linear layer on its share of the sentences while the actors encode; the mean of both is tested.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import ray
import torch
from torch import nn

from bertstream.integrations.ray_data import Embed

DATA = Path(__file__).parent / "data"
WORDS = ["bank", "bass", "bat", "crane", "seal", "spring"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder (default: %(default)s)")
parser.add_argument("--actors", type=int, default=2, help="number of encoders (default: %(default)s)")
parser.add_argument("--gpus", type=float, default=0, help="GPUs per actor (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=2)
args = parser.parse_args()


def sentences(split):
    """Rows of text and label; the label is the ambiguous word."""
    rows = map(json.loads, (DATA / f"senses-{split}.jsonl").read_text("utf-8").splitlines())
    return [{"text": " ".join(row["words"]), "label": WORDS.index(row["word"])} for row in rows]


@ray.remote(num_cpus=0)
def train(share, size):
    """Train a linear layer on the share; return its state dict and the number of rows it has seen."""
    torch.manual_seed(0)
    head, rows = nn.Linear(size, len(WORDS)), 0
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(args.epochs):
        for batch in share.iter_torch_batches(batch_size=16, local_shuffle_buffer_size=64, local_shuffle_seed=0):
            loss = nn.functional.cross_entropy(head(batch["vectors"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows += len(batch["label"])
    return head.state_dict(), rows


vectors = (
    ray.data.from_items(sentences("train"))
    .map_batches(
        Embed,
        fn_constructor_kwargs={
            "model": args.model,
            "output": "sentence",
            "dtype": "float32",
            "cache": {"memory": "1GiB"},
        },
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_gpus=args.gpus,
        batch_size=64,  # 1024 for a large corpus
    )
    .drop_columns(["text"])
)

embed = Embed(args.model, output="sentence", dtype="float32")
test = embed({name: np.array([row[name] for row in sentences("test")]) for name in ("text", "label")})

heads, rows = zip(
    *ray.get([train.remote(share, test["vectors"].shape[1]) for share in vectors.streaming_split(2, equal=True)]),
    strict=True,
)
head = {name: torch.stack([state[name] for state in heads]).mean(0) for name in heads[0]}
right = nn.functional.linear(torch.from_numpy(test["vectors"]), **head).argmax(1).numpy() == test["label"]
print(f"trained on {' + '.join(map(str, rows))} rows of {args.actors} actors' vectors")
print(f"test accuracy {right.mean():.4f} of {len(right)} texts in {len(WORDS)} classes")
