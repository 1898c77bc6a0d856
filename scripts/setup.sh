# Sourced by test.sh and quickstart.sh from the repository root: makes .venv, installs the package
# into it and puts it first on PATH. pip is the only thing here that needs the network.

find_python() {
  local candidate
  for candidate in python3.11 python3; do
    # Run it rather than look it up: version managers leave stubs that exist and do not work.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; found neither a python3.11 nor a new enough" \
    "python3 ($(python3 --version 2>&1 || true))." >&2
  return 1
}

setup_venv() {
  local python stamp wanted
  if ! .venv/bin/python -c '' >/dev/null 2>&1; then
    python="$(find_python)"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  # Installing is skipped while nothing that decides its outcome has changed. The root counts
  # too, because an editable install of a clone that was moved points to the old place.
  stamp=.venv/installed
  wanted="$(.venv/bin/python -c 'import hashlib, os, pathlib
parts = [pathlib.Path(f).read_bytes() for f in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*parts, os.getcwd().encode()])).hexdigest())')"
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    echo "setup: installing redrafter into .venv (a minute or two)"
    # Half of the time would go into byte code, most of which is never used: Python makes what it is
    # asked for.
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-compile \
      -c constraints.txt -e '.[dev]'
    echo "$wanted" >"$stamp"
  fi
}

# Without byte code whatever imports torch and transformers compiles them for ten seconds, each time.
# Containers like to ask for none, to keep an image small: here it is kept, in .venv and the clone.
unset PYTHONDONTWRITEBYTECODE
setup_venv
export PATH="$PWD/.venv/bin:$PATH"
# Nothing is fetched from here on; without this a mistyped path is looked up on the Hub for minutes.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Threads that wait for each other give up their core (redrafter/threads.py says why).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
