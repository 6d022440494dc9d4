"""The backends every method is tested on, the `--backend` option, Hypothesis profiles, and shared helpers."""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what tests with JAX cost: a third of the time with these. XLA_FLAGS= gives what users have.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import array_api_compat
import array_api_strict
import numpy as np
import pytest
from configs import CONFIGS, FIRST, Config
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # not explain: planted bugs need none, and it costs most
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("deep", parent=settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.load_profile("ci")

BACKENDS = ("numpy", "numpy-readonly", "strict", "strict-device1", "torch", "torch-compile", "jax", "jax-jit", "cupy")
FLOAT32 = ("strict-no-float64",)
"""Beside `BACKENDS`, for tests marked ``float32``: a device that has no float64."""
APART = ("cupy-surface", "dpnp")
"""Only where ``--backend`` names them: their libraries have an environment of their own in `.ci/libraries`."""
EAGER = ("numpy", "strict-device1", "torch", "jax")


@dataclass(frozen=True)
class Backend:
    """An array library under test: where arrays live, how a function is compiled, and how results come back."""

    name: str
    xp: Any
    device: Any = None
    readonly: bool = False

    @property
    def widest(self) -> str:
        """Real dtype with the most digits."""
        return "float32" if self.name in FLOAT32 else "float64"

    def asarray(self, values: Any, dtype: str | None = None) -> Any:
        """``values`` (NumPy or nested lists) as an array of this backend, in its widest dtype if none is named."""
        host = np.asarray(values, dtype=dtype or self.widest)
        if self.readonly:
            host = host.copy()
            host.flags.writeable = False
            return host
        if self.name.startswith("torch"):
            return self.xp.asarray(np.array(host), device=self.device)
        return self.xp.asarray(host, device=self.device) if self.device is not None else self.xp.asarray(host)

    def numpy(self, array: Any) -> np.ndarray:
        """``array`` on the host."""
        if self.name.startswith("strict"):
            array = array_api_compat.to_device(array, array_api_strict.Device("CPU_DEVICE"))
        if self.name.startswith("cupy"):
            return array.get()
        if self.name == "dpnp":
            return self.xp.asnumpy(array)
        return np.asarray(array)

    def update(self, method: Any) -> Callable[..., Any]:
        """``method.update``, compiled where the backend compiles: ``f(grad, state, param, refresh=None)``.

        Under ``torch.compile`` the step stays outside the graph and its scalars are passed as 0-D tensors.
        A compiled one has ``graphs``, in how many calls one was made, and ``refreshes``, which need one each.
        """
        if self.name == "torch-compile":
            return _compiled_torch(method)
        if self.name != "jax-jit":
            return method.update

        def traced(*args: Any, **kwargs: Any) -> Any:
            update.graphs += 1
            return method.update(*args, **kwargs)

        compiled = self.jit(traced, static_argnames="refresh")

        def update(*args: Any, refresh: Any = None, **kwargs: Any) -> Any:
            update.refreshes.add(refresh)
            return compiled(*args, refresh=refresh, **kwargs)

        update.graphs, update.refreshes = 0, set()
        return update

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """``function``, under ``jax.jit`` where the backend has it."""
        return sys.modules["jax"].jit(function, **options) if self.name == "jax-jit" else function


def _compiled_torch(method: Any) -> Callable[..., Any]:
    import torch

    xp = array_api_compat.array_namespace(torch.zeros(1))
    torch._dynamo.reset()  # its cache is per code object: all methods share `kernel`

    def kernel(grad: Any, state: Any, param: Any, scalars: Any, refresh: bool) -> Any:
        return method.update(grad, state, param, scalars=scalars, refresh=refresh, xp=xp)

    made: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        made.append(module)  # at times twice in one call
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(kernel, backend=backend, fullgraph=True)

    def update(grad: Any, state: Any, param: Any, *, refresh: bool | None = None) -> Any:
        step = state.step
        if refresh is None:
            refresh = method.due(step)
        update.refreshes.add(refresh)
        scalars = method.scalars(step + 1, like=param)
        if scalars:
            scalars = type(scalars)(*(torch.tensor(s, dtype=param.dtype) for s in scalars))
        made.clear()
        direction, new = compiled(grad, state._replace(step=0), param, scalars, refresh)
        update.graphs += bool(made)
        return direction, new._replace(step=step + 1)

    update.graphs, update.refreshes = 0, set()
    return update


def make_backend(name: str) -> Backend:
    """The backend of that name; skips the test, with the reason, where it is not to be had."""
    if name in ("numpy", "numpy-readonly"):
        return Backend(name, array_api_compat.array_namespace(np.zeros(1)), readonly=name.endswith("readonly"))
    if name.startswith("strict"):
        array_api_strict.set_array_api_strict_flags(
            api_version="2024.12", boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=("linalg",)
        )
        devices = {"strict": "CPU_DEVICE", "strict-device1": "device1", "strict-no-float64": "no_float64"}
        device = array_api_strict.Device(devices[name])
        return Backend(name, array_api_strict, device)
    if name.startswith("torch"):
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        return Backend(name, array_api_compat.array_namespace(torch.zeros(1)))
    if name.startswith("jax"):
        jax = pytest.importorskip("jax")
        jax.config.update("jax_enable_x64", True)
        return Backend(name, jax.numpy)
    if name == "dpnp":
        driver = Path(sys.prefix) / "lib" / "libintelocl.so"  # of the package intel-opencl-rt
        if driver.exists():
            os.environ.setdefault("OCL_ICD_FILENAMES", str(driver))
        return Backend(name, pytest.importorskip("dpnp", reason="dpnp is not installed"))
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if name == "cupy-surface":
        from cupy_surface import SURFACE

        return Backend(name, SURFACE)
    if not cupy.is_available():
        pytest.skip("CuPy finds no GPU")
    return Backend(name, array_api_compat.array_namespace(cupy.zeros(1)))


PLANTED = re.compile("planted|mutant|catch|caught|notices|_seen$|_bug_|mistake")
"""Names of tests that plant bugs. The quick tier has the checks; --full shows that these catch their bugs."""
ELSEWHERE = ("numpy-readonly", "strict", "torch-compile", "jax", "jax-jit", "cupy")
"""Backends that the quick tier leaves to --full, but for `AGREES` on the first configuration of each method.

Of graphs that torch compiles, which takes it seconds, it has those of `COMPILED`.
"""
COMPILED = ("ASGO", "Shampoo", "MBF", "AGD")
EAGERLY = (*COMPILED, "SShampoo", "SOAP", "Muon", "IFShampoo")
"""Methods with everything that is computed: roots, solves, sketches, QR, iterations, products; elementwise ones."""
AGREES = "test_float64_agrees_with_numpy"


def needs_float64(config: Config) -> bool:
    """Whether the method computes in float64 whatever the dtype, and refuses to where there is none."""
    return getattr(config.method, "solver", None) == "gram64"


def is_deep(backend: str, name: str, config: Config) -> bool:
    """Whether only the deep tests have the configuration on the backend, as others prove as much in less time.

    Eagerly on JAX, and under torch.compile: all but `EAGERLY`, for what runs under `jit`, as all do, runs without, and
    the adapter's tests compile each method. Under `jit`: where the step's number decides nothing, for
    `test_device_traffic` sees on all that no value is read.
    """
    if backend in ("jax", "torch-compile"):
        return name.partition("-")[0] not in EAGERLY
    periods = config.method.periods
    return (
        backend == "jax-jit" and name not in FIRST and set(periods if isinstance(periods, tuple) else (periods,)) == {1}
    )


PARTS = {
    "test_conformance": 8,
    "test_diagnose": 4,
    "test_wrong_optimizers": 4,
    "test_backends": 4,
    "test_jax_adapter": 2,
}
"""Of how many parts a long file is."""


def is_quick(name: str, backend: str, first: bool) -> bool:
    """Whether the quick tier has this test function on this backend; ``first``: with a method's first configuration."""
    if PLANTED.search(name):
        return False
    if backend in ELSEWHERE:
        return first and name == AGREES and backend in ("torch-compile", "jax-jit")
    return first or backend != "strict-device1"


def is_everything(config: pytest.Config) -> bool:
    """Whether no test is left to --full: it was asked for, as were single tests, a backend, or the deep tests."""
    named = any("::" in str(arg) for arg in config.args)
    deep = config.option.markexpr not in ("", "not deep")
    return bool(config.getoption("--full") or config.getoption("--backend") or named or deep)


def pytest_report_header(config: pytest.Config) -> str:
    if is_everything(config):
        return "everything but the deep tests"
    return "what the quick tier leaves out" if config.getoption("--rest") else "quick tier; --full runs everything"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, one after the other, so that it prepares once; the longest files in parts."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            parts = PARTS.get(Path(file).stem, 1)
            return f"{file}-{zlib.crc32(test.encode()) % parts}"

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_everything(config):
        return
    chosen, left = [], []
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        name = getattr(item, "originalname", item.name)
        backend = next((b for b in values.values() if isinstance(b, str) and b in (*BACKENDS, *FLOAT32)), "")
        few = [c for c in FIRST if backend != "torch-compile" or c.partition("-")[0] in COMPILED]
        first = "config" not in values or any(values["config"] is CONFIGS[c] for c in few)
        quick = not item.get_closest_marker("full") and is_quick(name, backend, first)
        (chosen if quick else left).append(item)
    if config.getoption("--rest"):
        chosen, left = left, chosen
    config.hook.pytest_deselected(items=left)
    items[:] = chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every test but the deep ones, not the quick tier alone")
    parser.addoption("--rest", action="store_true", help="what --full runs and the quick tier does not")
    parser.addoption(
        "--backend",
        action="append",
        choices=(*BACKENDS, *FLOAT32, *APART),
        help="run the backend tests on this backend only (repeatable; default: all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    pytest.register_assert_rewrite("helpers", "kronecker", "mutation", "torch_adapter_cases", "theory_cases")
    config.addinivalue_line("markers", "eager: runs on the eager libraries only, or on those of --backend")
    config.addinivalue_line(
        "markers",
        "cases(first_on=()): every configuration of every method on every backend; on these the first of each method",
    )
    config.addinivalue_line("markers", "eager_cases: the same, on the eager libraries only")
    config.addinivalue_line("markers", "float32: also where there is no float64")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.config.getoption("--backend")
    eager = any(metafunc.definition.get_closest_marker(name) for name in ("eager", "eager_cases"))
    narrow = FLOAT32 if metafunc.definition.get_closest_marker("float32") else ()
    backends = [b for b in asked or (*(EAGER if eager else BACKENDS), *narrow) if b not in FLOAT32 or b in narrow]
    if any(metafunc.definition.get_closest_marker(name) for name in ("cases", "eager_cases")):
        # JAX compiles every single operation: eagerly one configuration of a method, unless it was asked for
        marker = metafunc.definition.get_closest_marker("cases")
        few = () if asked else ("jax", *FLOAT32, *(marker.kwargs.get("first_on", ()) if marker else ()))
        if eager:
            few = (*few, "dpnp")  # which compiles too
        cases = [
            pytest.param(
                backend,
                config,
                id=f"{backend}-{name}",
                marks=[pytest.mark.deep] * (not asked and is_deep(backend, name, config)),
            )
            for backend in backends
            for name, config in CONFIGS.items()
            if (backend not in few or name in FIRST) and not (backend in FLOAT32 and needs_float64(config))
        ]
        metafunc.parametrize(("backend", "config"), cases, indirect=["backend"])
    elif "backend" in metafunc.fixturenames:
        twice = () if asked or "jax-jit" not in backends else ("jax",)
        marked = [pytest.param(b, marks=[pytest.mark.deep] * (b in twice)) for b in backends]
        metafunc.parametrize("backend", marked, indirect=True)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled() -> Iterator[None]:
    """What JAX compiled for a file's tests would stay in memory until the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of version 1 alone: version 2 has cases of its own for many mistakes that a test is about."""
    from precond_ref.conformance import vectors

    monkeypatch.setattr(vectors, "VERSIONS", ("v1",))


@pytest.fixture
def vectors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check runs the vectors and none of the contract, from which no diagnosis is made."""
    from precond_ref.conformance import contract

    monkeypatch.setattr(contract, "CHECKS", {})


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty record in the folder of the test."""
    from precond_ref.compare import rates

    monkeypatch.setattr(rates, "FILE", tmp_path / "learning_rates.json")
    return rates.FILE


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """One of the backends of `BACKENDS`, `FLOAT32` and `APART`."""
    return make_backend(request.param)
