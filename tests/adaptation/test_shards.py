"""Work that is cut into shards, and what it leaves of torch's numbers of threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from agents.adaptation import shards
from agents.adaptation.shards import over_shards


def test_tasks_are_cut_into_groups_that_fit_a_cache() -> None:
    cut = shards.shards(7, shards.SHARD // 3, torch.device("cpu"))
    assert [(one.start, one.stop) for one in cut] == [(0, 3), (3, 6), (6, 7)]
    assert shards.shards(2, 2 * shards.SHARD, torch.device("cpu")) == [slice(0, 1), slice(1, 2)]
    assert shards.shards(7, shards.SHARD, torch.device("cuda")) == [slice(0, 7)]


SCRIPT = """
import threading, torch
from contextlib import nullcontext
from agents.adaptation.shards import over_shards
from agents.rollout.collector import single_thread

def of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]

torch.set_num_threads(3)
names = set()

def work(shard):
    names.add(threading.current_thread().name)
    return shard, torch.get_num_threads()

for outside in (nullcontext, single_thread, nullcontext):
    with outside():
        print([shard for shard, _ in over_shards(work, range(8))], {threads for _, threads in over_shards(work, "ab")})
    print(torch.get_num_threads(), of_a_new_thread())
print({name.partition("_")[0] for name in names})
"""


def test_later_threads_have_as_many_of_torchs_as_before_and_shards_have_one() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[0, 1, 2, 3, 4, 5, 6, 7] {1}", "3 3"] * 3 + ["{'shards'}"]


def test_an_error_in_a_shard_is_raised() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        over_shards(lambda shard: 1 // shard, [1, 0])
    except ZeroDivisionError:
        return
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("the error is lost")
