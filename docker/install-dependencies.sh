#!/bin/sh
# Installs the locked dependencies into a virtual environment that has no pip of its own.
#
#   install-dependencies.sh VENV LOCK [TORCH_INDEX]
#
# Without TORCH_INDEX every package comes from the lock, hash for hash. With it, torch and torchvision come from that
# index, in the versions of the lock, and the CUDA libraries stay out. What is given up: the lock cannot know the
# hashes of those two builds, so they are trusted as far as the index is.
set -eu

venv=$1
lock=$2
torch_index=${3:-}

install() {
    pip --python "$venv/bin/python" install --no-deps --only-binary=:all: "$@"
}

if [ -z "$torch_index" ]; then
    install --require-hashes --requirement "$lock"
    exit
fi

rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
# A requirement starts in the first column; its hashes are on the indented lines that follow.
awk '/^[^ #]/ { skip = /^(torch|torchvision|triton)[^a-z0-9-]/ || /^(nvidia|cuda)-/ } !skip' "$lock" > "$rest"
install --require-hashes --requirement "$rest"
# shellcheck disable=SC2046  # two words are meant
install --index-url "$torch_index" $(awk '/^(torch|torchvision)==/ { print $1 }' "$lock")
