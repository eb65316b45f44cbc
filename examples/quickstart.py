"""River bank or money bank? Train on contextual vectors as they stream, and on static vectors for comparison.

Each of six words has two senses; linear layers learn to tell them apart in the sentences of examples/data.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import bertstream

DATA = Path(__file__).parent / "data"
SENSES = ["bank/money", "bank/river", "bass/fish", "bass/music", "bat/animal", "bat/club"]  # pairs
SENSES += ["crane/bird", "crane/machine", "seal/animal", "seal/closure", "spring/coil", "spring/season"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

encoder = bertstream.Encoder.from_pretrained(args.model, output="tokens")
fields = {"position": int, "sense": SENSES.index}  # other fields of a batch, as numbers
settings = {"text": "words", "into": "vectors", "fields": fields, "batch_size": 32}
train = bertstream.stream(DATA / "senses-train.jsonl", encoder, **settings, shuffle=True, seed=args.seed)
test = bertstream.stream(DATA / "senses-test.jsonl", encoder, **settings)

table = encoder.model.get_input_embeddings().weight.detach().float()  # static vectors, one a token
heads = nn.ModuleList(nn.Linear(encoder.embedding_dim, len(SENSES)) for _ in range(5)).to(encoder.device)
optimizer = torch.optim.AdamW(heads.parameters(), lr=1.5e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)


def static(texts):
    """Mean static vector of each text's tokens, without [CLS] and [SEP]: [B, H]."""
    return torch.stack([table[text.input_ids[1:-1]].mean(0) for text in encoder.tokenizer(texts)])


def views(batch):
    """Five representations of each sentence's ambiguous word, [B, H] each."""
    vectors, _ = batch["vectors"].padded()  # [B, T, H]
    word_of_token = batch["vectors"].align([range(len(words)) for words in batch["words"]])  # [B, T]
    contextual = vectors[word_of_token == batch["position"][:, None].to(encoder.device)]
    places = list(zip(batch["words"], batch["position"].tolist(), strict=True))
    return {
        "majority class": torch.zeros_like(contextual),  # zeros leave only the bias to learn
        "the word's static vector": static([[words[i]] for words, i in places]),
        "mean static vector, 5 words each side": static([w[max(0, i - 5) : i] + w[i + 1 : i + 6] for w, i in places]),
        "mean static vector, whole sentence": static(batch["words"]),
        "the word's contextual vector": contextual,
    }


def logits_and_sense(batch):
    """The logits of the word's two senses for each view, [B, 2]; and the index of the right one, [B]."""
    sense = batch["sense"].to(encoder.device)
    pairs = {view: head(x).view(len(x), -1, 2) for head, (view, x) in zip(heads, views(batch).items(), strict=True)}
    return {view: x[torch.arange(len(x)), sense // 2] for view, x in pairs.items()}, sense % 2


for _ in tqdm(range(args.epochs), desc="training", unit="epoch"):
    for batch in train:
        logits, sense = logits_and_sense(batch)
        loss = sum(nn.functional.cross_entropy(x, sense) for x in logits.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()

with torch.no_grad():
    results = [logits_and_sense(batch) for batch in test]
print(f"sense accuracy on {test.stats()['texts']} held-out sentences")
for view in results[0][0]:
    right = torch.cat([logits[view].argmax(1) == sense for logits, sense in results])
    print(f"  {view:<39}{right.float().mean():.3f}")
