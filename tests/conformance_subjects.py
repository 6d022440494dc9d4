"""Subjects for the tests of the conformance kit: the named variants, ways to break the contract, the adapters."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import precond_ref
from precond_ref.conformance import subjects, variants
from precond_ref.conformance.subjects import Unsupported


class Variant:
    """A method with named deviations, from `precond_ref.conformance.variants`."""

    def __init__(self, flags: Iterable[str] = ()):
        self.flags = frozenset(flags)

    def init(self, config, params):
        self.config, self.method, self.rate = config, config.method, config["lr"]
        self.first, self.grads, self.members = [p.copy() for p in params], [], None

    def change(self, group=None, **factors):
        if group is not None or "lr" not in factors:
            return []
        self.rate *= factors["lr"]
        return ["lr"]

    def step(self, grads):
        self.grads.append(([g.copy() for g in grads], self.rate))
        if self.members is None:  # at the beginning, and after loading
            known = variants.of(self.method)
            fields = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
            decay = 0.0 if self.method.decays else self.config["weight_decay"]
            made = [np.asarray(p, np.float64) for p in self.first]
            self.members = [variants.Member(known, fields, p, decay, self.flags) for p in made]
            for earlier in self.grads[:-1]:
                self._advance(*earlier)
        return self._advance(grads, self.rate)

    def _advance(self, grads, rate):
        with np.errstate(all="ignore"):
            moved = [m.step(np.asarray(g, np.float64), rate) for m, g in zip(self.members, grads, strict=True)]
        return [x.astype(p.dtype) for (_, x, _), p in zip(moved, self.first, strict=True)]

    def save(self):
        return list(self.grads)

    def load(self, saved):
        self.grads, self.members = list(saved), None


class Broken(Variant):
    """A right implementation that breaks the contract in one way."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault, self.runs = fault, 0

    def init(self, config, params):
        super().init(config, params)
        self.runs += 1

    def step(self, grads):
        out = super().step(grads)
        if self.fault == "changes the gradient":
            grads[0] *= 2
        elif self.fault == "returns float32":
            out = [p.astype(np.float32) for p in out]
        elif self.fault == "not repeatable":
            out = [p + 1e-6 * self.runs for p in out]
        elif self.fault == "parameters share a norm" and len(out) > 1:
            shared = np.linalg.norm(np.concatenate([g.ravel() for g in grads]))
            out = [p * np.linalg.norm(grads[0]) / shared for p in out]
        elif self.fault == "NaN spreads" and any(np.isnan(g).any() for g in grads):
            out = [p * np.nan for p in out]
        return out

    def load(self, saved):
        super().load(saved[1:] if self.fault == "forgets on loading" else saved)


class Here:
    """In the place of `isolation.Isolated`, for tests of what the command says: in this process, at once."""

    def __init__(self, target, *, backend, dtype, names, limits):
        self.subject = subjects.wrap(subjects.load_target(target), backend=backend, dtype=dtype, names=names)

    def __getattr__(self, name):
        return getattr(self.subject, name)

    def close(self):
        pass


def factory(constructor: str) -> Callable[..., Any]:
    """The constructor of that name."""
    return operator.attrgetter(constructor)(precond_ref)


def torch_target(constructor: str) -> Callable[..., Any]:
    """Makes the PyTorch adapter's optimizer."""
    from precond_ref_torch import Optimizer

    def make(params, lr, weight_decay, **config):
        method = _made(constructor, config, weight_decay)
        flat = [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        if not all(method.takes(tuple(p.shape)) for p in flat):
            raise Unsupported("the adapter's routing gives this shape to another method")
        return Optimizer(params, method, lr=lr, weight_decay=weight_decay)

    return make


def optax_target(constructor: str) -> Callable[..., Any]:
    """Makes the optax adapter's transformation: the method, then decay and learning rate by optax."""
    import optax

    from precond_ref_jax import scale_by

    def make(lr, weight_decay, **config):
        method = _made(constructor, config, weight_decay)
        decay = 0.0 if method.decays else weight_decay
        return optax.chain(
            scale_by(method, takes=lambda path, x: True), optax.add_decayed_weights(decay), optax.scale(-lr)
        )

    return make


def _made(constructor, config, weight_decay):
    make = factory(constructor)
    import inspect

    own = {"weight_decay": weight_decay} if "weight_decay" in inspect.signature(make).parameters else {}
    return make(**config, **own)
