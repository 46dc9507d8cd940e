"""TRL's SFTTrainer and one line more: Gemma 3 270M learns to judge reviews; what becomes of the news?

python examples/sft.py --accept-gemma-terms
python examples/sft.py --accept-gemma-terms --pull 0      # the same without
"""

from __future__ import annotations

import tempfile
import time

from datasets import Dataset
from decoder import Reviews, arguments
from trl import SFTConfig, SFTTrainer

from recadam_torch import Forgetting
from recadam_torch.huggingface import AnchorCallback


def main() -> None:
    """Train, and print what was learnt and what was kept."""
    args = arguments(steps=60).parse_args()
    reviews = Reviews(args.accept_gemma_terms, count=8 * args.steps)
    print(f"before: {reviews.nats():.3f} nats a token of news, accuracy {reviews.accuracy():.3f}", flush=True)

    callback = AnchorCallback(pull=args.pull)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=args.steps // 3 or 1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            completion_only_loss=True,
        )
        trainer = SFTTrainer(
            reviews.model,
            args=config,
            train_dataset=Dataset.from_list(reviews.rows()),
            processing_class=reviews.tokenizer,
        )
        trainer.add_callback(callback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started

    meter = Forgetting(reviews.model, callback, [{"input_ids": row} for row in reviews.news])
    print(f"{seconds / args.steps:.2f} s a step; the news moved by KL = {meter().kl:.4f} nats a token")
    print(f"after: {reviews.nats():.3f} nats a token of news")
    print(f"test accuracy: {reviews.accuracy():.3f}")


if __name__ == "__main__":
    main()
