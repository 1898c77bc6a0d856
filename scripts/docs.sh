#!/usr/bin/env bash
# The documents as pages to browse, in build/site, with the API from the docstrings; a warning is an
# error. `--serve` shows them while they are written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null; then
  echo "error: the documents need pip install -e '.[docs]'" >&2
  exit 1
fi
if [[ "${1:-}" == --serve ]]; then
  exec python -m mkdocs serve
fi
NO_MKDOCS_2_WARNING=1 exec python -m mkdocs build --strict --quiet
