//! File descriptors: the log, sinks and plugins keep theirs, connections get the rest.

use rustix::process::{Resource, getrlimit};

use crate::listeners::mqtt;

/// For the admin address, plugins, sinks and what libraries open.
const RESERVED: u64 = 192;
/// For one stream: its segments, folders and readers.
const RESERVED_PER_STREAM: u64 = 16;

/// Returns how many connections the limit on open files leaves room for, at most
/// `wanted`, and says so where that is fewer: as a warning where a person asked for `wanted`.
pub fn connections_max(wanted: u32, streams: usize) -> u32 {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return wanted };
    let allowed = allowed(wanted, streams as u64, limit);
    let is_default = wanted == mqtt::Config::default().connections_max;
    if allowed < wanted && is_default {
        tracing::info!("the limit on open files, {limit}, leaves room for {allowed} MQTT connections");
    } else if allowed < wanted {
        tracing::warn!(
            "the limit on open files, {limit}, leaves room for {allowed} connections: mqtt.connections_max \
             is {wanted}; raise the limit (ulimit -n, LimitNOFILE=), or lower mqtt.connections_max"
        );
    }
    allowed
}

fn allowed(wanted: u32, streams: u64, limit: u64) -> u32 {
    // A limit so low that the reserve is most of it is shared by halves.
    let reserved = (RESERVED + RESERVED_PER_STREAM * streams).min(limit / 2);
    wanted.min(u32::try_from(limit - reserved).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_file_descriptors_for_the_log() {
        assert_eq!(allowed(100_000, 4, 1 << 20), 100_000);
        assert_eq!(allowed(100_000, 4, 65_536), 65_536 - 256);
        assert_eq!(allowed(100, 4, 1_024), 100);
        assert_eq!(allowed(100_000, 4, 256), 128);
        assert_eq!(allowed(100_000, 1_000, 1_024), 512);
        assert_eq!(allowed(1_000, 4, u64::MAX), 1_000);
    }
}
