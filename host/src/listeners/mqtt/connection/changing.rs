//! A SUBSCRIBE or UNSUBSCRIBE that is being processed, on a task of its own. It is answered once a
//! persistent session's change is durable, which takes as long as the broker's stream has no room. Later
//! packets of the client wait, and its connection continues.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::acks::Stopped;
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::wire::Packet;
use crate::threads::{SHORT_TURN, in_turns};

pub struct Changing {
    task: JoinHandle<Result<Box<Packet>, Stopped>>,
    given_up: CancellationToken,
}

/// Result of a change of subscriptions in memory.
pub struct Changed {
    pub answer: Packet,
    /// Whether the answer waits until all changes of the session are durable.
    pub is_noted: bool,
}

impl Changing {
    /// Begins `change`.
    pub fn new(
        broker: &Arc<Broker>,
        session: &Arc<Session>,
        change: impl Future<Output = Changed> + Send + 'static,
    ) -> Self {
        let given_up = CancellationToken::new();
        let (until, broker_, session) = (given_up.clone(), broker.clone(), session.clone());
        let work = async move {
            let Changed { answer, is_noted } = change.await;
            if is_noted {
                let noted = until.run_until_cancelled(session.note_durable(&broker_));
                noted.await.unwrap_or(Err(Stopped))?;
            }
            Ok(Box::new(answer))
        };
        Self { task: broker.background.spawn(in_turns(SHORT_TURN, work)), given_up }
    }

    /// Returns the answer once it may be sent.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Box<Packet>, Stopped>> {
        match ready!(Pin::new(&mut self.task).poll(cx)) {
            Ok(answered) => Poll::Ready(answered),
            // The runtime ends: these threads do first.
            Err(_) => Poll::Pending,
        }
    }

    /// Abandons the answer because the connection ends. When this returns, the change is complete in
    /// memory: the next connection finds it, and a later note contains what was not appended.
    pub async fn give_up(self) {
        self.given_up.cancel();
        // A panic ends the process.
        let _ = self.task.await;
    }
}
