#!/usr/bin/env bash
# On a CPU torch's silu and sigmoid of one number have other last digits by where in a tensor it lies.
#
# Versions:  torch 2.13.0
# Expected:  an elementwise function gives one number for one number: silu(x)[i] is silu(x[i:i+1])[0].
# Happens:   with vectors (AVX2, AVX-512) what fills no pair of whole vectors at a tensor's end goes
#            another way, which rounds otherwise: of 4096 floats one in a hundred or so differs in the last bit. exp,
#            tanh and cos do not. Without vectors (ATEN_CPU_CAPABILITY=default) nothing differs.
# Matters:   a gated MLP whose width times its rows is no multiple of 32 gives a token other numbers
#            when it is verified among several than when it is decoded alone, although every product is
#            computed row by row. Who wants text that does not depend on drafting or batches must give
#            activations shapes of whole vectors, too.
# Seen:      AVX2: lengths 16, 48, 64: 0 differ, 17: 11; AVX-512: 16: 125, 17: 121, 48: 39, 64: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile torch==2.13.0 numpy
fi
cd "$work"
cat >place.py <<'PYTHON'
import sys

import torch
from torch.nn import functional as F

wanted = torch.backends.cpu.get_cpu_capability()
if sys.argv[1] == "avx2" and wanted != "AVX2":
    sys.exit(2)
x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4


def differ(function, length):
    whole, found = function(x), 0
    for i in range(0, len(x) - length, length):
        found += int((function(x[i : i + length].clone()) != whole[i : i + length]).sum())
    return found


found = {n: [differ(f, n) for f in (F.silu, torch.sigmoid, torch.exp)] for n in (16, 17, 48, 64)}
print(wanted, "silu, sigmoid, exp:", found)
vectors = sys.argv[1] != "default"
assert all(f[2] == 0 for f in found.values()) and found[64] == [0, 0, 0]
assert (found[17][0] > 0 and found[17][1] > 0) == vectors
PYTHON
for capability in avx2 default; do
    status=0
    ATEN_CPU_CAPABILITY=$capability "$VENV/bin/python" place.py "$capability" || status=$?
    if [ "$status" = 2 ]; then
        echo "a processor without AVX2: nothing to see" >&2
    fi
    [ "$status" = 0 ] || exit "$status"
done
