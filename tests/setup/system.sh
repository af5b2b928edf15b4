#!/bin/sh
# PostgreSQL, PgBouncer, InfluxDB 1, mosquitto (broker and clients), SQLite's shell, Python with venv, Node.js, xz: Debian packages.
# No service is started or needed: tests start private servers on random ports.
set -eu

postgres_bin() {
    for dir in /usr/lib/postgresql/*/bin "$(pg_config --bindir 2>/dev/null || true)" \
        "$(dirname "$(command -v initdb 2>/dev/null || echo /nonexistent/x)")"; do
        [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && return 0
    done
    return 1
}
pooler() { command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ]; }
influxdb() { command -v influxd >/dev/null; }
mosquitto_broker() { command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ]; }
python_venv() { command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' 2>/dev/null; }

missing=
postgres_bin || missing="$missing postgresql"
pooler || missing="$missing pgbouncer"
influxdb || missing="$missing influxdb"
mosquitto_broker || missing="$missing mosquitto"
command -v mosquitto_pub >/dev/null || missing="$missing mosquitto-clients"
command -v sqlite3 >/dev/null || missing="$missing sqlite3"
python_venv || missing="$missing python3-venv"
command -v node >/dev/null || missing="$missing nodejs"
command -v npm >/dev/null || missing="$missing npm"
command -v setpriv >/dev/null || missing="$missing util-linux"
command -v xz >/dev/null || missing="$missing xz-utils"
[ -z "$missing" ] && exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "setup: missing:$missing" >&2
    echo "setup: cannot install: $(command -v apt-get >/dev/null && echo 'not root' || echo 'not Debian or Ubuntu')." >&2
    echo "setup: on Debian or Ubuntu run:  sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi

echo "setup: installing Debian packages:$missing"
# Packages must not start their services: nothing here uses them.
policy=/usr/sbin/policy-rc.d
ours=
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && ours=1
fi
trap '[ -z "$ours" ] || rm -f $policy' EXIT
export DEBIAN_FRONTEND=noninteractive
# The lists may be there already; fetch them only when they do not do.
# shellcheck disable=SC2086
install() { apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends $missing >/dev/null; }
install 2>/dev/null || { apt-get -qq update && install; }
