#!/usr/bin/env bash
# vLLM serves a model with a draft head, as chains; greedy texts are plain vLLM's (docs/serving.md).
# Needs an environment with vLLM and this library (`pip install --no-deps redrafter`'s wheel).
#
#   bash examples/serve_vllm.sh MODEL HEAD [options of vllm serve]
#   bash examples/serve_vllm.sh MODEL HEAD --dry-run       # says what would be started
#
# Then, from elsewhere:
#   curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d \
#     '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}'
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,10p' "$0" >&2; exit 2; }
model=$1 head=$2
shift 2
exec redrafter vllm-serve "$model" --head "$head" "$@"
