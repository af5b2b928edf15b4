//! Authentication in more than one round, as carried by MQTT 5's AUTH packet (4.12).

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use super::authority::AuthorityId;
use super::fair::Source;
use super::guesses::Guesses;
use super::passwords::Passwords;
use super::{Access, Credentials, Denied, Identity, scram};

/// Most rounds of one exchange. None of the supported methods needs as many.
pub const ROUNDS_MAX: u32 = 8;

/// The next step of an exchange.
pub enum Step {
    /// The client must answer `data`.
    Ask { data: Vec<u8>, exchange: Box<dyn Exchange> },
    /// The client is authenticated.
    Done { data: Vec<u8>, identity: Identity },
}

/// An exchange that waits for the client's next answer.
#[async_trait]
pub trait Exchange: Send {
    async fn answer(self: Box<Self>, data: &[u8]) -> Result<Step, Denied>;

    /// Returns the user name that the client claims, if it is known already.
    fn user(&self) -> Option<&str> {
        None
    }
}

/// The beginning of an exchange by one authenticator.
pub struct Begun {
    /// Whether the authenticator knows the client. An unknown client goes through the same steps and is
    /// refused at the end.
    pub known: bool,
    pub step: Step,
}

impl Access {
    /// Performs the first round. `data` is the data in the client's CONNECT or first AUTH packet.
    pub async fn begin(&self, method: &str, data: &[u8], who: &Credentials<'_>) -> Result<Step, Denied> {
        let mut unknown = None;
        for authenticator in &self.authenticators {
            match authenticator.by().begin(method, data, who).await? {
                Some(Begun { known: true, step }) => return Ok(step.by(authenticator.id())),
                Some(begun) => unknown = unknown.or(Some(begun.step.by(authenticator.id()))),
                None => {}
            }
        }
        unknown.ok_or(Denied::BadMethod)
    }
}

impl Step {
    /// Notes which authenticator has recognised the client, now or at the end of the exchange.
    fn by(self, id: AuthorityId) -> Self {
        match self {
            Self::Ask { data, exchange } => Self::Ask { data, exchange: Box::new(By { exchange, id }) },
            Self::Done { data, mut identity } => {
                identity.admitted_by = Some(id);
                Self::Done { data, identity }
            }
        }
    }
}

/// An exchange with the authenticator that began it.
struct By {
    exchange: Box<dyn Exchange>,
    id: AuthorityId,
}

#[async_trait]
impl Exchange for By {
    async fn answer(self: Box<Self>, data: &[u8]) -> Result<Step, Denied> {
        let Self { exchange, id } = *self;
        exchange.answer(data).await.map(|step| step.by(id))
    }

    fn user(&self) -> Option<&str> {
        self.exchange.user()
    }
}

struct Scram {
    exchange: scram::Exchange,
    user: String,
    source: Source,
    guesses: Arc<Guesses>,
    /// Identity of the user, or `None` if the user does not exist.
    identity: Option<Identity>,
}

impl Passwords {
    /// Begins SCRAM-SHA-256, for users that have a verifier beside their password.
    pub async fn begin_exchange(
        &self,
        method: &str,
        data: &[u8],
        who: &Credentials<'_>,
    ) -> Result<Option<Begun>, Denied> {
        if method != scram::METHOD {
            return Ok(None);
        }
        let first = scram::First::read(data).ok_or(Denied::BadCredentials)?;
        if who.username.is_some_and(|username| username != first.user) {
            return Err(Denied::BadCredentials);
        }
        let (verifier, identity) = self.verifier(&first.user).await?;
        let known = identity.is_some();
        let (exchange, data) =
            scram::Exchange::begin(&first, verifier).ok_or(Denied::Unavailable("random"))?;
        let (source, guesses) = (Source::of(who.ip), self.guesses().clone());
        let exchange = Box::new(Scram { exchange, user: first.user, source, guesses, identity });
        Ok(Some(Begun { known, step: Step::Ask { data: data.into(), exchange } }))
    }
}

#[async_trait]
impl Exchange for Scram {
    async fn answer(self: Box<Self>, data: &[u8]) -> Result<Step, Denied> {
        let Self { exchange, user, source, guesses, identity } = *self;
        tokio::time::sleep(guesses.delay(source, Instant::now())).await;
        let guess = guesses.begin(source, &user, Instant::now())?;
        let (Some(data), Some(identity)) = (exchange.finish(data), identity) else {
            guess.wrong(Instant::now());
            return Err(Denied::BadCredentials);
        };
        guess.right();
        Ok(Step::Done { data: data.into(), identity })
    }

    fn user(&self) -> Option<&str> {
        Some(&self.user)
    }
}
