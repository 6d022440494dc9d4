"""The root-free and inverse-free methods with explicit Kronecker products, for float64 and for mpmath numbers.

Written from the equations alone: D x D matrices act on flattened tensors, projections solve least-squares problems.
"""

from __future__ import annotations

import functools

import mpmath
import numpy as np


def exact(array):
    """``array`` as mpmath numbers."""
    return np.vectorize(mpmath.mpf, otypes=[object])(array)


def kron(matrices):
    return functools.reduce(np.kron, matrices)


def identity(d, like):
    return exact(np.eye(d)) if like.dtype == object else np.eye(d)


def inverse(matrix):
    if matrix.dtype == object:
        return np.array((mpmath.matrix(matrix.tolist()) ** -1).tolist(), dtype=object).reshape(matrix.shape)
    return np.linalg.inv(matrix)


def unfold(tensor, n):
    return np.moveaxis(tensor, n, 0).reshape(tensor.shape[n], -1)


def others(items, n):
    return [item for j, item in enumerate(items) if j != n]


def free_entries(structure, d):
    """Lists of index pairs: each list one free number of a (d, d) matrix."""
    pairs = [(i, j) for i in range(d) for j in range(d)]
    name, _, sizes = structure.partition("(")
    sizes = [int(s) for s in sizes.rstrip(")").split(",") if s]
    if name == "dense":
        return [[p] for p in pairs]
    if name == "diagonal":
        return [[(i, i)] for i in range(d)]
    if name == "block-diagonal":
        starts = range(0, d, sizes[0])
        return [
            [(i, j)] for s in starts for i in range(s, min(s + sizes[0], d)) for j in range(s, min(s + sizes[0], d))
        ]
    if name in ("tril", "triu"):
        return [[(i, j) if name == "tril" else (j, i)] for i, j in pairs if i >= j]
    if name == "tril-toeplitz":
        return [[(j + k, j) for j in range(d - k)] for k in range(d)]
    if name == "triu-toeplitz":
        return [[(j, j + k) for j in range(d - k)] for k in range(d)]
    a = min(sizes[0], d)
    e = min(sizes[1], d - a)
    top, middle, last = range(a), range(a, d - e), range(d - e, d)
    cells = [(i, j) for i in top for j in range(d)] + [(i, i) for i in middle]
    cells += [(i, j) for i in last for j in middle] + [(i, j) for i in last for j in last]
    return [[c] for c in cells]


def basis(structure, d):
    """0/1 matrices that span the class, (count, d, d)."""
    matrices = []
    for cells in free_entries(structure, d):
        matrix = np.zeros((d, d))
        for cell in cells:
            matrix[cell] = 1
        matrices.append(matrix)
    return np.array(matrices)


def least_squares(x, structure):
    """The m of the class, of least norm, for which m + m^T is nearest to x."""
    e = basis(structure, len(x))
    columns = (e + e.transpose(0, 2, 1)).reshape(len(e), -1).T
    coefficients = np.linalg.lstsq(columns, x.reshape(-1), rcond=None)[0]
    return np.tensordot(coefficients, e, 1)


def inverse_free(
    grads,
    params,
    *,
    beta2,
    damping,
    momentum=0.0,
    riemannian_momentum=0.0,
    weight_decay=0.0,
    batch_size=1,
    every=1,
    structure=None,
    clip=True,
    statistics=None,
    factors=None,
):
    """Directions and factors of IF-Shampoo for gradients (steps, d_1, ..., d_N) and the parameters at each step."""
    shape = grads.shape[1:]
    k = [identity(d, grads) for d in shape] if factors is None else list(factors)
    m = [0 * x for x in k]
    buffer = 0 * grads[0]
    directions = []
    for t, (g, w) in enumerate(zip(grads, params, strict=True)):
        if t % every == 0:
            pseudo = [g] if statistics is None else list(statistics[t])
            new_k, new_m = [], []
            for n, d in enumerate(shape):
                outer = 0
                for x in pseudo:
                    p = unfold((kron(k).T @ x.reshape(-1)).reshape(shape), n)
                    outer = outer + p @ p.T
                traces = 1
                for other in others(k, n):
                    traces = traces * np.trace(other.T @ other)
                size = grads[0].size
                h = (batch_size * outer * d / len(pseudo) + damping * traces * (k[n].T @ k[n]) * d) / size
                x = h - identity(d, grads)
                step = x / 2 if structure is None else least_squares(x, structure[n])
                new_m.append(riemannian_momentum * m[n] + (1 - riemannian_momentum) * step)
                norm = (new_m[n] ** 2).sum() ** 0.5
                length = max(1, norm) if clip else 1
                new_k.append(k[n] - beta2 / length * (k[n] @ new_m[n]))
            k, m = new_k, new_m
        big = kron(k)
        u = (big @ (big.T @ g.reshape(-1))).reshape(shape) + weight_decay * w
        buffer = momentum * buffer + u
        directions.append(buffer)
    return np.array(directions), k, m


def root_free(
    grads,
    params,
    *,
    beta2,
    damping,
    momentum=0.0,
    weight_decay=0.0,
    batch_size=1,
    every=1,
    statistics=None,
    factors=None,
):
    """Directions and factors of RF-Shampoo, as in `inverse_free`."""
    shape = grads.shape[1:]
    s = [identity(d, grads) for d in shape] if factors is None else list(factors)
    buffer = 0 * grads[0]
    directions = []
    for t, (g, w) in enumerate(zip(grads, params, strict=True)):
        if t % every == 0:
            pseudo = [g] if statistics is None else list(statistics[t])
            inverses = [inverse(x) for x in s]
            new = []
            for n, d in enumerate(shape):
                middle = kron(others(inverses, n)) if len(shape) > 1 else identity(1, grads)
                outer = sum(unfold(x, n) @ middle @ unfold(x, n).T for x in pseudo)
                traces = np.trace(middle) if len(shape) > 1 else 1  # the trace of a Kronecker product: of the factors
                h = batch_size * outer / len(pseudo) + damping * traces * identity(d, grads)
                new.append((1 - beta2) * s[n] + beta2 * d / grads[0].size * h)
            s = new
        u = (kron([inverse(x) for x in s]) @ g.reshape(-1)).reshape(shape) + weight_decay * w
        buffer = momentum * buffer + u
        directions.append(buffer)
    return np.array(directions), s


def rms_prop(grads, params, *, beta2, damping, momentum=0.0, weight_decay=0.0, batch_size=1, initial=1.0):
    """Directions and averages of RF-RMSProp, one coordinate at a time."""
    directions = np.empty_like(grads)
    last = np.empty_like(grads[0])
    for index in np.ndindex(*grads.shape[1:]):
        s, buffer = initial, 0
        for t in range(len(grads)):
            g = grads[(t, *index)]
            s = s - beta2 * (s - batch_size * g**2)
            buffer = momentum * buffer + g / (s + damping) + weight_decay * params[(t, *index)]
            directions[(t, *index)] = buffer
        last[index] = s
    return directions, last


def adam_w(grads, *, beta1, beta2, damping, batch_size=1, initial=1.0, bias_correction=False):
    """Directions of RF-AdamW, from the sums that the recursions unroll to."""
    directions = np.empty_like(grads)
    for t in range(1, len(grads) + 1):
        m = sum((1 - beta1) * beta1 ** (t - i) * grads[i - 1] for i in range(1, t + 1))
        data = sum((1 - beta2) * beta2 ** (t - i) * batch_size * grads[i - 1] ** 2 for i in range(1, t + 1))
        if bias_correction:
            m, s = m / (1 - beta1**t), data / (1 - beta2**t)
        else:
            s = data + beta2**t * initial
        directions[t - 1] = m / (s + damping)
    return directions


# ---- runs ----


def run(method, grads, params, state=None, statistics=None):
    """Directions of ``method`` for given gradients and parameters (steps, ...), and the last state."""
    state = method.init(params[0]) if state is None else state
    directions = []
    for t, (g, w) in enumerate(zip(grads, params, strict=True)):
        more = {} if statistics is None else {"statistic": statistics[t]}
        direction, state = method.update(g, state, w, **more)
        directions.append(direction)
    return np.array(directions), state


def train(method, start, gradient, steps, lr, state=None):
    """Parameters after each step of ``w - lr * direction`` with ``gradient(t, w)``, and the last state."""
    w = start
    state = method.init(w) if state is None else state
    path = []
    for t in range(steps):
        direction, state = method.update(gradient(t, w), state, w)
        w = w - lr * direction
        path.append(w)
    return np.array(path), state


def along(tensor, matrices):
    """``matrices[n]`` multiplied onto axis n, for every n."""
    shape = tuple(len(a) for a in matrices)
    return (kron(matrices) @ tensor.reshape(-1)).reshape(shape)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def pseudo_gradients(sigma, shape):
    """D tensors whose mean outer product, flattened, is ``sigma``."""
    lower = np.linalg.cholesky(sigma)
    return np.sqrt(len(sigma)) * lower.T.reshape(len(sigma), *shape)


def positive(d, seed=0):
    """A symmetric positive definite (d, d) matrix with condition number below 1e2."""
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.5 * np.eye(d)


def noisy(targets):
    """Gradient of 1/2 ||W - T_t||^2."""
    return lambda t, w: w - targets[t]


def transformed(gradient, maps):
    """The gradient with respect to V for W = V x_n maps[n]."""
    return lambda t, v: along(gradient(t, along(v, maps)), [a.T for a in maps])
