//! Checks whether a packet is allowed. A packet about which the access plugin must be asked first stays
//! at the front of the input until there is an answer.

use std::collections::BTreeSet;

use rmqtt_codec::v5::DisconnectReasonCode;

use super::{IdChange, Inbound, Owed, Work};
use crate::access::{Act, QUESTIONS_MAX, Verdict};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::acks::Ack;
use crate::listeners::mqtt::wire::{self, Fault, Publish, Version};
use crate::stream::Ticket;
use crate::topic;

/// Longest topic that is remembered. Longer topics are looked up each time.
const ALLOWED_TOPIC_BYTES_MAX: usize = 256;

/// Why a publish is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Dollar,
    Levels,
    NotAuthorized,
    /// The access plugin must be asked first.
    Unanswered,
}

impl Inbound {
    /// Returns why the rules or limits refuse a publish; `None` if they accept it.
    pub(super) fn refusal(&mut self, topic: &str) -> Option<Refusal> {
        if topic::is_reserved(topic) {
            return Some(Refusal::Dollar);
        }
        if self.rights.access().is_too_deep(topic) {
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

    /// Refuses a publish. MQTT 3.1.1 cannot report a refusal: the publish is acknowledged and dropped,
    /// or the connection ends. Topics below `$SYS` and `$share` are reserved for the broker.
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
        if self.version != Version::V5
            && refusal == Refusal::NotAuthorized
            && !self.rights.access().drops_denied()
        {
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

    /// Asks the access plugin about `topic`, and about the topics of later publishes that need an
    /// answer.
    pub(super) fn ask_to_publish(&mut self, topic: &str, mut behind: &[u8]) {
        self.asks = true;
        if self.rights.is_asking() {
            return;
        }
        let mut topics = BTreeSet::from([topic]);
        while topics.len() < QUESTIONS_MAX
            && let Ok(Some(frame)) = wire::frame(behind, self.config.packet_bytes_max())
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

    /// Asks the access plugin about topics for which deliveries wait.
    pub fn ask_to_receive(&mut self, topics: Vec<Box<str>>) {
        self.rights.ask(Act::Receive, topics);
    }

    /// Asks the access plugin about the filters of the SUBSCRIBE at the front, which waits for the
    /// answers.
    pub fn ask_to_subscribe(&mut self, filters: Vec<Box<str>>) {
        self.asks = true;
        self.rights.ask(Act::Subscribe, filters);
    }

    /// Continues with the packet that waited, since there are answers.
    pub fn go_on(&mut self) {
        self.asks = false;
    }
}
