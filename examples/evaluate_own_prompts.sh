#!/usr/bin/env bash
# Your model, your head, your prompts: is every token the same, how fast is it, and a page of it all.
#
#   bash examples/evaluate_own_prompts.sh MODEL HEAD PROMPTS.jsonl [N_PROMPTS [NEW_TOKENS [options of speed]]]
#
# A row of PROMPTS.jsonl holds a text, a question, messages, ...: see docs/data.md.
set -euo pipefail
[[ $# -ge 3 ]] || { sed -n '2,6p' "$0" >&2; exit 2; }
model=$1 head=$2 prompts=$3 n=${4:-40} new=${5:-128}
shift $(( $# < 5 ? $# : 5 ))
given=(--target.path "$model" --head "$head" --prompts "$prompts" --n_prompts "$n" --max_new_tokens "$new")

redrafter lossless "${given[@]}" --out "$head/lossless.json"
redrafter speed "${given[@]}" --methods stock,plain,lookup,head "$@" --out "$head/speed.json"
redrafter report "$head" --target.path "$model" --prompts "$prompts" --n_prompts 3
