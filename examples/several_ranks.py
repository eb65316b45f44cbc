"""Stream shards to several ranks and fine-tune BERT under DistributedDataParallel (gloo, on this machine).

python examples/several_ranks.py --ranks 2
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import bertstream

DATA = Path(__file__).parent / "data"


class Classifier(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        self.embed = bertstream.BertEmbedding(encoder)
        self.head = nn.Linear(encoder.embedding_dim, classes)

    def forward(self, texts):
        return self.head(self.embed(texts).vectors)


def train(rank, ranks, meeting_point, epochs):
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = bertstream.Encoder.from_pretrained("all-MiniLM-L6-v2", output="sentence", device="cpu", dtype="float32")
    words = ["bank", "bass", "bat", "crane", "seal", "spring"]
    lanes = bertstream.StreamConfig(lanes=2 * ranks)  # by default, data this small gets one lane
    loader = bertstream.stream(
        str(DATA / "senses-train.jsonl"), encoder, text="words", batch_size=16, shuffle=True,
        fields={"word": words.index}, reading=lanes,
    )  # fmt: skip
    classifier = Classifier(encoder, len(words))
    groups = [{"params": classifier.head.parameters(), "lr": 1e-2}, *encoder.parameter_groups(1e-4)]
    optimizer = torch.optim.AdamW(groups)
    unfreezing = bertstream.UnfreezeSchedule(encoder, start=1, every=1)
    for epoch in range(epochs):
        unfreezing.set(epoch)  # from epoch 1 on, batches hold tokens and the model embeds them
        model = nn.parallel.DistributedDataParallel(classifier)  # averages the parameters trainable now
        steps = 0
        for batch in loader:  # equally many per rank: one that has finished repeats its last
            loss = nn.functional.cross_entropy(model(batch["words"]), batch["word"])
            if batch.get("__repeated__", False):
                loss = 0 * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        print(f"rank {rank}, epoch {epoch}: {steps} steps, {loader.stats()['texts']} texts so far", flush=True)
    weights = sum(float(p.detach().double().sum()) for p in classifier.parameters())
    print(f"rank {rank}: weights add up to {weights:.9f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (args.ranks, f"{folder}/meet", args.epochs), args.ranks)
