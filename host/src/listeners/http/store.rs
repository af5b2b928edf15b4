//! Stores the messages of a request: one append for each stream, with the record of the request's key.
//! The answer waits until everything is durable.

use std::time::Duration;

use hyper::StatusCode;
use tokio::time::{Instant, timeout, timeout_at};

use super::Http;
use super::answer::{Outcome, RETRY_AFTER, RETRY_AFTER_LONG, Refusal};
use super::idempotency::{Failed, Known, Mismatch, Repeated};
use super::request::Sent;
use crate::ingest::{Draft, Rejected, Taken, facts};
use crate::stream::{NewMessage, Ticket};

/// How long a request waits for room in its streams before its client is told to try again later.
pub const ROOM_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long a request waits for a disk that does not answer. Its messages may become durable later.
pub const DURABLE_WAIT_MAX: Duration = Duration::from_secs(30);
/// Highest QoS with which MQTT subscribers receive the messages.
const QOS: u16 = 1;

/// Outcome of a request's messages.
pub struct Stored {
    pub outcomes: Vec<Outcome>,
    /// When a client may send messages again for which there was no room.
    pub retry_after: Duration,
}

/// Appends the messages that were accepted so far, and waits until they are durable.
pub async fn store(http: &Http, sent: &Sent<'_>) -> Result<Stored, Refusal> {
    let mut storing = Storing::of(http, sent)?;
    let until = Instant::now() + ROOM_WAIT_MAX;
    for stream in 0..http.ingest.streams().len() {
        storing.append(stream, until).await?;
    }
    storing.durable().await?;
    let Storing { outcomes, retry_after, .. } = storing;
    Ok(Stored {
        outcomes: outcomes.into_iter().map(|outcome| outcome.unwrap_or(Outcome::NoRoom)).collect(),
        retry_after,
    })
}

struct Storing<'s> {
    http: &'s Http,
    sent: &'s Sent<'s>,
    /// Properties that describe the sender, which follow each message's own properties.
    properties: Vec<u8>,
    /// Outcomes; `None` for a message that is not in its stream yet.
    outcomes: Vec<Option<Outcome>>,
    /// Tickets to wait for, by stream.
    tickets: Vec<(usize, Ticket)>,
    is_repeated: bool,
    retry_after: Duration,
}

impl<'s> Storing<'s> {
    /// Begins to store a request. If the request is repeated, the outcome of the first is part of the
    /// result.
    fn of(http: &'s Http, sent: &'s Sent<'s>) -> Result<Self, Refusal> {
        let of_item = |outcome| (outcome != Outcome::Accepted).then_some(outcome);
        let outcomes = sent.items.iter().map(|item| of_item(item.outcome)).collect();
        let mut storing = Self {
            http,
            sent,
            properties: Vec::new(),
            outcomes,
            tickets: Vec::new(),
            is_repeated: false,
            retry_after: RETRY_AFTER,
        };
        if let Some(id) = &sent.id {
            for stream in 0..http.ingest.streams().len() {
                let known = http.idempotency.look(stream, id, sent.items.len());
                if let Some(repeated) = known.map_err(|Mismatch| mismatch())? {
                    storing.repeat(stream, &repeated);
                }
            }
        }
        Ok(storing)
    }

    fn repeat(&mut self, stream: usize, repeated: &Repeated) {
        for (outcome, known) in self.outcomes.iter_mut().zip(&repeated.known) {
            if let Known::Decided(decided) = known {
                *outcome = Some(*decided);
            }
        }
        self.tickets.push((stream, repeated.ticket));
        if !std::mem::replace(&mut self.is_repeated, true) {
            self.http.counters.repeated.increment(1);
        }
    }

    /// Appends the messages of one stream, once it has room.
    async fn append(&mut self, stream: usize, until: Instant) -> Result<(), Refusal> {
        let sent = self.sent;
        let of_stream =
            |place: &Option<crate::ingest::Place>| place.as_ref().is_some_and(|place| place.stream == stream);
        let own: Vec<usize> = (0..sent.items.len())
            .filter(|at| self.outcomes[*at].is_none() && of_stream(&sent.places[*at]))
            .collect();
        if own.is_empty() {
            return Ok(());
        }
        // The record says nothing of messages of other streams: their appends may be lost where this one
        // is not.
        let mut recorded = self.outcomes.clone();
        recorded
            .iter_mut()
            .zip(&sent.places)
            .filter(|(_, place)| place.is_some())
            .for_each(|(it, _)| *it = None);
        own.iter().for_each(|at| recorded[*at] = Some(Outcome::Accepted));
        let spans: Vec<_> = own.iter().map(|at| self.write_properties(*at)).collect();
        loop {
            let messages: Vec<NewMessage<'_>> = own
                .iter()
                .zip(&spans)
                .map(|(at, span)| self.message(stream, *at, &self.properties[span.clone()]))
                .collect();
            let outcome = match self.try_append(stream, &messages, &recorded) {
                Ok(Ok(ticket)) => {
                    self.taken(&messages);
                    self.tickets.push((stream, ticket));
                    Outcome::Accepted
                }
                // The same request came by another connection in the meantime.
                Ok(Err(repeated)) => {
                    self.repeat(stream, &repeated);
                    return Ok(());
                }
                Err(Failed::Mismatch) => return Err(mismatch()),
                Err(Failed::Rejected(Rejected::NoRoom { lasts: false })) => {
                    if timeout_at(until, self.http.ingest.room(stream)).await.is_ok() {
                        continue;
                    }
                    Outcome::NoRoom
                }
                Err(Failed::Rejected(Rejected::NoRoom { lasts: true })) => {
                    self.retry_after = RETRY_AFTER_LONG;
                    Outcome::NoRoom
                }
                Err(Failed::Rejected(Rejected::TooLarge(_))) => Outcome::TooLarge,
                Err(Failed::Rejected(Rejected::Stopped(_))) => return Err(stopping()),
            };
            own.iter().for_each(|at| self.outcomes[*at] = Some(outcome));
            return Ok(());
        }
    }

    fn try_append(
        &self,
        stream: usize,
        messages: &[NewMessage<'_>],
        recorded: &[Option<Outcome>],
    ) -> Result<Result<Ticket, Repeated>, Failed> {
        let ingest = &self.http.ingest;
        match &self.sent.id {
            Some(id) => {
                let appended =
                    self.http.idempotency.append(ingest, stream, id, self.sent.now_us, messages, recorded)?;
                Ok(appended.map(|appended| appended.ticket))
            }
            None => {
                let appended = ingest.append(stream, messages, &[]).map_err(Failed::Rejected)?;
                Ok(Ok(appended.ticket))
            }
        }
    }

    /// Encodes the properties of a message and of its sender, and returns their range.
    fn write_properties(&mut self, at: usize) -> std::ops::Range<usize> {
        let begin = self.properties.len();
        let own = self.sent.items[at].properties.clone();
        self.properties.extend_from_slice(&self.sent.properties[own]);
        facts::push_sender(&mut self.properties, self.sent.client_id.as_deref(), &self.sent.identity);
        begin..self.properties.len()
    }

    fn message<'m>(&'m self, stream: usize, at: usize, properties: &'m [u8]) -> NewMessage<'m> {
        let (item, sent) = (&self.sent.items[at], self.sent);
        let place = sent.places[at].as_ref().expect("it was accepted");
        let device = sent.identity.device.as_deref().unwrap_or(place.device_of(&item.topic, &sent.client));
        let (topic, payload, flags) = (&*item.topic, &*item.payload, QOS | place.flags());
        let received_us = sent.now_us;
        self.http.ingest.message(stream, Draft { topic, payload, properties, device, flags, received_us })
    }

    fn taken(&self, messages: &[NewMessage<'_>]) {
        let Taken { by_qos, bytes, outside_namespace } = Taken::of(messages);
        let counters = &self.http.counters;
        counters.messages.increment(by_qos.iter().sum());
        counters.message_bytes.increment(bytes);
        counters.outside_namespace.increment(outside_namespace);
    }

    async fn durable(&self) -> Result<(), Refusal> {
        let all = async {
            for (stream, ticket) in &self.tickets {
                self.http.ingest.durable(*stream, *ticket).await?;
            }
            Ok::<_, crate::ingest::Stopped>(())
        };
        match timeout(DURABLE_WAIT_MAX, all).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(crate::ingest::Stopped)) => Err(stopping()),
            Err(_) => {
                let reason = "the disk does not answer: the messages are not durable yet, and may be later; \
                              repeat the request with the same Idempotency-Key";
                let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "not_durable", reason);
                Err(refusal.retry(RETRY_AFTER_LONG))
            }
        }
    }
}

fn mismatch() -> Refusal {
    let reason = "this Idempotency-Key was used for another request: take a new one for each request";
    Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key", reason)
}

fn stopping() -> Refusal {
    let reason = "a stream has stopped: what was sent may be durable or not";
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", reason).retry(RETRY_AFTER_LONG)
}
