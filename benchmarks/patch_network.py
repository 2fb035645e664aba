"""A small smooth classifier of the digits for the differentiable examples: seconds to train.

Linear embedding of 2 x 2 patches, softplus, one hidden layer. Smooth, so that derivatives of
gradients are informative; without convolutions, whose gradients XLA:CPU runs slowly in loops.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

PATCH = 2


def init(seed, *, side=16, features=16, hidden=64, classes=10):
    """Random parameters."""
    def dense(key, inputs, outputs):
        scale = np.sqrt(2.0 / inputs)
        return scale * jax.random.normal(key, (inputs, outputs)), jnp.zeros(outputs)

    keys = jax.random.split(jax.random.key(seed), 3)
    return (dense(keys[0], 3 * PATCH**2, features),
            dense(keys[1], features * (side // PATCH) ** 2, hidden),
            dense(keys[2], hidden, classes))


def apply_fn(params, x):
    """Logits [N, classes] of images [N, H, W, 3] in [0, 1]."""
    count, height, width, channels = x.shape
    rows, columns = height // PATCH, width // PATCH
    x = (x - 0.5).reshape(count, rows, PATCH, columns, PATCH, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * columns, -1)
    (w1, b1), (w2, b2), (w3, b3) = params
    x = jax.nn.softplus(x @ w1 + b1).reshape(count, -1)
    return jax.nn.softplus(x @ w2 + b2) @ w3 + b3


def cross_entropy(params, x, y):
    """Mean cross entropy of the clean images."""
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()


def accuracy(params, x, y):
    """Share of correctly classified images."""
    return float(np.mean(np.asarray(jax.jit(apply_fn)(params, x)).argmax(-1) == y))


def batches(x, y, size, seed):
    """Batches in random order, for ever."""
    random = np.random.RandomState(seed)
    while True:
        order = random.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            chosen = order[start:start + size]
            yield x[chosen], y[chosen]


def fit(params, x, y, *, steps, learning_rate, batch_size=64, seed=0, loss=cross_entropy):
    """Adam on `loss(params, x, y)`; returns the parameters after `steps` steps."""
    optimizer = optax.adam(learning_rate)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)  # the caller's are not donated
    state = optimizer.init(params)
    stream = batches(x, y, batch_size, seed)
    for _ in range(steps):
        params, state = step(params, state, *next(stream))
    return params


def standard(steps=600, seed=0, **shape):
    """(params, training images, training labels, test images, test labels)."""
    from gse_jax import data

    training, test = data.load("digits:train"), data.load("digits")
    # The digits are 8 x 8 images enlarged to 32 x 32: 16 x 16 holds the same and is four times
    # as fast.
    images = training.images[:, ::2, ::2]
    params = fit(init(seed, **shape), images, training.labels, steps=steps, learning_rate=3e-3,
                 seed=seed)
    return params, images, training.labels, test.images[:, ::2, ::2], test.labels
