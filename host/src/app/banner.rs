//! The start screen: what runs, where, and what to do next.

use std::fmt::Write;
use std::net::SocketAddr;

use crate::config::{Config, Source};
use crate::hints::{Hint, Hints, Letters};
use crate::listeners::transport::Bind;
use crate::topic::Namespace;

/// What the start screen shows. [`Started::of`] fills it from the config; what
/// is known only once it runs (bound addresses, plugins) is put over it.
#[derive(Clone, Debug, Default)]
pub struct Started {
    /// `headworks.yaml` or `embedded default`
    pub config: String,
    pub hints: Hints,
    pub data_dir: String,
    pub plugins_dir: String,
    /// In the order they run.
    pub plugins: Vec<PluginLine>,
    /// What it is (`mqtt`, `mqtt websocket tls`) and where it is bound.
    pub listeners: Vec<(String, Bind)>,
    pub streams: Vec<StreamLine>,
    pub pipelines: Vec<PipelineLine>,
    pub admin: Option<SocketAddr>,
    /// A topic that fits the namespace, for the hint.
    pub example_topic: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PluginLine {
    /// `10-normalize.wasm`
    pub file: String,
    pub name: String,
    pub version: String,
    /// Why it does not run; `None` when it does.
    pub problem: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamLine {
    pub name: String,
    /// Empty: all that no other stream wants.
    pub topics: Vec<String>,
    /// Devices write to it.
    pub takes_messages: bool,
    /// What MQTT clients subscribe to it by, where they have it from no device.
    pub topic_prefix: Option<String>,
    pub partitions: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PipelineLine {
    pub name: String,
    pub from: String,
    /// `None`: the folder's plugins.
    pub steps: Option<Vec<String>>,
    /// Route, and each sink as `warehouse (PostgreSQL 127.0.0.1:5432/iot table telemetry)`; none: drop.
    pub routes: Vec<(String, Vec<String>)>,
    /// The stream between the steps and the sinks, if there is one.
    pub out: Option<String>,
}

impl Started {
    /// What the config says, before anything is bound or compiled.
    pub fn of(config: &Config, source: &Source) -> Self {
        let sink = |name: &String| match config.sinks.get(name) {
            Some(sink) => format!("{name} ({})", sink.describe()),
            None => format!("{name} (stream)"),
        };
        let levels = match Namespace::parse(&config.topics) {
            Ok(namespace) => namespace.fields().iter().map(|field| example_level(field)).collect(),
            Err(_) => vec!["test".to_owned(), "hello".to_owned()],
        };
        Self {
            config: source.to_string(),
            hints: source.hints(),
            data_dir: config.data_dir.display().to_string(),
            plugins_dir: config.plugins.dir.display().to_string(),
            plugins: Vec::new(),
            listeners: config
                .mqtt
                .listeners
                .iter()
                .map(|listener| (listener.kind(), listener.bind.clone()))
                .chain(config.http.listeners.iter().map(|entry| (entry.kind("http"), entry.bind.clone())))
                .collect(),
            streams: config
                .streams
                .iter()
                .map(|(name, stream)| StreamLine {
                    name: name.clone(),
                    topics: stream.topics.clone(),
                    takes_messages: config.takes_messages(name),
                    topic_prefix: stream.topic_prefix.clone(),
                    partitions: stream.partitions,
                })
                .collect(),
            pipelines: config
                .pipelines
                .iter()
                .map(|(name, pipeline)| PipelineLine {
                    name: name.clone(),
                    from: pipeline.from.clone(),
                    steps: pipeline.steps.as_ref().map(|steps| {
                        steps
                            .iter()
                            .map(|step| step.name.clone().unwrap_or_else(|| step.plugin.clone()))
                            .collect()
                    }),
                    routes: pipeline
                        .routes
                        .iter()
                        .map(|(route, target)| (route.clone(), pipeline.targets(target).map(sink).collect()))
                        .collect(),
                    out: config.out_stream(name, pipeline),
                })
                .collect(),
            admin: config.admin.address(),
            example_topic: levels.join("/"),
        }
    }
}

/// The whole start screen.
pub fn banner(started: &Started) -> String {
    let mut text = format!("headworks {}\n\n{}", env!("CARGO_PKG_VERSION"), lines(started, true));
    let plain = started.listeners.iter().filter(|(kind, _)| kind == "mqtt").find_map(|(_, bind)| bind.tcp());
    let next = plain.map(|address| {
        let port = if address.port() == 1883 { String::new() } else { format!(" -p {}", address.port()) };
        let host =
            if address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { address.ip().to_string() };
        let topic = &started.example_topic;
        let device = topic.split('/').find(|level| level.starts_with("sensor")).unwrap_or("sensor-1");
        let blank = " ".repeat(12);
        format!(
            "mosquitto_pub -h {host}{port} -q 1 \\\n{blank}-t {topic} \\\n\
             {blank}-m '{{\"device_id\":\"{device}\",\"value\":21.5,\"ts\":1700000000}}'"
        )
    });
    let commands = [
        (Hint::StreamsTail, "what comes in"),
        (Hint::Status, "what is wrong, and what to do"),
        (Hint::DeadLettersSummary(Letters::All), "what was refused, and why"),
    ]
    .map(|(hint, what)| (started.hints.command(hint), what));
    let width = commands.iter().map(|(command, _)| command.chars().count()).max().unwrap_or(0);
    let hints = next.into_iter().chain(commands.map(|(command, what)| format!("{command:width$}  {what}")));
    for (number, hint) in hints.enumerate() {
        let label = if number == 0 { "next" } else { "" };
        let _ = writeln!(text, "{label:<10}{hint}");
    }
    text
}

/// The same without title and hints: what runs, or would.
pub fn summary(started: &Started) -> String {
    lines(started, false)
}

/// `runs`: the folder was looked at, so that its plugins are known.
fn lines(started: &Started, runs: bool) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        let _ = writeln!(text, "{}", format!("{label:<10}{value}").trim_end());
    };
    line("config", &started.config);
    line("data", &started.data_dir);
    line("plugins", &started.plugins_dir);
    for plugin in &started.plugins {
        match &plugin.problem {
            None => line("", &format!("{}  {} {}", plugin.file, plugin.name, plugin.version)),
            Some(problem) => line("", &format!("{}  does not run: {problem}", plugin.file)),
        }
    }
    let of_folder = started.pipelines.iter().any(|pipeline| pipeline.steps.is_none());
    if runs && started.plugins.is_empty() && of_folder {
        line("", "no plugins yet: messages go to their table as they are; drop a .wasm file in");
    }
    for (kind, address) in &started.listeners {
        line("listen", &format!("{kind} on {address}"));
    }
    for StreamLine { name, topics, partitions, takes_messages, topic_prefix } in &started.streams {
        let alone = started.streams.iter().filter(|stream| stream.takes_messages).count() == 1;
        let topics = match topics.join(" ") {
            _ if !takes_messages => match topic_prefix {
                Some(prefix) => format!("what pipelines write, for subscribers {prefix}/#"),
                None => "what pipelines write".to_owned(),
            },
            none if none.is_empty() && alone => "all topics".to_owned(),
            none if none.is_empty() => "all other topics".to_owned(),
            some => some,
        };
        let noun = if *partitions == 1 { "partition" } else { "partitions" };
        let is_read = started.pipelines.iter().any(|pipeline| pipeline.from == *name);
        let end = if is_read || !takes_messages { "" } else { "; for subscribers only, no rows" };
        line("stream", &format!("{name}  {topics}, {partitions} {noun}{end}"));
    }
    for PipelineLine { name, from, steps, routes, out } in &started.pipelines {
        let steps = match steps {
            None => " -> plugins of the folder".to_owned(),
            Some(steps) => steps.iter().map(|step| format!(" -> {step}")).collect(),
        };
        let out = out.iter().map(|out| format!(" -> {out}")).collect::<String>();
        line("pipeline", &format!("{name}  {from}{steps}{out}"));
        for (route, sinks) in routes {
            let sinks = if sinks.is_empty() { "dropped".to_owned() } else { sinks.join(", ") };
            line("", &format!("  {route} -> {sinks}"));
        }
    }
    if let Some(admin) = started.admin {
        line("admin", &format!("http://{admin}  (/readyz /metrics /api/problems)"));
    }
    text
}

fn example_level(field: &str) -> String {
    match field {
        "org" => "acme".to_owned(),
        "site" => "factory-01".to_owned(),
        "device_type" => "temperature".to_owned(),
        "device_id" => "sensor-4a3b".to_owned(),
        "measurement" => "reading".to_owned(),
        other => other.replace('_', "-"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_stream_that_pipelines_write_is_told_apart_from_those_that_devices_write() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("headworks.yaml");
        let text = "streams: { clean: { topic_prefix: clean, partitions: 1 }, hourly: {} }\n\
                    pipelines: { p: { to: clean }, q: { from: clean, routes: { default: hourly, odd: drop } } }\n";
        std::fs::write(&file, text).unwrap();
        let loaded = crate::config::load(Some(&file)).unwrap();
        let shown = summary(&Started::of(&loaded.config, &loaded.source));
        for line in [
            "stream    clean  what pipelines write, for subscribers clean/#, 1 partition\n",
            "stream    default  all topics, 4 partitions\n",
            "stream    hourly  what pipelines write, 4 partitions\n",
            "            default -> clean (stream)\n",
            "            default -> hourly (stream)\n            odd -> dropped\n",
        ] {
            assert!(shown.contains(line), "{line}not in\n{shown}");
        }
    }

    #[test]
    fn the_start_screen_of_the_embedded_default() {
        let loaded = crate::config::load(None).unwrap();
        let mut started = Started::of(&loaded.config, &loaded.source);
        started.plugins = vec![
            PluginLine {
                file: "10-normalize.wasm".into(),
                name: "normalize".into(),
                version: "0.1.0".into(),
                problem: None,
            },
            PluginLine {
                file: "20-broken.wasm".into(),
                problem: Some("not wasm".into()),
                ..PluginLine::default()
            },
        ];
        let sink = started.pipelines[0].routes[0].1[0].clone();
        let expected = "\
headworks VERSION

config    embedded default
data      data
plugins   ./plugins
          10-normalize.wasm  normalize 0.1.0
          20-broken.wasm  does not run: not wasm
listen    mqtt on 127.0.0.1:1883
stream    default  all other topics, 4 partitions; for subscribers only, no rows
stream    telemetry  +/+/+/+/+, 4 partitions
pipeline  telemetry  telemetry -> plugins of the folder
            default -> SINK
admin     http://127.0.0.1:8080  (/readyz /metrics /api/problems)
next      mosquitto_pub -h 127.0.0.1 -q 1 \\
            -t acme/factory-01/temperature/sensor-4a3b/reading \\
            -m '{\"device_id\":\"sensor-4a3b\",\"value\":21.5,\"ts\":1700000000}'
          headworks streams tail --follow  what comes in
          headworks status                 what is wrong, and what to do
          headworks dead-letters summary   what was refused, and why
";
        let expected = expected.replace("VERSION", env!("CARGO_PKG_VERSION")).replace("SINK", &sink);
        assert_eq!(banner(&started), expected);
        assert!(expected.lines().all(|line| line.chars().count() <= 80), "{expected}");
        started.hints = Hints::of(Some(Path::new("hw.yaml")));
        assert!(banner(&started).contains("headworks dead-letters summary --config hw.yaml   what was"));
        started.plugins.clear();
        let hint = "./plugins\n          no plugins yet: messages go to their table as they are; drop a .wasm file in\n";
        assert!(banner(&started).contains(hint));
        assert!(!summary(&started).contains("no plugins yet"));
        assert!(sink.starts_with("telemetry (") && sink.contains("telemetry.db"), "{sink}");
    }
}
