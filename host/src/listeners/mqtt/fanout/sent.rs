//! A message on its way to the subscribers that match it.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::batch::{MessageRef, flags};
use crate::listeners::mqtt::outbound::{Ids, Message, Place, Queued, ShareFilter, Source};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::{Found, Options, Share, Subscriber};

/// Subscribers that a message matched. The memory is reused for the next message.
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

/// A message on its way to subscribers. It is copied out of its stream's frame once, and only if a
/// connected subscriber holds it.
pub(super) enum Sent<'m> {
    Live {
        place: Place,
        /// Receiver: 0 for live delivery, otherwise the number of a lane.
        lane: u8,
        message: MessageRef<'m>,
        since_us: u64,
        may_be_again: bool,
        whole: OnceCell<Arc<Message>>,
    },
    /// A message that a lane offers to the members of a share.
    Owed(&'m Sent<'m>),
    /// A message that a member of a shared subscription gave back.
    Again(Queued),
    /// A message made by the broker at this broker time.
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

    /// Returns the queue entry, or `None` for a message that may be sent only once and may have been
    /// sent before a restart.
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

    /// Returns the copy of a stream's message.
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
