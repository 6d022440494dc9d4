"""What every method promises: registry, fields, purity, refusals, non-finite input, compilation counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as compat
import ml_dtypes
import numpy as np
import pytest
from configs import CONFIGS, FIRST, LOUD, Config, of_vectors
from conftest import EAGERLY, Backend, make_backend
from helpers import distance, gradients, leaves, run
from hypothesis import given
from hypothesis import strategies as st
from mutation import mutated

import precond_ref as pr
from precond_ref import protocol
from precond_ref.conformance import vectors
from precond_ref.fields import Flag, Integer
from precond_ref.methods import asgo, inverse_free, klshampoo, mbf, muon, root_free, shampoo, sketchy
from precond_ref.numerics import lapack, roots
from precond_ref.numerics import sketch as fd
from precond_ref.protocol import Method

ids = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
FAMILY = pytest.mark.parametrize("name", FIRST)


def eagerly(name: str) -> pytest.MarkDecorator:
    """The tier of a configuration on JAX without ``jit``."""
    return pytest.mark.full if name in FIRST and name.partition("-")[0] in EAGERLY else pytest.mark.deep


def numpy_noise() -> np.errstate:
    """NumPy's warnings about infinities and NaN, silenced."""
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


# ---- registry and dataclasses ---------------------------------------------------------------------------------------


def test_every_method_is_public_configured_and_described() -> None:
    registry = pr.list_methods()
    assert set(registry) == set(LOUD)
    for name, cls in registry.items():
        assert getattr(pr, name) is cls
        assert name in pr.__all__
        assert cls.paper
        required = [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        for method in [*([] if required else [cls()]), *(c.method for c in LOUD[name].values())]:
            assert set(method.symbols) == {f.name for f in dataclasses.fields(method)}
            assert all(method.symbols.values())
        for preset in cls.presets:
            assert isinstance(getattr(cls, preset)(), Method)
    with pytest.raises(TypeError, match="item assignment"):
        registry["Mine"] = pr.Adam  # type: ignore[index]


def test_configurations_of_vectors() -> None:
    found = of_vectors("SGD")
    assert found["plain"] == Config(pr.SGD(), (2, 3))
    assert found["scalar"] == Config(pr.SGD(momentum=0.75), ())
    assert len(set(found.values())) == len(found) < len(vectors.cases("SGD", kind="trace"))
    assert of_vectors("none") == {}


@ids
def test_is_a_frozen_hashable_printable_dataclass(config: Config) -> None:
    method = config.method
    assert hash(method) == hash(method.replace())
    assert method == method.replace()
    assert eval(repr(method), vars(pr)) == method
    field = dataclasses.fields(method)[0].name if dataclasses.fields(method) else "nothing"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, field, 0.5)
    with pytest.raises(TypeError, match="are given by name"):
        type(method)(0.5)  # positional


class Plain:
    """A base that is no method."""


class Changed(Plain, pr.ASGO):
    """Other defaults for fields of the base, which is not the first."""

    eps: float = 0.25
    every: int


def test_another_default_keeps_meaning_and_rule() -> None:
    """Whatever the order of the bases; without a type it would not be heard of, and so is an error."""

    class Again(Changed):
        beta1: float = 0.5

    for cls in (Changed, Again):
        made = cls()
        assert (made.eps, made.every, made.symbols["eps"]) == (0.25, 1, pr.ASGO.symbols["eps"])
        with pytest.raises(ValueError, match="^eps must be .*, got -1"):
            cls(eps=-1)
    assert Again().beta1 == 0.5
    with pytest.raises(TypeError, match=r"^Untyped.eps must have a type, as in `eps: float = 0.5`"):

        class Untyped(pr.ASGO):
            eps = 0.25


def float_fields() -> list[tuple[str, str]]:
    found = {}
    for name, config in CONFIGS.items():
        for f in dataclasses.fields(config.method):
            if isinstance(getattr(config.method, f.name), float):
                found[type(config.method).__name__, f.name] = name
    return [(name, field) for (_, field), name in found.items()]


@pytest.mark.parametrize(("name", "field"), float_fields())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5], ids=str)
def test_bad_number_is_refused(name: str, field: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {bad}"):
        CONFIGS[name].method.replace(**{field: bad})


@pytest.mark.parametrize(("name", "field"), float_fields())
def test_what_is_not_a_number_is_refused(name: str, field: str) -> None:
    method = CONFIGS[name].method
    for bad in ("0.5", True, [0.5], 1j):
        with pytest.raises(TypeError, match=f"^{field} must be a real number or a 0-D array"):
            method.replace(**{field: bad})
    with pytest.raises(ValueError, match=rf"^{field} must be .* got an array of shape \(2,\)"):
        method.replace(**{field: np.full(2, 0.5)})
    assert getattr(method.replace(**{field: np.asarray(0.5)}), field) == 0.5


def other_fields() -> list[tuple[str, str, Any]]:
    found = {}
    for name, config in CONFIGS.items():
        for f in dataclasses.fields(config.method):
            value = getattr(config.method, f.name)
            if isinstance(value, (bool, int, str)):
                found[type(config.method).__name__, f.name] = (name, f.name, value)
    return list(found.values())


@pytest.mark.parametrize(("name", "field", "value"), other_fields())
def test_bad_choice_count_or_flag_is_refused(name: str, field: str, value: Any) -> None:
    method = CONFIGS[name].method
    bads: tuple[Any, ...] = (0, -1, 1.5, "3", True)
    if isinstance(value, bool):
        bads = ("nonsense", None)
    elif isinstance(value, str):
        bads = ("nonsense", 3)
    for bad in bads:
        if type(bad) is type(value) and bad == value:
            continue
        with pytest.raises((ValueError, TypeError), match=f"^{field} must be .* got "):
            method.replace(**{field: bad})


def test_fields_that_need_each_other() -> None:
    for make, message in (
        (lambda: pr.SGD(nesterov=True), "nesterov=True needs momentum > 0"),
        (lambda: pr.Shampoo(bias_correction=True), "bias_correction=True needs an average"),
        (lambda: pr.ASGO(side="right", heads=2), "heads needs side="),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="heads must divide the rows, got heads=2 and shape"):
        pr.ASGO(heads=2).init(np.zeros((3, 4)))


def test_optional_checks_say_so() -> None:
    with pytest.raises(ValueError, match="a must be >= 1 or None, got 0"):
        Integer(ge=1, optional=True).check("a", 0)
    Integer(ge=1, optional=True).check("b", None)
    with pytest.raises(TypeError, match="b must be True or False, got None"):
        Flag().check("b", None)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@ids
def test_array_valued_fields_give_the_numbers_of_python_ones(config: Config, library: str) -> None:
    backend = make_backend(library)
    fields = {f.name: getattr(config.method, f.name) for f in dataclasses.fields(config.method)}
    arrays = {name: backend.asarray(value) for name, value in fields.items() if isinstance(value, float)}
    grads = gradients(config.shape, 4)
    expected, _ = run(backend, config, grads, "float64")
    got, _ = run(backend, config._replace(method=config.method.replace(**arrays)), grads, "float64")
    assert distance(got, expected) <= 1e-12


# ---- no dead knobs --------------------------------------------------------------------------------------------------

OTHER_CHOICE = {
    "kind": {"fc": "diagonal", "conv": "diagonal", "diagonal": "fc"},
    "layout": {
        "per_output": "per_input",
        "per_input": "contiguous",
        "contiguous": "per_output",
        "matrix": "flatten",
        "flatten": "batch",
        "batch": "flatten",
    },
    "side": {"smaller": "left", "left": "right", "right": "left"},
    "root": {"eigh": "polar_express", "svd": "newton_schulz", "newton_schulz": "svd", "higher_order": "coupled_newton"},
    "structure": {"dense": "tril"},
    "graft": {"rmsprop": "sgd", "sgd": "rmsprop"},
    "decay_schedule": {"power": "adam", "adam": "power"},
    "momentum_of": {"step": "update", "update": "step"},
    "factored_axes": {"last": "largest", "largest": "last", "leading": "last"},
    "inner": {"shampoo": "adam", "adam": "shampoo"},
    "start": {"eigh": "identity", "identity": "eigh"},
    "eps_form": {
        "square": "floor",
        "floor": "square",
        "inside": "outside",
        "outside": "inside",
        "corrected": "uncorrected",
        "uncorrected": "corrected",
    },
    "amsgrad": {"uncorrected": "corrected", "corrected": "uncorrected"},
    "nesterov": {"constant": "scheduled", "scheduled": "constant"},
    "bias_correction": {"both": "none", "second": "both", "none": "second"},
    "momentum_form": {"average": "sum", "sum": "average"},
    "nesterov_form": {"weighted": "added", "added": "weighted"},
    "coefficients": {"jordan": "quintic5", "quintic5": "jordan"},
    "after_last": {"repeat": "cycle", "cycle": "repeat"},
    "normalization": dict.fromkeys(("spectral", "schatten4", "aol"), "frobenius") | {"frobenius": "spectral"},
    "eps_rule": {"add": "max", "max": "add"},
    "eps2_rule": {"add": "max", "max": "add"},
    "scale": {"max": "jordan", "jordan": "ratio", "ratio": "jordan"},
    "outputs": {"rows": "columns", "columns": "rows"},
    "statistic": {"row": "short", "short": "row"},
    "rescale": {"norm": "none", "rms": "norm", "none": "norm"},
    "decay_form": {"decoupled": "l2", "l2": "decoupled"},
    "eps_position": {"uncorrected": "corrected", "corrected": "max", "max": "corrected"},
    "basis": {"qr": "eigh", "eigh": "qr"},
    "order": {"use_first": "update_first", "update_first": "use_first"},
    "sort": {"before": "after", "after": "before"},
    "second_moment": {"permute": "keep", "rotate": "permute"},
}
SAME_BY_DESIGN = ("solver", "narrow_state", "compute_dtype")  # how something is computed; acts below float32 only


def knobs() -> list[Any]:
    found = {}
    for name, config in CONFIGS.items():
        for f in dataclasses.fields(config.method):
            if f.name not in SAME_BY_DESIGN:
                found.setdefault((type(config.method).__name__, f.name), []).append(name)
    return [pytest.param(names, field, id=f"{method}-{field}") for (method, field), names in found.items()]


def perturbed(method: Any, field: str) -> list[Any]:
    """Valid changes of one field."""
    value = getattr(method, field)
    if isinstance(value, bool):
        candidates: list[Any] = [not value]
    elif isinstance(value, str):
        candidates = [OTHER_CHOICE[field][value]] if value in OTHER_CHOICE[field] else []
    elif isinstance(value, tuple):
        candidates = [value[::-1], value[1:]]
    elif value is None:
        candidates = [0.5, 2]
    else:
        candidates = [2 * value, 1] if isinstance(value, int) else [value / 2 + 0.01, value / 2]
    changed = []
    for candidate in candidates:
        try:
            changed.append(method.replace(**{field: candidate}))
        except (ValueError, TypeError):
            continue
    return changed


@pytest.mark.parametrize(("names", "field"), knobs())
def test_every_field_changes_the_trajectory(names: list[str], field: str) -> None:
    backend = make_backend("numpy")
    for name in names:
        config = CONFIGS[name]
        grads = gradients(config.shape, 7)
        before, _ = run(backend, config, grads, "float64", moving=True)
        for method in perturbed(config.method, field):
            try:
                after, _ = run(backend, Config(method, config.shape), grads, "float64", moving=True)
            except ValueError:
                continue
            if distance(after, before) > 1e-9:
                return
    pytest.fail(f"no change of {field} changes anything in {names}")


# ---- purity ---------------------------------------------------------------------------------------------------------


@pytest.mark.float32
@pytest.mark.eager_cases
def test_update_changes_nothing_given_and_shares_nothing(backend: Backend, config: Config) -> None:
    g1, g2 = (backend.asarray(g) for g in gradients(config.shape, 2))
    param = backend.asarray(np.ones(config.shape))
    _, state = config.method.update(g1, config.method.init(param), param)
    before = [backend.numpy(a).copy() for a in (g2, param, *leaves(state))]
    direction, new = config.method.update(g2, state, param)
    after = [backend.numpy(a) for a in (g2, param, *leaves(state))]
    assert all(np.array_equal(a, b) for a, b in itertools.zip_longest(before, after))
    again, same = config.method.update(g2, state, param)
    assert np.array_equal(backend.numpy(again), backend.numpy(direction))
    assert new.step == same.step == state.step + 1 == 2
    if backend.name == "numpy":
        arrays = [direction, g2, param, *leaves(new._replace(step=0))]
        assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


@ids
def test_init_shares_nothing(config: Config) -> None:
    param = np.ones(config.shape)
    arrays = [param, *leaves(config.method.init(param)._replace(step=0))]
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


@pytest.mark.float32
@pytest.mark.eager_cases
def test_diagnose_runs_and_says_whether_all_is_finite(backend: Backend, config: Config) -> None:
    param = backend.asarray(np.ones((2, *config.shape)))
    state = config.method.init(param, stack_ndim=1)
    report = config.method.diagnose(state)
    assert report.finite is None or bool(np.all(backend.numpy(report.finite)))
    grads = gradients((2, *config.shape), 1)[0]
    grads[1, ...] = np.nan
    with numpy_noise():
        _, state = config.method.update(backend.asarray(grads), state, param)
        report = config.method.diagnose(state)
    if report.finite is not None:
        finite = backend.numpy(report.finite)
        assert finite.tolist() == ([True, False] if finite.ndim else False)
        assert finite.ndim or config.method.elementwise or state.sketches == ()


def planted_nan(state: Any, at: int) -> Any:
    """``state`` with NaN in the second stack member of array number ``at``."""
    count = iter(range(1000))

    def change(value: Any) -> Any:
        if isinstance(value, tuple):
            parts = [change(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if hasattr(value, "shape") and next(count) == at:
            value = value.copy()
            value[1, ...] = np.nan
        return value

    return change(state._replace(step=None))._replace(step=state.step)


@ids
def test_finite_covers_every_array_of_the_state(config: Config) -> None:
    param, grads = np.ones((2, *config.shape)), gradients((2, *config.shape), 1)[0]
    _, state = config.method.update(grads, config.method.init(param, stack_ndim=1), param)
    for at in range(len(leaves(state._replace(step=None)))):
        with numpy_noise():
            finite = config.method.diagnose(planted_nan(state, at)).finite
        if finite is not None:
            assert finite.tolist() == ([True, False] if finite.ndim else False), at


@pytest.mark.parametrize("seen", [slice(0, 1), slice(1, None)])
def test_planted_blindness_to_an_array_of_the_state_is_caught(seen: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = protocol.all_finite
    monkeypatch.setattr(protocol, "all_finite", lambda xp, *arrays: whole(xp, *arrays[seen]))
    with pytest.raises(AssertionError):
        test_finite_covers_every_array_of_the_state(CONFIGS["AGD-default"])


# ---- refusals: state unchanged, message says what and what was got --------------------------------------------------


@FAMILY
@pytest.mark.eager
def test_bad_arrays_are_refused(backend: Backend, name: str) -> None:
    method, shape = CONFIGS[name]
    param = backend.asarray(np.ones(shape))
    grad = backend.asarray(gradients(shape, 1)[0])
    _, state = method.update(grad, method.init(param), param)
    before = [backend.numpy(a).copy() for a in leaves(state)]
    wider = backend.asarray(np.ones((*shape, 2)))
    with pytest.raises(ValueError, match="grad must have param's shape, got grad .* and param"):
        method.update(wider, state, param)
    with pytest.raises(TypeError, match="grad must have param's dtype, got grad .*float32.* and param .*float64"):
        method.update(backend.asarray(np.ones(shape), "float32"), state, param)
    for bad in ("int32", "complex128", "bool"):
        array = backend.asarray(np.ones(shape), bad)
        with pytest.raises(TypeError, match="real floating dtype"):
            method.init(array)
        with pytest.raises(TypeError, match="real floating dtype"):
            method.update(array, state, array)
    with pytest.raises(TypeError, match="state must be a .*State, got tuple"):
        method.update(grad, tuple(state), param)
    if len(state) > 1 and state[1] is not None:
        with pytest.raises(ValueError, match=r"must have (shape|\d entries for param of shape) .* got"):
            method.update(wider, state, wider)
    with pytest.raises(TypeError, match="one array-API namespace, got builtins.list"):
        method.init([1.0, 2.0])
    other = make_backend("numpy" if "numpy" not in backend.name else "strict").asarray(np.ones(shape))
    with pytest.raises(TypeError, match="one array-API namespace, got"):
        method.update(other, state, param)
    for stack_ndim in (-1, len(shape) + 1, 0.5):
        with pytest.raises(ValueError, match="stack_ndim must be an int between 0 and"):
            method.init(param, stack_ndim=stack_ndim)
    for bad in (None, 1.0, "x", [1.0], np.ones((2, 2)).view(np.matrix)):
        for call in (lambda b: method.init(b), lambda b: method.update(b, state, param)):
            with pytest.raises(TypeError, match="must be array"):
                call(bad)
        with pytest.raises((TypeError, ValueError), match="must be a|takes a parameter"):
            method.update(grad, state, bad)
    assert all(np.array_equal(a, backend.numpy(b)) for a, b in zip(before, leaves(state), strict=True))


@ids
def test_a_state_of_other_fields_or_another_method_is_refused(config: Config) -> None:
    method, shape = config
    param = np.ones(shape)
    _, state = method.update(param, method.init(param), param)
    for bad in (None, (), {}, pr.SGD().init(param) if not isinstance(method, pr.SGD) else pr.Adam().init(param)):
        with pytest.raises(TypeError, match=f"state must be a {type(state).__name__}, got {type(bad).__name__}"):
            method.diagnose(bad)
    for field, value in state._asdict().items():
        if field == "step" or value is None:
            continue
        with pytest.raises(ValueError, match=r"state.* must"):
            method.update(param, state._replace(**{field: None}), param)
        with pytest.raises(TypeError, match=f"state.{field} must be an? .*, got list"):
            method.update(param, state._replace(**{field: [1.0]}), param)
        if isinstance(value, tuple) and not hasattr(value, "_fields") and len(value) > 1:
            for wrong in (value[1:], (*value, value[0])):
                with pytest.raises(ValueError, match=r"state.* must"):
                    method.update(param, state._replace(**{field: wrong}), param)


@FAMILY
def test_another_device_is_refused(name: str) -> None:
    method, shape = CONFIGS[name]
    cpu, other = make_backend("strict"), make_backend("strict-device1")
    param = cpu.asarray(np.ones(shape))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"device"):
        method.update(other.asarray(np.ones(shape)), method.init(param), param)


@FAMILY
def test_bfloat16_numpy_is_refused(name: str) -> None:
    method, shape = CONFIGS[name]
    array = np.ones(shape).astype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match="param must have a real floating dtype of its namespace, got bfloat16"):
        method.init(array)


@pytest.mark.parametrize(
    ("library", "config"),
    [pytest.param(lib, c, id=f"{lib}-{n}", marks=() if lib == "torch" else eagerly(n)) for lib in ("torch", "jax")
     for n, c in CONFIGS.items()],
)  # fmt: skip
def test_bfloat16_where_the_library_has_it(library: str, config: Config) -> None:
    backend = make_backend(library)
    param = backend.xp.astype(backend.asarray(np.full(config.shape, 0.5)), backend.xp.bfloat16)
    try:
        state = config.method.init(param)
    except TypeError as error:
        assert "factorises matrices, which needs float32 or float64" in str(error)  # noqa: PT017
        return
    grads = gradients(config.shape, 3)
    expected, _ = run(make_backend("numpy"), config, grads, "float64")
    for g, e in zip(grads, expected, strict=True):
        grad = backend.xp.astype(backend.asarray(g), backend.xp.bfloat16)
        direction, state = config.method.update(grad, state, param)
        assert direction.dtype == backend.xp.bfloat16
        got = backend.numpy(backend.xp.astype(direction, backend.xp.float32))
        slope = 3.4445**5 if "coefficients" in config.method.symbols else 100  # of Jordan's polynomial at 0: 485
        assert np.linalg.norm(got - e) <= slope * 2**-9 * np.linalg.norm(e)  # runs and is near: u = 2^-9
    dtype = backend.xp.float32 if "narrow_state" in config.method.symbols else backend.xp.bfloat16
    assert all(leaf.dtype == dtype for leaf in leaves(state._replace(step=0)))
    if "narrow_state" in config.method.symbols:
        narrow = config.method.replace(narrow_state=True).init(param)
        assert all(leaf.dtype == backend.xp.bfloat16 for leaf in leaves(narrow._replace(step=0)))


@FAMILY
def test_too_few_axes_are_refused_or_taken(name: str) -> None:
    method = CONFIGS[name].method
    scalar = np.asarray(2.0)
    low, high = method.ndims
    if low == 0:
        direction, _ = method.update(scalar, method.init(scalar), scalar)
        assert np.shape(direction) == ()
        return
    with pytest.raises(ValueError, match=r"takes a parameter with .* axes .* got shape \(\)"):
        method.init(scalar)
    if high == 2:
        with pytest.raises(ValueError, match=r"exactly 2 axes .* got shape \(2, 3, 4\) with stack_ndim=0"):
            method.init(np.zeros((2, 3, 4)))


@pytest.mark.float32
@pytest.mark.eager_cases
def test_empty_parameter_gives_an_empty_direction(backend: Backend, config: Config) -> None:
    if not config.shape:
        pytest.skip("a 0-D parameter is never empty")
    for axis in range(len(config.shape)):
        shape = tuple(0 if i == axis else d for i, d in enumerate(config.shape))
        empty = backend.asarray(np.zeros(shape))
        direction, state = config.method.update(empty, config.method.init(empty), empty)
        assert tuple(direction.shape) == shape
        config.method.diagnose(state)


@pytest.mark.float32
@pytest.mark.eager_cases
def test_zero_gradients_give_zero(backend: Backend, config: Config) -> None:
    zero = backend.asarray(np.zeros(config.shape))
    state = config.method.init(zero)
    for _ in range(3):
        direction, state = config.method.update(zero, state, zero)
        assert np.array_equal(backend.numpy(direction), np.zeros(config.shape))


BAD = (math.nan, math.inf, -math.inf)


def check_bad_members(backend: Backend, method: Any, shape: tuple[int, ...], at: int, **extra: Any) -> None:
    """One bad entry in update ``at`` of three of five members: these are NaN throughout from then on, and reported;
    the others are what they are without, bit for bit. Elementwise methods: that entry, at that update."""
    bad, good, entry = slice(1, 4), [0, 4], (0, *(d // 2 for d in shape))
    clean = gradients((5, *shape), at + 3)
    grads = clean.copy()
    for member, value in enumerate(BAD, 1):
        grads[(at, member, *entry[1:])] = value
    param, update = backend.asarray(np.full((5, *shape), 0.5)), backend.update(method)
    state = reference = method.init(param, stack_ndim=1)
    entrywise = method.elementwise or getattr(state, "sketches", None) == ()
    with numpy_noise():
        for t, (g, c) in enumerate(zip(grads, clean, strict=True)):
            direction, state = update(backend.asarray(g), state, param, **extra)
            expected, reference = update(backend.asarray(c), reference, param, **extra)
            got, want = np.array(backend.numpy(direction)), backend.numpy(expected)
            assert np.array_equal(got[good], want[good]), t
            if entrywise and t >= at:
                assert t > at or not np.any(np.isfinite(got[(bad, *entry[1:])]))
                got[(bad, *entry[1:])] = want[(bad, *entry[1:])]
                assert np.array_equal(got[bad], want[bad]), t
            else:
                assert np.all(np.isnan(got[bad]) if t >= at else np.isfinite(got[bad])), t
            if t in (at, at + 2):
                finite = method.diagnose(state).finite
                held = bool(leaves(state._replace(step=None)))
                assert (finite is None) != held
                if held:
                    assert backend.numpy(finite).tolist() == (False if entrywise else [True, *[False] * 3, True]), t


@pytest.mark.float32
@pytest.mark.eager_cases
def test_a_bad_gradient_spoils_its_stack_member_only(backend: Backend, config: Config) -> None:
    check_bad_members(backend, config.method, config.shape, 1)


def schedules(method: Any) -> list[Any]:
    """``method`` with roots, factors or inverses kept, with no momentum to remember a gradient, and unnormalised."""
    fields = vars(method)
    if "statistics_every" in fields:
        return [method.replace(statistics_every=a, inverse_every=b) for a, b in ((1, 3), (3, 1), (2, 3))]
    changes: list[dict[str, Any]] = [{"every": 3}] if "every" in fields else [{}]
    for field, value in (("momentum", 0.0), ("rms", None)):
        if field in fields and (field, fields.get("rescale")) != ("rms", "rms"):
            also = {"nesterov": False} if field == "momentum" and "nesterov" in fields else {}
            changes += [{**change, **also, field: value} for change in changes]
    return [method.replace(**change) for change in changes]


@ids
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_bad_gradient_at_a_renewal_and_between_two(config: Config, at: int) -> None:
    for method in schedules(config.method):
        check_bad_members(make_backend("numpy"), method, config.shape, at)


@pytest.mark.parametrize("name", ["SShampoo-every", "RFShampoo-every"])
@pytest.mark.parametrize("compiler", ["jax-jit", "torch-compile"])
def test_a_bad_gradient_between_renewals_when_compiled(compiler: str, name: str) -> None:
    check_bad_members(make_backend(compiler), *CONFIGS[name], 1)


@pytest.mark.parametrize("name", ["RFShampoo-every", "IFShampoo-plain", "MBF-per_output"])
def test_a_bad_gradient_beside_a_clean_statistic(name: str) -> None:
    method, shape = CONFIGS[name]
    clean = gradients((2, 5, *shape), 1)[0]
    statistic = pr.MBF.Samples(np.moveaxis(clean, 0, 1)) if isinstance(method, pr.MBF) else clean
    check_bad_members(make_backend("numpy"), method, shape, 1, statistic=statistic)


FORGETS: dict[str, tuple[Any, str, str, Any, tuple[int, ...]]] = {
    "roots": (shampoo, "if i == 0 and self.every > 1:", "if False:", pr.Shampoo(eps=0.25, every=3), (4, 3)),
    "columns": (asgo, "elif self.every", "elif False and self.every", pr.ASGO(rms=None, every=3), (4, 3)),
    "heads": (asgo, "or self.heads is not None:", "or False:", pr.ASGO(rms=None, heads=2), (4, 3)),
    "diagonals": (asgo, " + bad_as_nan(diagonal, 1, xp)[..., None]", "", pr.DASGO(rms=None), (4, 3)),
    "sketches": (sketchy, "if i == 0 and method.every > 1:", "if False:", pr.SShampoo(size=2, every=3), (4, 3)),
    "factors": (root_free, "factors, inverses = ((first", "_, inverses = ((first",
                pr.RFShampoo(momentum=0.0, every=3), (4,)),
    "inverses": (root_free, "factors, inverses = ((first", "factors, _ = ((first",
                 pr.RFShampoo(momentum=0.0, every=3), (4, 3)),
    "inverse-free": (inverse_free, "if self.every > 1 or statistic is not None:", "if False:",
                     pr.IFShampoo(momentum=0.0, every=3), (4, 3)),
    "buffers": (inverse_free, "if self.every > 1 or statistic is not None:", "if False:",
                pr.IFShampoo(every=3), (4,)),
    "blocks": (mbf, "if not (self._averaged and fresh):", "if not fresh:", pr.MBF(average=False), (4, 3)),
    "inverses of before": (mbf, "if not (self._averaged and fresh):", "if not self._averaged:",
                           pr.MBF(inverse_every=3, statistics_every=3), (4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGETS)
def test_planted_bugs_that_forget_a_bad_gradient(name: str) -> None:
    module, old, new, method, shape = FORGETS[name]
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    broken = getattr(mutated(module, (old, new)), type(method).__name__)(**fields)
    check_bad_members(make_backend("numpy"), method, shape, 1)
    with pytest.raises(AssertionError):
        check_bad_members(make_backend("numpy"), broken, shape, 1)


def test_planted_bug_that_forgets_a_bad_first_gradient() -> None:
    broken = mutated(klshampoo, ("state.m + 0.0 * whole_grad", "state.m")).KLShampoo.soap(start="identity")
    check_bad_members(make_backend("numpy"), pr.KLShampoo.soap(start="identity"), (3, 4), 0)
    with pytest.raises(AssertionError):
        check_bad_members(make_backend("numpy"), broken, (3, 4), 0)


# ---- factorisations that fail ----------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NumPy's factorisations raise for a batch with a matrix whose largest entry is above 1e5, whatever the dtype."""
    calls: list[str] = []

    def watch(name: str) -> None:
        function = getattr(compat.linalg, name)

        def call(a: Any, *args: Any, **kwargs: Any) -> Any:
            if np.max(np.abs(a), initial=0.0) > 1e5:
                calls.append(name)
                raise np.linalg.LinAlgError("did not converge")
            return function(a, *args, **kwargs)

        monkeypatch.setattr(compat.linalg, name, call)

    for name in ("eigh", "svd", "svdvals", "solve", "cholesky"):
        watch(name)
    return calls


def check_failure(config: Config, failing: list[str]) -> None:
    """The second of three members, which LAPACK takes or does not: NaN and reported, or not touched; no exception."""
    grads = gradients((3, *config.shape), 2)
    grads[:, 1] *= 1e6
    param, method = np.zeros(grads.shape[1:]), config.method
    state = method.init(param, stack_ndim=1)
    alone = method.init(param[[0, 2]], stack_ndim=1)
    for g in grads:
        direction, state = method.update(g, state, param)
        expected, alone = method.update(g[[0, 2]], alone, param[[0, 2]])
        assert np.array_equal(direction[[0, 2]], expected)
    failed = bool(failing)
    assert np.all(np.isnan(direction[1])) == failed
    finite = method.diagnose(state).finite
    if failed:
        assert finite.tolist() == [True, False, True]


def check_failure_without_float64(lib: Any) -> None:
    """Where there is no float64 to try, a member that cannot be factorised is NaN; no exception."""
    backend = make_backend("strict-no-float64")

    def eigh(matrix: Any) -> tuple[Any, ...]:
        if np.max(backend.numpy(matrix)) > 1e5:
            raise np.linalg.LinAlgError("did not converge")
        return tuple(backend.xp.linalg.eigh(matrix))

    matrices = backend.asarray(np.stack([np.eye(3), 1e6 * np.eye(3), np.eye(3)]))
    for result in lib.attempt(eigh, matrices, wider=True):
        finite = np.isfinite(backend.numpy(result)).reshape(3, -1)
        assert finite.all(axis=1).tolist() == finite.any(axis=1).tolist() == [True, False, True]


def test_a_failure_without_float64() -> None:
    check_failure_without_float64(lapack)


def test_a_planted_float64_in_a_second_try_is_seen() -> None:
    with pytest.raises(ValueError, match="does not support dtype"):
        check_failure_without_float64(mutated(lapack, ("in_float64(array, xp) if", "xp.astype(array, xp.float64) if")))


@ids
def test_what_cannot_be_factorised_is_nan_for_its_member(config: Config, failing: list[str]) -> None:
    check_failure(config, failing)


@pytest.mark.parametrize(
    ("module", "name"),
    [(roots, "Shampoo-sum"), (roots, "Muon-svd"), (roots, "MBF-per_output"), (fd, "SAdaGrad-sum"),
     (root_free, "RFShampoo-default"), (muon, "Muon-svd")],
)  # fmt: skip
def test_exceptions_of_factorisations_are_seen(
    module: Any, name: str, failing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "attempt", lambda function, *arrays, **_: function(*arrays))
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        check_failure(CONFIGS[name], failing)


@given(data=st.data())
def test_any_wrong_shape_is_refused_and_any_right_one_taken(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(CONFIGS)))
    method, shape = CONFIGS[name]
    other = tuple(data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=4)))
    param = np.ones(shape)
    state = method.init(param)
    if other == shape:
        method.update(np.ones(other), state, param)
        return
    with pytest.raises(ValueError, match="grad must have param's shape"):
        method.update(np.ones(other), state, param)


STEPS: dict[str, tuple[Any, type[Exception], str]] = {
    "negative": (-1, ValueError, "state.step must be >= 0, the updates done, got -1"),
    "NaN": (math.nan, TypeError, "state.step must be an int or an array without axes, the updates done, got nan"),
    "bool": (True, TypeError, "state.step must be an int or an array .*, got True"),
    "None": (None, TypeError, "state.step must be an int or an array .*, got None"),
    "real": (1.0, TypeError, "state.step must be an int or an array .*, got 1.0"),
    "NumPy's negative": (np.int64(-1), ValueError, "state.step must be >= 0"),
    "NumPy's real": (np.float64("nan"), TypeError, "state.step must be an int or an array"),
    "array": (np.ones(1, int), TypeError, "state.step must be an int or an array without axes"),
    "real array": (np.asarray(math.nan), TypeError, "state.step must have an integer dtype, got float64"),
}


def check_steps(bad: str) -> None:
    step, kind, message = STEPS[bad]
    for method in (pr.AGD(), pr.Shampoo(eps=0.25, every=2), pr.MBF(kind="diagonal")):
        g = np.ones((3, 3))
        with pytest.raises(kind, match=message):
            method.update(g, method.init(g)._replace(step=step), g)


@pytest.mark.parametrize("bad", STEPS)
def test_a_state_with_a_step_that_counts_no_updates_is_refused(bad: str) -> None:
    check_steps(bad)
    g = np.ones((3, 3))
    assert pr.Shampoo().update(g, pr.Shampoo().init(g)._replace(step=np.asarray(3)), g)[1].step == 4


@pytest.mark.parametrize("bad", STEPS)
def test_a_step_that_is_not_checked_is_caught(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setattr(protocol, "_check_step", lambda *_: None)
    with pytest.raises((pytest.fail.Exception, AssertionError, TypeError, ValueError, RuntimeWarning)):
        check_steps(bad)


BROKEN: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "list": (pr.ASGO(), lambda s: s._replace(m=s.m.tolist()), TypeError, "state.m must be an array, got list"),
    "list of arrays": (pr.Shampoo(), lambda s: s._replace(grams=[*s.grams]), TypeError,
                       "state.grams must be an array, got list"),
    "number": (pr.AGD(), lambda s: s._replace(b=1.0), TypeError, "state.b must be an array, got float"),
    "None": (pr.ASGO(), lambda s: s._replace(gram=None), ValueError, r"with the arrays m \(3, 4\): 'None"),
    "nothing": (pr.AdaGrad(), lambda s: s._replace(total=None), ValueError, "with the arrays none: 'None"),
    "no entries": (pr.Shampoo(), lambda s: s._replace(grams=()), ValueError, "with the arrays none: "),
    "a stack": (pr.ASGO(), lambda s: s._replace(m=s.m[None]), ValueError,
                r"diagnose of ASGO failed for a state with the arrays m \(1, 3, 4\), gram \(3, 3\): the stack axes"),
    "another stack": (pr.RFShampoo(), lambda s: s._replace(factors=(s.factors[0][0], *s.factors[1:])), ValueError,
                      r"arrays factors.0 \(3,\), .*: the stack axes"),
    "not square": (pr.ASGO(), lambda s: s._replace(gram=s.gram[:, 1:]), ValueError, r"m \(3, 4\), gram \(3, 2\): "),
    "no sketch": (pr.SShampoo(size=2), lambda s: s._replace(sketches=s.sketches[0]), ValueError, "no attribute"),
}  # fmt: skip


def check_broken_state(name: str) -> None:
    method, broken, kind, message = BROKEN[name]
    state = method.init(np.ones((3, 4)))
    method.diagnose(state)
    with pytest.raises(kind, match=message):
        method.diagnose(broken(state))


@pytest.mark.parametrize("name", BROKEN)
def test_a_state_of_the_wrong_structure_is_not_diagnosed(name: str) -> None:
    check_broken_state(name)


def test_planted_bugs_of_broken_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pr.Method, "_finite", lambda self, state, arrays, xp: np.asarray(True))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check_broken_state("a stack")


def test_refresh_is_checked() -> None:
    g = np.ones((3, 3))
    method = pr.Shampoo(eps=0.25)
    with pytest.raises(ValueError, match="refresh=False needs every > 1"):
        method.update(g, method.init(g), g, refresh=False)
    with pytest.raises(TypeError, match="refresh must be True, False or None, got 1"):
        method.update(g, method.init(g), g, refresh=1)


def test_state_of_another_parameter_is_refused() -> None:
    small, large = np.ones((3, 2)), np.ones((4, 2))
    method = pr.Shampoo(eps=0.25)
    with pytest.raises(ValueError, match=r"state.grams\[0\] must have shape \(4, 4\) for param of .*, got \(3, 3\)"):
        method.update(large, method.init(small), large)
    with pytest.raises(ValueError, match=r"state.m must have shape \(4, 2\) for param of shape \(4, 2\), got \(3, 2\)"):
        pr.Adam().update(large, pr.Adam().init(small), large)
    with pytest.raises(TypeError, match="state must be a AGDState, got AdamState"):
        pr.AGD().update(small, pr.Adam().init(small), small)


@pytest.mark.parametrize("name", FIRST)
def test_a_state_of_another_dtype_is_refused(name: str) -> None:
    method, shape = CONFIGS[name]
    wide, narrow = np.ones(shape), np.ones(shape, "float32")
    if not leaves(method.init(wide)._replace(step=0)):
        return
    with pytest.raises(TypeError, match=r"state\..* must have param's dtype float32, got float64"):
        method.update(narrow, method.init(wide), narrow)
    with pytest.raises(TypeError, match=r"state\..* must have param's dtype float64, got float32"):
        method.update(wide, method.init(narrow), wide)


def test_numpy_scalars_are_checked_like_numbers() -> None:
    for bad in (np.float32(2), np.float32("nan"), np.float64(2), np.int64(3)):
        with pytest.raises(ValueError, match="beta1 must be finite and >= 0 and < 1"):
            pr.AGD(beta1=bad)
    assert pr.Shampoo(every=np.int64(2)).every == 2


NUMPY = {"number": (np.float64, np.int64), "narrow": (np.float32, np.int32)}


def with_numpy(method: Any, kind: str) -> Any:
    """``method`` made anew with NumPy's scalars for its numbers."""
    real, whole = NUMPY[kind]
    kinds = {float: real, int: whole}
    fields = {name: getattr(method, name) for name in method.symbols}
    return method.replace(**{name: kinds[type(v)](v) for name, v in fields.items() if type(v) in kinds})


def check_numpy_scalars(library: str, config: Config) -> None:
    """Fields given as NumPy's scalars are Python's numbers, so that the direction has the same bits."""
    method, shape = config
    backend = make_backend(library)
    grad = backend.asarray(np.random.default_rng(0).standard_normal(shape).astype("float32"), "float32")
    want = method.update(grad, method.init(grad), grad)[0]
    for kind in NUMPY:
        given = with_numpy(method, kind)
        if kind == "number":
            assert given == method
        for name in method.symbols:
            assert type(getattr(given, name)) is type(getattr(method, name)), name
        direction = given.update(grad, given.init(grad), grad)[0]
        assert direction.dtype == want.dtype
        if given == method:
            assert np.array_equal(backend.numpy(direction), backend.numpy(want), equal_nan=True)


@pytest.mark.filterwarnings("ignore:beta2 of")
@pytest.mark.parametrize(
    ("library", "name"), [*(("torch", n) for n in FIRST), *(pytest.param("jax", n, marks=eagerly(n)) for n in FIRST)]
)
def test_numpy_scalars_are_numbers_with_every_library(library: str, name: str) -> None:
    check_numpy_scalars(library, CONFIGS[name])


@pytest.mark.parametrize("name", ["AGD-default", "ASGO-right", "Shampoo-sum", "MBF-per_output"])
def test_planted_numpy_scalars_are_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(protocol, "numbers", SimpleNamespace(Real=type(None), Integral=int, Number=int))
    with pytest.raises((AssertionError, TypeError, NotImplementedError)):
        check_numpy_scalars("torch", CONFIGS[name])


def test_none_and_the_other_amsgrad_are_refused() -> None:
    g = np.ones(3)
    with pytest.raises(TypeError, match="one array-API namespace"):
        pr.Adam().update(g, pr.Adam().init(g), None)
    for made, used in ((False, True), (True, False)):
        with pytest.raises(ValueError, match=f"amsgrad={used}"):
            pr.AGD(amsgrad=used).update(g, pr.AGD(amsgrad=made).init(g), g)


# ---- compilation counts ---------------------------------------------------------------------------------------------


def test_a_traced_refresh_computes_the_root_only_when_due() -> None:
    jax = pytest.importorskip("jax")
    backend = make_backend("jax")
    param = backend.asarray(np.zeros((4, 4)))

    def primitives(jaxpr: Any) -> set[str]:
        """Names of all primitives outside of a `cond`."""
        names = set()
        for equation in jaxpr.eqns:
            names.add(equation.primitive.name)
            if equation.primitive.name != "cond":
                for value in equation.params.values():
                    inner = getattr(value, "jaxpr", value)
                    names |= primitives(inner) if hasattr(inner, "eqns") else set()
        return names

    def traced(method: Any) -> set[str]:
        state = method.init(param)._replace(step=jax.numpy.int32(1))
        return primitives(jax.make_jaxpr(method.update)(param, state, param).jaxpr)

    assert "eigh" in traced(pr.ASGO(eps=0.25))
    assert "eigh" not in traced(pr.ASGO(every=3, eps=0.25))
    assert "cond" in traced(pr.ASGO(every=3, eps=0.25))


def check_idle(method: Any, shape: tuple[int, ...]) -> None:
    """Fields that a method calls idle change no bit of its directions."""
    grads = np.random.default_rng(3).standard_normal((4, *shape))

    def run(method: Any) -> list[bytes]:
        state, out = method.init(grads[0]), []
        for g in grads:
            direction, state = method.update(g, state, grads[0])
            out.append(direction.tobytes())
        return out

    rules = {f.name: f.metadata["rule"] for f in dataclasses.fields(method) if "rule" in f.metadata}
    for name in sorted(method.idle):
        value = getattr(method, name)
        others: Any = getattr(rules[name], "of", ("quintic5",) if isinstance(value, str) else ())
        if value is None:
            others = [0.75]
        elif isinstance(value, (int, float)):
            others = [0.5 * value + 0.25] if isinstance(value, float) else [value + 1]
        assert {*others} - {value}, name
        for other in others:
            assert run(method.replace(**{name: other})) == run(method), (name, other)


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.method.idle])
def test_idle_fields_change_nothing(name: str) -> None:
    check_idle(CONFIGS[name].method, CONFIGS[name].shape)


@pytest.mark.parametrize("method", [pr.Muon(scale="jordan", nesterov=False), pr.NorMuon(), pr.AdaMuon()])
def test_fields_of_muon_that_are_idle_change_nothing(method: Any) -> None:
    assert method.idle & {"rms", "scale", "nesterov_form"}
    check_idle(method, (4, 3))


@pytest.mark.parametrize(
    "method", [pr.ASGO(root="polar_express"), pr.Adafactor(parameter_scale=True), pr.Muon(), pr.NorMuon(rescale="rms")]
)
def test_a_field_that_is_called_idle_and_is_not_is_caught(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"ASGO": "root_steps", "Adafactor": "eps2"}
    monkeypatch.setattr(type(method), "idle", frozenset({names.get(method.name, "rms")}))
    if method.name == "Adafactor":
        method = method.replace(eps2=8.0)
    with pytest.raises(AssertionError):
        check_idle(method, (4, 3))
