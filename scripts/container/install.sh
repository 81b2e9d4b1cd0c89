#!/bin/sh
# install.sh FOLDER: the library with its server, in a virtual environment of its own, with the tested versions of everything.
#
# Run from the root of the repository. TORCH_INDEX: where torch itself comes from (in an image, the builds without CUDA); empty:
# where everything else comes from.
set -eu

folder=${1:?install.sh FOLDER: give the folder of the virtual environment}
python3 -m venv "$folder"
if [ -n "${TORCH_INDEX:-}" ]; then
    "$folder/bin/python" -m pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch
fi
"$folder/bin/python" -m pip install --no-cache-dir -c constraints.txt ".[serve,vision]"
