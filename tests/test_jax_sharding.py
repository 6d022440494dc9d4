"""The optax transformations on meshes of eight host devices, in a process of its own: equal to the unsharded run.

States that Orbax saved from one mesh go on on another."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

REPRESENTATIVE = ("agd", "asgo", "rf_shampoo")


def run(*arguments: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.full
def test_sharded_equals_unsharded() -> None:
    run(*REPRESENTATIVE)


@pytest.mark.deep
def test_sharded_equals_unsharded_for_every_method() -> None:
    run()


# ---- in the other process -------------------------------------------------------------------------------------------


def tolerance(step: Any, opt: Any, params: Any, grads: Any, expected: Any) -> float:
    """1e-12, or 64 times the answer of one device to a change of its gradients by 2^-52, if this is more.

    Columns of a basis that no gradient has reached yet are divided by their eps alone: there, rounding is all.
    """
    import jax

    found, state, random = params, opt.init(params), np.random.default_rng(0)
    for g in grads:
        g = jax.tree.map(lambda x: x * (1 + 2.0**-52 * random.choice([-1.0, 1.0], x.shape)), g)
        found, state = step(found, state, g)
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in ((found, state), expected)), strict=True)
    return max(1e-12, *(64 * float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) for a, b in pairs if a.size))


def check(case: Any, axis_type: Any, lib: Any) -> None:
    """Three steps: values, placements of parameters and of what is like them, types under scan, one compilation."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec
    from test_jax_adapter import COMPILATIONS, close, tree

    explicit = axis_type == jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))
    shape = (8, 4, 2, 2)[: len(case.shape)]
    names: tuple[str | None, ...] = ("a", "b", None, None)[: len(shape)]
    specs = {"a": PartitionSpec(*names), "b": [PartitionSpec(*reversed(names)), PartitionSpec()]}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    opt = case.optimizer(lib, case.kwargs.get("learning_rate", 0.5))
    params, grads = tree(shape, "float64"), [tree(shape, "float64", seed) for seed in range(1, 4)]

    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = opt.update(g, state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = params, opt.init(params)
    unsharded = jax.jit(step)
    for g in grads:
        expected, expected_state = unsharded(expected, expected_state, g)

    bound = tolerance(unsharded, opt, params, grads, (expected, expected_state))

    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        placed, *placed_grads = (jax.device_put(x, shardings) for x in (params, *grads))
        state = opt.init(placed)
        alike: list[bool] = []

        def compare(x: Any, spec: Any) -> Any:
            if not isinstance(x, optax.MaskedNode):
                alike.append(x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim))
            return x

        optax.tree.map_params(opt, compare, state, specs, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        assert all(alike)
        types = jax.tree.map(jax.typeof, state)
        # With Auto axes the compiler would place the new state as it likes, and the next step would compile again.
        kept = None if explicit else (shardings, jax.tree.map(lambda x: x.sharding, state))
        compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=kept)
        got = jax.tree.map(jnp.copy, placed)
        for i, g in enumerate(placed_grads):
            before = len(COMPILATIONS)
            got, state = compiled(got, state, g)
            assert (len(COMPILATIONS) > before) == (i == 0), f"compilations at step {i + 1}"
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), got, shardings))
        if explicit:
            assert jax.tree.map(jax.typeof, state) == types
            fresh = jax.jit(opt.init)(placed)  # zeros made while tracing have the type of those made eagerly
            assert jax.tree.map(jax.typeof, fresh) == types
        close(jax.device_get((got, state)), jax.device_get((expected, expected_state)), bound)


def check_resharding(case: Any, lib: Any, forgets: str = "") -> None:
    """Four steps, one on each mesh, saved by Orbax in between: the numbers of an uninterrupted run on one device.

    ``forgets`` plants a mistake: "state" starts afresh on each mesh, "step" loses the counter.
    """
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as checkpoint
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from test_jax_adapter import close, tree

    shape = (8, 4, 2, 2)[: len(case.shape)]
    opt = case.optimizer(lib, case.kwargs.get("learning_rate", 0.5))
    params, grads = tree(shape, "float64"), [tree(shape, "float64", seed) for seed in range(1, 5)]

    @jax.jit
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = opt.update(g, state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = params, opt.init(params)
    for g in grads:
        expected, expected_state = step(expected, expected_state, g)

    devices = np.asarray(jax.devices())
    meshes = [
        Mesh(devices[:count].reshape(grid), ("a", "b")) for count, grid in ((8, (4, 2)), (2, (2, 1)), (4, (1, 4)))
    ]
    held, state = params, opt.init(params)
    with TemporaryDirectory() as folder, checkpoint.StandardCheckpointer() as checkpointer:
        for i, (mesh, g) in enumerate(zip([*meshes, Mesh(devices[:1].reshape(1, 1), ("a", "b"))], grads, strict=True)):

            def place(x: Any, mesh: Any = mesh) -> Any:
                fits = x.ndim >= 2 and x.shape[0] % mesh.shape["a"] == 0 and x.shape[1] % mesh.shape["b"] == 0
                return NamedSharding(mesh, PartitionSpec("a", "b") if fits else PartitionSpec())

            if i:
                saved = Path(folder) / str(i)
                checkpointer.save(saved, (held, state))
                checkpointer.wait_until_finished()
                like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), (held, state))
                held, state = checkpointer.restore(saved, like)
                assert jax.tree.all(
                    jax.tree.map(lambda x: x.sharding.is_equivalent_to(place(x), x.ndim), (held, state))
                )
                if forgets == "state":
                    state = jax.tree.map(jnp.zeros_like, state)
                elif forgets == "step":
                    state = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 0 else x, state)
            held, state, g = (jax.tree.map(lambda x: jax.device_put(x, place(x)), x) for x in (held, state, g))
            held, state = step(held, state, g)
    bound = tolerance(step, opt, params, grads, (expected, expected_state))
    close(jax.device_get((held, state)), jax.device_get((expected, expected_state)), bound)


MUTANTS = {
    "products typed by their sharding": (
        "Explicit",
        "if AxisType.Explicit in mesh.axis_types:\n        # The",
        "if False:\n        #",
    ),
    "everything comes out replicated": ("Explicit", "return sharding if sharding.mesh == mesh else", "return"),
    "statistics on one device": ("Auto", "if mesh.empty or not", "if True or not"),
}


def main(chosen: list[str]) -> None:
    from jax.sharding import AxisType
    from mutation import mutated
    from test_jax_adapter import CASES, adapter

    for name in chosen or CASES:
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            try:
                check(CASES[name], axis_type, adapter)
            except Exception as error:
                error.add_note(f"{name}, {axis_type}")
                raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax's, about its own future
            check_resharding(CASES[name], adapter)
            for forgets in ("state", "step"):
                if name == "agd":
                    try:
                        check_resharding(CASES[name], adapter, forgets)
                    except AssertionError:
                        continue
                    raise AssertionError(f"not seen: {forgets} forgotten")
    for name, (axis_type, old, new) in MUTANTS.items():
        lib = mutated(adapter, (old, new))
        try:
            check(CASES["asgo"], AxisType[axis_type], lib)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:100]}")
            continue
        raise AssertionError(f"not seen: {name}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
