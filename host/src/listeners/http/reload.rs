//! Changes a running listener to another configuration: [`Handle::prepare`] does everything that may fail,
//! [`Prepared::commit`] puts the result in force.
//!
//! Access control is that of the MQTT listener. A request of an open connection shows its credentials again
//! to the version that is in force.

use std::sync::Arc;

use super::{Config, Error, Handle, Http, handshake_places, plan};
use crate::listeners::reload::Comparison;
use crate::listeners::transport::config::Endpoint;
use crate::listeners::transport::{AddressChanges, Addresses};

/// A configuration that can be put in force. Dropping it closes the addresses that were opened for it.
///
/// It is of use until another one is committed.
pub struct Prepared {
    http: Arc<Http>,
    addresses: Arc<Addresses<Http>>,
    /// The configuration that is in force then: keys that need a restart have their present values.
    config: Config,
    changes: AddressChanges,
    told: Vec<String>,
    needs_restart: Vec<String>,
}

impl Handle {
    /// Returns the configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.http.config()
    }

    /// Prepares another configuration, which was validated. Binds addresses that are new (an address that
    /// stays keeps its socket and its connections), and reads files of certificates. Changes nothing that
    /// runs; an error undoes what was done.
    ///
    /// `next` has the `connections_max` for which there are file descriptors.
    pub async fn prepare(&self, next: &Config) -> Result<Prepared, Error> {
        let (compared, config) = compare(&self.config(), next);
        let plans = config.listeners.iter().map(plan).collect();
        let changes = self.addresses.prepare(plans).await?;
        let told = changes.told.iter().cloned().chain(compared.told).collect();
        let (http, addresses) = (self.http.clone(), self.addresses.clone());
        Ok(Prepared { http, addresses, config, changes, told, needs_restart: compared.needs_restart })
    }
}

impl Prepared {
    /// Returns the keys that differ and keep their present values until a restart.
    pub fn needs_restart(&self) -> &[String] {
        &self.needs_restart
    }

    /// Returns what changes, in words for a person and without secrets.
    pub fn changes(&self) -> &[String] {
        &self.told
    }

    /// Puts the configuration in force.
    pub fn commit(self) {
        let Self { http, addresses, config, changes, .. } = self;
        let before = http.config.send_replace(Arc::new(config));
        let config = http.config();
        http.idempotency.set_bounds(config.idempotency_window.0, config.idempotency_keys_max as usize);
        let (connections, places) = handshake_places(&config);
        addresses.set_bounds(connections, places);
        addresses.commit(changes, || {});
        // Their certificates may be of an authority that is gone.
        http.access.get().recheck();
        let is_new = |endpoint: &&Endpoint| !before.listeners.contains(endpoint);
        config.listeners.iter().filter(is_new).for_each(|endpoint| http.warn_of_strangers(endpoint));
    }
}

/// Compares the configuration in force with another one. Returns what differs, and the configuration that
/// will be in force: keys that need a restart have their present values.
///
/// Each key is in one of three classes. The pattern has no `..`, so that a new key does not compile until it
/// is in one of them.
fn compare(now: &Config, next: &Config) -> (Comparison, Config) {
    let Config {
        // By address: see `prepare`.
        listeners: _,
        max_message_size,
        max_batch_size,
        batch_messages_max,
        partial_bodies_bytes_max,
        connections_max,
        http2_streams_max,
        request_timeout,
        idle_timeout,
        drain_timeout,
        idempotency_window,
        idempotency_keys_max,
    } = now;
    let mut in_force = next.clone();
    let mut keys = Comparison::of("http");
    // The memory that it bounds is shared out from the start.
    keys.restart(
        "partial_bodies_bytes_max",
        partial_bodies_bytes_max,
        &mut in_force.partial_bodies_bytes_max,
    );

    let next = &in_force;
    keys.next_connection("max_message_size", max_message_size, &next.max_message_size);
    keys.next_connection("max_batch_size", max_batch_size, &next.max_batch_size);
    keys.next_connection("batch_messages_max", batch_messages_max, &next.batch_messages_max);
    keys.next_connection("http2_streams_max", http2_streams_max, &next.http2_streams_max);
    keys.next_connection("request_timeout", request_timeout, &next.request_timeout);
    keys.next_connection("idle_timeout", idle_timeout, &next.idle_timeout);

    keys.in_place("connections_max", connections_max, &next.connections_max);
    keys.in_place("drain_timeout", drain_timeout, &next.drain_timeout);
    keys.in_place("idempotency_window", idempotency_window, &next.idempotency_window);
    keys.in_place("idempotency_keys_max", idempotency_keys_max, &next.idempotency_keys_max);
    (keys, in_force)
}
