"""All that waits for a GPU, one part after the other: tests, rates, ways of launching, a timeline, and learning.

Each part is a process of its own with a limit of time, so that what fails or hangs takes nothing else with it. A line
says how each ended, and what it printed is kept in build/gpu, beside the results. build/gpu.tar.gz holds it all.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, ROOT

PARTS: dict[str, tuple[str, str, float]] = {
    "machine": ("what PyTorch and Warp see", "benchmarks.first_gpu --look", 1.0),
    "tests": ("the device's tests, by tolerance", "pytest -q -rfEs tests/device --device {device}", 4.0),
    "rates": ("from physics alone to training", "benchmarks.envs.gpu --device {device} --minutes 2", 4.0),
    "timeline": ("kernels of an NPG iteration", "benchmarks.envs.gpu --device {device} --trace {folder}/npg.json", 1.0),
    "ways": ("torch.compile, graphs, eager", "benchmarks.envs.gpu --device {device} --ways 4096 --seconds 1", 3.0),
    "learning": (
        "returns beside MuJoCo's",
        "benchmarks.envs.warp_learning --device {device} --tasks HalfCheetah-v5 --seeds 3 --budget-minutes 1",
        3.0,
    ),
}
"""Part -> what it is, what `python -m` runs, and the minutes after which it is ended."""
SHORTEST = 30
"""Seconds with less than which no part begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--look", action="store_true", help="only say what PyTorch and Warp see")
    arguments = parser.parse_args()
    if arguments.look:
        look(arguments.device)
        return
    folder, begin, failed = ROOT / "build" / "gpu", time.monotonic(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.parts:
        about, command, minutes = PARTS[name]
        left = 60 * arguments.minutes - (time.monotonic() - begin)
        if left < SHORTEST:
            print(f"{name:9} left out: the minutes are spent; --parts {name} runs it alone", flush=True)
            continue
        print(f"{name:9} {about}, at most {minutes:g} minutes ...", flush=True)
        module = command.format(device=arguments.device, folder=folder)
        ended = run(shlex.split(module), folder / f"{name}.log", min(60 * minutes, left))
        failed += not ended.startswith("ok")
        print(f"{'':9} {ended}", flush=True)
        if name == "machine" and not ended.startswith("ok"):
            break
    archive = pack(folder)
    print(f"{failed} of the parts failed. Please send back {archive.relative_to(ROOT)}, whatever failed.")
    sys.exit(int(failed > 0))


def run(arguments: list[str], log: Path, seconds: float) -> str:
    """Run a module with arguments, keep what it prints, and say in a line how it ended."""
    begin = time.monotonic()
    with log.open("w") as out:
        try:
            ended = subprocess.run(
                [sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            ended = None
    spent = time.monotonic() - begin
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["it printed nothing"]
    last = lines[-1].strip()[:120]
    where = log.relative_to(ROOT)
    if ended == 0:
        told = sum("FAILED" in line for line in lines)
        return f"ok in {spent:.0f} s" + f", but {told} lines of {where} say FAILED" * (told > 0) + f": {last}"
    why = f"ended after {spent:.0f} s, for it took too long" if ended is None else f"failed after {spent:.0f} s"
    return f"FAILED: it {why}: {last} (all of it: {where})"


def look(device: str) -> None:
    """Say what there is; an error in a sentence where something is missing."""
    import torch

    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        sys.exit(
            "PyTorch sees no GPU; see whether nvidia-smi does, and whether its driver is as new as PyTorch's CUDA."
        )
    import mujoco_warp
    import warp

    there = warp.device_from_torch(torch.device(device))
    free, total = torch.cuda.mem_get_info()
    print(f"Warp {warp.__version__}, MuJoCo Warp {mujoco_warp.__version__}")
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    graphs = (
        "graphs" if warp.is_mempool_enabled(there) else "no graphs of physics, for Warp has no pool of memory there"
    )
    print(f"{torch.cuda.get_device_name(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {graphs}")


def pack(folder: Path) -> Path:
    """Put logs and results into one archive."""
    for pattern in ("gpu*.*", "warp_learning_*.*"):
        for file in (RESULTS / "envs").glob(pattern):
            shutil.copy(file, folder)
    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, folder.name)
    return archive


if __name__ == "__main__":
    main()
