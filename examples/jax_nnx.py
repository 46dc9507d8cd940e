"""Flax NNX: MiniLM with three layers, read from its PyTorch checkpoint, learns movie reviews.

python examples/jax_nnx.py --steps 96
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from recadam_core import Sigmoid
from recadam_harness.archives import model_folder
from recadam_harness.tasks.movie_reviews import read_reviews, tokenize
from recadam_jax import load_anchor, recadam

WIDTH, INNER, HEADS, LAYERS = 384, 1536, 12, 3
# Where the checkpoint keeps what.
NAMES = {
    "words/embedding": "embeddings.word_embeddings.weight",
    "positions/embedding": "embeddings.position_embeddings.weight",
    "kinds/embedding": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "after_mixed": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "after_outer": "output.LayerNorm",
}


class Layer(nnx.Module):
    """Attention and a feed-forward network, each with a norm after it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.key, self.value, self.mixed = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.inner, self.outer = nnx.Linear(WIDTH, INNER, rngs=rngs), nnx.Linear(INNER, WIDTH, rngs=rngs)
        self.after_mixed = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)
        self.after_outer = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        split = (*x.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (part(x).reshape(split) for part in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        x = self.after_mixed(x + self.mixed(mixed.reshape(x.shape)))
        return self.after_outer(x + self.outer(jax.nn.gelu(self.inner(x), approximate=False)))


class Classifier(nnx.Module):
    """A BERT encoder, the mean over its tokens, and a new head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(30522, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(512, WIDTH, rngs=rngs)
        self.kinds = nnx.Embed(2, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.words(ids) + self.positions(jnp.arange(ids.shape[1])) + self.kinds(jnp.zeros_like(ids))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        seen = mask[:, :, None]
        return self.head((x * seen).sum(1) / seen.sum(1))


def name(path: str) -> str:
    """`layers/0/query/kernel` as `encoder.layer.0.attention.self.query.weight`."""
    if path in NAMES:
        return NAMES[path]
    *layer, part, kind = path.split("/")
    prefix = f"encoder.layer.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[part]}.{'bias' if kind == 'bias' else 'weight'}"


@nnx.jit
def step(model: Classifier, optimizer: nnx.Optimizer, ids: jax.Array, mask: jax.Array, y: jax.Array) -> None:
    """Gradient and update in one program."""

    def loss(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(ids, mask), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main() -> None:
    """Train, and print what was learnt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=96)
    args = parser.parse_args()

    folder = model_folder("minilm-l3")
    texts, labels = read_reviews()
    train, test = (tokenize(folder, texts[start : start + n], 32) for start, n in ((2000, 512), (0, 500)))

    model = Classifier(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    anchor = load_anchor(
        folder / "model.safetensors",
        params,
        name,
        new=["head"],
        transpose=lambda path: path.endswith("/kernel"),
    )
    nnx.update(model, jax.tree.map(lambda p, star: p if star is None else star, params, anchor, is_leaf=bare))
    annealing = Sigmoid(k=0.1, t0=args.steps / 2)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), recadam(1e-4, gamma=2000.0, annealing=annealing, anchor=anchor)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for _ in range(args.steps):
        rows = rng.integers(0, len(train["ids"]), 16)
        step(model, optimizer, train["ids"][rows], train["mask"][rows] > 0, labels[2000 + rows])

    scores = nnx.jit(lambda model, ids, mask: model(ids, mask))(model, test["ids"], test["mask"] > 0)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, nnx.state(model, nnx.Param).words, anchor.words))
    print(f"the words are {float(moved):.3f} from where they were")
    print(f"test accuracy: {float((scores.argmax(-1) == labels[:500]).mean()):.3f}")


def bare(x: object) -> bool:
    """A missing anchor is no branch of the tree, but a leaf."""
    return x is None


if __name__ == "__main__":
    main()
