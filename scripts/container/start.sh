#!/bin/sh
# start.sh [OPTIONS of deepseek-r1 serve]: serves the checkpoint in CHECKPOINT (default: /checkpoint) at PORT (default: 8000).
#
# A container is reached from outside of it, so the server listens on all addresses and does not start without a key.
# VENV: folder of the virtual environment that install.sh has made (default: venv, in the working directory).
set -eu

if [ -z "${DEEPSEEK_R1_API_KEY:-}" ]; then
    echo "start.sh: set DEEPSEEK_R1_API_KEY to the key that clients must send" >&2
    exit 1
fi
checkpoint=${CHECKPOINT:-/checkpoint}
if [ ! -f "$checkpoint/config.json" ]; then
    echo "start.sh: no checkpoint in $checkpoint; mount its folder there, or set CHECKPOINT" >&2
    exit 1
fi
exec "${VENV:-venv}/bin/deepseek-r1" serve "$checkpoint" --host 0.0.0.0 --port "${PORT:-8000}" "$@"
