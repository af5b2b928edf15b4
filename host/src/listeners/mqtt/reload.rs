//! Changes a running listener to another configuration: [`Handle::prepare`] does everything that may fail,
//! [`Prepared::commit`] puts the result in force.
//!
//! When each key applies is decided in [`compare`]. Access control applies at once, to connected clients too:
//! see [`super::connection`].

use std::sync::Arc;

use super::config::{Config, Endpoint};
use super::outbound::QueueLimits;
use super::{Broker, Error, Handle, access_secret, service};
use crate::access::{self, Access};
use crate::listeners::reload::Comparison;
use crate::listeners::transport::{AddressChanges, Addresses};
use crate::units::ByteSize;

/// A configuration that can be put in force. Dropping it closes the addresses that were opened for it.
///
/// It is of use until another one is committed.
pub struct Prepared {
    broker: Arc<Broker>,
    addresses: Arc<Addresses<Broker>>,
    /// The configuration that is in force then: keys that need a restart have their present values.
    config: Config,
    /// `None` if nothing of it changes.
    access: Option<Access>,
    changes: AddressChanges,
    told: Vec<String>,
    needs_restart: Vec<String>,
}

impl Handle {
    /// Returns the configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.clients.0.config()
    }

    /// Prepares another configuration, which was validated. Binds addresses that are new (an address that
    /// stays keeps its socket and its connections), reads files of certificates, passwords and keys, and
    /// compiles the access rules. Changes nothing that runs; an error undoes what was done.
    ///
    /// `next` has the `connections_max` for which there are file descriptors.
    pub async fn prepare(&self, next: &Config) -> Result<Prepared, Error> {
        let broker = &self.clients.0;
        let now = broker.config();
        let (mut compared, config) = compare(&now, next, broker.packet_bytes_most);
        let access = next_access(broker, &now, &config).await?;
        if let Some(access) = &access {
            compared.told.extend(told_of_access(&now, &config, broker, access));
        }
        let plans = config.listeners.iter().map(|endpoint| service::plan(endpoint, &config)).collect();
        let changes = self.addresses.prepare(plans).await?;
        let told = changes.told.iter().cloned().chain(compared.told).collect();
        let (broker, addresses) = (broker.clone(), self.addresses.clone());
        let needs_restart = compared.needs_restart;
        Ok(Prepared { broker, addresses, config, access, changes, told, needs_restart })
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
        let Self { broker, addresses, config, access, changes, .. } = self;
        let before = broker.config.send_replace(Arc::new(config));
        let config = broker.config();
        broker.live.set_limits(QueueLimits::of(&config));
        addresses.set_bounds(config.connections_max as usize, config.handshakes_max as usize);
        // Rights are renewed once it is known whom each address serves, and before new addresses open.
        addresses.commit(changes, || {
            if let Some(access) = access {
                broker.access.replace(access);
            }
        });
        broker.sessions.wake_all();
        // Their certificates may be of an authority that is gone.
        broker.access.get().recheck();
        let is_new =
            |endpoint: &&Endpoint| before.access != config.access || !before.listeners.contains(endpoint);
        config.listeners.iter().filter(is_new).for_each(|endpoint| warn_of_strangers(endpoint, &config));
    }
}

/// Warns of an address that serves whoever reaches it.
pub fn warn_of_strangers(endpoint: &Endpoint, config: &Config) {
    let bind = &endpoint.bind;
    if !endpoint.entry().is_local() && endpoint.allow_anonymous && config.access.is_none() {
        tracing::warn!(%bind, "mqtt: anyone who can reach this address may publish and subscribe (allow_anonymous)");
    }
}

/// Opens the access control of another configuration; `None` if it is that of before.
async fn next_access(broker: &Arc<Broker>, now: &Config, next: &Config) -> Result<Option<Access>, Error> {
    let of = |config: &Config| (config.access.clone(), config.limits.clone(), config.connect_timeout);
    // Whom an address serves decides about clients without credentials.
    if of(now) == of(next) && now.listeners == next.listeners {
        return Ok(None);
    }
    let secret = match &next.access {
        Some(_) => access_secret(&*broker.broker).await?,
        None => Default::default(),
    };
    let (broker, next) = (broker.clone(), next.clone());
    // Reads files, and computes a hash for the pace of others.
    let opened = tokio::task::spawn_blocking(move || {
        let engine = broker.access_plugins.for_config(next.access.as_ref())?;
        let plugins = engine.as_ref();
        let (wait_max, failures) = (next.connect_timeout.0, &broker.failures);
        let deps = access::Deps { secret: &secret, plugins, wait_max, failures };
        broker.access.get().reopen(next.access.as_ref(), &next.limits, &deps)
    });
    // A panic ends the process.
    let opened = opened.await.map_err(|_| Error::Access("the host stops".to_owned()))?;
    opened.map(Some).map_err(Error::Access)
}

fn told_of_access(now: &Config, next: &Config, broker: &Broker, access: &Access) -> Vec<String> {
    let mut told = Vec::new();
    match (&now.access, &next.access) {
        (None, Some(_)) => told.push(
            "mqtt.access: clients are authenticated from now on; connected ones are disconnected, unless they \
             may be anonymous"
                .to_owned(),
        ),
        (Some(_), None) => told.push("mqtt.access: removed; every client may do everything".to_owned()),
        (Some(a), Some(b)) if a != b => {
            told.push("mqtt.access: changes at once, for connected clients too".to_owned());
        }
        _ => {}
    }
    let gone = broker.access.get().authorities_gone(access);
    if gone > 0 && next.access.is_some() {
        told.push(format!(
            "mqtt.access.authenticate: {gone} of the authenticators are removed or replaced; clients that they \
             admitted are disconnected"
        ));
    }
    told
}

/// Compares the configuration in force with another one. Returns what differs, and the configuration that
/// will be in force: keys that need a restart have their present values.
///
/// Each key is in one of three classes. The patterns have no `..`, so that a new key does not compile until
/// it is in one of them.
fn compare(now: &Config, next: &Config, packet_bytes_most: ByteSize) -> (Comparison, Config) {
    let Config {
        // By address, and by client: see `prepare`.
        listeners: _,
        access: _,
        limits,
        max_packet_size,
        partial_packets_bytes_max,
        receive_maximum,
        inflight_max,
        outbound_inflight_max,
        topic_alias_maximum,
        outbound_topic_alias_maximum,
        connections_max,
        keep_alive_max,
        sessions_max,
        session_expiry_max,
        subscriptions_per_client_max,
        subscription_bytes_per_client_max,
        queue_messages_max,
        queue_bytes_max,
        queue_age_max,
        queue_when_full,
        queue_copies_bytes_max,
        queues_bytes_max,
        subscriptions_bytes_max,
        connections_bytes_max,
        retained_messages_max,
        retained_bytes_max,
        will_bytes_max,
        wills_bytes_max,
        will_delay_after_restart,
        handshakes_max,
        connect_timeout,
        drain_timeout,
        sys_interval,
        keep_client_id,
    } = now;
    let mut in_force = next.clone();
    let mut keys = Comparison::of("mqtt");

    // The memory and the streams that these bound are there from the start.
    keys.restart(
        "partial_packets_bytes_max",
        partial_packets_bytes_max,
        &mut in_force.partial_packets_bytes_max,
    );
    keys.restart("queue_copies_bytes_max", queue_copies_bytes_max, &mut in_force.queue_copies_bytes_max);
    keys.restart("queues_bytes_max", queues_bytes_max, &mut in_force.queues_bytes_max);
    keys.restart("subscriptions_bytes_max", subscriptions_bytes_max, &mut in_force.subscriptions_bytes_max);
    keys.restart("connections_bytes_max", connections_bytes_max, &mut in_force.connections_bytes_max);
    keys.restart("retained_messages_max", retained_messages_max, &mut in_force.retained_messages_max);
    keys.restart("retained_bytes_max", retained_bytes_max, &mut in_force.retained_bytes_max);
    keys.restart("wills_bytes_max", wills_bytes_max, &mut in_force.wills_bytes_max);
    if next.max_packet_size > packet_bytes_most {
        // The broker's stream takes no copy of a larger one.
        keys.restart("max_packet_size", max_packet_size, &mut in_force.max_packet_size);
    }

    let next = &in_force;
    keys.next_connection("max_packet_size", max_packet_size, &next.max_packet_size);
    keys.next_connection("receive_maximum", receive_maximum, &next.receive_maximum);
    keys.next_connection("inflight_max", inflight_max, &next.inflight_max);
    keys.next_connection("outbound_inflight_max", outbound_inflight_max, &next.outbound_inflight_max);
    keys.next_connection("topic_alias_maximum", topic_alias_maximum, &next.topic_alias_maximum);
    let aliases = &next.outbound_topic_alias_maximum;
    keys.next_connection("outbound_topic_alias_maximum", outbound_topic_alias_maximum, aliases);
    keys.next_connection("keep_alive_max", keep_alive_max, &next.keep_alive_max);
    keys.next_connection("sessions_max", sessions_max, &next.sessions_max);
    keys.next_connection("session_expiry_max", session_expiry_max, &next.session_expiry_max);
    keys.next_connection("will_bytes_max", will_bytes_max, &next.will_bytes_max);
    keys.next_connection("connect_timeout", connect_timeout, &next.connect_timeout);
    keys.next_connection("keep_client_id", keep_client_id, &next.keep_client_id);

    keys.in_place("connections_max", connections_max, &next.connections_max);
    keys.in_place("handshakes_max", handshakes_max, &next.handshakes_max);
    let filters = &next.subscriptions_per_client_max;
    keys.in_place("subscriptions_per_client_max", subscriptions_per_client_max, filters);
    let filter_bytes = &next.subscription_bytes_per_client_max;
    keys.in_place("subscription_bytes_per_client_max", subscription_bytes_per_client_max, filter_bytes);
    keys.in_place("queue_messages_max", queue_messages_max, &next.queue_messages_max);
    keys.in_place("queue_bytes_max", queue_bytes_max, &next.queue_bytes_max);
    keys.in_place("queue_age_max", queue_age_max, &next.queue_age_max);
    keys.in_place("queue_when_full", queue_when_full, &next.queue_when_full);
    keys.in_place("drain_timeout", drain_timeout, &next.drain_timeout);
    keys.in_place("sys_interval", sys_interval, &next.sys_interval);
    // The next start reads it, as it would without a reload.
    keys.in_place("will_delay_after_restart", will_delay_after_restart, &next.will_delay_after_restart);
    compare_limits(limits, &next.limits, &mut keys);
    (keys, in_force)
}

fn compare_limits(now: &access::Limits, next: &access::Limits, keys: &mut Comparison) {
    let access::Limits {
        client_messages_per_s,
        client_bytes_per_s,
        messages_per_s,
        bytes_per_s,
        topic_levels_max,
        connections_per_user_max,
        connects_per_s,
    } = now;
    let messages = &next.client_messages_per_s;
    keys.next_connection("limits.client_messages_per_s", client_messages_per_s, messages);
    keys.next_connection("limits.client_bytes_per_s", client_bytes_per_s, &next.client_bytes_per_s);
    let connections = &next.connections_per_user_max;
    keys.next_connection("limits.connections_per_user_max", connections_per_user_max, connections);
    keys.in_place("limits.messages_per_s", messages_per_s, &next.messages_per_s);
    keys.in_place("limits.bytes_per_s", bytes_per_s, &next.bytes_per_s);
    keys.in_place("limits.topic_levels_max", topic_levels_max, &next.topic_levels_max);
    keys.in_place("limits.connects_per_s", connects_per_s, &next.connects_per_s);
}
