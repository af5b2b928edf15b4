#!/bin/sh
# Private Node.js packages, target/node: the clients that the reference page uses.
set -eu
cd "$(dirname "$0")/../.."
from=tests/clients/node
to=target/node
cmp -s $from/package-lock.json $to/package-lock.json && [ -f $to/node_modules/.package-lock.json ] && exit 0

echo "setup: installing Node.js packages in $to"
rm -rf $to
mkdir -p $to
cp $from/package.json $from/package-lock.json $to/
npm ci --prefix $to --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
