#!/usr/bin/env python3
"""Makes a stored folder of `tests/tests/stored_folders.rs` with a binary of Headworks.

    tests/stored/make.py BINARY PLUGINS OUT.tar.xz [--with-to]

BINARY    the host that writes the folder, for example one built from an old commit
PLUGINS   the folder with that version's 10-normalize.wasm and 30-route.wasm
--with-to the version is younger than 0.1.0: it can write streams (`to`), and speaks HTTP

Devices and clients speak plain MQTT to the host, which is then killed (-9) while work is unfinished. The archive
holds the data folder, the plugins, the config with placeholders for ports, a dump of the PostgreSQL database, and
`expected.json`: what was acknowledged, and what waits. Needs PostgreSQL's programs and nothing but Python's own
modules. As root, the server runs as the user `postgres`.
"""

import argparse
import glob
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import tempfile
import time
import urllib.request

CONFIG = """\
data_dir: ./data
admin: {{ bind: 127.0.0.1:@ADMIN@ }}
plugins: {{ dir: ./plugins{limits} }}
mqtt:
  listeners: [ {{ bind: 127.0.0.1:0 }} ]
  session_expiry_max: 36500d
  queue_age_max: 36500d
  will_delay_after_restart: 1s
{http}\
dead_letters: {{ max_age: null }}
streams:
  telemetry: {{ topics: [ "acme/telemetry/#" ], partitions: 4, retention: {{ max_age: null }} }}
  lagging: {{ topics: [ "acme/lagging/#" ], partitions: 2, retention: {{ max_age: null }} }}
  pair: {{ topics: [ "acme/pair/#" ], partitions: 4, retention: {{ max_age: null }} }}
{to_streams}\
  other: {{ partitions: 1, retention: {{ max_age: null }} }}
pipelines:
  telemetry:
    from: telemetry
    steps: [ {{ plugin: normalize }} ]
    routes: {{ default: warehouse }}
    refusals_max_share: 1
    sink_backoff: {{ min: 20ms, max: 200ms }}
  lagging:
    from: lagging
    steps: []
    routes: {{ default: archive }}
    sink_backoff: {{ min: 20ms, max: 200ms }}
  pair:
    from: pair
    steps:
      - {{ plugin: normalize }}
      - {{ plugin: route, config: {{ rules: [ {{ name: high, when: {{ above: 59.5 }}, route: high }} ] }} }}
    routes: {{ default: [near, far], high: far }}
    lag_after: 100ms
    sink_backoff: {{ min: 20ms, max: 200ms }}
{to_pipelines}\
sinks:
  warehouse: {{ type: postgres, url: "@POSTGRES@", table: telemetry, on_conflict: {on_conflict} }}
  archive: {{ type: sqlite, path: data/archive.db, table: telemetry, busy_timeout: 50ms{on_conflict_of_archive} }}
  near: {{ type: sqlite, path: data/near.db, table: telemetry, busy_timeout: 50ms }}
  far: {{ type: sqlite, path: data/far.db, table: telemetry, busy_timeout: 50ms }}
{to_sinks}"""

HTTP = """\
http: { listeners: [ { bind: 127.0.0.1:0 } ], idempotency_window: 36500d }
"""
TO_STREAMS = """\
  raw: { topics: [ "acme/raw/#" ], partitions: 4, retention: { max_age: null } }
  clean: { topic_prefix: clean, partitions: 2, retention: { max_age: null } }
"""
TO_PIPELINES = """\
  raw: { from: raw, steps: [ { plugin: normalize } ], to: clean }
  clean: { from: clean, steps: [], routes: { default: cleaned }, sink_backoff: { min: 20ms, max: 200ms } }
"""
TO_SINKS = """\
  cleaned: { type: sqlite, path: data/cleaned.db, table: telemetry, busy_timeout: 50ms }
"""

# What `normalize` rejects, PostgreSQL's table, and the table of the sink `far`.
EVERY = 50
BAD = 13
BREAKS_CHECK = 7
BREAKS_TRIGGER = 27
# Longer than it takes from its client's end to that of the host.
WILL_DELAY_S = 3


def check(besides=""):
    """`besides`: a device whose first message of this kind is taken."""
    is_besides = f"device_id = '{besides}' AND value = {BREAKS_CHECK}"
    is_taken = f"value::bigint % {EVERY} <> {BREAKS_CHECK} OR {is_besides}"
    return f"ALTER TABLE telemetry ADD CONSTRAINT checked CHECK ({is_taken}) NOT VALID"


def trigger(besides=""):
    is_besides = f"NEW.device_id = '{besides}' AND NEW.value = {BREAKS_TRIGGER}"
    is_rejected = f"CAST(NEW.value AS INTEGER) % {EVERY} = {BREAKS_TRIGGER} AND NOT ({is_besides})"
    body = "BEGIN SELECT RAISE(ABORT, 'checked'); END"
    return f"CREATE TRIGGER checked BEFORE INSERT ON telemetry WHEN {is_rejected} {body}"


# ---- MQTT -------------------------------------------------------------------------------------------------


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack(">H", len(data)) + data


def packet(first, *parts):
    body, length = b"".join(parts), b""
    left = len(body)
    while True:
        length += bytes([left & 0x7F | (0x80 if left > 0x7F else 0)])
        left >>= 7
        if not left:
            return bytes([first]) + length + body


class Client:
    """A client that sends and takes one packet at a time."""

    def __init__(self, port, client_id, version=5, clean=False, will=None, will_delay_s=0):
        self.version, self.buffer = version, b""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        flags, payload = (2 if clean else 0), text(client_id)
        if will:
            topic, message = will
            flags |= 0x04 | 0x08 | 0x20  # QoS 1, retained
            if version == 5:
                payload += b"\x05\x18" + struct.pack(">I", will_delay_s)
            payload += text(topic) + text(message)
        expiry = b"" if clean else b"\x11\xff\xff\xff\xfe"
        properties = bytes([len(expiry)]) + expiry if version == 5 else b""
        self.send(packet(0x10, text("MQTT"), bytes([version, flags]), b"\xff\xff", properties, payload))
        first, body = self.receive()
        assert first == 0x20 and body[1] == 0, (client_id, first, body)
        self.session_present = body[0] == 1

    def send(self, data):
        self.socket.sendall(data)

    def receive(self):
        while True:
            length, shift, at = 0, 0, 1
            while at < len(self.buffer):
                length |= (self.buffer[at] & 0x7F) << shift
                shift, at = shift + 7, at + 1
                if self.buffer[at - 1] < 0x80:
                    if len(self.buffer) >= at + length:
                        first, body = self.buffer[0], self.buffer[at : at + length]
                        self.buffer = self.buffer[at + length :]
                        return first, body
                    break
            read = self.socket.recv(1 << 16)
            assert read, "the host closed the connection"
            self.buffer += read

    def ack(self, first, packet_id):
        self.send(packet(first, struct.pack(">H", packet_id)))

    def expect(self, first, packet_id):
        got, body = self.receive()
        assert got == first and struct.unpack(">H", body[:2])[0] == packet_id, (hex(got), body, hex(first))

    def publish(self, topic, payload, qos=1, packet_id=1, retain=False):
        properties = b"\x00" if self.version == 5 else b""
        ids = struct.pack(">H", packet_id) if qos else b""
        self.send(packet(0x30 | qos << 1 | retain, text(topic), ids, properties, payload.encode()))

    def publish_through(self, topic, payload, qos=1, packet_id=1, retain=False):
        self.publish(topic, payload, qos, packet_id, retain)
        if qos == 1:
            self.expect(0x40, packet_id)
        elif qos == 2:
            self.expect(0x50, packet_id)
            self.ack(0x62, packet_id)
            self.expect(0x70, packet_id)

    def subscribe(self, topic, qos, identifier=None):
        number = b"" if identifier is None else bytes([0x0B, identifier])
        properties = bytes([len(number)]) + number if self.version == 5 else b""
        self.send(packet(0x82, b"\x00\x4d", properties, text(topic), bytes([qos])))
        first, body = self.receive()
        assert first == 0x90 and body[-1] == qos, (first, body)

    def published(self):
        """Payload, QoS and packet id of the PUBLISH that comes next."""
        first, body = self.receive()
        assert first >> 4 == 3, (hex(first), body)
        at = 2 + struct.unpack(">H", body[:2])[0]
        topic, qos, packet_id = body[2:at].decode(), first >> 1 & 3, 0
        if qos:
            packet_id, at = struct.unpack(">H", body[at : at + 2])[0], at + 2
        if self.version == 5:
            assert body[at] < 0x80
            at += 1 + body[at]
        return topic, body[at:].decode(), qos, packet_id

    def cut(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def leave(self):
        self.send(b"\xe0\x00")
        while self.socket.recv(1 << 16):
            pass
        self.socket.close()


class Device:
    """A device whose messages are counted. `open`: what it began and did not end."""

    def __init__(self, port, stream, number, qos):
        self.name, self.stream, self.qos = f"{stream}-q{qos}-{number}", stream, qos
        self.version = 5 if number % 2 else 4
        self.client = Client(port, self.name, self.version)
        self.count, self.open = 0, []

    def topic(self):
        return f"acme/{self.stream}/temperature/{self.name}/reading"

    def payload(self, value):
        fields = {"device_id": self.name, "metric": "temperature_c", "value": value}
        if value % EVERY != BAD:
            fields["ts"] = 1_700_000_000_000 + value
        return json.dumps(fields, separators=(",", ":"))

    def send(self, count):
        for _ in range(count):
            value, self.count = self.count, self.count + 1
            self.client.publish_through(self.topic(), self.payload(value), self.qos, value + 1)

    def begin(self, phase):
        """Publishes one more, and does not see it through: `published`, `received` (PUBREC came)."""
        value, self.count = self.count, self.count + 1
        self.client.publish(self.topic(), self.payload(value), self.qos, value + 1)
        if phase == "received":
            self.client.expect(0x50, value + 1)
        self.open.append({"value": value, "phase": phase})

    def expected(self):
        return {
            "device": self.name,
            "stream": self.stream,
            "qos": self.qos,
            "version": self.version,
            "count": self.count,
            "open": self.open,
        }


# ---- servers ------------------------------------------------------------------------------------------------


class Postgres:
    def __init__(self, folder):
        self.folder, self.process = folder, None
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        self.bin = os.path.dirname(found[-1] if found else shutil.which("initdb"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        os.makedirs(folder)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        self.run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D", f"{folder}/data")
        self.start()
        self.sql("CREATE DATABASE iot", "postgres")

    def command(self, program, *args):
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
        return [*user, f"{self.bin}/{program}", *args]

    def run(self, program, *args):
        done = subprocess.run(self.command(program, *args), cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, (program, args, done.stdout, done.stderr)
        return done.stdout

    def start(self):
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "autovacuum=off"]
        command = self.command("postgres", "-D", f"{self.folder}/data", "-p", str(self.port), "-k", self.folder)
        log = open(f"{self.folder}/postgres.log", "a")
        self.process = subprocess.Popen([*command, *settings], cwd=self.folder, stdout=log, stderr=log)
        until("PostgreSQL answers", lambda: subprocess.run(
            self.command("pg_isready", "-h", "127.0.0.1", "-p", str(self.port)), capture_output=True).returncode == 0)

    def stop(self):
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def url(self):
        return f"postgres://postgres@127.0.0.1:{self.port}/iot"

    def sql(self, sql, database="iot"):
        return self.run("psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", database, "-Atqc", sql)

    def dump(self):
        text = self.run("pg_dump", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "--inserts", "--no-owner", "iot")
        # Lines for psql alone, and the setting of a session that others share.
        left_out = ("\\", "--", "SET transaction_timeout", "SELECT pg_catalog.set_config('search_path'")
        return "\n".join(line for line in text.splitlines() if line and not line.startswith(left_out)) + "\n"


class Host:
    def __init__(self, binary, folder):
        self.binary, self.folder, self.process = binary, folder, None

    def start(self):
        log = open(f"{self.folder}/host.log", "a")
        command = [self.binary, "run", "--config", "headworks.yaml"]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        until("the host is ready", self.ready)
        run = json.load(open(f"{self.folder}/data/run.json"))
        return int(run["mqtt"][0].rsplit(":", 1)[1])

    def get(self, path):
        run = json.load(open(f"{self.folder}/data/run.json"))
        with urllib.request.urlopen(f"http://{run['admin']}{path}", timeout=5) as answer:
            return answer.read().decode()

    def ready(self):
        assert self.process.poll() is None, "the host ended"
        try:
            self.get("/readyz")
            return "sinks" not in self.get("/api/status") or all(
                part["ready"] for part in json.loads(self.get("/api/status")).get("components", [])
            )
        except OSError:
            return False

    def ends(self):
        return {stream["name"]: stream["end"] for stream in json.loads(self.get("/api/status"))["streams"]}

    def cli(self, *args, timeout=60):
        command = [self.binary, *args, "--config", "headworks.yaml"]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=timeout)

    def letters(self):
        done = self.cli("dead-letters", "list", "--max", "100000", "--format", "json")
        assert done.returncode == 0, done
        return [json.loads(line) for line in done.stdout.splitlines()]

    def kill(self):
        self.process.kill()
        self.process.wait()


def until(what, is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def rows(path, table="telemetry"):
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20) as database:
            return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def lock(path):
    """Keeps the sink of this file from writing until the connection is closed."""
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    return database


# ---- the scene ------------------------------------------------------------------------------------------------


def session(port, name, version):
    """A session of each kind of message: in flight in each phase, acknowledged, and queued while it is away."""
    client = Client(port, name, version)
    client.subscribe(f"cmd/{name}/#", 2, identifier=7)
    topic, sender = f"cmd/{name}/set", Client(port, f"{name}-sender", clean=True)
    for number, qos in enumerate([2, 2, 1, 1, 2, 1]):
        sender.publish_through(topic, f"m{number}", qos, number + 1)
    ids = {}
    for number in range(6):
        _, payload, _, packet_id = client.published()
        assert payload == f"m{number}", payload
        ids[payload] = packet_id
    client.ack(0x50, ids["m0"])
    client.expect(0x62, ids["m0"])
    client.ack(0x40, ids["m3"])
    client.ack(0x50, ids["m4"])
    client.expect(0x62, ids["m4"])
    client.ack(0x70, ids["m4"])
    client.send(b"\xc0\x00")
    assert client.receive()[0] == 0xD0
    client.cut()
    for number in range(6, 12):
        sender.publish_through(topic, f"m{number}", 1 + number % 2, number + 1)
    sender.leave()
    return {
        "client": name,
        "version": version,
        "released": ids["m0"],
        "in_flight": [{"payload": payload, "id": ids[payload]} for payload in ["m1", "m2", "m5"]],
        "queued": [f"m{number}" for number in range(6, 12)],
    }


def post(host):
    """Messages by HTTP. The last request is repeated after the restart, as if its client had seen no answer."""
    device, count = "lagging-http", 5
    address = json.load(open(f"{host.folder}/data/run.json"))["http"][0]
    for value in range(count):
        fields = {"device_id": device, "metric": "temperature_c", "value": value, "ts": 1_700_000_000_000 + value}
        request = urllib.request.Request(
            f"http://{address}/messages/acme/lagging/temperature/{device}/reading",
            data=json.dumps(fields, separators=(",", ":")).encode(),
            headers={"Idempotency-Key": f"key-{value}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status < 300, answer.status
    return {"device": device, "count": count}


def broker_state(port):
    sessions = [session(port, "five", 5), session(port, "three", 4)]
    sender = Client(port, "retainer", clean=True)
    sender.publish_through("state/kept", "kept", 1, 1, retain=True)
    sender.publish_through("state/large", "x" * 150_000, 1, 2, retain=True)
    sender.publish_through("state/gone", "gone", 1, 3, retain=True)
    sender.publish_through("state/gone", "", 1, 4, retain=True)
    late = Client(port, "late")
    late.subscribe("state/kept", 1)
    assert late.published()[1] == "kept"
    late.cut()

    members = [Client(port, "member-1", 5), Client(port, "member-2", 4)]
    for member in members:
        member.subscribe("$share/group/jobs/#", 2)
    for number in range(10):
        sender.publish_through("jobs/do", f"j{number}", 1 + number % 2, 100 + number)
    # They take what comes first and acknowledge nothing.
    for member in members:
        member.published()
        member.cut()
    for number in range(10, 20):
        sender.publish_through("jobs/do", f"j{number}", 1 + number % 2, 100 + number)
    sender.leave()
    return {"sessions": sessions, "jobs": 20}


def wills(port):
    """A will that waits for its delay, and one whose client is connected."""
    delayed = Client(port, "delayed", will=("wills/delayed", "delayed"), will_delay_s=WILL_DELAY_S)
    connected = Client(port, "connected", 4, clean=True, will=("wills/connected", "connected"))
    delayed.cut()
    return connected


def redrives(host, postgres, letters):
    """Of each table that rejects rows one letter is a row by a redrive, and another is rejected again. Returns what
    became rows, and the letters that a redrive is to have taken when the host is killed: their tables take them."""
    done, pending = [], []
    far = sqlite3.connect(f"{host.folder}/data/far.db", timeout=60, isolation_level=None)
    for sink in ["warehouse", "far"]:
        rejected = [letter for letter in letters if letter["refused"].get("sink") == sink]
        assert len(rejected) >= 4, letters
        pending.append(rejected[2])
        taken = rejected[2]["device"]
        drop, create = {
            "warehouse": ("ALTER TABLE telemetry DROP CONSTRAINT checked", check(taken)),
            "far": ("DROP TRIGGER checked", trigger(taken)),
        }[sink]
        execute = postgres.sql if sink == "warehouse" else far.execute
        execute(drop)
        redrive(host, rejected[0])
        execute(create)
        redrive(host, rejected[1])
        done.append(late(rejected[0]))
    far.close()
    # Still bad.
    bad = [letter for letter in letters if letter["refused"].get("step") == "normalize"]
    redrive(host, bad[0], bad[-1])
    return done, pending


def redrive(host, *letters, timeout=60):
    try:
        done = host.cli("dead-letters", "redrive", *[str(letter["id"]) for letter in letters], timeout=timeout)
        print("redrive:", done.stdout.strip(), done.stderr.strip())
    except subprocess.TimeoutExpired:
        print("redrive: waits")


def late(letter):
    return {
        "sink": letter["refused"]["sink"],
        "device": letter["device"],
        "value": letter["payload"]["value"],
    }


def scene(args, folder):
    postgres = Postgres(f"{folder}/postgres")
    host = Host(os.path.abspath(args.binary), f"{folder}/host")
    os.makedirs(f"{host.folder}/plugins")
    for name in ["10-normalize.wasm", "30-route.wasm"]:
        shutil.copy(f"{args.plugins}/{name}", f"{host.folder}/plugins/{name}")
    to = [TO_STREAMS, TO_PIPELINES, TO_SINKS] if args.with_to else ["", "", ""]
    config = CONFIG.format(
        to_streams=to[0],
        to_pipelines=to[1],
        to_sinks=to[2],
        # As configs of 0.1.0 say it.
        on_conflict="reject" if args.with_to else "refuse",
        on_conflict_of_archive="" if args.with_to else ", on_conflict: auto",
        http=HTTP if args.with_to else "",
        limits="" if args.with_to else ", limits: { retries_max: 3 }",
    )
    with open(f"{host.folder}/headworks.yaml", "w") as file:
        file.write(config.replace("@ADMIN@", "0").replace("@POSTGRES@", postgres.url()))
    try:
        expected = play(args, host, postgres)
        dump = postgres.dump()
    finally:
        if host.process and host.process.poll() is None:
            host.kill()
        if postgres.process and postgres.process.poll() is None:
            postgres.stop()
    for name, text in [
        ("headworks.yaml", config),
        ("postgres.sql", dump),
        ("expected.json", json.dumps(expected, indent=1)),
    ]:
        with open(f"{host.folder}/{name}", "w") as file:
            file.write(text)
    kept = ["data", "plugins", "headworks.yaml", "postgres.sql", "expected.json"]
    # Caches depend on the build.
    left_out = ["--exclude=data/plugin-cache", "--exclude=data/run.json"]
    # The same names and times in each archive; holes of preallocated files stay holes.
    plain = ["--sparse", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]
    tar = ["tar", "-C", host.folder, *plain, *left_out, "-cf", "-", *kept]
    with open(args.out, "wb") as out:
        packed = subprocess.Popen(tar, stdout=subprocess.PIPE)
        subprocess.run(["xz", "-9e"], stdin=packed.stdout, stdout=out, check=True)
        assert packed.wait() == 0


def is_rejected(stream, value):
    of_stream = {"telemetry": [BAD, BREAKS_CHECK], "pair": [BAD, BREAKS_TRIGGER], "raw": [BAD]}
    return value % EVERY in of_stream.get(stream, [])


def play(args, host, postgres):
    port = host.start()
    data = f"{host.folder}/data"
    postgres.sql(check())
    with sqlite3.connect(f"{data}/far.db", timeout=60) as far:
        far.execute(trigger())
    far.close()
    streams = ["telemetry", "lagging", "pair"] + (["raw"] if args.with_to else [])
    devices = [Device(port, stream, number, qos) for stream in streams for number, qos in [(0, 1), (1, 1), (2, 2), (3, 2)]]
    of = lambda *names: [device for device in devices if device.stream in names]

    def send(names, count):
        for device in of(*names):
            device.send(count)

    def left(stream, is_left_out):
        return sum(1 for device in of(stream) for value in range(device.count) if not is_left_out(value))

    is_bad = lambda value: value % EVERY == BAD
    warehouse = lambda: left("telemetry", lambda value: is_bad(value) or value % EVERY == BREAKS_CHECK)
    send(streams, 40)
    until("PostgreSQL has all", lambda: int(postgres.sql("SELECT count(*) FROM telemetry")) == warehouse())
    until("archive has all", lambda: rows(f"{data}/archive.db") == left("lagging", lambda _: False))
    until("near has all", lambda: rows(f"{data}/near.db") == left("pair", is_bad))
    far_rejects = lambda value: is_bad(value) or value % EVERY == BREAKS_TRIGGER
    until("far has all", lambda: rows(f"{data}/far.db") == left("pair", far_rejects))
    if args.with_to:
        until("cleaned has all", lambda: rows(f"{data}/cleaned.db") == left("raw", is_bad))
    rejected = sum(1 for device in devices for value in range(40) if is_rejected(device.stream, value))
    until("all letters are there", lambda: len(host.letters()) == rejected)
    state = broker_state(port)
    posted = post(host) if args.with_to else None
    redriven, pending = redrives(host, postgres, host.letters())

    # One of two sinks lags, and the sink of the pipeline with one.
    locks = [lock(f"{data}/far.db"), lock(f"{data}/archive.db")]
    send(["lagging", "pair"], 40)
    high = lambda value: is_bad(value) or value >= 60
    until("near has all", lambda: rows(f"{data}/near.db") == left("pair", high))
    locks.append(lock(f"{data}/near.db"))
    if args.with_to:
        locks.append(lock(f"{data}/cleaned.db"))
        send(["raw"], 20)
    postgres.stop()
    send(["telemetry"], 20)
    send(["pair"], 10)
    redrive(host, *pending, timeout=10)
    # What devices began and did not end.
    for device in devices:
        if device.qos == 2:
            device.begin("received")
            device.begin("published")
        else:
            device.begin("published")
    # Its will is never published.
    Client(port, "leaving", clean=True, will=("wills/never", "never")).leave()
    # What clients acknowledged is written, and so is the end of this one.
    time.sleep(1)
    stays = wills(port)
    host.kill()
    stays.socket.close()
    for database in locks:
        database.close()
    postgres.start()
    return {
        "devices": [device.expected() for device in devices],
        "redriven": redriven,
        "pending": [late(letter) for letter in pending],
        "broker": state,
        "posted": posted,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("plugins")
    parser.add_argument("out")
    parser.add_argument("--with-to", action="store_true")
    parser.add_argument("--keep", help="a folder for what was made, to look at")
    args = parser.parse_args()
    folder = args.keep or tempfile.mkdtemp(prefix="headworks-stored-")
    os.makedirs(folder, exist_ok=True)
    os.chmod(folder, 0o755)
    scene(args, folder)
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
