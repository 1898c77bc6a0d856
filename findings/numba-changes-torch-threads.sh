#!/usr/bin/env bash
# The first parallel function of numba gives torch another number of threads, in the whole process.
#
# Versions:  torch 2.13.0, numba 0.65.0
# Expected:  OMP_NUM_THREADS=1 holds for torch whatever else is imported and called; and numba's
#            set_num_threads(1), called before, is about numba.
# Happens:   numba's OpenMP layer starts with all cores and sets OpenMP's number to theirs, which
#            is torch's, too: torch.get_num_threads() goes from 1 to that, without a word. With NUMBA_NUM_THREADS=1, or another threading layer of numba's
#            (workqueue), it stays 1.
# Matters:   engines find n-gram drafts by numba beside torch. A row "one thread" of a table then
#            computes with two; with spinning waits, and others on the second core, a token cost
#            seven times the CPU time. Who measures drafters must set both variables.
# Seen:      on two cores: before 1, after 2; NUMBA_NUM_THREADS=1: 1, 1; workqueue: 1, 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 numba==0.65.0 numpy
fi
cd "$work"
cat >threads.py <<'PYTHON'
import numpy as np
import torch
from numba import njit, prange, set_num_threads

before = torch.get_num_threads()


@njit(parallel=True)
def add_one(x):
    for i in prange(len(x)):
        x[i] += 1


set_num_threads(1)
add_one(np.zeros(8))
print(before, torch.get_num_threads())
PYTHON
cores=$("$VENV/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)))')
if [ "$cores" -lt 2 ]; then
    echo "one core: nothing to see" >&2
    exit 2
fi
export OMP_NUM_THREADS=1
usual=$(NUMBA_THREADING_LAYER=omp "$VENV/bin/python" threads.py)
told=$(NUMBA_THREADING_LAYER=omp NUMBA_NUM_THREADS=1 "$VENV/bin/python" threads.py)
other=$(NUMBA_THREADING_LAYER=workqueue "$VENV/bin/python" threads.py)
echo "before and after: $usual; NUMBA_NUM_THREADS=1: $told; workqueue: $other"
[ "$told" = "1 1" ] && [ "$other" = "1 1" ]
[ "${usual% *}" = 1 ] && [ "${usual#* }" -gt 1 ]
