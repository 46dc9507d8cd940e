"""DPO whose reference model is the anchors: no second copy of the model, and the same training bit for bit.

python examples/dpo.py --accept-gemma-terms
python examples/dpo.py --accept-gemma-terms --second-model      # the usual way, for comparison
"""

from __future__ import annotations

import copy
import resource
import tempfile

from datasets import Dataset
from decoder import Reviews, arguments
from trl import DPOConfig, DPOTrainer

from recadam_torch import reference
from recadam_torch.huggingface import AnchorCallback


class OfTokens(DPOTrainer):
    """Takes rows that are tokens already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def main() -> None:
    """Train, and print what was learnt and what it took."""
    parser = arguments(steps=30)
    parser.add_argument(
        "--second-model", action="store_true", help="keep a copy of the model as the reference"
    )
    args = parser.parse_args()
    reviews = Reviews(args.accept_gemma_terms, count=4 * args.steps)
    print(f"before: {reviews.nats():.3f} nats a token of news, accuracy {reviews.accuracy():.3f}", flush=True)

    model, callback = reviews.model, AnchorCallback(pull=args.pull)
    ref_model = copy.deepcopy(model) if args.second_model else reference(model, callback)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=args.lr / 10,
            logging_steps=args.steps // 3 or 1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=80,
        )
        trainer = OfTokens(
            model,
            ref_model=ref_model,
            args=config,
            train_dataset=Dataset.from_list(reviews.choices()),
            processing_class=reviews.tokenizer,
            callbacks=[callback],
        )
        trainer.train()

    print(f"after: {reviews.nats():.3f} nats a token of news")
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {megabytes:,.0f} MB, of which the weights are {4e-6 * count(model):,.0f} MB")
    print(f"test accuracy: {reviews.accuracy():.3f}")


def count(model) -> int:
    """How many numbers the model has."""
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
