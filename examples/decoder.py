"""What the examples with a decoder share: Gemma 3 270M, movie reviews to learn and the news to remember."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from recadam_harness.decoders import Vocabulary, decoder_folder, load_decoder, tokenizer_of
from recadam_harness.tasks.movie_reviews import read_bbc, read_reviews
from recadam_harness.tasks.reviews_decoder import WORDS, review_prompt

NEWS, HELD_OUT, LENGTH = 64, 200, 64


def arguments(steps: int) -> argparse.ArgumentParser:
    """Options that the examples have in common."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--pull", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument(
        "--accept-gemma-terms", action="store_true", help="the weights are under the Gemma Terms of Use"
    )
    return parser


class Reviews:
    """Reviews to be finished with a word, and news, in the tokens that they have.

    Args:
        accepted: whether the terms of the weights are.
        count: how many reviews to train on.
    """

    def __init__(self, accepted: bool, count: int) -> None:
        folder = decoder_folder(accepted)
        self.tokenizer = tokenizer_of(folder)
        texts, self._labels = read_reviews()
        prompts = [review_prompt(text) for text in texts[: count + HELD_OUT]]
        _, bodies = read_bbc(NEWS)
        self.vocabulary = Vocabulary(self.tokenizer, [*prompts, *bodies, *WORDS])
        self._prompts = [row[-LENGTH:] for row in self.vocabulary(prompts)]
        self._words = [row[-1] for row in self.vocabulary(WORDS)]
        self.news = [torch.tensor([row[:LENGTH]]) for row in self.vocabulary(bodies)]
        torch.manual_seed(0)
        self.model = load_decoder(folder, self.vocabulary)

    def rows(self) -> list[dict[str, list[int]]]:
        """Rows to train on: only the last token, the word, is learnt."""
        pairs = zip(self._prompts[HELD_OUT:], self._labels[HELD_OUT:], strict=False)
        return [
            {"input_ids": [*row, self._words[label]], "completion_mask": [0] * len(row) + [1]}
            for row, label in pairs
        ]

    def choices(self) -> list[dict[str, list[int]]]:
        """The same as pairs of a chosen and a rejected answer."""
        pairs = zip(self._prompts[HELD_OUT:], self._labels[HELD_OUT:], strict=False)
        return [
            {
                "prompt_ids": row,
                "chosen_ids": [self._words[label]],
                "rejected_ids": [self._words[1 - label]],
            }
            for row, label in pairs
        ]

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of held-out reviews to which the right word is likelier."""
        self.model.eval()
        right = 0
        for row, label in zip(self._prompts[:HELD_OUT], self._labels[:HELD_OUT], strict=True):
            last = self.model(input_ids=torch.tensor([row])).logits[0, -1]
            right += int(last[self._words].argmax()) == label
        return right / HELD_OUT

    @torch.no_grad()
    def nats(self) -> float:
        """What the news cost: nats a token."""
        self.model.eval()
        losses: list[Any] = [self.model(input_ids=row, labels=row).loss.item() for row in self.news]
        return sum(losses) / len(losses)
