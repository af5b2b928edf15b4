//! Each option of mosquitto's clients that touches the protocol, against the
//! host. Those that no broker sees (`-A`, `-N`, `--pretty`, `--proxy`, `--quiet`,
//! engines, the OS's certificates) are not here; what the host does not offer is
//! named in `host/docs/from-mosquitto.md` and refused here.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use headworks_tests::certificates::Authority;
use headworks_tests::host::Host;
use headworks_tests::mosquitto;
use headworks_tests::process::{Lines, run};

/// A subscriber and what is published before and after it subscribed. `T` in an
/// option is a topic of the case's own. What it hears, in order, and ends.
struct Case {
    option: &'static str,
    before: &'static [(&'static str, &'static str)],
    subscriber: &'static str,
    /// Options, and what goes to standard input.
    after: &'static [(&'static str, &'static str)],
    heard: &'static [&'static str],
}

/// Topic, QoS, retained, payload.
const PLAIN: &str = "-F HEARD:%t|%q|%r|%p";
/// Content type, correlation data, payload format, response topic, user properties, subscription identifier.
const PROPERTIES: &str = "-F HEARD:%C|%D|%F|%R|%P|%S|%p";

const CASES: &[Case] = &[
    Case {
        option: "-q 0",
        before: &[],
        subscriber: "-q 2 -t T",
        after: &[("-q 0 -t T -m x", "")],
        heard: &["T|0|0|x"],
    },
    Case {
        option: "-q 1",
        before: &[],
        subscriber: "-q 2 -t T",
        after: &[("-q 1 -t T -m x", "")],
        heard: &["T|1|0|x"],
    },
    Case {
        option: "-q 2",
        before: &[],
        subscriber: "-q 2 -t T",
        after: &[("-q 2 -t T -m x", "")],
        heard: &["T|2|0|x"],
    },
    Case {
        option: "-q of the subscriber",
        before: &[],
        subscriber: "-q 1 -t T",
        after: &[("-q 2 -t T -m x", "")],
        heard: &["T|1|0|x"],
    },
    Case {
        option: "-t twice",
        before: &[],
        subscriber: "-t T/a -t T/b",
        after: &[("-q 1 -t T/b -m x", ""), ("-q 1 -t T/c -m y", ""), ("-q 1 -t T/a -m z", "")],
        heard: &["T/b|0|0|x", "T/a|0|0|z"],
    },
    Case {
        option: "-t with wildcards",
        before: &[],
        subscriber: "-t T/+/c -t T/d/#",
        after: &[("-q 1 -t T/b/c -m x", ""), ("-q 1 -t T/d -m y", "")],
        heard: &["T/b/c|0|0|x", "T/d|0|0|y"],
    },
    Case {
        option: "-t of a share",
        before: &[],
        subscriber: "-q 1 -t $share/g/T",
        after: &[("-q 1 -t T -m x", "")],
        heard: &["T|1|0|x"],
    },
    Case {
        option: "-r",
        before: &[("-q 1 -r -t T -m kept", "")],
        subscriber: "-q 1 -t T",
        after: &[],
        heard: &["T|1|1|kept"],
    },
    Case {
        option: "-r of a message that comes live",
        before: &[],
        subscriber: "-q 1 -t T",
        after: &[("-q 1 -r -t T -m x", "")],
        heard: &["T|1|0|x"],
    },
    Case {
        option: "-n",
        before: &[],
        subscriber: "-t T",
        after: &[("-q 1 -n -t T", "")],
        heard: &["T|0|0|"],
    },
    Case {
        option: "-r -n takes the retained message away",
        before: &[("-q 1 -r -t T -m old", ""), ("-q 1 -r -n -t T", "")],
        subscriber: "-t T",
        after: &[("-q 1 -t T -m new", "")],
        heard: &["T|0|0|new"],
    },
    Case {
        option: "-f",
        before: &[],
        subscriber: "-t T",
        after: &[("-q 1 -f payload.txt -t T", "")],
        heard: &["T|0|0|of-a-file"],
    },
    Case {
        option: "-s",
        before: &[],
        subscriber: "-t T",
        after: &[("-q 1 -s -t T", "all-of-it")],
        heard: &["T|0|0|all-of-it"],
    },
    Case {
        option: "-l",
        before: &[],
        subscriber: "-q 1 -t T",
        after: &[("-q 1 -l -t T", "one\ntwo\nthree\n")],
        heard: &["T|1|0|one", "T|1|0|two", "T|1|0|three"],
    },
    Case {
        option: "-M 1",
        before: &[],
        subscriber: "-q 2 -t T",
        after: &[("-q 2 -M 1 -l -t T", "one\ntwo\n")],
        heard: &["T|2|0|one", "T|2|0|two"],
    },
    Case {
        option: "--repeat",
        before: &[],
        subscriber: "-q 1 -t T",
        after: &[("-q 1 --repeat 3 --repeat-delay 0 -m x -t T", "")],
        heard: &["T|1|0|x"; 3],
    },
    Case {
        option: "-k",
        before: &[],
        subscriber: "-k 5 -t T",
        after: &[("-k 5 -q 1 -t T -m x", "")],
        heard: &["T|0|0|x"],
    },
    Case {
        option: "-i, -I and none",
        before: &[],
        subscriber: "-I T -t T",
        after: &[("-i own-id -q 1 -t T -m x", ""), ("-V 5 -i x -c -x 60 -q 1 -t T -m y", "")],
        heard: &["T|0|0|x", "T|0|0|y"],
    },
    Case {
        option: "-V mqttv31",
        before: &[],
        subscriber: "-V mqttv31 -q 2 -t T",
        after: &[("-V mqttv31 -q 2 -t T -m x", "")],
        heard: &["T|2|0|x"],
    },
    Case {
        option: "-V mqttv311",
        before: &[],
        subscriber: "-V mqttv311 -q 2 -t T",
        after: &[("-V mqttv311 -q 2 -t T -m x", "")],
        heard: &["T|2|0|x"],
    },
    Case {
        option: "-V mqttv5",
        before: &[],
        subscriber: "-V mqttv5 -q 2 -t T",
        after: &[("-V mqttv5 -q 2 -t T -m x", "")],
        heard: &["T|2|0|x"],
    },
    Case {
        option: "-T",
        before: &[],
        subscriber: "-t T/# -T T/no",
        after: &[("-q 1 -t T/no -m x", ""), ("-q 1 -t T/yes -m y", "")],
        heard: &["T/yes|0|0|y"],
    },
    Case {
        option: "-R",
        before: &[("-q 1 -r -t T -m old", "")],
        subscriber: "-R -t T",
        after: &[("-q 1 -t T -m new", "")],
        heard: &["T|0|0|new"],
    },
    Case {
        option: "--retained-only",
        before: &[("-q 1 -r -t T/a -m kept", "")],
        subscriber: "--retained-only -t T/#",
        after: &[],
        heard: &["T/a|0|1|kept"],
    },
    Case {
        option: "-C",
        before: &[],
        subscriber: "-C 2 -t T",
        after: &[("-q 1 -l -t T", "one\ntwo\nthree\n")],
        heard: &["T|0|0|one", "T|0|0|two"],
    },
    Case {
        option: "-D publish",
        before: &[],
        subscriber: "-V 5 -q 1 -t T",
        after: &[(
            "-V 5 -q 1 -t T -m x -D publish content-type text/plain -D publish correlation-data c7 \
         -D publish payload-format-indicator 1 -D publish response-topic answers/1 -D publish user-property k v \
         -D publish message-expiry-interval 60 -D publish topic-alias 1",
            "",
        )],
        heard: &["text/plain|c7|1|answers/1|k:v||x"],
    },
    Case {
        option: "-D subscribe",
        before: &[],
        subscriber: "-V 5 -t T -D subscribe subscription-identifier 7 -D subscribe user-property k v",
        after: &[("-q 1 -t T -m x", "")],
        heard: &["|||||7|x"],
    },
    Case {
        option: "-D connect",
        before: &[],
        subscriber: "-V 5 -q 1 -t T -D connect receive-maximum 1 -D connect maximum-packet-size 1000 \
         -D connect request-problem-information 1 -D connect request-response-information 0 \
         -D connect user-property k v -D connect session-expiry-interval 9",
        after: &[("-V 5 -q 1 -l -t T -D connect user-property k v", "one\ntwo\n")],
        heard: &["||||||one", "||||||two"],
    },
    Case {
        option: "-D disconnect, -D unsubscribe",
        before: &[(
            "-V 5 -q 1 -t T -m x -D disconnect user-property k v -D disconnect session-expiry-interval 0",
            "",
        )],
        subscriber: "-V 5 -t T -U T/other -D unsubscribe user-property k v",
        after: &[("-q 1 -t T -m x", "")],
        heard: &["||||||x"],
    },
    Case {
        option: "-A, --nodelay, --quiet",
        before: &[],
        subscriber: "-A 127.0.0.1 --nodelay -t T",
        after: &[("-A 127.0.0.1 --nodelay --quiet -q 1 -t T -m x", "")],
        heard: &["T|0|0|x"],
    },
];

#[test]
fn every_option_that_touches_the_protocol_works() {
    let host = Host::start("mosquitto-options", "");
    host.folder.write("payload.txt", "of-a-file");
    for (number, case) in CASES.iter().enumerate() {
        println!("{}", case.option);
        let topic = format!("option/{number}");
        let own = |text: &str| -> Vec<String> {
            let topic = |word: &str| match word {
                "T" => topic.clone(),
                word => word.replace("T/", &format!("{topic}/")).replace("/T", &format!("/{topic}")),
            };
            text.split_ascii_whitespace().map(topic).collect()
        };
        let publish = |(options, input): &(&str, &str)| {
            let mut command = mosquitto::publish(host.mqtt());
            command.current_dir(host.folder.path()).args(own(options));
            give(&mut command, input);
        };
        case.before.iter().for_each(publish);
        let mut command = mosquitto::subscribe(host.mqtt());
        command.arg("-d").args(own(case.subscriber));
        let format = if case.subscriber.contains("-V 5") { PROPERTIES } else { PLAIN };
        command.args(format.split_ascii_whitespace());
        if !case.subscriber.contains("-C") {
            command.args(["-C", &case.heard.len().to_string()]);
        }
        let mut subscriber = Lines::of(&mut command);
        subscriber.find("Subscribed");
        case.after.iter().for_each(publish);
        for heard in case.heard {
            let line = subscriber.find("HEARD:");
            let heard =
                if heard.starts_with('T') { heard.replacen('T', &topic, 1) } else { (*heard).to_owned() };
            assert_eq!(line.trim_start_matches("HEARD:"), heard, "{}", case.option);
        }
        assert!(subscriber.end().success(), "{}", case.option);
    }
}

#[test]
fn a_session_is_kept_with_c_and_x_and_filters_go_with_u() {
    let host = Host::start("mosquitto-session", "");
    let session = |options: &str| {
        let mut command = mosquitto::subscribe(host.mqtt());
        command.args(["-F", "%t|%q|%p"]).args(options.split_ascii_whitespace());
        run(&mut command)
    };
    let publish = |topic: &str, text: &str| {
        run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", topic, "-m", text]));
    };
    for (version, id) in [("-V 311", "old"), ("-V 5 -x 600", "new")] {
        session(&format!("{version} -i {id} -c -q 1 -t {id}/a -t {id}/b -E"));
        publish(&format!("{id}/a"), "1");
        publish(&format!("{id}/b"), "2");
        let heard = session(&format!("{version} -i {id} -c -q 1 -t {id}/a -C 2"));
        assert_eq!(heard, format!("{id}/a|1|1\n{id}/b|1|2\n"));
        session(&format!("{version} -i {id} -c -q 1 -t {id}/a -U {id}/b -E"));
        publish(&format!("{id}/b"), "gone");
        publish(&format!("{id}/a"), "3");
        let heard = session(&format!("{version} -i {id} -c -q 1 -t {id}/a -C 1"));
        assert_eq!(heard, format!("{id}/a|1|3\n"));
        // Without -c the session ends.
        session(&format!("-V 5 -i {id} -t {id}/other -E"));
        publish(&format!("{id}/a"), "nobody");
        session(&format!("{version} -i {id} -c -q 1 -t {id}/a -E"));
        publish(&format!("{id}/a"), "somebody");
        let heard = session(&format!("{version} -i {id} -c -q 1 -t {id}/a -C 1"));
        assert_eq!(heard, format!("{id}/a|1|somebody\n"));
    }
}

#[test]
fn retained_messages_are_removed_and_a_quiet_topic_times_out() {
    let host = Host::start("mosquitto-retained", "");
    for topic in ["r/1", "r/2"] {
        run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-r", "-t", topic, "-m", "kept"]));
    }
    let until_quiet = |options: &str| {
        let mut command = mosquitto::subscribe(host.mqtt());
        command.args(["-t", "r/#", "-v", "-W", "1"]).args(options.split_ascii_whitespace());
        let output = command.output().expect("mosquitto_sub is installed");
        // Its own code for the end of its time.
        assert_eq!(output.status.code(), Some(27));
        String::from_utf8(output.stdout).expect("texts")
    };
    assert!(until_quiet("-q 1 -T r/2 --remove-retained").starts_with("r/1 kept\n"));
    assert_eq!(until_quiet(""), "r/2 kept\n");
}

#[test]
fn a_will_of_the_clients_options_is_sent_when_its_client_is_killed() {
    let host = Host::start("mosquitto-will", "");
    let mut watcher = Lines::of(mosquitto::subscribe(host.mqtt()).args([
        "-d",
        "-V",
        "5",
        "-q",
        "2",
        "-t",
        "will/#",
        "-F",
        "HEARD:%t|%q|%p|%C|%P",
        "-C",
        "2",
    ]));
    watcher.find("Subscribed");
    let plain = "--will-topic will/plain --will-payload gone --will-qos 1 --will-retain";
    let full = "-V 5 --will-topic will/5 --will-payload gone --will-qos 2 -D will content-type t \
                -D will will-delay-interval 0 -D will message-expiry-interval 60 -D will user-property k v";
    for (options, heard) in [(plain, "will/plain|1|gone||"), (full, "will/5|2|gone|t|k:v")] {
        let mut client = Command::new("mosquitto_sub");
        client.args(["-h", "127.0.0.1", "-p", &host.mqtt().port().to_string(), "-t", "x"]);
        client.args(options.split_ascii_whitespace());
        let mut lost = Lines::of(client.arg("-d"));
        lost.find("Subscribed");
        assert_eq!(lost.kill().signal(), Some(9));
        assert_eq!(watcher.find("HEARD:"), format!("HEARD:{heard}"));
    }
    let kept = run(mosquitto::subscribe(host.mqtt()).args(["-t", "will/#", "-C", "1", "-F", "%t|%r"]));
    assert_eq!(kept, "will/plain|1\n");
}

#[test]
fn a_user_and_password_are_asked_for_and_taken_from_options_and_url() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0 } ], access: { \
                authenticate: [ { type: passwords, file: passwords } ], \
                rules: [ { effect: allow, topics: [\"#\"] } ] } }";
    let mut host = Host::prepare_with("mosquitto-user", mqtt, "");
    give(&mut host.command(&["passwd", "passwords", "ann"]), "secret\n");
    host.run();
    let publish = |options: &[&str]| {
        let output = mosquitto::publish(host.mqtt()).args(["-q", "1", "-m", "x"]).args(options).output();
        output.expect("mosquitto_pub is installed").status
    };
    let url = format!("mqtt://ann:secret@127.0.0.1:{}/u/url", host.mqtt().port());
    assert!(publish(&["-t", "u/right", "-u", "ann", "-P", "secret"]).success());
    assert!(run(Command::new("mosquitto_pub").args(["-q", "1", "-m", "x", "-L", &url])).is_empty());
    for version in ["311", "5"] {
        let refused = |status: ExitStatus| !status.success();
        assert!(refused(publish(&["-V", version, "-t", "u", "-u", "ann", "-P", "wrong"])));
        assert!(refused(publish(&["-V", version, "-t", "u"])));
    }
}

#[test]
fn tls_options_are_taken_and_what_is_not_offered_is_refused() {
    let dir = headworks_tests::folder::Folder::new("mosquitto-unix");
    let socket = dir.join("mqtt.sock");
    let mqtt = format!(
        "mqtt:\n  listeners:\n    - {{ bind: 127.0.0.1:0 }}\n    \
         - {{ bind: 127.0.0.1:0, tls: {{ cert: server.pem, key: server.key }} }}\n    \
         - {{ bind: 127.0.0.1:0, tls: {{ cert: server.pem, key: server.key, client_ca: ca.pem }} }}\n    \
         - {{ bind: 'unix:{}' }}\n",
        socket.display()
    );
    let mut host = Host::prepare_with("mosquitto-tls-options", &mqtt, "");
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    let device = ca.sign(&host.folder, "device", 2);
    host.run();
    let text = |path: &Path| path.to_str().expect("our paths are UTF-8").to_owned();
    let (ca, cert, key) = (text(&ca.ca), text(&device.cert), text(&device.key));
    let publish = |listener: usize, options: &str| {
        let options = options.replace("CA", &ca).replace("CERT", &cert).replace("KEY", &key);
        let at = host.listener(listener);
        let mut command = mosquitto::publish(at);
        command.args(["-q", "1", "-t", "tls", "-m", "x"]).args(options.split_ascii_whitespace());
        command.output().expect("mosquitto_pub is installed").status.success()
    };
    for taken in [
        "--cafile CA",
        "--cafile CA --tls-version tlsv1.3",
        "--cafile CA --tls-version tlsv1.2",
        "--cafile CA --tls-version tlsv1.2 --ciphers ECDHE-ECDSA-AES256-GCM-SHA384",
        "--cafile CA --tls-alpn mqtt",
        "--cafile CA --insecure",
    ] {
        assert!(publish(1, taken), "{taken}");
    }
    assert!(publish(2, "--cafile CA --cert CERT --key KEY"));
    assert!(!publish(2, "--cafile CA"), "a certificate is asked for");
    let method = mosquitto::publish(host.mqtt())
        .args(["-V", "5", "-t", "t", "-m", "x", "-D", "connect", "authentication-method", "SCRAM"])
        .output();
    assert!(
        !method.expect("mosquitto_pub is installed").status.success(),
        "no authentication method is offered"
    );
    run(Command::new("mosquitto_pub").arg("--unix").arg(&socket).args(["-q", "1", "-t", "unix", "-m", "x"]));
}

/// Runs to its end with so much on standard input; fails unless it succeeds.
fn give(command: &mut Command, input: &str) {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("the client is installed");
    // It may not want any.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("our child");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_mosquitto_bridges_with_its_settings_as_they_are() {
    let host = Host::start("mosquitto-bridge", "");
    for version in ["mqttv311", "mqttv31", "mqttv50"] {
        let settings = format!(
            "connection gw-{version}\naddress {}\ntopic {version}/# both 1\nbridge_protocol_version {version}\n",
            host.mqtt()
        );
        let gateway = mosquitto::Mosquitto::start_with(&settings);
        for (from, to, way) in [(gateway.addr, host.mqtt(), "up"), (host.mqtt(), gateway.addr, "down")] {
            let topic = format!("{version}/{way}");
            // Kept until the bridge is there, whichever side waits.
            run(mosquitto::publish(from).args(["-q", "1", "-r", "-t", &topic, "-m", "hello"]));
            let heard = run(mosquitto::subscribe(to).args(["-q", "1", "-t", &topic, "-C", "1"]));
            assert_eq!(heard, "hello\n", "{topic}");
        }
    }
}
