"""The measuring process of one checkout: see `builds`. A script that reads lines, not a module.

`benchmarks` and `kivi_vllm` are those of the checkout, which may be an older one: what is taken
from them must be little, and old.
"""

import json
import sys
import time

import torch

from benchmarks.attention.cases import RESIDUAL, SHAPES, B
from benchmarks.attention.kivi import KiviPool
from benchmarks.attention.memory import cold_sets
from benchmarks.attention.work import Work
from benchmarks.common import machine
from kivi_vllm.ops.cpu import library

what = json.loads(sys.argv[1])
torch.set_num_threads(what["threads"])
shape = SHAPES[what["shape"]]
total = what["context"] + RESIDUAL
work = Work(shape, what["batch"], 1, total)
read = KiviPool(shape, what["cache"], 1, what["batch"], 1).read_bytes(work)
sets = cold_sets(read, machine.llc_bytes())
pool = KiviPool(shape, what["cache"], sets, what["batch"], -(-total // B))
pool.prepare()
calls = pool.of_a_step(work)[what["operator"]]
for call in calls:
    call()
print(library.load().isa, flush=True)
done = 0
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        calls[done % sets]()
        times.append(time.perf_counter() - start)
        done += 1
    print(sorted(times)[len(times) // 2], flush=True)
