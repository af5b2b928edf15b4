#!/bin/sh
# Builds every plugin afresh, the tests' own too; sets up a Rust toolchain for
# wasm where there is none. plugins/build.sh describes the roads to it.
set -eu
cd "$(dirname "$0")/../.."
exec plugins/build.sh
