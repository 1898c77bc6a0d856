#!/usr/bin/env bash
# Installs what is needed, then runs the linter and the tests. Arguments go to pytest:
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh -k layout -x        the tests with "layout" in their name, stop at the first
#   bash scripts/test.sh -m "not slow"       without the statistics and end-to-end runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# One thread per process: two pytest workers share the cores, and sums stay in a fixed order.
export OMP_NUM_THREADS=1
ruff check .
# Each worker takes one half in order, so that what the tests of a file share is made once; who is
# done first helps the other one.
exec python -m pytest -n 2 --dist worksteal "$@"
