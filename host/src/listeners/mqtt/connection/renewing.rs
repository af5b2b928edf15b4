//! What a reload of access control changes for a connected client.
//!
//! Its rights are compiled anew before anything more is taken from it or sent to it. On a task of its own
//! the access plugin is asked where the rules say so, and filters that the client may no longer have are
//! removed with what waits for them. Later packets of the client wait meanwhile, except for PINGREQ.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::changing::Changing;
use super::{Connection, End, Event};
use crate::access::{Act, Admitted, AdmittedNoMore, Connected, Denied, Verdict};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::auth;
use crate::listeners::mqtt::handshake::{ask_for_filters, leave_forbidden};
use crate::listeners::mqtt::session::Session;
use crate::threads::{SHORT_TURN, in_turns};

const NO_MORE: &str = "mqtt: a connected client is not admitted by the reloaded access control";
const UNASKED: &str = "mqtt: the access plugin cannot be asked about a connected client after a reload";
const NO_WILL: &str =
    "mqtt: a will is forgotten because its client may not publish it any more after a reload";

pub struct Renewing {
    task: JoinHandle<Renewed>,
    given_up: CancellationToken,
}

/// Result of a renewal.
pub enum Renewed {
    Done {
        rights: Box<Admitted>,
        may_leave_will: bool,
    },
    /// The access plugin cannot be asked.
    Failed,
}

impl Renewing {
    fn begin(
        broker: &Arc<Broker>,
        session: &Arc<Session>,
        mut rights: Box<Admitted>,
        will_topic: Option<Box<str>>,
    ) -> Self {
        let given_up = CancellationToken::new();
        let (until, broker_, session) = (given_up.clone(), broker.clone(), session.clone());
        let work = async move {
            let asked = until.run_until_cancelled(ask(&mut rights, &session, will_topic)).await;
            let Some(Ok(may_leave_will)) = asked else { return Renewed::Failed };
            leave_forbidden(&broker_, &session, &mut rights).await;
            Renewed::Done { rights, may_leave_will }
        };
        Self { task: broker.background.spawn(in_turns(SHORT_TURN, work)), given_up }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Renewed> {
        match ready!(Pin::new(&mut self.task).poll(cx)) {
            Ok(renewed) => Poll::Ready(renewed),
            // The runtime ends: these threads do first.
            Err(_) => Poll::Pending,
        }
    }

    /// Abandons the renewal because the connection ends. When this returns, nothing changes the session any
    /// more; its next connection has the rights of that time.
    pub async fn give_up(self) {
        self.given_up.cancel();
        // A panic ends the process.
        let _ = self.task.await;
    }
}

/// Asks the access plugin about the client's will and filters, if the rules require it. Returns whether the
/// client may leave its will.
async fn ask(rights: &mut Admitted, session: &Session, will_topic: Option<Box<str>>) -> Result<bool, Denied> {
    let mut may_leave_will = true;
    if let Some(topic) = will_topic {
        if rights.publish(&topic) == Verdict::Ask {
            rights.ask_now(Act::Publish, vec![topic.clone()]).await?;
        }
        may_leave_will = rights.publish(&topic) == Verdict::Yes;
    }
    // Last: the answers of the last call are all kept.
    ask_for_filters(rights, session).await?;
    Ok(may_leave_will)
}

/// Returns the result of a SUBSCRIBE or UNSUBSCRIBE, or of a renewal. Never returns while there is none. Cancel
/// safe. Small, because each connection holds it.
pub(super) fn held(
    mut changing: Option<&mut Changing>,
    mut renewing: Option<&mut Renewing>,
) -> impl Future<Output = Event> {
    poll_fn(move |cx| {
        if let Some(changing) = &mut changing
            && let Poll::Ready(answer) = changing.poll(cx)
        {
            return Poll::Ready(Event::Changed(answer));
        }
        match &mut renewing {
            Some(renewing) => renewing.poll(cx).map(Event::Renewed),
            None => Poll::Pending,
        }
    })
}

impl<S> Connection<'_, S> {
    /// Begins to renew the client's rights if access control was replaced. Must be called before anything is
    /// taken in that was read since.
    pub(super) fn keep_up(&mut self) -> Result<(), End> {
        let broker = self.broker;
        // A SUBSCRIBE ends first, so that its filters are looked at too.
        let is_busy = self.renewing.is_some() || self.changing.is_some() || self.drains;
        if is_busy || broker.access.is_of(self.inbound.rights()) {
            return Ok(());
        }
        let (access, client_id) = (broker.access.get(), &*self.session.client_id);
        let own_client_id = (!self.is_id_assigned).then_some(client_id);
        let of = Connected { own_client_id, client_id, entrance: &self.remote.entrance };
        match access.renew(self.inbound.rights(), of) {
            Ok(None) => self.inbound.belong_to(access),
            Ok(Some(rights)) => {
                self.inbound.hold(true);
                let will_topic = self.will.as_ref().map(|will| will.topic.clone());
                let renewing = Renewing::begin(broker, &self.session, Box::new(rights), will_topic);
                self.renewing = Some(Box::new(renewing));
            }
            Err(AdmittedNoMore) => return Err(End::Fault(auth::failed(broker, client_id, NO_MORE))),
        }
        Ok(())
    }

    /// Goes on with the renewed rights.
    pub(super) fn renewed(&mut self, renewed: Renewed) -> Result<(), End> {
        self.renewing = None;
        let (broker, client_id) = (self.broker, &*self.session.client_id);
        let Renewed::Done { rights, may_leave_will } = renewed else {
            return Err(End::Fault(auth::failed(broker, client_id, UNASKED)));
        };
        if let Some(will) = self.will.take_if(|_| !may_leave_will) {
            let detail = format!("client {client_id}, topic {}", will.topic);
            broker.failures.report_client(NO_WILL, client_id, 1, &detail, "");
            will.forget(broker);
        }
        self.inbound.hold_no_more();
        // The client may have authenticated again meanwhile: those rights are looked at by themselves.
        if Arc::ptr_eq(&rights.identity, &self.inbound.rights().identity) {
            self.inbound.succeed(*rights);
        }
        Ok(())
    }
}
