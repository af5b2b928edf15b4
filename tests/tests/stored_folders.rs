//! Data folders and databases that earlier versions wrote and that were killed (-9) with work unfinished: this
//! version opens them and continues. Each acknowledged message is a row once in each table, in the order of its
//! device; dead letters are listed and sent once; sessions get what was queued for them once.
//!
//! The folders are archives in `tests/stored/`, which `tests/stored/make.py` makes; it says what they hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use headworks::stream::partition_of;
use headworks_tests::folder::root;
use headworks_tests::host::Host;
use headworks_tests::http::Connection;
use headworks_tests::mqtt::{Version, kind};
use headworks_tests::packets::{Client, Connect, Publish, ack};
use headworks_tests::postgres::{self, Database};
use headworks_tests::process::run;
use headworks_tests::telemetry::{self, Rows};
use serde::Deserialize;

/// Only a hung test meets it.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often `normalize` and the databases reject a value, and which one.
const EVERY: u64 = 50;
/// `normalize` rejects it.
const BAD: u64 = 13;
/// PostgreSQL rejects it.
const BREAKS_CHECK: u64 = 7;
/// The table of the sink `far` rejects it.
const BREAKS_TRIGGER: u64 = 27;
/// From this value on a message goes to the sink `far` alone.
const HIGH: u64 = 60;
/// Messages that each device sends after the folder was opened.
const MORE: u64 = 30;

#[derive(Debug, Deserialize)]
struct Expected {
    devices: Vec<Device>,
    /// Rows by redrives that ended before the host was killed: table, device and value.
    redriven: Vec<Late>,
    /// The same by redrives that were killed.
    pending: Vec<Late>,
    broker: Broker,
    /// What a device has posted by HTTP.
    posted: Option<Posted>,
}

#[derive(Debug, Deserialize)]
struct Posted {
    device: String,
    count: u64,
}

#[derive(Debug, Deserialize)]
struct Device {
    device: String,
    stream: String,
    qos: u8,
    version: u8,
    /// Messages that it has sent, values from 0.
    count: u64,
    /// The last of them, of which it did not see the end.
    open: Vec<Open>,
}

#[derive(Debug, Deserialize)]
struct Open {
    value: u64,
    /// `published`; `received`: PUBREC came.
    phase: String,
}

#[derive(Debug, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    sink: String,
    device: String,
    value: u64,
}

#[derive(Debug, Deserialize)]
struct Broker {
    sessions: Vec<Session>,
    jobs: usize,
}

#[derive(Debug, Deserialize)]
struct Session {
    client: String,
    version: u8,
    /// Packet id of a QoS 2 message whose PUBREL came.
    released: u16,
    in_flight: Vec<InFlight>,
    queued: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct InFlight {
    payload: String,
    id: u16,
}

/// A copy of a stored folder, and the database that belongs to it.
struct Stored {
    host: Host,
    database: Database,
    expected: Expected,
    /// Sends what no device of the folder sends.
    marks: u64,
}

fn version(number: u8) -> Version {
    if number == 5 { Version::V5 } else { Version::V311 }
}

impl Device {
    fn publish(&self, value: u64) -> Publish {
        let (_, payload) = match value % EVERY == BAD {
            true => telemetry::bad_message(&self.device, value),
            false => telemetry::message(&self.device, value),
        };
        let topic = format!("acme/{}/temperature/{}/reading", self.stream, self.device);
        let id = u16::try_from(value + 1).expect("few messages");
        Publish::new(&topic, self.qos, id, &payload)
    }

    /// Ends what it had begun, as MQTT 4.4 asks, and sends more.
    fn go_on(&mut self, host: &Host) {
        let version = version(self.version);
        let mut client = Client::open(host.mqtt(), &Connect::resuming(version, &self.device));
        assert!(client.session_present, "{}", self.device);
        for open in &self.open {
            let publish = self.publish(open.value);
            match &*open.phase {
                "received" => {
                    client.send(ack(0x62, publish.packet_id));
                    client.expect(ack(0x70, publish.packet_id));
                }
                _ => client.publish_through(&publish.dup()),
            }
        }
        for value in self.count..self.count + MORE {
            client.publish_through(&self.publish(value));
        }
        self.count += MORE;
        client.leave();
    }

    /// Whether the message may be two rows: it was sent twice, and only QoS 2 is received once.
    fn may_repeat(&self, value: u64) -> bool {
        self.qos == 1 && self.open.iter().any(|open| open.value == value)
    }
}

impl Stored {
    fn open(name: &str) -> Self {
        let host = Host::prepare(&format!("stored-{name}"), "");
        let head = std::fs::read_to_string(host.folder.join("headworks.yaml")).expect("ours");
        let admin = head.lines().find(|line| line.starts_with("admin:")).expect("the head has it").to_owned();
        let archive = root().join(format!("tests/stored/{name}.tar.xz"));
        run(Command::new("tar").arg("-xJf").arg(&archive).arg("-C").arg(host.folder.path()));
        let read = |file: &str| {
            std::fs::read_to_string(host.folder.join(file))
                .unwrap_or_else(|error| panic!("{file} of {}: {error}", archive.display()))
        };
        let mut database = postgres::shared().database();
        database.execute(&read("postgres.sql"));
        let expected = serde_json::from_str(&read("expected.json")).expect("as make.py writes it");
        let config = read("headworks.yaml").replace("admin: { bind: 127.0.0.1:@ADMIN@ }", &admin);
        host.folder.write("headworks.yaml", config.replace("@POSTGRES@", database.url()));
        Self { host, database, expected, marks: 0 }
    }

    /// Repeats the last request with its key, as a client that saw no answer, and posts more.
    fn post(&mut self) {
        let Some(Posted { device, count }) = self.expected.posted.take() else { return };
        let mut connection = Connection::open(self.host.http(0), PATIENCE).expect("the host listens");
        let path = format!("/messages/acme/lagging/temperature/{device}/reading");
        for value in count - 1..count + 5 {
            let key = format!("key-{value}");
            let payload = telemetry::message(&device, value).1;
            let headers = [("Idempotency-Key", &*key), ("Content-Type", "application/json")];
            let answer = connection.post(&path, &headers, payload.as_bytes());
            let (status, _) = answer.expect("an answer");
            assert!((200..300).contains(&status), "{status}");
        }
        let (stream, open) = ("lagging".to_owned(), Vec::new());
        self.expected.devices.push(Device { device, stream, qos: 2, version: 5, count: count + 5, open });
    }

    fn kill_and_run(&mut self) {
        self.host.kill();
        self.host.run();
    }

    fn streams(&self) -> BTreeSet<String> {
        self.expected.devices.iter().map(|device| device.stream.clone()).collect()
    }

    fn file(&self, sink: &str) -> PathBuf {
        self.host.folder.join(format!("data/{sink}.db"))
    }

    /// Waits until each sink has, or has rejected, all that was acknowledged before: partitions keep their order.
    fn await_rows(&mut self) {
        self.marks += 1;
        for stream in self.streams() {
            let mut client = Client::unique(&self.host, Version::V5);
            for device in self.markers() {
                let topic = format!("acme/{stream}/temperature/{device}/reading");
                client.publish_through(&Publish::new(&topic, 1, 1, &telemetry::message(&device, 0).1));
            }
            client.leave();
            let (prefix, count) = (format!("marker-{}-%", self.marks), u64::from(PARTITIONS));
            let marked = format!("telemetry WHERE device_id LIKE '{prefix}'");
            for sink in sinks_of(&stream).iter().filter(|sink| **sink != "warehouse") {
                let rows = || telemetry::sqlite_count(&self.file(sink), &marked);
                self.host.writes(&format!("{sink} has all"), || (rows() == count).then_some(()));
            }
            if stream == "telemetry" {
                self.database.changes("headworks_positions", "PostgreSQL has all", |database| {
                    (database.count(&marked) == count.cast_signed()).then_some(())
                });
            }
        }
    }

    fn markers(&self) -> Vec<String> {
        let of = |partition| {
            let mut names = (0..).map(|number| format!("marker-{}-{number}", self.marks));
            names.find(|name| partition_of(name, PARTITIONS).0 == partition).expect("endless")
        };
        (0..PARTITIONS).map(of).collect()
    }

    /// Waits until what a killed redrive had taken is there, and noted to be.
    fn await_pending(&mut self) {
        for Late { sink, device, value } in self.expected.pending.clone() {
            let row = format!("telemetry WHERE device_id = '{device}' AND value = {value}");
            match &*sink {
                "warehouse" => {
                    self.database.changes("headworks_positions", "PostgreSQL has it", |database| {
                        (database.count(&row) > 0).then_some(())
                    })
                }
                sink => {
                    let rows = || telemetry::sqlite_count(&self.file(sink), &row);
                    self.host.writes(&format!("{sink} has it"), || (rows() > 0).then_some(()));
                }
            }
        }
        let is_over = |letter: &serde_json::Value| letter["pending"] == false;
        let is_noted = || self.letters().iter().all(is_over).then_some(());
        self.host.writes("the redrive has ended", is_noted);
    }

    fn rows(&mut self, sink: &str) -> Rows {
        let rows = match sink {
            "warehouse" => telemetry::postgres_rows(&mut self.database, "telemetry"),
            sink => telemetry::sqlite_rows(&self.file(sink), "telemetry"),
        };
        rows.into_iter().filter(|(device, _)| !device.starts_with("marker-")).collect()
    }

    /// `late`: rows by redrives, which come after younger ones.
    fn assert_rows(&mut self, late: &[Late]) {
        for stream in self.streams() {
            for sink in sinks_of(&stream) {
                let rows = self.rows(sink);
                let devices = self.expected.devices.iter().filter(|device| device.stream == stream);
                let names: BTreeSet<&str> = devices.clone().map(|device| &*device.device).collect();
                let unknown: Vec<_> = rows.iter().filter(|(device, _)| !names.contains(&**device)).collect();
                assert!(unknown.is_empty(), "{sink}: nobody sent {unknown:?}");
                devices.for_each(|device| assert_rows_of(device, sink, &rows, late));
            }
        }
    }

    fn letters(&self) -> Vec<serde_json::Value> {
        self.host.cli_json(&["dead-letters", "list", "--max", "1000"])
    }

    /// Each rejected message is an open letter once for each sink, with its reason, and nothing else is.
    fn assert_letters(&self, sent: &[Late]) {
        let mut letters = BTreeMap::<(String, u64), Vec<String>>::new();
        for letter in self.letters() {
            let (payload, refused) = (&letter["payload"], &letter["refused"]);
            let device = payload["device_id"].as_str().expect("a device").to_owned();
            let value = payload["value"].as_u64().expect("a number");
            let reason = refused["reason"].as_str().expect("a reason");
            let why = if value % EVERY == BAD { "field \"ts\" is missing" } else { "checked" };
            assert!(reason.contains(why), "{letter}");
            let names: Vec<_> = match (refused["sinks"].as_array(), refused["sink"].as_str()) {
                (Some(sinks), _) => sinks.iter().filter_map(|sink| sink.as_str()).collect(),
                (None, sink) => sink.into_iter().collect(),
            };
            // What is for the stream that the steps write is for all that read it.
            let names = names.into_iter().flat_map(|name| match name {
                "pair.out" => vec!["far", "near"],
                "raw.out" => vec!["clean"],
                name => vec![name],
            });
            letters.entry((device, value)).or_default().extend(names.map(str::to_owned));
        }
        letters.values_mut().for_each(|sinks| sinks.sort_unstable());
        let mut expected = BTreeMap::new();
        for device in &self.expected.devices {
            for value in 0..device.count {
                let is_sent = |sink: &str| {
                    sent.contains(&Late { sink: sink.to_owned(), device: device.device.clone(), value })
                };
                let sinks: Vec<String> = rejecting(&device.stream, value)
                    .iter()
                    .filter(|sink| !is_sent(sink))
                    .map(|sink| (*sink).to_owned())
                    .collect();
                if !sinks.is_empty() {
                    expected.insert((device.device.clone(), value), sinks);
                }
            }
        }
        assert_eq!(letters, expected);
    }

    /// Sends the letters of the two sinks whose tables take the rows now. Returns how many rows were written.
    fn redrive(&self) -> usize {
        let rows =
            |line: &str| line.split(", ").find_map(|part| part.split_once(" row")?.0.parse::<usize>().ok());
        let redrive = |sink| self.host.cli(&["dead-letters", "redrive", "--all", "--sink", sink]);
        ["warehouse", "far"].map(redrive).iter().flat_map(|said| said.lines().filter_map(rows)).sum()
    }

    /// What the databases reject until it is mended.
    fn rejected(&self) -> Vec<Late> {
        let of = |device: &Device| -> Vec<Late> {
            let by_database = |value: &u64| value % EVERY != BAD;
            let late = |value| {
                let sinks = rejecting(&device.stream, value).iter();
                sinks.map(move |sink| Late { sink: (*sink).to_owned(), device: device.device.clone(), value })
            };
            (0..device.count).filter(by_database).flat_map(late).collect()
        };
        self.expected.devices.iter().flat_map(of).collect()
    }

    fn mend_tables(&mut self) {
        self.database.execute("ALTER TABLE telemetry DROP CONSTRAINT checked");
        let far = rusqlite::Connection::open(self.file("far")).expect("the sink's file");
        far.busy_timeout(PATIENCE).expect("a timeout");
        far.execute_batch("DROP TRIGGER checked").expect("make.py has made it");
    }
}

/// Of all streams that have rows: `lagging` has two, and these cover them.
const PARTITIONS: u16 = 4;

/// The sinks with a table of the rows of a stream.
fn sinks_of(stream: &str) -> &'static [&'static str] {
    match stream {
        "telemetry" => &["warehouse"],
        "lagging" => &["archive"],
        "pair" => &["near", "far"],
        "raw" => &["cleaned"],
        other => panic!("no stream {other}"),
    }
}

/// The sinks for which a message is a dead letter, in order.
fn rejecting(stream: &str, value: u64) -> &'static [&'static str] {
    match (stream, value % EVERY) {
        ("telemetry", BAD | BREAKS_CHECK) => &["warehouse"],
        ("pair", BAD) => &["far", "near"],
        ("pair", BREAKS_TRIGGER) => &["far"],
        ("raw", BAD) => &["clean"],
        _ => &[],
    }
}

fn assert_rows_of(device: &Device, sink: &str, rows: &Rows, late: &[Late]) {
    let name = &device.device;
    let is_late = |value: u64| late.contains(&Late { sink: sink.to_owned(), device: name.clone(), value });
    let mut got: Vec<u64> = rows.iter().filter(|row| row.0 == *name).map(|row| row.1).collect();
    for value in late.iter().filter(|late| late.sink == sink && late.device == *name).map(|late| late.value) {
        let times = got.iter().filter(|got| **got == value).count();
        assert_eq!(times, 1, "{sink}: rows of {name}'s message {value}, which a redrive sent");
    }
    got.retain(|value| !is_late(*value));
    let mut seen = BTreeSet::new();
    got.retain(|value| seen.insert(*value) || !device.may_repeat(*value));
    let by_stream = if sink == "cleaned" { "clean" } else { sink };
    let is_row = |value: &u64| {
        let goes_here = sink != "near" || *value < HIGH;
        goes_here && !is_late(*value) && !rejecting(&device.stream, *value).contains(&by_stream)
    };
    let wanted: Vec<u64> = (0..device.count).filter(is_row).collect();
    assert_eq!(got, wanted, "{sink}: rows of {name}, in order");
}

/// Takes so many messages and so many releases besides those of its own QoS 2 messages, and acknowledges all.
fn take(client: &mut Client, version: Version, messages: usize, mut releases: Vec<u16>) -> Vec<Publish> {
    let mut taken = Vec::new();
    while taken.len() < messages || !releases.is_empty() {
        let packet = client.receive();
        match packet.first >> 4 {
            kind::PUBLISH => {
                let publish = Publish::read(version, &packet);
                match publish.qos {
                    0 => {}
                    1 => client.send(ack(0x40, publish.packet_id)),
                    _ => {
                        releases.push(publish.packet_id);
                        client.send(ack(0x50, publish.packet_id));
                    }
                }
                taken.push(publish);
            }
            kind::PUBREL => {
                let id = u16::from_be_bytes([packet.body[0], packet.body[1]]);
                let at = releases.iter().position(|release| *release == id);
                releases.remove(at.unwrap_or_else(|| panic!("PUBREL of {id}, of {releases:?}")));
                client.send(ack(0x70, id));
            }
            _ => panic!("neither PUBLISH nor PUBREL: {packet:?}"),
        }
    }
    taken
}

/// What was in flight comes again, then what was queued; nothing else comes then or later.
fn assert_session(stored: &Stored, session: &Session) {
    let version = version(session.version);
    let mut client = Client::open(stored.host.mqtt(), &Connect::resuming(version, &session.client));
    assert!(client.session_present, "{}", session.client);
    let count = session.in_flight.len() + session.queued.len();
    let taken = take(&mut client, version, count, vec![session.released]);
    let (again, queued) = taken.split_at(session.in_flight.len());
    for (publish, expected) in again.iter().zip(&session.in_flight) {
        let got = (publish.text(), publish.packet_id, publish.dup);
        assert_eq!(got, (&*expected.payload, expected.id, true), "{}", session.client);
    }
    let texts: Vec<&str> = queued.iter().map(Publish::text).collect();
    assert_eq!(texts, session.queued, "{}", session.client);
    if version == Version::V5 {
        // Its subscription identifier.
        assert!(taken.iter().all(|publish| publish.each_property() == [(0x0b, vec![7])]), "{taken:?}");
    }
    client.ping();
    client.cut();
    assert_nothing_else(stored, &session.client, version);
}

/// The next message is one that is published now.
fn assert_nothing_else(stored: &Stored, client: &str, version: Version) {
    let mut resumed = Client::open(stored.host.mqtt(), &Connect::resuming(version, client));
    assert!(resumed.session_present, "{client}");
    let mut sender = Client::unique(&stored.host, Version::V5);
    sender.publish_through(&Publish::new(&format!("cmd/{client}/set"), 1, 1, "after"));
    sender.leave();
    let next = resumed.delivered();
    assert_eq!((next.text(), next.dup), ("after", false), "{client}");
    resumed.leave();
}

fn assert_retained(stored: &Stored) {
    let mut late = Client::open(stored.host.mqtt(), &Connect::resuming(Version::V5, "late"));
    let kept = late.delivered();
    assert_eq!((kept.text(), kept.retain, kept.dup), ("kept", true, true));
    late.ping();
    late.leave();
    let mut client = Client::unique(&stored.host, Version::V311);
    client.subscribe("state/#", 1);
    let mut retained = [client.delivered(), client.delivered()];
    retained.sort_by(|one, other| one.topic.cmp(&other.topic));
    assert_eq!((&*retained[0].topic, retained[0].text()), ("state/kept", "kept"));
    assert_eq!((&*retained[1].topic, retained[1].text()), ("state/large", &*"x".repeat(150_000)));
    client.ping();
    client.leave();
}

/// A session that sees each will once.
struct WillWatcher(Client);

impl WillWatcher {
    fn connect(host: &Host) -> Self {
        Self(Client::open(host.mqtt(), &Connect::resuming(Version::V5, "will-watcher")))
    }

    fn await_wills(mut self) {
        self.0.subscribe("wills/#", 1);
        let mut texts = [self.0.delivered(), self.0.delivered()].map(|will| will.text().to_owned());
        texts.sort_unstable();
        assert_eq!(texts, ["connected", "delayed"]);
        self.0.leave();
    }

    fn assert_no_more(host: &Host) {
        let mut watcher = Self::connect(host);
        assert!(watcher.0.session_present);
        let mut sender = Client::unique(host, Version::V5);
        sender.publish_through(&Publish::new("wills/end", 1, 1, "end"));
        sender.leave();
        assert_eq!(watcher.0.delivered().text(), "end");
        watcher.0.leave();
    }
}

/// Each message that waited in a shared subscription comes to one of its members. They stay connected until the host
/// ends.
fn jobs(host: &Host) -> Receiver<(usize, String)> {
    let (to, taken) = channel();
    for (member, version) in [Version::V5, Version::V311].into_iter().enumerate() {
        let name = format!("member-{}", member + 1);
        let mut client = Client::open(host.mqtt(), &Connect::resuming(version, &name));
        assert!(client.session_present, "{name}");
        let to = to.clone();
        std::thread::spawn(move || {
            while let Some(packet) = client.try_receive() {
                match packet.first >> 4 {
                    kind::PUBREL => {
                        client.send(ack(0x70, u16::from_be_bytes([packet.body[0], packet.body[1]])))
                    }
                    _ => {
                        let publish = Publish::read(version, &packet);
                        client.send(ack(if publish.qos == 1 { 0x40 } else { 0x50 }, publish.packet_id));
                        let _ = to.send((member, publish.text().to_owned()));
                    }
                }
            }
        });
    }
    taken
}

fn assert_jobs(stored: &Stored) {
    let jobs = jobs(&stored.host);
    let mut of = [Vec::new(), Vec::new()];
    for _ in 0..stored.expected.broker.jobs {
        let (member, job) = jobs.recv_timeout(PATIENCE).expect("a member gets it");
        of[member].push(job.trim_start_matches('j').parse::<usize>().expect("a number"));
    }
    for jobs in &of {
        assert!(jobs.is_sorted(), "each member gets them in order: {of:?}");
    }
    let mut all = of.concat();
    all.sort_unstable();
    assert_eq!(all, (0..stored.expected.broker.jobs).collect::<Vec<_>>());
}

fn goes_on(name: &str) -> Stored {
    let mut stored = Stored::open(name);
    // Killed early, while it reads the streams, opens the sinks and decides what they read.
    for changes in [1, 5, 20] {
        stored.host.launch_and_kill(changes);
    }
    stored.host.run();
    WillWatcher::connect(&stored.host).await_wills();
    assert_session(&stored, &stored.expected.broker.sessions[0]);
    assert_retained(&stored);
    let mut devices = std::mem::take(&mut stored.expected.devices);
    devices.iter_mut().for_each(|device| device.go_on(&stored.host));
    stored.expected.devices = devices;
    stored.post();

    stored.kill_and_run();
    assert_session(&stored, &stored.expected.broker.sessions[1]);
    assert_jobs(&stored);
    stored.await_rows();
    stored.await_pending();
    let mut late = [&stored.expected.redriven[..], &stored.expected.pending].concat();
    stored.assert_rows(&late);
    stored.assert_letters(&late);

    stored.mend_tables();
    stored.kill_and_run();
    let before = std::mem::replace(&mut late, stored.rejected()).len();
    assert_eq!(stored.redrive(), late.len() - before);
    stored.assert_rows(&late);
    stored.assert_letters(&late);

    stored.kill_and_run();
    assert_eq!(stored.redrive(), 0);
    stored.await_rows();
    stored.assert_rows(&late);
    stored.assert_letters(&late);
    WillWatcher::assert_no_more(&stored.host);
    for session in &stored.expected.broker.sessions {
        assert_nothing_else(&stored, &session.client, version(session.version));
    }
    assert!(stored.host.stop().success());
    stored
}

#[test]
fn a_folder_of_0_1_0_goes_on_without_loss_or_doubles() {
    let stored = goes_on("0.1.0");
    // Its config is read, with warnings.
    for warning in [
        "sinks.warehouse.on_conflict: refuse is read as reject",
        "sinks.archive.on_conflict: auto is read as ignore",
        "plugins.limits.retries_max: set pipelines.<name>.retries.max instead",
    ] {
        assert!(stored.host.log().contains(warning), "{warning}");
    }
}

/// Sinks of one pipeline read the source beside each other, and positions in streams have their former form.
#[test]
fn a_folder_from_before_streams_between_steps_and_sinks_goes_on_without_loss_or_doubles() {
    drop(goes_on("before-out-streams"));
}

#[test]
fn a_folder_with_a_stream_between_steps_and_sinks_goes_on_without_loss_or_doubles() {
    drop(goes_on("out-streams"));
}
