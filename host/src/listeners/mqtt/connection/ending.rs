//! The end of a connection: the last packet to its client, the log and the counters, and the order in
//! which its resources are released.

use rmqtt_codec::v5::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Connection;
use crate::access::UserPlace;
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::inbound::Trouble;
use crate::listeners::mqtt::metrics::SENT;
use crate::listeners::mqtt::session::Turn;
use crate::listeners::mqtt::will;
use crate::listeners::mqtt::wire::{self, Fault, Version};
use crate::listeners::transport::{Place, closing};

/// Why a connection ended.
#[derive(Debug)]
pub enum End {
    Disconnect {
        keep_will: bool,
        expiry_s: Option<u32>,
    },
    Lost,
    Fault(Fault),
    /// A packet exceeds `max_packet_size`; its size and topic.
    TooLarge(Box<str>),
    TakenOver,
    KeepAlive,
    Slow,
    Kicked,
    Stopped,
    Shutdown,
    /// The listener's address is no longer served.
    ListenerClosed,
}

impl From<Trouble> for End {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Fault(fault) => Self::Fault(fault),
            Trouble::Stopped => Self::Stopped,
        }
    }
}

impl End {
    /// Returns the end for what was found in these bytes.
    pub fn of(trouble: Trouble, bytes: &[u8], packet_bytes_max: usize) -> Self {
        match Self::from(trouble) {
            Self::Fault(fault) if fault.code == DisconnectReasonCode::PacketTooLarge => {
                let large = wire::too_large(bytes, packet_bytes_max);
                large.map_or(Self::Fault(fault), |large| Self::TooLarge(large.into()))
            }
            end => end,
        }
    }
}

/// Resources that are released when a connection ends.
pub struct Leaving {
    pub turn: Turn,
    pub user_place: Option<UserPlace>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// Sends the last packet, releases the connection's resources, and handles its will.
    pub(super) async fn leave(mut self, end: End, place: Place, leaving: Leaving) {
        let end = match end {
            End::Fault(_) | End::TooLarge(_) | End::Disconnect { .. } => end,
            // What else the client sent may hold up its DISCONNECT.
            end => self.last_words().unwrap_or(end),
        };
        if matches!(end, End::TakenOver) {
            self.session.note_taken_over();
        }
        // It counts as away from now on: members of a share that leave together give each other nothing.
        self.session.outbox().disconnected();
        self.say_goodbye(&end).await;
        if let Some(changing) = self.changing.take() {
            changing.give_up().await;
        }
        if let Some(renewing) = self.renewing.take() {
            renewing.give_up().await;
        }
        let Connection {
            broker, session, mut io, inbound, will, acks_waiting, partial, out, outward, ..
        } = self;
        // What it holds of the session is given back before the session.
        drop((inbound, acks_waiting, partial, out, outward));
        let expiry_s = if let End::Disconnect { expiry_s, .. } = end { expiry_s } else { None };
        let keep_will = !matches!(end, End::Disconnect { keep_will: false, .. });
        drop(leaving.user_place);
        // The session does not outlive the will that tells of its end.
        let ended_us = broker.clock.now_us();
        // Before the session may be taken over: see `will::lost`.
        match will {
            Some(will) if keep_will => {
                let expiry_s = expiry_s.unwrap_or(session.expiry_s());
                will::lost(broker, &session.client_id, expiry_s, *will).await;
            }
            Some(will) => will.forget(broker),
            None => {}
        }
        let closed = {
            let (broker, session) = (broker.clone(), session.clone());
            async move { broker.sessions.close(&broker, &session, leaving.turn, expiry_s, ended_us).await }
        };
        broker.in_background(closed).await;
        broker.client_connected(-1);
        broker.connection_ended.notify_waiters();
        // A client that has said goodbye waits for nothing.
        if !matches!(end, End::Lost | End::Disconnect { .. }) {
            linger(broker, &mut io).await;
        }
        drop(place);
    }

    /// Counts and reports the end, and sends the last packet.
    async fn say_goodbye(&mut self, end: &End) {
        let remote = &self.remote;
        let (cause, code, why) = match end {
            End::Disconnect { .. } => ("client", None, ""),
            End::Lost => ("lost", None, ""),
            End::Fault(fault) if fault.is_refusal() => ("refused", Some(fault.code), fault.what),
            End::Fault(fault) => ("malformed", Some(fault.code), fault.what),
            End::TooLarge(_) => {
                let why = "packet is larger than max_packet_size";
                ("malformed", Some(DisconnectReasonCode::PacketTooLarge), why)
            }
            End::TakenOver => {
                let why = "another connection has the same client id";
                ("taken_over", Some(DisconnectReasonCode::SessionTakenOver), why)
            }
            End::KeepAlive => {
                let why = "nothing came for longer than the keep alive";
                ("keep_alive", Some(DisconnectReasonCode::KeepAliveTimeout), why)
            }
            End::Slow => ("slow", Some(DisconnectReasonCode::QuotaExceeded), "too many messages wait"),
            End::Kicked => ("kicked", Some(DisconnectReasonCode::AdministrativeAction), "by an operator"),
            End::Stopped => {
                ("stopped", Some(DisconnectReasonCode::ServerShuttingDown), "a stream has stopped")
            }
            End::ListenerClosed => {
                let why = "the listener is closed";
                ("listener_closed", Some(DisconnectReasonCode::AdministrativeAction), why)
            }
            End::Shutdown => ("shutdown", Some(DisconnectReasonCode::ServerShuttingDown), ""),
        };
        self.broker.counters.disconnected(cause);
        let client_id = &*self.session.client_id;
        tracing::debug!(client = client_id, %remote, cause, "client disconnected");
        let kind = match end {
            End::Fault(fault) if !fault.is_refusal() => {
                Some(format!("mqtt: client broke the protocol: {}", fault.what))
            }
            End::TooLarge(_) => {
                Some("mqtt: client sent a packet larger than mqtt.max_packet_size".to_owned())
            }
            End::Slow => Some("mqtt: slow subscriber disconnected, its queue is full".to_owned()),
            End::KeepAlive => Some("mqtt: client was silent for longer than its keep alive".to_owned()),
            _ => None,
        };
        if let Some(kind) = kind {
            let mut detail = format!("client {client_id} at {remote}");
            if let End::TooLarge(large) = end {
                let max = self.inbound.config().max_packet_size;
                detail +=
                    &format!(": {large}, at most {max}: raise mqtt.max_packet_size, or send less at once");
            }
            self.broker.failures.report_client(&kind, client_id, 1, &detail, "");
        }
        self.inbound.write_acks(self.broker, &mut self.out);
        if let Some(code) = code
            && self.peer.version == Version::V5
        {
            // A DISCONNECT may say why, whatever the client asked for (MQTT 5.0, 3.1.2.11.7).
            let has_room = self.peer.packet_bytes_max >= wire::ACK_BYTES_MAX;
            let why = if has_room { why } else { "" };
            wire::put_with_reason(&mut self.out, wire::DISCONNECT, &[code.into()], why);
        }
        self.broker.counters.sending(self.peer.version, &self.out[self.counted..]);
        // One that sends no more may read the answers to what it has sent.
        if self.has_left || !matches!(end, End::Lost) {
            let sent = closing::say_last(&mut self.io, &mut self.out).await;
            self.broker.counters.bytes[SENT].increment(sent as u64);
        }
    }
}

/// Waits for the client to close its side, except while the host stops, which its clients must not
/// delay.
pub async fn linger<S: AsyncRead + Unpin>(broker: &Broker, io: &mut S) {
    tokio::select! {
        () = closing::linger(io) => {}
        () = broker.shutdown.cancelled() => {}
    }
}
