"""The recipe: fit the head first, then pull each weight by how far it would move the new task's features.

python examples/recipe.py --steps 100
python examples/recipe.py --steps 100 --plain     # AdamW from a random head, to compare
"""

from __future__ import annotations

import argparse

import torch
from reviews import Reviews
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from recadam_core import Constant, gamma_for
from recadam_harness.archives import model_folder
from recadam_harness.experiments.data import Source
from recadam_torch import RecAdam, feature_importance, probe_head


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear head."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, 2)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features of the rows, of shape (rows, width)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> object:
        """Features of texts, as the measures of the source task want them."""
        parts = []
        for start in range(0, len(texts), 64):
            rows = self.tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=32)
            parts.append(self.encode(*(torch.tensor(rows[x]) for x in ("input_ids", "attention_mask"))))
        return torch.cat(parts).numpy()


def main() -> None:
    """Train, and print what was learnt and what was kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="AdamW from a random head instead")
    args = parser.parse_args()

    folder = model_folder("minilm-l3")
    torch.manual_seed(0)
    model = Classifier(str(folder)).eval()  # no dropout, here or later
    train, test = Reviews(folder, 2000, 1000), Reviews(folder, 0, 500)
    batches = torch.stack([torch.randperm(1000)[:16] for _ in range(args.steps)])
    before = Source("test").measure(model.embed)

    lr = 4e-4
    if args.plain:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        with torch.no_grad():
            parts = zip(train.ids.split(100), train.mask.split(100), strict=True)
            features = torch.cat([model.encode(ids, mask) for ids, mask in parts])
        probe_head(model.classifier, features, train.labels)
        importance = feature_importance(
            model.encoder.named_parameters(),
            (normalize(model.encode(train.ids[rows], train.mask[rows])) for rows in batches[:32]),
        )
        groups = [
            {"params": model.encoder.named_parameters(), "importance": importance},
            {"params": model.classifier.named_parameters(), "anchored": False},
        ]
        optimizer = RecAdam(groups, lr=lr, gamma=gamma_for(lr, pull=0.1), annealing=Constant(1.0, 1.0))
    rate = torch.optim.lr_scheduler.LambdaLR(  # up for a tenth of the steps, then down to nothing
        optimizer, lambda t: min(10 * (t + 1) / args.steps, (args.steps - t) / (0.9 * args.steps), 1.0)
    )

    for rows in batches:
        optimizer.zero_grad()
        scores = model.classifier(model.encode(train.ids[rows], train.mask[rows]))
        cross_entropy(scores, train.labels[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()

    after = Source("test").measure(model.embed)
    for name, what in (("snli_mnr", "source loss"), ("bbc_recall_at_1", "titles found")):
        print(f"{what}: {before[name]:.3f} before, {after[name]:.3f} after")
    with torch.no_grad():
        right = model.classifier(model.encode(test.ids, test.mask)).argmax(1) == test.labels
    print(f"test accuracy: {right.float().mean():.3f}")


if __name__ == "__main__":
    main()
