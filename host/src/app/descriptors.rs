//! File descriptors: the log, sinks, plugins and what else the config asks for have theirs,
//! connections get the rest.

use anyhow::bail;
use rustix::process::{Resource, getrlimit};

use crate::access::Authenticator;
use crate::admin;
use crate::config::Config;
use crate::listeners::{http, mqtt};

/// File descriptors of the runtimes, standard streams, watched folders, the compiling child and
/// files that are read.
const PROCESS: u64 = 48;
/// File descriptors of one stream: segments, folders, a segment that is made, readers.
const PER_STREAM: u64 = 16;
/// File descriptors of one sink of a pipeline: its connection or its database's files, twice while
/// it is opened again, and the segment that its lane reads.
const PER_SINK: u64 = 8;
/// File descriptors of one step: a version that runs and one that is loaded.
const PER_STEP: u64 = 4;
/// File descriptors of one listener: its socket and the file that it reads certificates from.
const PER_LISTENER: u64 = 2;
/// Connections, of the listeners and of the admin address, that a host must have room for to start.
const CONNECTIONS_LEAST: u64 = 16;

/// Connections of the listeners at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    pub mqtt: u32,
    pub http: u32,
}

/// Returns how many connections the limit on open files leaves room for, at most what the config
/// has, and says so where that is fewer: as a warning where a person asked for more. Fails where
/// the limit leaves the parts of the config too few.
pub fn connections_max(config: &Config) -> anyhow::Result<Connections> {
    let serves_http = !config.http.listeners.is_empty();
    let http = if serves_http { config.http.connections_max } else { 0 };
    let wanted = Connections { mqtt: config.mqtt.connections_max, http };
    let Some(limit) = getrlimit(Resource::Nofile).current else { return Ok(wanted) };
    let needed = needed(config);
    let Some(allowed) = allowed(wanted.mqtt.saturating_add(wanted.http), needed, limit) else {
        bail!(
            "the limit on open files is {limit}, and this config needs {}: raise it (ulimit -n, LimitNOFILE=)",
            needed + CONNECTIONS_LEAST
        );
    };
    let shared = wanted.within(allowed);
    for (name, key, wanted, allowed, default) in [
        ("MQTT", "mqtt", wanted.mqtt, shared.mqtt, mqtt::Config::default().connections_max),
        ("HTTP", "http", wanted.http, shared.http, http::Config::default().connections_max),
    ] {
        if allowed < wanted && wanted == default {
            tracing::info!("the limit on open files, {limit}, leaves room for {allowed} {name} connections");
        } else if allowed < wanted {
            tracing::warn!(
                "the limit on open files, {limit}, leaves room for {allowed} {name} connections: \
                 {key}.connections_max is {wanted}; raise the limit (ulimit -n, LimitNOFILE=), or lower \
                 {key}.connections_max"
            );
        }
    }
    Ok(shared)
}

impl Connections {
    /// Shares what is allowed: where it is too little for both, HTTP has at most a quarter of it, or what
    /// MQTT leaves.
    fn within(self, allowed: u32) -> Self {
        let http = self.http.min((allowed / 4).max(allowed.saturating_sub(self.mqtt)));
        Self { mqtt: self.mqtt.min(allowed - http), http }
    }
}

/// What all but connections need.
fn needed(config: &Config) -> u64 {
    // Dead letters and the broker's own are streams too.
    let streams = config.streams.len() + 2;
    let sinks: usize = config.pipelines.values().map(|pipeline| pipeline.sinks().len()).sum();
    let steps = config.pipelines.values().filter_map(|pipeline| pipeline.steps.as_ref()).map(Vec::len);
    let authenticators = config.mqtt.access.iter().flat_map(|access| &access.authenticate);
    let requests = authenticators.map(|authenticator| match authenticator {
        Authenticator::Http(http) => u64::from(http.requests_max),
        _ => 1,
    });
    PROCESS
        + PER_STREAM * streams as u64
        + PER_SINK * sinks as u64
        + PER_STEP * steps.sum::<usize>() as u64
        + PER_LISTENER * (config.mqtt.listeners.len() + config.http.listeners.len()) as u64
        + if config.http.listeners.is_empty() { 0 } else { http::GIVING_WAY_MAX as u64 }
        + requests.sum::<u64>()
}

/// `None` where not even the least number of connections has room.
fn allowed(wanted: u32, needed: u64, limit: u64) -> Option<u32> {
    let left = limit.checked_sub(needed)?;
    // A limit so low that the admin address's are most of what is left is shared by halves.
    let connections = left - (admin::CONNECTIONS_MAX as u64).min(left / 2);
    (left >= CONNECTIONS_LEAST).then(|| wanted.min(u32::try_from(connections).unwrap_or(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_file_descriptors_for_all_else() {
        assert_eq!(allowed(100_000, 200, 1 << 20), Some(100_000));
        assert_eq!(allowed(100_000, 200, 65_536), Some(65_536 - 264));
        assert_eq!(allowed(100, 200, 1_024), Some(100));
        assert_eq!(allowed(100_000, 200, 256), Some(28));
        assert_eq!(allowed(100_000, 200, 216), Some(8));
        assert_eq!(allowed(100_000, 200, 215), None);
        assert_eq!(allowed(100_000, 200, 100), None);
        assert_eq!(allowed(1_000, 200, u64::MAX), Some(1_000));
    }

    #[test]
    fn listeners_share_what_there_is_for_connections() {
        let wanted = Connections { mqtt: 1_000, http: 400 };
        assert_eq!(wanted.within(1_400), wanted);
        assert_eq!(wanted.within(1_300), Connections { mqtt: 975, http: 325 });
        assert_eq!(wanted.within(100), Connections { mqtt: 75, http: 25 });
        let few = Connections { mqtt: 10, http: 400 };
        assert_eq!(few.within(100), Connections { mqtt: 10, http: 90 });
        assert_eq!(Connections { mqtt: 1_000, http: 0 }.within(100), Connections { mqtt: 100, http: 0 });
    }

    #[test]
    fn each_part_of_a_config_has_its_file_descriptors() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("headworks.yaml");
        let needs = |text: &str| {
            std::fs::write(&file, text).unwrap();
            needed(&crate::config::load(Some(&file)).unwrap().config)
        };
        let sinks = |count: usize| {
            let names = (0..count).map(|n| format!("s{n}")).collect::<Vec<_>>();
            let all = names.iter().map(|name| format!("{name}: {{ type: sqlite, path: {name}.db }}"));
            format!(
                "sinks: {{ {} }}\npipelines: {{ p: {{ from: telemetry, routes: {{ default: [{}] }} }} }}\n",
                all.collect::<Vec<_>>().join(", "),
                names.join(", ")
            )
        };
        let one = needs(&sinks(1));
        // A pipeline with several sinks has a stream between its steps and its sinks.
        assert_eq!(needs(&sinks(40)), one + 39 * PER_SINK + PER_STREAM);
        let more = sinks(1) + "streams: { a: { topics: [a/#] }, b: { topics: [b/#] }, telemetry: {} }\n";
        assert_eq!(needs(&more), one + 2 * PER_STREAM);
        let listeners = sinks(1) + "mqtt: { listeners: [ { bind: 127.0.0.1:0 }, { bind: 127.0.0.1:0 } ] }\n";
        assert_eq!(needs(&listeners), one + PER_LISTENER);
    }
}
