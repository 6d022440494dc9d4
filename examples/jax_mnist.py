"""A flax classifier trained with ASGO as an optax transformation.

The data are MNIST if PRECOND_REF_DATA names its folder, else the digits.

python -m pip install -e ".[jax,cli]" flax && python examples/jax_mnist.py
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import precond_ref_jax
from precond_ref.problems import load_digits, load_mnist


class Network(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(64)(images))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(hidden)))


def main(epochs=3, batch_size=100):
    images, labels = load_mnist() if os.environ.get("PRECOND_REF_DATA") else load_digits()
    images = jnp.asarray(images.reshape(len(images), -1) / images.max(), jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)
    order = jax.random.permutation(jax.random.key(0), len(images))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]

    network = Network()
    params = network.init(jax.random.key(1), images[:1])
    steps = epochs * (len(train) // batch_size)
    rate = optax.cosine_decay_schedule(0.05, steps)
    optimizer = precond_ref_jax.asgo(rate, weight_decay=1e-2)  # the kernels; the biases get Adam
    state = optimizer.init(params)

    def loss(params, batch):
        logits = network.apply(params, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for epoch in range(epochs):
        shuffled = jax.random.permutation(jax.random.key(2 + epoch), train)
        for start in range(0, len(train) - batch_size + 1, batch_size):
            params, state, value = step(params, state, shuffled[start : start + batch_size])
        accuracy = (network.apply(params, images[test]).argmax(axis=1) == labels[test]).mean()
        print(f"epoch {epoch + 1}: loss {value:.3f}, test accuracy {accuracy:.3f}")
    return float(accuracy)


if __name__ == "__main__":
    main()
