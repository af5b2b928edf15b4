#!/bin/sh
# Everything that `make test` needs, said as it is installed; quick when all is there.
set -eu
here=$(dirname "$0")
"$here/system.sh"
"$here/python.sh"
"$here/node.sh"
"$here/wasm.sh"
