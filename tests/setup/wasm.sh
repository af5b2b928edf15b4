#!/bin/sh
# A Rust toolchain that builds plugins: see plugins/build.sh for the roads to it.
set -eu
cd "$(dirname "$0")/../.."
exec plugins/build.sh --setup
