//! What the broker promised is there after kill -9: retained messages and wills.
//! And that its metrics show what it keeps.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use headworks_tests::host::Host;
use headworks_tests::mosquitto;
use headworks_tests::mqtt::Version::{V5, V311};
use headworks_tests::packets::{Client, Connect, Publish, Will};
use headworks_tests::process::{Lines, Process, run};

const STATUS: &str = "acme/site-1/pump/p-1/status";
const END: &str = "test/end";

fn publish(host: &Host, args: &[&str]) {
    let mut command = mosquitto::publish(host.mqtt());
    let status = command.args(["-q", "1"]).args(args).status().expect("mosquitto_pub is installed");
    assert!(status.success(), "{command:?}: {status}");
}

/// Topic and payload of each retained message that matches, as a new subscriber gets them.
fn retained(host: &Host, filter: &str) -> Vec<String> {
    publish(host, &["-r", "-t", END, "-m", "end"]);
    let mut command = Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args());
    // The retained messages of the first filter come before those of the second.
    command.args(["-v", "-t", filter, "-t", END]).stdout(Stdio::piped());
    let mut child = command.spawn().expect("mosquitto_sub is installed");
    let out = BufReader::new(child.stdout.take().expect("piped"));
    let _process = Process::adopt("mosquitto_sub", child);
    let lines = out.lines().map(|line| line.expect("mosquitto_sub runs until its last message"));
    lines.take_while(|line| line != "test/end end").collect()
}

fn kill_and_run(host: &mut Host) {
    host.kill();
    host.run();
}

/// The wills of clients that the last run lost wait so long.
fn set_will_delay(host: &Host, delay: &str) {
    set(host, &format!("will_delay_after_restart: {delay}"));
}

/// The only keys of `mqtt` beside its listeners.
fn set(host: &Host, keys: &str) {
    let config = std::fs::read_to_string(host.folder.join("headworks.yaml")).expect("ours");
    let (before, rest) = config.split_once("mqtt: {").expect("the head has it");
    let rest = rest.split_once("listeners").expect("the head has it").1;
    let config = format!("{before}mqtt: {{ {keys}, listeners{rest}");
    host.folder.write("headworks.yaml", config);
}

/// A connected client that leaves a retained will "lost" at [`STATUS`].
fn client_with_will(host: &Host, client_id: &str) -> Lines {
    let mut command = Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args());
    command.args(["-d", "-i", client_id, "-t", "test/commands"]);
    command.args(["--will-topic", STATUS, "--will-payload", "lost", "--will-retain", "--will-qos", "1"]);
    let mut client = Lines::of(&mut command);
    client.find("received CONNACK");
    client
}

#[test]
fn a_retained_message_whose_ack_came_is_there_after_kill_9_and_so_is_its_removal() {
    let mut host = Host::start("retained", "");
    // Larger than one value of the stream's state may be.
    let large = "x".repeat(150_000);
    host.folder.write("large", &large);
    let file = host.folder.join("large");
    publish(&host, &["-r", "-t", "acme/a", "-m", "first"]);
    publish(&host, &["-r", "-t", "acme/b", "-f", file.to_str().expect("UTF-8")]);
    publish(&host, &["-r", "-t", "acme/c", "-m", "gone soon"]);
    publish(&host, &["-r", "-t", "acme/a", "-m", "second"]);
    publish(&host, &["-r", "-t", "acme/c", "-n"]);
    kill_and_run(&mut host);
    let mut found = retained(&host, "acme/#");
    found.sort();
    assert_eq!(found, ["acme/a second".to_owned(), format!("acme/b {large}")]);

    publish(&host, &["-r", "-t", "acme/b", "-m", "small"]);
    publish(&host, &["-r", "-t", "acme/a", "-n"]);
    kill_and_run(&mut host);
    assert_eq!(retained(&host, "acme/#"), ["acme/b small"]);
}

#[test]
fn the_will_of_a_client_that_a_crash_cut_off_comes_once_after_the_restart() {
    let mut host = Host::prepare("will", "");
    set_will_delay(&host, "0s");
    host.run();
    let client = client_with_will(&host, "pump-1");
    host.kill();
    client.kill();
    host.run();
    // It hears the will when it comes, or that it is retained.
    assert_eq!(run(mosquitto::subscribe(host.mqtt()).args(["-C", "1", "-t", STATUS])), "lost\n");
    assert_eq!(retained(&host, STATUS), [format!("{STATUS} lost")]);
    // Once: after it was taken away it does not come again.
    publish(&host, &["-r", "-t", STATUS, "-n"]);
    kill_and_run(&mut host);
    host.stop();
    host.run();
    assert_eq!(retained(&host, STATUS), Vec::<String>::new());
}

#[test]
fn the_will_of_a_client_that_comes_back_after_a_crash_is_not_sent() {
    let mut host = Host::prepare("will-back", "");
    set_will_delay(&host, "1h");
    host.run();
    let client = client_with_will(&host, "pump-1");
    host.kill();
    client.kill();
    host.run();
    // The client is back, and leaves with a DISCONNECT.
    publish(&host, &["-i", "pump-1", "-t", "test/back", "-m", "back"]);
    host.stop();
    set_will_delay(&host, "0s");
    host.run();
    publish(&host, &["-r", "-t", "acme/other", "-m", "still here"]);
    host.stop();
    host.run();
    assert_eq!(retained(&host, "acme/#"), ["acme/other still here"]);
}

#[test]
fn metrics_show_what_waits_what_is_kept_and_what_was_refused() {
    let host = Host::start("broker-metrics", "");
    let mut command = Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args());
    let keeper = command.args(["-i", "keeper", "-c", "-q", "1", "-t", "acme/#", "-E"]).status();
    assert!(keeper.expect("mosquitto_sub is installed").success());
    publish(&host, &["-r", "-t", "acme/a", "-m", "0123456789"]);
    // What comes later is delivered later: the message waits for its subscriber when this returns.
    let mut later = Client::clean(host.mqtt(), V311, "later");
    later.subscribe("later", 0);
    later.publish(&Publish::new("later", 0, 0, "x"));
    later.delivered();
    assert_eq!(host.metric("headworks_mqtt_queued_messages", &[]), 1.0);
    let mut refused = mosquitto::publish(host.mqtt());
    refused.args(["-V", "mqttv5", "-q", "1", "-t", "$SYS/mine", "-m", "x"]);
    refused.output().expect("mosquitto_pub is installed");
    let labelled = |name: &str, label: &str, value: &str| {
        host.metric(&format!("headworks_mqtt_{name}"), &[(label, value)])
    };
    for (name, least) in [
        ("queued_bytes", 10.0),
        ("retained_messages", 1.0),
        ("retained_bytes", 10.0),
        ("sessions", 1.0),
        ("subscriptions", 1.0),
        ("sockets_total", 3.0),
    ] {
        let value = host.metric(&format!("headworks_mqtt_{name}"), &[]);
        assert!(value >= least, "{name}: {value}");
    }
    assert_eq!(host.metric("headworks_mqtt_acks_waiting", &[]), 0.0);
    assert_eq!(host.metric("headworks_mqtt_in_flight_messages", &[]), 0.0);
    for (packet, count) in [("connect", 4.0), ("subscribe", 2.0), ("publish", 3.0), ("disconnect", 3.0)] {
        assert_eq!(labelled("packets_received_total", "type", packet), count, "{packet}");
    }
    for (packet, count) in [("connack", 4.0), ("suback", 2.0), ("puback", 2.0), ("publish", 1.0)] {
        assert_eq!(labelled("packets_sent_total", "type", packet), count, "{packet}");
    }
    assert_eq!(labelled("refusals_total", "code", "0x87"), 1.0);
    assert!(labelled("bytes_total", "direction", "sent") > 20.0);
}

#[test]
fn what_passes_a_bound_of_wills_or_subscriptions_is_told_in_each_version_and_counted() {
    let mut host = Host::prepare("broker-bounds", "");
    set(
        &host,
        "will_bytes_max: 1KiB, wills_bytes_max: 1500, subscriptions_per_client_max: 2, \
         subscription_bytes_per_client_max: 8",
    );
    host.run();
    let leaving = |version, payload_len: usize| Connect {
        will: Some(Will { payload: vec![b'x'; payload_len], ..Will::new("acme/gone", 1) }),
        ..Connect::new(version, "leaving")
    };
    let _stays = Client::open(host.mqtt(), &Connect { client_id: b"stays".into(), ..leaving(V5, 900) });
    assert!(host.metric("headworks_mqtt_wills_bytes", &[]) > 900.0);
    for (version, too_large, no_room, refused) in [(V5, 0x95, 0x97, 0x97), (V311, 3, 3, 0x80)] {
        for (payload_len, code) in [(2_000, too_large), (900, no_room)] {
            let mut client = Client::raw(host.mqtt(), version);
            client.send(leaving(version, payload_len).bytes());
            assert_eq!(client.receive().body[1], code, "{version:?} {payload_len}");
        }
        let mut client = Client::clean(host.mqtt(), version, "subscriber");
        let filters = [("a/b/c", 0), ("a/b/c/d", 0), ("d", 0), ("e", 0)];
        assert_eq!(client.subscribe_all(&[], &filters), [0, refused, 0, refused]);
    }
    for (name, cause) in [
        ("connects", "will_bytes_max"),
        ("connects", "wills_bytes_max"),
        ("subscribes", "subscription_bytes_per_client_max"),
        ("subscribes", "subscriptions_per_client_max"),
    ] {
        let count = host.metric(&format!("headworks_mqtt_refused_{name}_total"), &[("cause", cause)]);
        assert_eq!(count, 2.0, "{cause}");
    }
}
