#!/usr/bin/env bash
# From an empty machine to a measured draft head, in a few minutes after installing: makes a small
# target model, trains a ReDrafter head for it, proves that drafting changes no token, and measures
# the speed. Everything lands in quickstart/; a second run keeps the target model and makes the rest
# again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

step() {
  echo
  echo "== [$((SECONDS / 60)) min $((SECONDS % 60)) s] $*"
}
SECONDS=0

step "1/6 a small target model, trained on made-up word problems"
python scripts/make_tiny_target.py --output_dir quickstart/target

step "2/6 its own answers to prompts, and its hidden states on them"
rm -rf quickstart/prompts quickstart/answers quickstart/states quickstart/head
python data/prepare.py --target.path quickstart/target --output_dir quickstart/prompts \
  --source.path quickstart/target/prompts_train.jsonl --source.n_rows 500 --show 1
python data/answers.py --target.path quickstart/target --prompts quickstart/prompts \
  --answers.max_new_tokens 80 --output_dir quickstart/answers
python data/states.py --target.path quickstart/target --rows quickstart/answers \
  --states.forward_tokens 4096 --output_dir quickstart/states

step "3/6 a draft head for it"
python train/redrafter.py --config configs/quickstart.yaml \
  --target.path quickstart/target --output_dir quickstart/head

step "4/6 is every token the same with and without drafting? (12 prompts, greedily and sampling)"
python eval/lossless.py --target.path quickstart/target --head quickstart/head \
  --prompts quickstart/target/prompts_heldout.jsonl --n_prompts 12 --out quickstart/head/lossless.json

step "5/6 how fast? (12 prompts by four methods, greedily, then sampling)"
measure() {
  python eval/speed.py --target.path quickstart/target --head quickstart/head \
    --prompts quickstart/target/prompts_heldout.jsonl --n_prompts 12 --max_new_tokens 64 \
    --methods stock,plain,lookup,head --temperature "$1" --out "quickstart/head/$2" >/dev/null
}
measure 0 speed.json
measure 1 speed-t1.json

step "6/6 what publishing it would upload (a dry run: nothing leaves this machine)"
python scripts/push_to_hub.py --head quickstart/head --repo USER/quickstart --dry-run

step "done; made:"
printf '  %-30s %s\n' \
  quickstart/target "the model; its prompts_train.jsonl and prompts_heldout.jsonl" \
  quickstart/answers "what it said to the prompts" \
  quickstart/states "its hidden states there: what the head was trained on" \
  quickstart/head "the draft head" \
  quickstart/head/lossless.json "what was compared, token by token" \
  quickstart/head/speed.json "all numbers of the table below; speed-t1.json at temperature 1" \
  quickstart/head/card "the model card that publishing it would write"
echo "  redrafter check-store --store quickstart/answers --target.path quickstart/target --show 3"
echo "    prints three of its answers; 'source .venv/bin/activate' first, here and for all of README"
echo
python scripts/quickstart_table.py quickstart/head/speed.json quickstart/head/speed-t1.json
