//! Packets that are not on the hot path: SUBSCRIBE, UNSUBSCRIBE, DISCONNECT, AUTH.

use std::sync::Arc;

use bytes::Buf;
use rmqtt_codec::v5::{
    DisconnectReasonCode, RetainHandling, SubscribeAck, SubscribeAckReason, SubscriptionOptions,
    UnsubscribeAck, UnsubscribeAckReason,
};
use rmqtt_codec::{v3, v5};
use tokio::task::coop::consume_budget;
use tokio::task::yield_now;
use tokio_util::codec::Encoder;

use super::changing::{Changed, Changing};
use super::{Connection, End};
use crate::access::{QUESTIONS_MAX, Verdict};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::acks::Stopped;
use crate::listeners::mqtt::fanout::{FILTERS_AT_ONCE, SendRetained, Subscription};
use crate::listeners::mqtt::outbound::look_up;
use crate::listeners::mqtt::session::{KEPT_FILTER_BYTES_MAX, Session};
use crate::listeners::mqtt::subscriptions::{FILTER_LEVELS_MAX, Filter, Options, levels, memory_of};
use crate::listeners::mqtt::wire::{self, Fault, Packet};

impl<S> Connection<'_, S> {
    /// Processes the packet at the front of the input.
    pub(super) async fn packet(&mut self) -> Result<(), End> {
        let frame = wire::frame(&self.input, self.inbound.config().packet_bytes_max()).map_err(End::Fault)?;
        let frame = frame.expect("take stopped at a whole packet");
        let (first, len) = (frame.first, frame.len);
        let packet = wire::decode(self.peer.version, &self.input[..len]).map_err(End::Fault)?;
        let filters = self.unanswered(&packet);
        if !filters.is_empty() {
            // It stays at the front until there are answers.
            self.inbound.ask_to_subscribe(filters);
            return Ok(());
        }
        self.broker.counters.received.add_one(first);
        self.input.advance(len);
        self.inbound.passed(len);
        match packet {
            Packet::V3(v3::Packet::Subscribe { packet_id, topic_filters }) => {
                let is_bridge = self.is_bridge;
                let filters = topic_filters.iter().map(|(filter, qos)| {
                    let options = SubscriptionOptions {
                        qos: *qos,
                        no_local: is_bridge && !filter.starts_with("$share/"),
                        retain_as_published: is_bridge,
                        ..SubscriptionOptions::default()
                    };
                    (&**filter, options)
                });
                let Asked { granted, status, .. } = self.check(filters, 0).await?;
                let status = status.into_iter().map(|reason| match u8::from(reason) {
                    qos @ 0..=2 => v3::SubscribeReturnCode::Success(
                        v3::QoS::try_from(qos).expect("0, 1 and 2 are QoS levels"),
                    ),
                    _ => v3::SubscribeReturnCode::Failure,
                });
                let status = status.collect();
                self.subscribe(granted, Packet::V3(v3::Packet::SubscribeAck { packet_id, status }))
            }
            Packet::V5(v5::Packet::Subscribe(subscribe)) => {
                let id = subscribe.id.map_or(0, |id| id.get());
                let filters = subscribe.topic_filters.iter().map(|(filter, options)| (&**filter, *options));
                let Asked { granted, status, refused } = self.check(filters, id).await?;
                let has_room = status.len() + wire::ACK_BYTES_MAX <= self.peer.packet_bytes_max;
                let refused = refused.filter(|_| self.tells_reasons && has_room);
                let answer = v5::Packet::SubscribeAck(SubscribeAck {
                    packet_id: subscribe.packet_id,
                    properties: Vec::new(),
                    reason_string: refused.map(Into::into),
                    status,
                });
                self.subscribe(granted, Packet::V5(answer))
            }
            Packet::V3(v3::Packet::Unsubscribe { packet_id, topic_filters }) => {
                let filters = topic_filters.iter().map(|filter| (&**filter).into());
                self.unsubscribe(filters.collect(), move |_| {
                    Packet::V3(v3::Packet::UnsubscribeAck { packet_id })
                })
            }
            Packet::V5(v5::Packet::Unsubscribe(unsubscribe)) => {
                let packet_id = unsubscribe.packet_id;
                let filters = unsubscribe.topic_filters.iter().map(|filter| (&**filter).into());
                self.unsubscribe(filters.collect(), move |status| {
                    Packet::V5(v5::Packet::UnsubscribeAck(UnsubscribeAck {
                        packet_id,
                        properties: Vec::new(),
                        reason_string: None,
                        status,
                    }))
                })
            }
            Packet::V3(v3::Packet::Disconnect) | Packet::V5(v5::Packet::Disconnect(_)) => {
                Err(self.disconnect(&packet))
            }
            Packet::V5(v5::Packet::Auth(packet)) => {
                let forbidden = Fault::protocol("AUTH without a method in CONNECT");
                let again = self.auth.as_mut().ok_or(End::Fault(forbidden))?;
                let taken = again.take(self.broker, packet, &self.inbound, self.will.as_deref());
                taken.map_err(End::Fault)
            }
            _ => Err(End::Fault(Fault::protocol("a packet that a client must not send now"))),
        }
    }

    /// Returns the end of the connection for a DISCONNECT.
    fn disconnect(&self, packet: &Packet) -> End {
        let Packet::V5(v5::Packet::Disconnect(disconnect)) = packet else {
            return End::Disconnect { keep_will: false, expiry_s: None };
        };
        let max = u32::try_from(self.inbound.config().session_expiry_max.0.as_secs()).unwrap_or(u32::MAX);
        let expiry_s = disconnect.session_expiry_interval_secs.map(|seconds| seconds.min(max));
        if expiry_s.is_some_and(|seconds| seconds > 0) && self.session.expiry_s() == 0 {
            return End::Fault(Fault::protocol("DISCONNECT must not revive a session that ends"));
        }
        let keep_will = disconnect.reason_code != DisconnectReasonCode::NormalDisconnection;
        End::Disconnect { keep_will, expiry_s }
    }

    /// Returns the end of the connection for a DISCONNECT that is queued behind other packets, if there
    /// is one.
    pub(super) fn last_words(&self) -> Option<End> {
        let mut rest = &self.input[..];
        while let Ok(Some(frame)) = wire::frame(rest, self.inbound.config().packet_bytes_max()) {
            let (packet, behind) = rest.split_at(frame.len);
            if frame.first == wire::DISCONNECT {
                return wire::decode(self.peer.version, packet).ok().map(|packet| self.disconnect(&packet));
            }
            rest = behind;
        }
        None
    }

    /// Returns the filters of a SUBSCRIBE about which the access plugin must be asked. If any answer is
    /// missing, all of them are returned, so that none is forgotten meanwhile. Filters beyond
    /// `QUESTIONS_MAX` are not asked about, and are refused.
    fn unanswered(&self, packet: &Packet) -> Vec<Box<str>> {
        let rights = self.inbound.rights();
        let is_asked = |filter: &Filter| rights.rule_for_subscribe(filter.topics()) == Verdict::Ask;
        let filters: Vec<&str> = match packet {
            _ if rights.is_everything() => return Vec::new(),
            Packet::V3(v3::Packet::Subscribe { topic_filters, .. }) => {
                topic_filters.iter().map(|(filter, _)| &**filter).collect()
            }
            Packet::V5(v5::Packet::Subscribe(subscribe)) => {
                subscribe.topic_filters.iter().map(|(filter, _)| &**filter).collect()
            }
            _ => return Vec::new(),
        };
        let filters = filters.into_iter().filter_map(Filter::parse).filter(is_asked);
        let filters: Vec<Filter> = filters.take(QUESTIONS_MAX).collect();
        let is_open = |filter: &Filter| rights.subscribe(filter.topics()) == Verdict::Ask;
        if !filters.iter().any(is_open) {
            return Vec::new();
        }
        filters.iter().map(|filter| filter.topics().as_str().into()).collect()
    }

    /// Checks the filters of a SUBSCRIBE.
    async fn check(
        &mut self,
        filters: impl Iterator<Item = (&str, SubscriptionOptions)>,
        id: u32,
    ) -> Result<Asked, End> {
        let kept = self.session.persistent_epoch().is_some();
        let room = Room::of(&self.session, self.broker);
        let mut asked =
            Asked { granted: Granted { subscriptions: Vec::new(), room }, status: Vec::new(), refused: None };
        for (text, wanted) in filters {
            consume_budget().await;
            let filter = match self.check_filter(text, kept, &mut asked.granted.room) {
                Ok(filter) => filter,
                Err((reason, cause)) => {
                    self.report_refused(text, cause);
                    asked.refused.get_or_insert(cause);
                    asked.status.push(reason);
                    continue;
                }
            };
            if filter.is_shared() && wanted.no_local {
                // MQTT 5.0, 3.8.3.1.
                return Err(End::Fault(Fault::protocol("no local on a shared subscription")));
            }
            let options = Options {
                qos: wanted.qos.value(),
                no_local: wanted.no_local,
                retain_as_published: wanted.retain_as_published,
                id,
            };
            let retained = match wanted.retain_handling {
                RetainHandling::AtSubscribe => SendRetained::Always,
                RetainHandling::AtSubscribeNew => SendRetained::IfNew,
                RetainHandling::NoAtSubscribe => SendRetained::Never,
            };
            asked.granted.subscriptions.push(Subscription { filter, options, retained });
            asked.status.push(match options.qos {
                0 => SubscribeAckReason::GrantedQos0,
                1 => SubscribeAckReason::GrantedQos1,
                _ => SubscribeAckReason::GrantedQos2,
            });
        }
        Ok(asked)
    }

    fn report_refused(&self, filter: &str, cause: &'static str) {
        self.broker.counters.refused_subscribe(cause);
        self.session.activity().refused_subscribe();
        let kind = format!("mqtt: subscribe refused: {cause}");
        let client_id = &*self.session.client_id;
        let detail = format!("client {client_id}, filter {filter:.200}");
        self.broker.failures.report_client(&kind, client_id, 1, &detail, "");
    }

    /// Subscribes, and then sends `answer`.
    fn subscribe(&mut self, granted: Granted, answer: Packet) -> Result<(), End> {
        let (broker, session) = (self.broker.clone(), self.session.clone());
        self.begin(async move {
            let Granted { subscriptions, room: _room } = granted;
            let retained_before = session.outbox().last_retained();
            for some in subscriptions.chunks(FILTERS_AT_ONCE) {
                broker.live.subscribe(&broker, &session, some);
                if subscriptions.len() > FILTERS_AT_ONCE {
                    yield_now().await;
                }
            }
            look_up(&broker, &session, retained_before).await;
            Changed { answer, is_noted: !subscriptions.is_empty() }
        })
    }

    /// Checks one filter. The error is the cause under which its refusal is counted.
    fn check_filter(
        &self,
        text: &str,
        kept: bool,
        room: &mut Room,
    ) -> Result<Filter, (SubscribeAckReason, &'static str)> {
        let deep = text.split('/').nth(FILTER_LEVELS_MAX).is_some();
        let long = kept && text.len() > KEPT_FILTER_BYTES_MAX;
        let filter = if deep || long { None } else { Filter::parse(text) };
        let filter = filter.ok_or((SubscribeAckReason::TopicFilterInvalid, "invalid"))?;
        match self.inbound.rights().subscribe(filter.topics()) {
            Verdict::Yes => {}
            Verdict::No => return Err((SubscribeAckReason::NotAuthorized, "not_authorized")),
            Verdict::Ask => return Err((SubscribeAckReason::QuotaExceeded, "questions_max")),
        }
        if !self.session.has_filter(text) {
            room.take(text).map_err(|cause| (SubscribeAckReason::QuotaExceeded, cause))?;
        }
        Ok(filter)
    }

    fn unsubscribe(
        &mut self,
        filters: Vec<Box<str>>,
        answer: impl FnOnce(Vec<UnsubscribeAckReason>) -> Packet + Send + 'static,
    ) -> Result<(), End> {
        let (broker, session) = (self.broker.clone(), self.session.clone());
        self.begin(async move {
            let mut status = Vec::new();
            for filter in &filters {
                consume_budget().await;
                // Of a filter that it does not have, no lock is taken.
                let had =
                    session.has_filter(filter) && broker.live.unsubscribe(&broker, &session, filter).await;
                status.push(match had {
                    true => UnsubscribeAckReason::Success,
                    false => UnsubscribeAckReason::NoSubscriptionExisted,
                });
            }
            // Also of filters that it does not have: an earlier UNSUBSCRIBE of them, which was not
            // answered, may not be durable yet.
            Changed { answer: answer(status), is_noted: true }
        })
    }

    /// Begins to change the session's subscriptions. Later packets of the client wait until
    /// [`Self::changed`].
    fn begin(&mut self, change: impl Future<Output = Changed> + Send + 'static) -> Result<(), End> {
        self.inbound.hold(false);
        self.changing = Some(Box::new(Changing::new(self.broker, &self.session, change)));
        Ok(())
    }

    /// Answers a SUBSCRIBE or UNSUBSCRIBE.
    pub(super) fn changed(&mut self, answer: Result<Box<Packet>, Stopped>) -> Result<(), End> {
        self.changing = None;
        self.inbound.hold_no_more();
        match *answer.map_err(|Stopped| End::Stopped)? {
            Packet::V3(packet) => self.send_v3(packet),
            Packet::V5(packet) => self.send_v5(packet),
        }
    }

    fn send_v3(&mut self, packet: v3::Packet) -> Result<(), End> {
        let encoded = v3::Codec::new(0).encode(packet, &mut self.out);
        encoded.map_err(|_| End::Fault(Fault::protocol("the answer would be too large")))
    }

    fn send_v5(&mut self, packet: v5::Packet) -> Result<(), End> {
        let before = self.out.len();
        let encoded = v5::Codec::new(0, 0).encode(packet, &mut self.out);
        encoded.map_err(|_| End::Fault(Fault::protocol("the answer would be too large")))?;
        if self.out.len() - before > self.peer.packet_bytes_max {
            self.out.truncate(before);
            let code = DisconnectReasonCode::PacketTooLarge;
            let what = "asks for an answer over its own maximum packet size";
            return Err(End::Fault(Fault { code, what }));
        }
        Ok(())
    }
}

/// The requested and granted filters of a SUBSCRIBE.
struct Asked {
    granted: Granted,
    status: Vec<SubscribeAckReason>,
    /// Why the first refused filter was refused.
    refused: Option<&'static str>,
}

/// Filters to subscribe to, with the memory that was taken for them.
struct Granted {
    subscriptions: Vec<Subscription>,
    room: Room,
}

/// Average number of topic levels that a client may have for each filter. Each level that no other
/// filter shares takes about 120 bytes of memory.
const LEVELS_PER_FILTER: usize = 10;

/// Limits on what a client may still subscribe to.
struct Room {
    filters: usize,
    levels: usize,
    bytes: usize,
    /// Bytes of filters in the state of the broker's stream.
    state_bytes: usize,
    /// The session that takes memory for the granted filters.
    session: Arc<Session>,
    memory: usize,
}

impl Room {
    fn of(session: &Arc<Session>, broker: &Broker) -> Self {
        let config = broker.config();
        let filters_max = config.subscriptions_per_client_max as usize;
        let bytes_max = config.subscription_bytes_per_client_max.0 as usize;
        let is_kept = session.persistent_epoch().is_some();
        let sums = session.filter_sums();
        let state_bytes_max = if is_kept { broker.state_share() } else { usize::MAX };
        Self {
            filters: filters_max.saturating_sub(session.filters()),
            levels: (LEVELS_PER_FILTER * filters_max).saturating_sub(sums.levels),
            bytes: bytes_max.saturating_sub(sums.bytes),
            state_bytes: state_bytes_max.saturating_sub(sums.bytes),
            session: session.clone(),
            memory: 0,
        }
    }

    /// Adds a filter. The error is the limit that it would exceed.
    fn take(&mut self, filter: &str) -> Result<(), &'static str> {
        let state_bytes = self.state_bytes.checked_sub(filter.len()).ok_or("broker_state")?;
        let filters = self.filters.checked_sub(1).ok_or("subscriptions_per_client_max")?;
        let levels = self.levels.checked_sub(levels(filter)).ok_or("subscriptions_per_client_max")?;
        let bytes = self.bytes.checked_sub(filter.len()).ok_or("subscription_bytes_per_client_max")?;
        let memory = self.memory + memory_of(filter);
        if !self.session.take_memory(memory) {
            return Err("subscriptions_bytes_max");
        }
        (self.filters, self.levels, self.bytes) = (filters, levels, bytes);
        (self.state_bytes, self.memory) = (state_bytes, memory);
        Ok(())
    }
}

/// Releases the memory of filters that were granted and not added.
impl Drop for Room {
    fn drop(&mut self) {
        self.session.filters_added();
    }
}
