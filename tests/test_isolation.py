"""Subjects that end, hang, fork, fill the memory or change their process: each has its verdict, and no traceback."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mutation import mutated
from typer.testing import CliRunner

from precond_ref import cli
from precond_ref.conformance import check, contract, isolation, processes, results, runner, subjects, wrap
from precond_ref.conformance.invariance import try_laws
from precond_ref.conformance.isolation import Isolated
from precond_ref.conformance.processes import Ended, Limits

ROOT = Path(__file__).parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
DEEP = pytest.mark.deep
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

HOSTILE = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")
    __repr__ = __str__

class Plain:  # SGD without momentum; what Act does in the second step is in a file
    def init(self, config, params):
        if config["momentum"] or config["weight_decay"]:
            raise NotImplementedError("plain SGD only")
        self.act, self.t = Path("act").read_text().partition(":"), 0
        self.params, self.lr = params, config["lr"]
        self.at("init")

    def at(self, place):
        if self.act[0] == place:
            exec(self.act[2], globals())

    def step(self, grads):
        self.t += 1
        self.at(f"step {self.t}")
        self.params = [p - self.lr * g for p, g in zip(self.params, grads)]
        return self.params

def plain(param, grad, state, *, lr):
    return param - lr * grad, {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current one, with the module above."""
    path, before = tmp_path_factory.mktemp("hostile"), Path.cwd()
    (path / "hostile.py").write_text(HOSTILE, encoding="utf-8")
    os.chdir(path)
    yield path
    os.chdir(before)


def acting(folder: Path, act: str, **limits: float) -> results.Report:
    """The report on a subject that does this, in a process of its own."""
    (folder / "act").write_text(act, encoding="utf-8")
    subject = Isolated("hostile:Plain")
    subject.program.limits = Limits(**limits)  # from here on: an import takes its time
    try:
        return check(subject, "SGD", target="hostile:Plain")
    finally:
        subject.close()


# ---- what ends the check --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "limits", "how"),
    [
        ("init:os._exit(0)", {}, "ended with exit code 0 instead of answering 'init'"),
        ("step 2:os._exit(0)", {}, "ended with exit code 0 instead of answering 'step' 2"),
        pytest.param("step 1:os._exit(7)", {}, "ended with exit code 7", marks=DEEP),
        pytest.param("step 1:os.kill(os.getpid(), signal.SIGSEGV)", {}, "ended by signal 11 (SIGSEGV)", marks=POSIX),
        pytest.param("step 1:os.closerange(0, 64)", {}, "instead of answering 'step' 1", marks=[POSIX, DEEP]),
        pytest.param("step 1:os.fork() and os._exit(0)", {}, "ended with exit code 0", marks=[POSIX, DEEP]),
        # the process that goes on left its group, and keeps the pipe
        pytest.param("step 1:os.fork() and os._exit(0); os.setsid(); time.sleep(9)", {"seconds": 4}, "exit code 0",
                     marks=POSIX),
        ("step 1:time.sleep(600)", {"seconds": 1}, "did not answer 'step' 1 within 1 s"),
        pytest.param("step 1:exec('while True: pass')", {"seconds": 1}, "did not answer 'step' 1", marks=DEEP),
        pytest.param("step 1:os.kill(os.getpid(), signal.SIGSTOP)", {"seconds": 1}, "not answer", marks=[POSIX, DEEP]),
        pytest.param("step 2:hold = [np.ones(2**21) for _ in range(400)]", {"gigabytes": 0.25},
                     "took more than 0.25 GiB of memory to answer 'step' 2", marks=LINUX),
        pytest.param("step 2:os.fork() or (np.ones(2**26), time.sleep(9)); time.sleep(9)", {"gigabytes": 0.25},
                     "took more than 0.25 GiB of memory", marks=[LINUX, DEEP]),
    ],
)  # fmt: skip
@pytest.mark.full
def test_the_end_of_the_process_is_the_verdict(folder: Path, act: str, limits: dict[str, float], how: str) -> None:
    begun = time.monotonic()
    report = acting(folder, act, **limits)
    assert time.monotonic() - begun < 30
    assert not report.ok
    assert how in report.ended
    assert report.ended.endswith(" in SGD/plain")
    assert report.results[-1].id == "SGD/plain"
    assert report.failures == [report.results[-1]]
    assert {r.message for r in report.results[:-1]} == {"plain SGD only"}  # what was judged before is told
    assert report.as_json()["ended"] == report.ended


# ---- its time -------------------------------------------------------------------------------------------------------


SPIN = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"


@LINUX
@pytest.mark.parametrize("seconds", [0.0, 0.5])
@pytest.mark.parametrize("child", [False, True])
def test_the_processor_time_of_a_process_is_counted(folder: Path, seconds: float, child: bool) -> None:
    spin = SPIN.format(seconds)
    inside = f"__import__('subprocess').run([sys.executable, '-S', '-c', {spin!r}])" if child else spin
    (folder / "act").write_text(f"step 1:time.sleep(0.3); {inside}", encoding="utf-8")
    subject = Isolated("hostile:Plain")
    try:
        subject.init(results.config_of(next(c for c in results.cases("SGD") if c.id == "SGD/plain")), [np.ones(2)])
        before = subject.worked()
        subject.step([np.ones(2)])
        assert seconds - 0.05 <= subject.worked() - before < seconds + 0.25
    finally:
        subject.close()


def check_programs(tool: Any) -> None:
    """JAX forgets what it compiled after 2.5 GiB, and again after as much from then on, whoever uses it."""
    import jax

    sizes: list[float] = []
    cleared: list[float] = []
    tool.unshared = lambda: int(sizes.pop(0) * 2**30)
    kept, jax.clear_caches = jax.clear_caches, lambda: cleared.append(sizes[0])
    try:
        for size, after in ((1.0, None), (3.4, None), (3.6, 1.5), (3.9, None), (4.1, 1.0), (0.5, None), (3.1, 0.5)):
            sizes[:] = [size] if after is None else [size, after]
            tool.Programs.spare()
            assert not sizes
        assert cleared == [1.5, 1.0, 0.5]
        for subject in (tool.Optax(lambda lr, momentum: optax_sgd(lr)), tool.Reference("jax")):
            sizes[:] = [1.0] * 99
            subject.init(results.config_of(next(c for c in results.cases("SGD") if c.id == "SGD/plain")), [np.ones(2)])
            sizes[:] = [9.0, 0.5] + [0.5] * 99
            subject.step([np.ones(2)])
        assert cleared == [1.5, 1.0, 0.5, 0.5, 0.5]
    finally:
        jax.clear_caches = kept


def optax_sgd(lr: float) -> Any:
    return pytest.importorskip("optax").sgd(lr)


@LINUX
def test_what_jax_compiled_is_forgotten_in_time() -> None:
    check_programs(mutated(subjects))


@LINUX
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if size > cls.least + cls.GROWTH:", "if size > cls.GROWTH:"),
        ("if size > cls.least + cls.GROWTH:", "if size > cls.least + 2 * cls.GROWTH:"),
        ("cls.least = min(cls.least, size)", "cls.least = size"),
        ("cls.least = unshared()", "unshared()"),
        ('sys.modules["jax"].clear_caches()\n', "unshared()\n"),
        ('to the parameters."""\n        Programs.spare()\n', 'to the parameters."""\n'),
        ('if self.backend == "jax":\n            Programs', 'if self.backend == "strict":\n            Programs'),
    ],
)
def test_a_planted_bug_of_what_jax_keeps_is_caught(old: str, new: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        check_programs(mutated(subjects, (old, new)))


def check_time(tool: Any) -> None:
    """The time is over after as much work beyond the limit of the clock, or five times this limit."""

    def late(clock: float, own: float, other: float, deep: bool = False) -> bool:
        trial = object.__new__(tool.Trial)
        trial.subject, trial.deep, trial.began = SimpleNamespace(worked=lambda: other), deep, 50.0
        tool.time = SimpleNamespace(monotonic=lambda: 50.0 + clock, process_time=lambda: 200.0 + own)
        trial.worked = 200.0
        return trial.late

    assert not late(100, 500, 0)  # several threads
    assert not late(500, 60, 50)  # other programs on the processor
    assert late(130, 60, 70)
    assert late(130, 130, 0)
    assert late(601, 0, 0)  # it waits
    assert not late(600, 60, 60)
    assert not late(590, 300, 290, deep=True)
    assert late(610, 310, 300, deep=True)


def test_the_time_for_inputs() -> None:
    check_time(mutated(contract))  # a copy, whose clock is set


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return clock > limit and", "return clock > limit or"),
        ("return clock > limit and (", "return ("),
        ("clock > PATIENCE * limit or ", ""),
        ("clock > PATIENCE * limit or", "clock > limit or"),
        ("self._worked() - self.worked > limit", "self._worked() > limit"),
        ('time.process_time() + getattr(self.subject, "worked", float)()', "time.process_time()"),
        ("limit, clock = SECONDS[self.deep]", "limit, clock = SECONDS[False]"),
    ],
)
def test_a_planted_bug_of_the_time_is_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_time(mutated(contract, (old, new)))


def test_an_end_is_expected_by_nobody(folder: Path) -> None:
    (folder / "act").write_text("init:n = globals().get('n', 0) + 1; n > 2 and os._exit(0)", encoding="utf-8")
    subject = Isolated("hostile:Plain")
    report = check(subject, "SGD", xfails=["contract/dtype", "contract/resume"])
    subject.close()
    assert report.ran == 1
    assert report.ended.endswith("exit code 0 instead of answering 'init' in contract/dtype")
    assert not report.failures
    assert not report.unknown_xfails  # not tried is not unknown
    assert not report.ok


def test_a_test_of_one_case_fails_where_the_process_ends(folder: Path) -> None:
    (folder / "act").write_text("step 1:os._exit(0)", encoding="utf-8")
    subject = Isolated("hostile:Plain")
    result = runner.run_case(subject, next(c for c in results.cases("SGD") if c.id == "SGD/plain"))
    subject.close()
    assert result.bad
    assert "ended with exit code 0" in result.message


# ---- what a step raises, prints and changes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit()", "SystemExit (<string>"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise Unprintable", "Unprintable: (its message cannot be printed)"),
        ("raise ValueError('x' * 10**6)", "x... (1000000 characters)"),
        ("raise NotImplementedError('x' * 10**6)", "x... (1000000 characters)"),
        (r"raise ValueError('\ud800')", r"ValueError: \ud800"),
        ("input()", "EOFError: EOF when reading a line"),
        ("np.empty(2**55)", "MemoryError"),
        ("(lambda f: f(f))(lambda f: f(f))", "RecursionError"),
    ],
)
def test_what_a_step_raises_is_a_result(shared: Any, code: str, said: str) -> None:
    report = shared(f"step 2:{code}")
    assert not report.ok
    assert not report.ended
    result = next(r for r in report.results if r.id == "SGD/plain")
    assert said.partition(" (<")[0] in result.message
    assert len(result.message) < 600


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Any]:
    """`acting` in one process, for what does not end it."""
    (folder / "act").write_text("", encoding="utf-8")
    subject = Isolated("hostile:Plain")

    def act(code: str) -> results.Report:
        (folder / "act").write_text(code, encoding="utf-8")
        return check(subject, "SGD")

    yield act
    subject.close()


def test_what_is_printed_is_no_answer(shared: Any) -> None:
    assert shared("step 1:print('hello'); os.write(1, b'{}\\n'); sys.__stdout__.flush()").ok
    assert shared("step 1:sys.stdout.write('x' * 10**6)").ok


@POSIX
@pytest.mark.full
def test_a_fork_does_not_answer_twice(shared: Any) -> None:
    assert shared("step 1:os.fork()").ok
    assert shared("step 1:os.fork() or sys.exit(3)").ok
    assert shared("step 1:os.fork() or time.sleep(60)").ok  # ended with the process
    assert shared("step 1:threading.Thread(target=time.sleep, args=(60,)).start()").ok


@pytest.mark.parametrize(
    ("code", "undo", "said"),
    [
        ("np.seterr(all='raise')", "np.seterr(all='warn')", "NumPy's errstate divide"),
        ("os.environ['HOME'] = '/'", "os.environ.pop('HOME', None)", "os.environ['HOME']"),
        ("os.environ.pop('PATH', None)", "os.environ['PATH'] = ''", "os.environ['PATH']"),
        ("signal.signal(signal.SIGUSR1, signal.SIG_IGN)", "signal.signal(signal.SIGUSR1, signal.SIG_DFL)",
         "the handler of SIGUSR1"),
        ("sys.stdout = None", "sys.stdout = sys.__stdout__", "sys.stdout"),
    ],
)  # fmt: skip
def test_changes_of_the_process_are_seen(shared: Any, code: str, undo: str, said: str) -> None:
    report = shared(f"step 1:{code}")
    assert [r.id for r in report.failures] == ["contract/process-untouched"]
    assert said in report.failures[0].message
    shared(f"step 1:{undo}")
    assert shared("").ok


def test_the_folder_and_the_standard_output_of_the_subject_are_its_own(folder: Path) -> None:
    report = acting(folder, "step 5:os.chdir('..'); sys.stdout.close()")
    failure = next(r for r in report.results if r.id == "contract/process-untouched")
    assert failure.message == "changes sys.stdout, the current folder"
    assert Path.cwd() == folder


@DEEP
@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("torch", "torch.set_default_dtype(torch.float64)", "torch's default dtype"),
        ("torch", "torch.set_grad_enabled(False)", "torch's grad mode"),
        ("torch", "torch.set_default_device('meta')", "torch's default device"),
        ("jax", "jax.config.update('jax_enable_x64', True)", "jax_enable_x64"),
    ],
)
def test_changes_of_libraries_are_seen(folder: Path, module: str, code: str, said: str) -> None:
    name = f"with_{module}"
    (folder / f"{name}.py").write_text(f"import {module}\n{HOSTILE}", encoding="utf-8")
    (folder / "act").write_text(f"step 1:{code}", encoding="utf-8")
    subject = Isolated(f"{name}:Plain")
    report = check(subject, "SGD")
    subject.close()
    assert [(r.id, r.message) for r in report.failures] == [("contract/process-untouched", f"changes {said}")]


# ---- the same verdicts as in one process ----------------------------------------------------------------------------


@pytest.mark.full
def test_isolation_changes_no_verdict(folder: Path) -> None:
    (folder / "several.py").write_text(
        textwrap.dedent("""
            def step(param, grad, state, *, lr, momentum, weight_decay):
                b = momentum * (0 if state is None else state["b"]) + (1 - momentum) * grad
                if param.ndim == 0:
                    raise IndexError("no scalars")
                grad *= 2
                return (1 - lr * weight_decay) * param - lr * b, {"b": b}
        """),
        encoding="utf-8",
    )
    names = {"state.buffer": "b"}
    subject = Isolated("several:step", names=names)
    apart = check(subject, "SGD", level=2, target="several:step")
    subject.close()
    sys.path.insert(0, str(folder))
    here = check(wrap(subjects.load_target("several:step"), names=names), "SGD", level=2, target="several:step")
    sys.path.remove(str(folder))
    assert {r.status for r in here.results} == {"passed", "failed", "error", "skipped"}
    assert apart.as_json() == here.as_json()


def test_the_reference_in_a_process_of_its_own() -> None:
    subject = Isolated("precond_ref:ASGO", dtype="float32")
    report = check(subject, "ASGO", level=2, dtype="float32")
    laws = [*try_laws(subject, "ASGO", dtype="float32", examples=2, laws=["sign", "scale"])]  # with other fields
    subject.close()
    assert report.ok
    assert {r.status for r in laws} == {"passed"}


def test_in_one_process_an_exit_is_a_result_too() -> None:
    def step(param, grad, state, *, lr, momentum, weight_decay):
        sys.exit(0)

    report = check(wrap(step), "SGD")
    assert not report.ok
    assert "SystemExit: 0 (test_isolation.py, line " in report.results[0].message + report.results[1].message


# ---- commands in any language ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "how"),
    [
        (
            "import time; input(); print('{\"ok\"', end='', flush=True); time.sleep(600)",
            "did not answer 'init' within 1",
        ),
        ("import time; time.sleep(600)", "did not answer 'init' within 1 s"),  # does not read
        ("import os, time; input(); os.close(1); time.sleep(600)", "closed its output instead of answering 'init'"),
        ("import sys; input()\nwhile True: sys.stdout.write('x' * 2**20)", "a line of more than 64 MiB"),
    ],
)
@pytest.mark.full
def test_a_command_that_does_not_answer_ends_the_check(program: str, how: str) -> None:
    command = subjects.Command([sys.executable, "-c", program], limits=Limits(seconds=10 if "MiB" in how else 1))
    report = check(command, "SGD")
    command.close()
    assert how in report.ended
    assert len(report.results) == 1


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("input(); print('{\"ok\": tr', end='')", "'{\"ok\": tr', which is not JSON"),
        ("input(); print('[' * 10**5)", "which is not JSON"),
        ("input(); print(9 * '9' * 10**4)", "which is not JSON"),
        ("import sys; input(); sys.stdout.buffer.write(b'\\xff\\n')", "which is not JSON"),
        ("input(); print(3)", "must answer with a JSON object, got '3'"),
        ("input(); print('{\"error\": \"' + 10**6 * 'x' + '\"}')", "characters)"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9 (SIGKILL) instead of answering 'init'"),
    ],
)
def test_a_command_that_answers_nonsense(program: str, message: str) -> None:
    command = subjects.Command([sys.executable, "-c", program])
    result = runner.run_case(command, results.cases("SGD")[0])
    command.close()
    assert result.status == "error"
    assert message in result.message
    assert len(result.message) < 600


def test_a_large_request_does_not_wait_for_a_reader() -> None:
    program = processes.Program([sys.executable, "-c", "import time; time.sleep(600)"], "it", Limits(seconds=0.3))
    with pytest.raises(Ended, match="did not answer 'init' within 0.3 s"):
        program.ask(b"x" * 2**20, "'init'")


# ---- the command line -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    """``precond-ref check ...``."""
    return CliRunner().invoke(cli.application(), ["check", *arguments])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys; sys.exit()", "importing broken failed: SystemExit (broken.py, line 1)"),
        ("import os; os._exit(0)", "broken:f ended with exit code 0 instead of answering 'import'"),
        ("while True: pass", "broken:f did not answer 'import' within 2 s"),
        ("1 / 0", "importing broken failed: ZeroDivisionError: division by zero (broken.py, line 1)"),
        pytest.param("raise ValueError('v')", "importing broken failed: ValueError: v", marks=DEEP),
        pytest.param("def f(:", "importing broken failed: SyntaxError", marks=DEEP),
        (
            "class f:\n init = step = 0\n def __init__(self): raise ValueError('no')",
            "broken:f cannot be made: ValueError: no",
        ),
    ],
)
@pytest.mark.full
def test_a_target_that_cannot_be_imported_is_wrong(folder: Path, source: str, said: str) -> None:
    (folder / "broken.py").write_text(source, encoding="utf-8")
    os.utime(folder / "broken.py", (0, 0))  # two sources of one size are of one time: no old bytecode may be taken
    result = command("broken:f", "--method", "SGD", "--timeout", "2", "--json", "out.json")
    assert result.exit_code == 1
    assert f"WRONG: {said}" in result.output
    assert result.output.rstrip().endswith("; nothing was tried after that")
    assert said in json.loads((folder / "out.json").read_text(encoding="utf-8"))["ended"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hostile:Nope"], "hostile has no 'Nope'"),
        (["nowhere:f"], "there is no module 'nowhere'"),
        (["needs:f"], "importing needs failed: No module named 'no_such_module'"),
        (["hostile:np"], "a target must be a class, a function or an object with init and step"),
        (["hostile:plain", "--backend", "mxnet"], "backend must be one of"),
        (["hostile:plain", "--timeout", "0"], "--timeout must be positive and finite, got 0"),
        (["hostile:plain", "--memory", "nan"], "--memory must be positive and finite, got nan"),
    ],
)
def test_a_target_that_is_not_there_is_no_verdict(folder: Path, arguments: list[str], said: str) -> None:
    (folder / "needs.py").write_text("import no_such_module", encoding="utf-8")
    result = command(*arguments, "--method", "SGD")
    assert result.exit_code == 2
    assert said in result.output
    assert "WRONG" not in result.output


def test_the_verdict_of_a_process_that_ended(folder: Path) -> None:
    (folder / "act").write_text("step 2:os._exit(0)", encoding="utf-8")
    result = command("hostile:Plain", "--method", "SGD")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "WRONG: hostile:Plain ended with exit code 0 instead of answering 'step' 2 in SGD/plain; "
        "nothing was tried after that"
    )
    assert result.output.count("exit code 0") == 1
    (folder / "act").write_text("step 2:sys.exit(0)", encoding="utf-8")
    result = command("hostile:Plain", "--method", "SGD")
    assert result.exit_code == 1
    assert "SystemExit: 0" in result.output


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def redirected(shell: str) -> tuple[int, str]:
    """Exit code and error stream of a line of shell, in which check runs a right subject."""
    line = f"{shlex.quote(sys.executable)} -m precond_ref.cli check hostile:plain --method SGD {shell}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": path}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stderr


@POSIX
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 2, "the report cannot be written to standard output: Broken pipe"),
        pytest.param("--json /dev/full > /dev/full", 2, "full: No space left on device, standard output:", marks=FULL),
        pytest.param(">&-", 2, "standard output: it is closed", marks=DEEP),
        pytest.param("2>&- > out.txt", 0, "", marks=DEEP),
        pytest.param("| head -1 > out.txt; exit ${PIPESTATUS[0]}", 0, "", marks=DEEP),
    ],
)  # fmt: skip
@pytest.mark.full
def test_a_report_that_cannot_be_written_is_no_verdict(folder: Path, shell: str, code: int, said: str) -> None:
    got, errors = redirected(shell)
    assert got == code
    assert said in errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


@FULL
@pytest.mark.full
def test_a_full_disk_is_no_verdict(folder: Path) -> None:
    result = command("hostile:plain", "--method", "SGD", "--json", "/dev/full")
    assert result.exit_code == 2
    assert "OK IN PART: hostile:plain is SGD in 1 of 16 cases" in result.output  # the report is shown all the same
    assert "error: the report cannot be written to /dev/full: No space left on device" in result.output


# ---- nothing is left behind -----------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether it is, within a few seconds."""
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


@LINUX
def test_what_the_subject_started_ends_with_it(folder: Path) -> None:
    assert acting(folder, "step 1:Path('pid').write_text(str(pid)) if (pid := os.fork()) else time.sleep(600)").ok
    assert gone(int((folder / "pid").read_text()))


@LINUX
def test_a_subject_ends_with_the_command(folder: Path) -> None:
    (folder / "act").write_text("step 1:Path('pid').write_text(str(os.getpid())); time.sleep(600)", encoding="utf-8")
    (folder / "pid").unlink(missing_ok=True)
    code = "from precond_ref.conformance import check, isolation; check(isolation.Isolated('hostile:Plain'), 'SGD')"
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not ((folder / "pid").exists() and (pid := (folder / "pid").read_text())):
        time.sleep(0.05)
        assert parent.poll() is None
    assert alive(int(pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(int(pid))


def test_memory_is_that_of_the_group() -> None:
    program = [sys.executable, "-c", "x = bytearray(b'1') * 2**27; print(1, flush=True); input()"]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert processes.memory(process.pid) > 2**27 or sys.platform != "linux"
    assert processes.memory(process.pid) < 2**28
    process.communicate(b"\n")
    assert processes.memory(process.pid) == 0


def test_only_plain_values_go_to_the_parent() -> None:
    import numpy as np

    class Own(np.ndarray):
        pass

    got = isolation.plain({"a": (1, 2.0, None, "x"), 3: np.zeros(2).view(Own), np.float64(2.0): [np.float32(1)]})
    assert got["a"] == [1, 2.0, None, "x"]
    assert type(got[3]) is np.ndarray
    assert got["2.0"][0].dtype == np.float32
    with pytest.raises(TypeError, match="a NumPy array of numbers is needed, got object"):
        isolation.plain([object()])
