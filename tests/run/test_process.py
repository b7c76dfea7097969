"""What the commands set in their process, and that importing the package sets none of it."""

import ctypes
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from agents.run import cli, process

ROOT = Path(__file__).parents[2]
SET = ("GOMP_SPINCOUNT", "MKL_CBWR")
PREPARE = "from agents.run import process; process.prepare()"
IMPORT = "import agents; agents.NPG, agents.REGISTRY; import agents.run.cli"


def output_of(script: str, **variables: str) -> str:
    """Run script in a Python that begins without the variables that prepare sets; a warning is an error there."""
    outside = {name: value for name, value in os.environ.items() if name not in SET}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script],
        cwd=ROOT,
        env={**outside, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    assert (
        output_of("import sys, agents; print('torch' in sys.modules, 'agents.base' in sys.modules)") == "False False\n"
    )


def test_importing_changes_nothing_in_the_process() -> None:
    script = f"""
import os, torch
before = dict(os.environ), torch.get_num_threads(), torch.get_num_interop_threads()
{IMPORT}
print(before == (dict(os.environ), torch.get_num_threads(), torch.get_num_interop_threads()))
"""
    assert output_of(script) == "True\n"


def test_prepare_sets_what_torch_reads() -> None:
    assert output_of(f"import os; {PREPARE}; print(*map(os.environ.get, {SET}))") == "10000 AUTO,STRICT\n"


def test_prepare_keeps_what_is_set() -> None:
    script = f"import os; {PREPARE}; print(*map(os.environ.get, {SET}))"
    assert output_of(script, GOMP_SPINCOUNT="7", MKL_CBWR="COMPATIBLE") == "7 COMPATIBLE\n"


def test_prepare_says_that_it_comes_too_late() -> None:
    script = f"""
import torch, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {PREPARE}
    process.prepare()
print([str(one.message).split(":")[0] for one in caught])
"""
    sentence = "prepare() comes after PyTorch was imported, which reads GOMP_SPINCOUNT only then"
    assert output_of(script) == f"{[sentence]}\n"


def test_prepare_comes_in_time_where_the_variable_was_set_before() -> None:
    assert output_of(f"import torch; {PREPARE}", GOMP_SPINCOUNT="10000") == ""


@pytest.mark.parametrize("command", ["train.py", "evaluate.py"])
def test_a_command_prepares_its_process_before_torch_is_imported(command: str) -> None:
    script = f"""
import os, runpy, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch sees", *map(os.environ.get, {SET}))

sys.meta_path.insert(0, Watch())
sys.argv = [{command!r}, "--help"]
runpy.run_path({command!r}, run_name="__main__")
"""
    assert output_of(script).startswith("torch sees 10000 AUTO,STRICT\n")


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_only_a_prepared_process_keeps_the_memory_of_freed_tensors() -> None:
    # glibc's own functions: where tensors lie depends on what else a process allocates.
    script = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(12)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""
    untouched, imported, prepared, own = (
        int(output_of(f"{begin}\n{script}", **variables))
        for begin, variables in [
            ("", {}),
            (IMPORT, {}),
            (PREPARE, {}),
            (PREPARE, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}),
        ]
    )
    assert prepared < 100 < 10_000 < min(untouched, imported, own)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit, match="0"):
        cli.train(["npg", "--help"])
    assert cli.train(["npg→", "--env", "Hopper-v5"]) == 2
    assert cli.train(["nρg…", "--env", "Hopper-v5"]) == 2
    for stream in (out, err):
        stream.flush()
    shown, said = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    assert "theta <- theta + beta w" in shown
    assert "--target-kl" in shown
    assert "?" not in shown
    assert "There is no 'npg?'" in said
    assert "There is no 'nrhog...'" in said


def test_warnings_of_ours_are_sentences_and_others_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # is put back
    process.warn_in_sentences()
    ours, other = str(ROOT / "agents" / "base.py"), os.__file__
    assert warnings.formatwarning("Give less.", RuntimeWarning, ours, 3, None) == "warning: Give less.\n"
    assert warnings.formatwarning("Give less.", RuntimeWarning, other, 3, None).startswith(f"{other}:3: RuntimeWarning")
