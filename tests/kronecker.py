"""Laws that RF-Shampoo and IF-Shampoo share, with explicit Kronecker products and least-squares projections."""

from __future__ import annotations

import functools

import numpy as np
from helpers import distance


def kron(matrices):
    return functools.reduce(np.kron, matrices)


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


# ---- laws of the methods whose curvature is a Kronecker product of factors S; ``make`` is one with loud fields ----


def start_at(method, param, factors):
    """The initial state with other S."""
    inverses = tuple(map(np.linalg.inv, factors))
    state = method.init(param)
    if hasattr(state, "inverses"):
        return state._replace(factors=tuple(factors), inverses=inverses)
    return state._replace(factors=tuple(map(np.linalg.cholesky, inverses)))


def curvature(state):
    """All S of a state."""
    return state.factors if hasattr(state, "inverses") else [np.linalg.inv(k @ k.T) for k in state.factors]


def affine_gap(method):
    """L1 and L13: W = A V M^T, S = A^T A and M^T M at the start. Distances of the paths and of S from A^T S A."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    maps = [
        np.eye(d) + 0.5 * x / np.linalg.norm(x, 2) for d, x in ((4, normal(4, 4, seed=3)), (3, normal(3, 3, seed=4)))
    ]
    w, state = train(method, start, noisy(targets), 100, 2**-6)
    v0 = along(start, [np.linalg.inv(a) for a in maps])
    begin = start_at(method, v0, [a.T @ a for a in maps])
    v, other = train(method, v0, transformed(noisy(targets), maps), 100, 2**-6, begin)
    expected = [a.T @ s @ a for a, s in zip(maps, curvature(state), strict=True)]
    return distance([along(x, maps) for x in v], w), distance(curvature(other), expected)


def check_affine(make):
    """Without damping they are the same; with it (the negative test) not."""
    assert max(affine_gap(make(damping=0.0))) <= 1e-12
    assert affine_gap(make())[0] >= 1e-3


def check_gauge(make):
    """L4: (c S_C, S_K / c) gives the same directions."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    w, _ = train(make(), start, noisy(targets), 100, 2**-6)
    v, _ = train(make(), start, noisy(targets), 100, 2**-6, start_at(make(), start, (9 * np.eye(4), np.eye(3) / 9)))
    assert distance(v, w) <= 1e-12


def check_reduction(make):
    """L5: the mean with B and the sum with B = 1, where S_0 and lambda are divided by B."""
    grads, params = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2)
    mean, total = make(batch_size=8, damping=0.25), make(batch_size=1, damping=2.0)
    state = start_at(mean, params[0], (np.eye(4) / 8, np.eye(3)))
    assert distance(run(mean, grads, params, state)[0], run(total, 8 * grads, params)[0]) <= 1e-12


def check_scaling(make):
    """L6: g -> s g, S_0 -> s^2 S_0, lambda -> s^2 lambda: u -> u / s. L7: curvature -> s curvature: u unchanged."""
    grads, params, statistics = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2), normal(50, 2, 4, 3, seed=3)
    small, s = make(weight_decay=0.0), 3.0
    for power, given, scaled in ((2, None, None), (1, statistics, np.sqrt(s) * statistics)):
        large = small.replace(damping=small.damping * s**power)
        state = start_at(large, params[0], (s**power * np.eye(4), np.eye(3)))
        u, _ = run(small, grads, params, statistics=given)
        v, _ = run(large, s * grads, params, state, statistics=scaled)
        assert distance(v * s ** (power - 1), u) <= 1e-12


def check_permutation(make):
    """L9: axes in another order, and their structures. L10: axes of size 1 drop out."""
    grads, params = normal(20, 4, 3, 2, seed=1), normal(20, 4, 3, 2, seed=2)
    structured = hasattr(make(), "structure")
    method = make(structure=("dense", "tril", "diagonal")) if structured else make()
    turned = make(structure=("diagonal", "dense", "tril")) if structured else method
    u, _ = run(method, grads, params)
    v, _ = run(turned, *(np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for x in (grads, params)))
    assert distance(v.transpose(0, 2, 3, 1), u) <= 1e-12
    v, _ = run(method, *(x.reshape(20, 1, 4, 3, 1, 2) for x in (grads, params)))
    np.testing.assert_array_equal(v.reshape(u.shape), u)


def converged(make, sigma, shape, **changes):
    """A method without momenta, its statistic, and its state after 400 updates with the curvature ``sigma``."""
    more = {"riemannian_momentum": 0.0} if hasattr(make(), "riemannian_momentum") else {}
    method = make(**{"momentum": 0.0, "weight_decay": 0.0, "batch_size": 1, **more, **changes})
    statistic, w = pseudo_gradients(sigma, shape), np.zeros((400, *shape))
    return method, statistic, run(method, w, w, statistics=[statistic] * 400)[1]


def check_fixed_point(make):
    """5.1, 5.4: the stationary equations with damping; a Kronecker curvature is found without, on three axes too."""
    _, statistic, state = converged(make, positive(6), (3, 2))
    s_c, s_k = curvature(state)
    c, k = np.linalg.inv(s_c), np.linalg.inv(s_k)
    right = np.mean([x @ k @ x.T for x in statistic], axis=0) + 0.25 * np.trace(k) * np.eye(3)
    left = np.mean([x.T @ c @ x for x in statistic], axis=0) + 0.25 * np.trace(c) * np.eye(2)
    assert distance([2 * s_c, 3 * s_k], [right, left]) <= 1e-12
    parts = [positive(d, seed=d) for d in (3, 2, 2)]
    method, _, state = converged(make, kron(parts), (3, 2, 2), damping=0.0)
    assert distance([kron(curvature(state))], [kron(parts)]) <= 1e-12
    g = normal(3, 2, 2)
    u, _ = method.replace(every=2).update(g, state._replace(step=1), g)
    assert distance([u], [np.linalg.solve(kron(parts), g.reshape(-1)).reshape(g.shape)]) <= 1e-12


def check_newton_rate(make):
    """5.7: with the Hessian as curvature the error contracts by 1 - lr, whatever the condition number, here 900."""
    r, x = np.diag([1.0, 5.0, 30.0]), np.diag([0.25, 1.0, 2.0, 7.5])
    method, statistic, state = converged(make, np.kron(r, x), (3, 4), damping=0.0)
    w = normal(3, 4)
    for _ in range(20):
        u, state = method.update(r @ w @ x, state, w, statistic=statistic)
        new = w - 0.3 * u
        assert abs(np.linalg.norm(new) / np.linalg.norm(w) - 0.7) <= 1e-10
        w = new


def check_local_rates(make):
    """5.5: overall scale 1 - N beta2, trace-free shape 1 - beta2, gauge 1, for a Kronecker curvature."""
    shape, epsilon, beta2 = (3, 4), 1e-6, 0.125
    sigma = kron([positive(d, seed=d) for d in shape])
    method, statistic, state = converged(make, sigma, shape, damping=0.0, beta2=beta2)
    (c, k), w, e = curvature(state), np.zeros(shape), normal(3, 3)
    e = e + e.T - 2 * np.trace(e) / 3 * np.eye(3)
    root = np.linalg.cholesky(c)

    def after(c0, k0):
        new_c, new_k = curvature(method.update(w, start_at(method, w, (c0, k0)), w, statistic=statistic)[1])
        inverse = np.linalg.inv(root)
        return inverse @ new_c @ inverse.T - np.eye(3), np.linalg.solve(k, new_k) - np.eye(4)

    dc, dk = after(c * (1 + epsilon), k)
    # The neglected second order is epsilon times a number below 10.
    assert abs((np.trace(dc) / 3 + np.trace(dk) / 4) / epsilon - (1 - 2 * beta2)) <= 10 * epsilon
    dc, _ = after(root @ (np.eye(3) + epsilon * e) @ root.T, k)
    np.testing.assert_allclose(dc / epsilon, (1 - beta2) * e, rtol=0, atol=100 * epsilon)
    dc, _ = after(c * (1 + epsilon), k / (1 + epsilon))
    np.testing.assert_allclose(dc / epsilon, np.eye(3), rtol=0, atol=10 * epsilon)


LAWS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_affine,
        check_gauge,
        check_reduction,
        check_scaling,
        check_permutation,
        check_fixed_point,
        check_newton_rate,
        check_local_rates,
    )
}
