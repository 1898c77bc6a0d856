#!/usr/bin/env bash
# A real full disk under a data job and under the trainer: what is said, what is left, and that the
# same command goes on once there is room. Needs Linux, and util-linux's unshare.
#
#   unshare -rm bash scripts/dev/fill_disk.sh TARGET PROMPTS.jsonl > scripts/dev/fill_disk.log
#
# TARGET: a small model, e.g. of scripts/make_tiny_target.py --size test
set -u
target=$1 prompts=$2 root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
disk=$work/disk
mkdir "$disk"
mount -t tmpfs -o size=6m tmpfs "$disk" || exit 1
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
trap 'umount "$disk"; rm -rf "$work"' EXIT

run() { # its last lines, without progress bars and the names of temporary folders
    "$@" > "$work/said" 2>&1
    local status=$?
    tr '\r' '\n' < "$work/said" | grep -E "error|stopped|rows|head" |
        grep -v "row/s" | tail -3 | sed "s#$work/##g"
    echo "exit status $status"
}
all_files() { (cd "$1" && find . -name '*.safetensors' -not -path '*/checkpoints/*' -exec sha256sum {} + | sort -k2); }
equal() { [ -n "$(all_files "$1")" ] && cmp <(all_files "$1") <(all_files "$2") && echo "all files equal"; }
room() { # KiB: of the disk, and of these filled by something else
    rm -f "$disk/filler"
    mount -o remount,size="$1"k "$disk"
    dd if=/dev/zero of="$disk/filler" bs=1K count="$2" status=none
    left
}
left() { df --output=size,avail "$disk" | tail -1 | awk '{print "disk of " $1 " KiB, " $2 " free"}'; }
states() { run python "$root/data/states.py" --target.path "$target" --rows "$work/rows" --output_dir "$1"; }
answers() {
    run python "$root/data/answers.py" --target.path "$target" --prompts "$work/prompts" \
        --output_dir "$1" --answers.max_new_tokens 24 --answers.shard_prompts 4
}
train() { # FOLDER
    run python "$root/train/redrafter.py" --target.path "$target" --data.stores "[$work/states]" \
        --output_dir "$1" --optim.steps 40 --optim.batch_positions 32 --save_steps 10 \
        --keep_checkpoints 8 --eval.prompts 0 --tracker null "${@:2}"
}

echo "== without a full disk"
prepare() { run python "$root/data/prepare.py" --target.path "$target" --source.path "$prompts" "$@"; }
prepare --output_dir "$work/rows" --keep texts
prepare --output_dir "$work/prompts" --keep prompts --source.n_rows 32
states "$work/states"
answers "$work/answers"
train "$work/head"

echo "== states: what cannot fit is refused before any work"
room 6144 4096
states "$disk/states"

echo "== answers: the disk fills up meanwhile"
rm -rf "$disk/states"
room 1024 960
answers "$disk/answers"
ls "$disk/answers" | tr '\n' ' '
echo
room 4096 0
answers "$disk/answers"
equal "$work/answers" "$disk/answers"

echo "== training: the disk fills up meanwhile"
rm -rf "$disk/answers"
room 3072 0
train "$disk/head"
find "$disk/head/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f '
echo
room 65536 0
train "$disk/head" --resume auto
equal "$work/head" "$disk/head"
