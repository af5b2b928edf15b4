//! Whether a packet is allowed: what is refused, and what the access plugin
//! must be asked first. A packet that waits for that stays at the front of what
//! was read, whole, until there is an answer.

use std::collections::BTreeSet;

use rmqtt_codec::v5::DisconnectReasonCode;

use super::{IdChange, Inbound, Owed, Work};
use crate::access::{Act, QUESTIONS_MAX, Verdict};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::acks::Ack;
use crate::listeners::mqtt::wire::{self, Fault, Publish, Version};
use crate::stream::Ticket;
use crate::topic;

/// Longer topics are looked up each time.
const ALLOWED_TOPIC_BYTES_MAX: usize = 256;

/// Why a publish is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Dollar,
    Levels,
    NotAuthorized,
    /// Not now: it must be asked first.
    Unanswered,
}

impl Inbound {
    /// What the rules and limits say of a publish; `None` where it is taken.
    pub(super) fn refusal(&mut self, broker: &Broker, topic: &str) -> Option<Refusal> {
        if topic::is_reserved(topic) {
            return Some(Refusal::Dollar);
        }
        if broker.access.is_too_deep(topic) {
            return Some(Refusal::Levels);
        }
        if self.rights.is_everything() || self.allowed_topic == topic {
            return None;
        }
        match self.rights.publish(topic) {
            Verdict::Yes => {}
            Verdict::No => return Some(Refusal::NotAuthorized),
            Verdict::Ask => return Some(Refusal::Unanswered),
        }
        self.allowed_topic.clear();
        if topic.len() <= ALLOWED_TOPIC_BYTES_MAX {
            self.allowed_topic.push_str(topic);
        }
        None
    }

    /// MQTT 3.1.1 has no way to say no: a publish is acknowledged and dropped,
    /// or the connection ends. Topics below `$SYS` and `$share` are the broker's own.
    pub(super) fn refuse(
        &mut self,
        broker: &Broker,
        publish: &Publish<'_>,
        topic: &str,
        refusal: Refusal,
        work: &mut Work<'_>,
    ) -> Result<(), Fault> {
        let counters = &broker.counters;
        let (counter, kind, code) = match refusal {
            Refusal::Dollar => (
                &counters.dollar_topics,
                "mqtt: publish to a topic of the broker's refused",
                wire::NOT_AUTHORIZED,
            ),
            Refusal::Levels => (
                &counters.topic_levels,
                "mqtt: publish refused, its topic has more levels than topic_levels_max",
                wire::TOPIC_NAME_INVALID,
            ),
            Refusal::NotAuthorized | Refusal::Unanswered => {
                (&counters.not_authorized, "mqtt: publish refused by the access rules", wire::NOT_AUTHORIZED)
            }
        };
        counter.increment(1);
        self.session.activity().refused_publish();
        let client_id = &self.session.client_id;
        broker.failures.report_client(kind, client_id, 1, &format!("client {client_id} to {topic}"), "");
        if self.version != Version::V5 && refusal == Refusal::NotAuthorized && !broker.access.drops_denied() {
            return Err(Fault { code: DisconnectReasonCode::NotAuthorized, what: "publish not allowed" });
        }
        let first = if publish.qos == 1 { wire::PUBACK } else { wire::PUBREC };
        if publish.qos > 0 {
            // In its turn: acks keep the order of their publishes (MQTT 5.0, 4.6).
            let code = if self.version == Version::V5 { code } else { 0 };
            let packet_id = publish.packet_id;
            let ack = Some(Ack { first, packet_id, code });
            let (stream, least) = (broker.ingest.route(topic), Ticket::default());
            work.owed.push(Owed { stream, packet_id, ack, change: IdChange::None, least });
        }
        Ok(())
    }

    /// Has the plugin asked for `topic`, and for the topics of the publishes
    /// behind it that will have to be asked for.
    pub(super) fn ask_to_publish(&mut self, broker: &Broker, topic: &str, mut behind: &[u8]) {
        self.asks = true;
        if self.rights.is_asking() {
            return;
        }
        let mut topics = BTreeSet::from([topic]);
        while topics.len() < QUESTIONS_MAX
            && let Ok(Some(frame)) = wire::frame(behind, broker.packet_bytes_max)
        {
            behind = &behind[frame.len..];
            if frame.first & 0xf0 != wire::PUBLISH {
                continue;
            }
            let Ok(publish) = wire::publish(self.version, &frame) else { break };
            // One without a topic has an alias, whose topic came before.
            let is_asked = !publish.topic.is_empty() && !topic::is_reserved(publish.topic);
            if is_asked && self.rights.publish(publish.topic) == Verdict::Ask {
                topics.insert(publish.topic);
            }
        }
        self.rights.ask(Act::Publish, topics.into_iter().map(Into::into).collect());
    }

    /// Has the plugin asked what deliveries wait for.
    pub fn ask_to_receive(&mut self, topics: Vec<Box<str>>) {
        self.rights.ask(Act::Receive, topics);
    }

    /// The packet at the front is a SUBSCRIBE, and waits until these are answered.
    pub fn ask_to_subscribe(&mut self, filters: Vec<Box<str>>) {
        self.asks = true;
        self.rights.ask(Act::Subscribe, filters);
    }

    /// There are answers: what waited is looked at again.
    pub fn go_on(&mut self) {
        self.asks = false;
    }
}
