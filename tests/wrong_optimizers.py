"""Right optimizers in plain torch, optax and NumPy, and wrong ones: each has one piece of the source exchanged."""

from __future__ import annotations

from typing import Any, NamedTuple

TORCH_ADAM = """
import torch

class Target(torch.optim.Optimizer):
    def __init__(self, params, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False, foreach=False):
        options = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, options | dict(foreach=foreach))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, beta1, beta2, eps = (group[name] for name in ("lr", "beta1", "beta2", "eps"))
            found, updates = [], []
            for number, p in enumerate(group["params"]):
                shrink = 1 - lr * group["weight_decay"]
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = int(state["step"])
                m = state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
                v = state["v"].mul_(beta2).add_(g * g, alpha=1 - beta2)
                root = (v / (1 - beta2**t)).sqrt() + eps
                u = m / (1 - beta1**t) / torch.where(root == 0, 1, root)
                p.mul_(shrink)
                found.append(p)
                updates.append(u)
            if group["foreach"] and found:
                torch._foreach_add_(found, updates, alpha=-lr)
            else:
                for p, u in zip(found, updates):
                    p.add_(u, alpha=-lr)
        return loss
"""

TORCH_SHAMPOO = """
import torch

class Target(torch.optim.Optimizer):
    def __init__(self, params, lr, eps, beta2=1.0, bias_correction=False, every=1, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, eps=eps, beta2=beta2, bias_correction=bias_correction, every=every,
                                      weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta2, every, eps = group["beta2"], group["every"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad, self.state[p]
                if p.ndim == 0:
                    raise NotImplementedError("scalars")
                if not state:
                    state["step"] = torch.zeros(())
                    state["grams"] = [torch.zeros(d, d, dtype=p.dtype) for d in p.shape]
                    state["roots"] = [torch.zeros(d, d, dtype=p.dtype) for d in p.shape]
                state["step"] += 1
                t, u = int(state["step"]), g
                scale = 1 - beta2**t if group["bias_correction"] else 1.0
                for axis, gram in enumerate(state["grams"]):
                    rows = g.movedim(axis, 0).reshape(p.shape[axis], -1)
                    gram.mul_(beta2).addmm_(rows, rows.T, alpha=1 if beta2 == 1 else 1 - beta2)
                    if (t - 1) % every == 0:
                        state["roots"][axis] = power(gram / scale, eps, -0.5 / p.ndim)
                    u = torch.tensordot(state["roots"][axis], u.movedim(axis, 0), 1).movedim(0, axis)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])
        return loss


def power(gram, eps, exponent):
    w, q = torch.linalg.eigh(gram)
    w = w + eps
    keep = w > 1e-12 * w.max().clamp(min=1e-300) if eps == 0 else w > 0
    return (q * torch.where(keep, w.clamp(min=1e-300) ** exponent, 0)) @ q.T
"""

OPTAX_ADAM = """
import jax
import jax.numpy as jnp
import optax

def Target(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"t": 0, "m": zeros, "v": zeros}

    def update(grads, state, params):
        t = state["t"] + 1
        rate = learning_rate(state["t"]) if callable(learning_rate) else learning_rate
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state["m"], grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state["v"], grads)

        def leaf(m, v, p):
            root = jnp.sqrt(v / (1 - b2**t)) + eps
            u = m / (1 - b1**t) / jnp.where(root == 0, 1, root)
            return -rate * (u + weight_decay * p)

        return jax.tree.map(leaf, m, v, params), {"t": t, "m": m, "v": v}

    return optax.GradientTransformation(init, update)
"""

NUMPY_ADAM = """
import numpy as np

def Target(param, grad, state, *, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    t, m, v = state or (0, np.zeros_like(param), np.zeros_like(param))
    t, m, v = t + 1, beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    root = np.sqrt(v / (1 - beta2**t)) + eps
    u = m / (1 - beta1**t) / np.where(root == 0, 1, root)
    return (1 - lr * weight_decay) * param - lr * u, (t, m, v)
"""

NUMPY_ASGO = """
import numpy as np

def Target(param, grad, state, *, lr, beta1=0.9, beta2=0.95, eps=1e-8, rms=0.2, weight_decay=0.0, every=1):
    rows, columns = param.shape
    left = rows < columns
    t, m, v, root = state or (0, np.zeros_like(param), 0.0, None)
    g = grad
    gram = g @ g.T if left else g.T @ g
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * gram
    if t % every == 0:
        w, q = np.linalg.eigh(v)
        if eps == 0:
            w = np.where(w > 1e-12 * max(w.max(), 1e-300), w, np.inf)
        root = (q * (np.maximum(w, 0) + eps) ** -0.5) @ q.T
    u = root @ m if left else m @ root
    if rms is not None:
        u = u * (rms * u.size**0.5 / (float(np.linalg.norm(u)) or 1))
    return (1 - lr * weight_decay) * param - lr * u, (t + 1, m, v, root)
"""

NUMPY_RMSPROP = """
import numpy as np

def Target(param, grad, state, *, lr, beta2=0.99, eps=1e-8, centered=False, bias_correction=False, weight_decay=0.0):
    t, v, mean = state or (0, np.zeros_like(param), np.zeros_like(param))
    t, v, mean = t + 1, beta2 * v + (1 - beta2) * grad**2, beta2 * mean + (1 - beta2) * grad
    c = 1 - beta2**t if bias_correction else 1
    root = np.sqrt(np.maximum(v / c - (mean / c) ** 2 * centered, 0)) + eps
    return (1 - lr * weight_decay) * param - lr * grad / np.where(root == 0, 1, root), (t, v, mean)
"""

NUMPY_ADAFD = """
import numpy as np

def Target(param, grad, state, *, lr, size, delta, weight_decay=0.0):
    if not np.isfinite(grad).all():
        return param * np.nan, state
    d = param.size
    u, e, rho = state or (np.zeros((d, 0), param.dtype), np.zeros(0, param.dtype), 0.0)
    u, s, _ = np.linalg.svd(np.column_stack([u * np.sqrt(e), grad]), full_matrices=False)
    e = s**2
    if len(e) >= size:
        u, cut = u[:, : size], e[size - 1]
        e, rho = np.maximum(e[: size] - cut, 0), rho + cut
    u, e = u[:, e > 1e-15 * s[0]**2], e[e > 1e-15 * s[0]**2]
    c = u.T @ grad
    step = u @ (c / (np.sqrt(e) + delta)) + (grad - u @ c) / (delta or np.inf)
    return (1 - lr * weight_decay) * param - lr * step, (u, e, rho)
"""

TORCH_SGD = """
import torch

class Target(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                b = self.state[p].get("b")
                b = p.grad.clone() if b is None else b.mul_(group["momentum"]).add_(p.grad)
                self.state[p]["b"] = b
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(b, alpha=group["lr"])
        return loss
"""

RIGHT = {
    "torch SGD": (TORCH_SGD, "SGD"),
    "torch Adam": (TORCH_ADAM, "Adam"),
    "torch Shampoo": (TORCH_SHAMPOO, "Shampoo"),
    "optax Adam": (OPTAX_ADAM, "Adam"),
    "numpy Adam": (NUMPY_ADAM, "Adam"),
    "numpy ASGO": (NUMPY_ASGO, "ASGO"),
    "numpy RMSProp": (NUMPY_RMSPROP, "RMSProp"),
    "numpy AdaFD": (NUMPY_ADAFD, "AdaFD"),
}


AVERAGING = """    def add_param_group(self, group):
        super().add_param_group(group)
        for p in group["params"]:
            p.register_post_accumulate_grad_hook(self.average)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.calls = {}

    def average(self, p):
        self.calls[p] = self.calls.get(p, 0) + 1
        p.grad.div_(self.calls[p])

    @torch.no_grad()"""


class Wrong(NamedTuple):
    """An edit of a right optimizer, and the check that finds it."""

    base: str
    old: str
    new: str
    caught: str


# fmt: off
A, S, G, J, N, M = "torch Adam", "torch Shampoo", "torch SGD", "optax Adam", "numpy Adam", "numpy ASGO"
R, F = "numpy RMSProp", "numpy AdaFD"
LOOP = "for group in self.param_groups:"
ADAM_G = 'g = -p.grad if group["maximize"] else p.grad'
COUNT, LAST = 't = int(state["step"])', "p.mul_(shrink)"
NUMPY_T = "t, m, v = t + 1,"
SUB = "sub_(u, alpha=group["
WRONG: dict[str, Wrong] = {
    # values of groups, and values that change
    "lr of the constructor": Wrong(A, "eps = (group[name]", "eps = (self.defaults[name]", "schedule"),
    "lr of the first group": Wrong(A, "(group[name] for", "(self.param_groups[0][name] for", "group-values"),
    "decay of the constructor": Wrong(A, 'group["weight_decay"]', 'self.defaults["weight_decay"]', "schedule"),
    "decay of the first group": Wrong(A, 'group["weight_decay"]',
        'self.param_groups[0]["weight_decay"]', "group-values"),
    "only the first group": Wrong(A, LOOP, "for group in self.param_groups[:1]:", "groups"),
    "schedule late": Wrong(J, 'learning_rate(state["t"])', "learning_rate(t)", "schedule"),
    "lr in the momentum": Wrong(G, "b.mul_(group[\"momentum\"]).add_(p.grad)",
        'b.mul_(group["momentum"]).add_(p.grad, alpha=group["lr"] / self.state[p].setdefault(\'lr\', '
        'group["lr"]))', "schedule"),
    # gradients
    "buffer is the gradient": Wrong(G, "p.grad.clone()", "p.grad", "gradient-buffer"),
    "break": Wrong(A, "continue", "break", "no-gradient"),
    "decay without a gradient": Wrong(A, "if p.grad is None:",
        "p.mul_(shrink if p.grad is None else 1)\n"
        "                if p.grad is None:", "unfreezing"),
    "one count for all": Wrong(A, COUNT, 't = self.t = getattr(self, "t", 0) + (number == 0)', "groups"),
    "one count for a group": Wrong(A, COUNT,
        't = group["t"] = max(group.get("t", 0), int(state["step"]))', "unfreezing"),
    "a hook that averages": Wrong(G, "    @torch.no_grad()", AVERAGING, "accumulation"),
    "strides": Wrong(G, "p.grad.clone()",
        "torch.as_strided(p.grad, p.shape, torch.empty(p.shape).stride()).clone()", "layout"),
    "scaler": Wrong(G, "for p in group[\"params\"]:",
        'for p in group["params"]:\n'
        "                self._step_supports_amp_scaling = True", "skipped-step"),
    "NaN replaced": Wrong(A, ADAM_G, "g = torch.nan_to_num(-p.grad if group['maximize'] else p.grad)", "nonfinite"),
    "maximize flips the decay": Wrong(A, 'lr * group["weight_decay"]',
        'lr * group["weight_decay"] * (-1 if group["maximize"] else 1)', "maximize"),
    "maximize in place": Wrong(A, ADAM_G, "g = p.grad.neg_() if group['maximize'] else p.grad", "maximize"),
    "betas of the first group": Wrong(A, "found, updates = [], []",
        "found, updates, beta1 = [], [], self.param_groups[0]['beta1']", "group-values"),
    "foreach with one count": Wrong(A, COUNT,
        't = max(int(s["step"]) for s in self.state.values()) if group["foreach"] else int(state["step"])',
        "unfreezing"),
    "a list made once": Wrong(G, "if p.grad is None:",
        "if not self.__dict__.setdefault('live', {}).setdefault(p, p.requires_grad) or p.grad is None:", "unfreezing"),
    "strides of three axes": Wrong(G, "p.grad.clone()",
        "(p.grad if p.ndim < 3 else torch.as_strided(p.grad, p.shape, torch.empty(p.shape).stride())).clone()",
        "layout"),
    "roots not saved": Wrong(S, "    @torch.no_grad()",
        "    def __setstate__(self, state):\n"
        "        super().__setstate__(state)\n"
        "        for s in self.state.values():\n"
        "            if 'roots' in s: s['roots'] = [torch.eye(len(r), dtype=r.dtype) for r in s['roots']]\n"
        "\n"
        "    @torch.no_grad()", "resume"),
    "roots made anew on loading": Wrong(S, "    @torch.no_grad()",
        "    def __setstate__(self, state):\n"
        "        super().__setstate__(state)\n"
        "        for group in self.param_groups:\n"
        "            for s in (self.state[p] for p in group['params'] if 'roots' in self.state.get(p, ())):\n"
        "                scale = 1 - group['beta2'] ** int(s['step']) if group['bias_correction'] else 1.0\n"
        "                s['roots'] = [power(x / scale, group['eps'], -0.5 / len(s['grams'])) for x in s['grams']]\n"
        "\n"
        "    @torch.no_grad()", "resume"),
    "maximize ignored": Wrong(A, ADAM_G, "g = p.grad", "maximize"),
    "foreach ignored": Wrong(A, 'group["foreach"] and found', "False", "engines"),
    "foreach wrong": Wrong(A, "alpha=-lr)\n            else", "alpha=-lr * 1.01)\n            else", "engines"),
    "closure without gradients": Wrong(A, "with torch.enable_grad():", "if True:", "closure"),
    "loss not returned": Wrong(A, "return loss", "return None", "closure"),
    "closure twice": Wrong(A, "loss = closure()", "loss = closure() and closure()", "closure"),
    # saving and loading
    "lr of the constructor on loading": Wrong(G, "    @torch.no_grad()",
        "    def __setstate__(self, state):\n"
        "        super().__setstate__(state)\n"
        "        for group in self.param_groups: group['lr'] = self.defaults['lr']\n"
        "\n"
        "    @torch.no_grad()", "resume-values"),
    "decay lost on loading": Wrong(A, "    @torch.no_grad()",
        "    def __setstate__(self, state):\n"
        "        super().__setstate__(state)\n"
        "        for group in self.param_groups: group['weight_decay'] = 0.0\n"
        "\n"
        "    @torch.no_grad()", "resume"),
    "the first parameter saved": Wrong(A, "    @torch.no_grad()",
        "    def state_dict(self):\n"
        "        out = super().state_dict()\n"
        "        out['state'] = {k: v for k, v in out['state'].items() if k == 0}\n"
        "        return out\n"
        "\n"
        "    @torch.no_grad()", "resume"),
    "step saved modulo 10": Wrong(A, "    @torch.no_grad()",
        "    def state_dict(self):\n"
        "        out = super().state_dict()\n"
        "        out['state'] = {k: v | dict(step=v['step'] % 10) for k, v in out['state'].items()}\n"
        "        return out\n"
        "\n"
        "    @torch.no_grad()", "resume"),
    "float32 state of bfloat16": Wrong(A, 'state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)',
        'state["m"], state["v"] = (torch.zeros_like(p, dtype=torch.promote_types(p.dtype, '
        'torch.float32)) for _ in "mv")', "resume-dtypes"),
    # long runs
    "bias correction stops": Wrong(A, COUNT, 't = min(int(state["step"]), 20)', "long-run"),
    "wrong from step 12": Wrong(N, "return (1 - lr", "u = u * (1 if t <= 12 else 1.001); return (1 - lr", "long-run"),
    "state starts again": Wrong(N, NUMPY_T,
        "m, v = (m, v) if t % 100 or not t else (0 * m, 0 * v); t, m, v = t + 1,", "long-run"),
    "root never renewed": Wrong(S, "if (t - 1) % every == 0:",
        "if (t - 1) % every == 0 and (every == 1 or t <= 10):", "long-run"),
    "wrong under jit": Wrong(J, 't = state["t"] + 1',
        't = state["t"] + (2 if isinstance(state["t"], jax.core.Tracer) else 1)', "engines"),
    "wrong without jit": Wrong(J, 't = state["t"] + 1',
        't = state["t"] + (1 if isinstance(state["t"], jax.core.Tracer) or state["t"] < 5 else 2)', "repeatable"),
    # shapes
    "wrong on 4 axes": Wrong(A, ADAM_G, ADAM_G + " * (1 if p.ndim < 4 else 0.9)", "axes"),
    "blocks above 16": Wrong(S, "gram / scale, eps",
        "(gram / scale if len(gram) <= 16 else torch.block_diag(gram[:16, :16], gram[16:, 16:]) / scale), eps",
        "shapes"),
    "eight eigenvalues": Wrong(S, "w = w + eps",
        "w = torch.where(torch.arange(len(w)) < len(w) - 8, 0, w) + eps", "shapes"),
    "one triangle above 6": Wrong(S, "gram / scale, eps",
        "(gram / scale if len(gram) <= 6 else torch.triu(gram) / scale), eps", "shapes"),
    "wrong side if long": Wrong(M, "left = rows < columns", "left = rows < columns or rows > 4 * columns", "shapes"),
    "wrong side if long and small": Wrong(M, "left = rows < columns",
        "left = rows < columns or 30 > rows > 4 * columns > 4", "shapes"),
    "sixteen rows of a sketch": Wrong(F, "c = u.T @ grad",
        "e = np.where(np.arange(len(e)) < 16, e, 0); c = u.T @ grad", "shapes"),
    "scaled if longer by 20": Wrong(M, "return (1 - lr",
        "u = u * (1 if rows <= columns + 20 else 0.99); return (1 - lr", "shapes"),
    "above 4096 entries": Wrong(N, "return (1 - lr",
        "u = u * (1 if u.size <= 4096 else 0.99); return (1 - lr", "shapes"),
    "above 4096 entries in JAX": Wrong(J, "return -rate * (u", "return -rate * (p.size <= 4096) * (u", "shapes"),
    "third parameter": Wrong(A, ADAM_G, ADAM_G + "; g = g if number < 2 else 0.999 * g", "independent"),
    "twelfth parameter": Wrong(A, ADAM_G, ADAM_G + "; g = g if number < 11 else 0.999 * g", "many"),
    "roots by shape": Wrong(M, "    u = root @ m if left",
        "    roots = Target.__dict__.setdefault('roots', {})\n"
        "    if t % every == 0: roots[param.shape] = root\n"
        "    root = roots[param.shape]\n"
        "    u = root @ m if left", "independent"),
    "no decay of vectors": Wrong(N, "(1 - lr * weight_decay)", "(1 - lr * weight_decay * (param.ndim != 1))", "axes"),
    # sizes of gradients
    "minute entries zeroed": Wrong(N, NUMPY_T,
        "grad = np.where(np.abs(grad) < 1e-12, 0, grad); t, m, v = t + 1,", "sizes"),
    "clamped at 1e6": Wrong(A, ADAM_G, ADAM_G + "; g = g.clamp(-1e6, 1e6)", "sizes"),
    "small eigenvalues dropped": Wrong(M, "np.maximum(w, 0)", "np.where(w > 1e-6 * w.max(), w, 1e30)", "sizes"),
    "norm above 100": Wrong(M, "g = grad", "g = grad / max(1, np.linalg.norm(grad) / 100)", "sizes"),
    "half precision ends at 65504": Wrong(M, "g = grad", "g = np.clip(grad, -65504, 65504)", "sizes"),
    "small entries zeroed": Wrong(N, NUMPY_T,
        "grad = np.where(np.abs(grad) < 1e-6, 0, grad); t, m, v = t + 1,", "sizes"),
    "clamped at 5": Wrong(A, ADAM_G, ADAM_G + "; g = g.clamp(-5, 5)", "sizes"),
    "clamped at 5 in JAX": Wrong(J, "grads)\n\n        def leaf", "grads)\n"
        "        m = jax.tree.map(lambda m: jnp.clip(m, -5, 5), m)\n\n        def leaf", "sizes"),
    "float32 statistic": Wrong(N, "(1 - beta2) * grad**2", "(1 - beta2) * grad.astype('f').astype('d')**2", "inputs"),
    # sizes that change during the run
    "entries of a step up to 4": Wrong(N, "return (1 - lr", "u = np.clip(u, -4, 4); return (1 - lr", "bursts"),
    "lr in single precision": Wrong(N, "return (1 - lr", "lr = float(np.float32(lr)); return (1 - lr", "long-run"),
    "rms of a step up to 2": Wrong(N, "return (1 - lr",
        "u = u / max(1, np.sqrt(np.mean(u * u)) / 2); return (1 - lr", "bursts"),
    "norm of a step up to 200": Wrong(M, "return (1 - lr",
        "u = u / max(1, np.linalg.norm(u) / 200); return (1 - lr", "bursts"),
    # values of hyperparameters
    "beta2 at most 0.98": Wrong(R, "t, v, mean = state or", "beta2 = min(beta2, 0.98); t, v, mean = state or",
        "long-run"),
    "eps at most 1": Wrong(N, "+ eps", "+ min(eps, 1.0)", "values"),
    "eps at most 0.5": Wrong(N, "+ eps", "+ min(eps, 0.26)", "values"),
    "beta2 ignored if large": Wrong(M, "beta2 * v", "(beta2 if beta2 <= 0.5 or beta2 == 0.875 else 0.5) * v", "values"),
}
# fmt: on


def source(name: str) -> tuple[str, str]:
    """Of a right optimizer, or of a wrong one; and the method that it should be."""
    if name in RIGHT:
        return RIGHT[name]
    wrong = WRONG[name]
    text, method = RIGHT[wrong.base]
    assert text.count(wrong.old) == 1, (name, text.count(wrong.old))
    return text.replace(wrong.old, wrong.new), method


def target(name: str) -> tuple[Any, str]:
    """What `wrap` takes, and the method."""
    text, method = source(name)
    found: dict[str, Any] = {}
    exec(text, found)
    return found["Target"], method
