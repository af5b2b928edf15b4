#!/bin/sh
# A private virtual environment, target/venv: the clients that the reference page uses.
set -eu
cd "$(dirname "$0")/../.."
venv=target/venv
wanted="paho-mqtt==1.6.1 psycopg2-binary>=2.9.9"
[ -f $venv/.wanted ] && [ "$(cat $venv/.wanted)" = "$wanted" ] && $venv/bin/python -c 'import paho.mqtt, psycopg2' 2>/dev/null && exit 0

echo "setup: installing Python packages in $venv: $wanted"
rm -rf $venv
mkdir -p target
python3 -m venv $venv
# shellcheck disable=SC2086
$venv/bin/python -m pip install --quiet --disable-pip-version-check $wanted
echo "$wanted" >$venv/.wanted
