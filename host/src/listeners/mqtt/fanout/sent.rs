//! A message on its way to those who want it.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::batch::{MessageRef, flags};
use crate::listeners::mqtt::outbound::{Ids, Message, Place, Queued, ShareFilter, Source};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::{Found, Options, Share, Subscriber};

/// Whom a message met; reused from one to the next.
#[derive(Default)]
pub(super) struct Met<'t> {
    pub(super) ones: Vec<&'t Subscriber<Arc<Session>>>,
    pub(super) shares: Vec<&'t Share<Arc<Session>>>,
}

impl<'t> Met<'t> {
    pub(super) fn push(&mut self, found: Found<'t, Arc<Session>>) {
        match found {
            Found::One(subscriber) => self.ones.push(subscriber),
            Found::Share(share) => self.shares.push(share),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.ones.len() + self.shares.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A message on its way to those who want it; copied out of its stream's
/// frame once, and only where somebody is there to hold it.
pub(super) enum Sent<'m> {
    Live {
        place: Place,
        /// To whom it goes: 0, or the number of a lane.
        lane: u8,
        message: MessageRef<'m>,
        since_us: u64,
        may_be_again: bool,
        whole: OnceCell<Arc<Message>>,
    },
    /// A lane offers it to the members of a share, whoever they are.
    Owed(&'m Sent<'m>),
    /// A member of a shared subscription gave it back.
    Again(Queued),
    /// Made at that broker time.
    Broker(&'m Arc<Message>, u64),
}

impl Sent<'_> {
    pub(super) fn is_for(&self, session: &Session) -> bool {
        match self {
            Self::Live { place, lane, .. } => session.lane(place.stream.into()) == *lane,
            Self::Owed(_) | Self::Again(_) | Self::Broker(..) => true,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self, Self::Live { lane: 0, .. })
    }

    /// `None`: what may be sent once only, and perhaps was, before a restart.
    pub(super) fn queued(
        &self,
        qos: u8,
        as_published: bool,
        ids: Ids,
        share: Option<ShareFilter>,
    ) -> Option<Queued> {
        match self {
            Self::Live { place, message, since_us, may_be_again, .. } => {
                let (entry, may_be_again) = (message.entry, *may_be_again);
                let qos = qos.min((entry.flags & flags::QOS_MASK) as u8);
                (qos > 0 || !may_be_again).then(|| Queued {
                    source: Source::Stream { stream: place.stream, offset: place.offset },
                    body: None,
                    since_us: *since_us,
                    len: Message::len_of(*message),
                    qos,
                    retain: as_published && entry.flags & flags::RETAIN != 0,
                    apart: false,
                    may_be_again,
                    ids,
                    share,
                })
            }
            Self::Owed(sent) => {
                let queued = sent.queued(qos, as_published, ids, share)?;
                Some(Queued { apart: true, ..queued })
            }
            Self::Again(queued) => {
                let retain = queued.retain && as_published;
                let qos = qos.min(queued.qos);
                Some(Queued { qos, retain, apart: true, may_be_again: true, ids, share, ..queued.clone() })
            }
            Self::Broker(message, now_us) => {
                let retain = message.retain && as_published;
                let source = Source::Broker((*message).clone());
                let queued = Queued::whole(source, 0, Options::default(), *now_us);
                Some(Queued { retain, ids, share, ..queued })
            }
        }
    }

    /// Of a stream's message.
    pub(super) fn whole(&self) -> Option<Arc<Message>> {
        match self {
            Self::Live { message, whole, .. } => {
                Some(whole.get_or_init(|| Arc::new(Message::of(*message))).clone())
            }
            Self::Owed(sent) => sent.whole(),
            Self::Again(_) | Self::Broker(..) => None,
        }
    }
}
