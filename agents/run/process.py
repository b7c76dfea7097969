"""How the commands set their process up: quick training beside the physics' threads, and sums that repeat."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import importlib
import io
import os
import signal
import sys
import threading
import unicodedata
import warnings
from pathlib import Path

RENDERERS = {"egl": ("EGL", "libegl1 libgl1"), "osmesa": ("OSMesa", "libosmesa6")}
"""What draws without a screen on Linux, by its name in MUJOCO_GL: its library, and the packages that bring it."""
SCREEN_RENDERERS = ("enable", "enabled", "on", "true", "1", "glfw", "glx")
NO_RENDERER = ("disable", "disabled", "off", "false", "0")


def prepare() -> None:
    """Set this process up as train.py and evaluate.py do; call it before anything imports PyTorch.

    Training becomes quicker, and a resumed run rounds as one that nothing interrupted. What is set holds for the whole
    process and, as far as it is environment variables, for those that it starts; what the environment sets already
    stays. Importing agents sets nothing.

    Warns:
        RuntimeWarning: PyTorch is imported already and does not read GOMP_SPINCOUNT any more.
    """
    if "torch" in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        warnings.warn(
            "prepare() comes after PyTorch was imported, which reads GOMP_SPINCOUNT only then: its idle threads go on "
            "spinning. Call prepare() first, or start Python with GOMP_SPINCOUNT=10000.",
            RuntimeWarning,
            stacklevel=2,
        )
    # PyTorch's idle threads spin on the cores that the physics needs; after this many turns (some 0.1 ms) they sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Intel's BLAS adds up in an order that depends on where in memory a matrix lies, unless it is strict. Read at the
    # first product.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    _keep_freed_memory()


PYTHONS_WARNING = warnings.formatwarning
PLAIN = {
    **{"\u200b": "", "…": "...", "·": ".", "–": "-", "—": "-", "─": "-", "━": "-", "╸": "-", "│": "|", "←": "<-"},
    **{"⁻": "^-", "¹": "1", "²": "2"},
}
"""For terminals that cannot show these; Greek letters are named, and others become question marks."""


def show_plainly() -> None:
    """Have what stdout and stderr cannot show replaced, in place of an error."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end]
        names = {sign: unicodedata.name(sign, "").lower().split() for sign in signs}
        greek = {sign: words[-1] for sign, words in names.items() if words[:2] == ["greek", "small"]}
        return "".join((greek | PLAIN).get(sign, "?") for sign in signs), error.end

    codecs.register_error("plain", replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="plain")


def warn_in_sentences() -> None:
    """Have warnings of ours say what they say; those of other packages also say where."""
    ours = Path(__file__).parents[2]

    def sentence(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        inside = any(Path(filename).is_relative_to(ours / package) for package in ("agents", "envs"))
        return f"warning: {message}\n" if inside else PYTHONS_WARNING(message, category, filename, lineno, line)

    warnings.formatwarning = sentence


def work(words: list[str], output: str, cores: list[int]) -> None:
    """Run a command in this process, which another of ours has begun.

    Args:
        words: what `agents.run.cli.main` takes.
        output: file to which all that is printed is added.
        cores: the ones to work on; none are all.
    """
    os.setsid()  # a terminal's Ctrl-C comes to the other process alone, which tells this one
    if cores:
        os.sched_setaffinity(0, cores)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    prepare()
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    main = importlib.import_module("agents.run.cli").main  # by its name: it stands above this module
    sys.exit(main(words))


def _end_with_the_other() -> None:
    """Have this process save itself and end when the one that has begun it is gone."""
    multiprocessing = importlib.import_module("multiprocessing")  # the first Ctrl-C is heard the sooner
    other = multiprocessing.parent_process()
    assert other is not None
    other.join()
    os.kill(os.getpid(), signal.SIGTERM)


def renderer_fault() -> str | None:
    """Say what is wrong with MUJOCO_GL, with which MuJoCo cannot be imported; None if nothing is."""
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    if sys.platform != "linux" or asked in ("", *NO_RENDERER, *SCREEN_RENDERERS):
        return None
    if asked not in RENDERERS:
        return f"MUJOCO_GL is {asked}; set it to {', '.join(RENDERERS)} or glfw, or leave it unset."
    library, package = RENDERERS[asked]
    if has_library(library):
        return None
    return f"MUJOCO_GL is {asked}, whose library is not installed; apt-get install {package}, or leave it unset."


def has_library(name: str) -> bool:
    """Say whether a library can be loaded, by the names that PyOpenGL looks for."""
    for ending in ("", *(f".{version}" for version in range(10))):
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"lib{name}.so{ending}")
            return True
    return False


def program(command: str = "") -> str:
    """Name the program that does a command, such as "train" or "resume", as this process was started."""
    started = Path(sys.argv[0])
    if started.name == "geodesic-rl":
        return f"geodesic-rl {command}".rstrip()
    if started.parts[-3:] == ("agents", "run", "__main__.py"):
        return f"python -m agents.run {command}".rstrip()
    # Where people have the scripts: train.py takes every command, and evaluate.py is one.
    return f"{command}.py" if command in ("train", "evaluate") else f"train.py {command}".rstrip()


def typed(command: str) -> str:
    """Say how `program` is typed."""
    name = program(command)
    return name if name.startswith(("geodesic-rl", "python")) else f"python {name}"


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    It gives the memory of an update, some dozen MiB, back to the system and takes it again page by page: up to 29,000
    page faults an update, which then takes twice as long. Whoever has set one of glibc's own variables keeps their way.
    """
    set_already = os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not set_already else None
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
