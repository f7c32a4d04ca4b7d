"""What a process keeps of the memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from scfeat_core import memory

LEFT = """
import ctypes, os
import numpy as np
from scfeat_core.memory import Surplus, keep_freed_memory, PATIENCE

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

keep_freed_memory()
surplus, before = Surplus(), resident()
surplus.processed(8_000_000)
images = [np.ones(2**20) for _ in range(20)]  # blocks of 8 MB
barrier = np.ones(100)  # behind them
del images
print(resident() - before)
for _ in range(PATIENCE):
    surplus.processed(300_000)
print(resident() - before)
"""


def need_glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library than glibc")


def environment(keep: str) -> dict[str, str]:
    return {**os.environ, memory.KEEP: keep, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("keep", ["1", "0"])
def test_what_a_large_image_left_is_given_back_after_many_small_ones(keep: str) -> None:
    need_glibc()
    done = subprocess.run([sys.executable, "-c", LEFT], env=environment(keep), capture_output=True, text=True)
    left, finally_left = map(float, done.stdout.split())
    assert finally_left < 20
    assert left > 150 if keep == "1" else left < 20


AGAIN = """
import resource, threading
import numpy as np
from scfeat_core.memory import keep_freed_memory, share_heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def run():
    for megabytes in (1, 20, 50, 100):  # glibc maps what is above 32, and in other threads what is above 64
        np.ones(megabytes * 131072)
        before = faults()
        for _ in range(3):
            np.ones(megabytes * 131072)
        print(faults() - before)

share_heap()
keep_freed_memory()
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def test_blocks_of_any_size_and_of_any_thread_are_not_mapped_again() -> None:
    need_glibc()
    done = subprocess.run([sys.executable, "-c", AGAIN], env=environment("1"), capture_output=True, text=True)
    again = [int(line) for line in done.stdout.split()]
    assert len(again) == 4 and max(again) < 100, f"{again} pages were faulted; those of 100 MB are 25,000"


KEPT = """
import os
import numpy as np
from scfeat_core.memory import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

keep_freed_memory()
before = resident()
np.ones(100 * 131072)
print(resident() - before)
"""


def test_what_the_user_has_set_stays() -> None:
    need_glibc()

    def kept(**variables: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", KEPT], env=environment("1") | variables, capture_output=True, text=True
        )
        return float(done.stdout)

    assert kept() > 80, "of 100 MB"
    assert kept(MALLOC_MMAP_MAX_="65536") < 20
    assert kept(GLIBC_TUNABLES="glibc.malloc.mmap_max=65536") < 20


def test_it_is_given_back_only_where_small_images_stay_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    monkeypatch.setattr(memory, "give_back_freed_memory", lambda: given_back.append(None))
    large, medium, small = 8_000_000, 3_000_000, 300_000

    def process(*images: int) -> int:
        given_back.clear()
        for pixels in images:
            surplus.processed(pixels)
        return len(given_back)

    surplus = memory.Surplus()
    assert process(*[small] * 100) == 0
    assert process(*[large, *[small] * (memory.PATIENCE - 1)] * 3) == 0, "cameras of several sizes"
    assert process(small) == 1 and process(*[small] * 100) == 0, "once"
    assert process(large, *[medium, small] * memory.PATIENCE) == 1
    assert process(*[small] * memory.PATIENCE) == 1, "the medium ones are not there any more, either"
    assert process(*[large] * 100) == 0
