//! Authentication in more than one round, as MQTT 5's AUTH carries it (4.12).

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use super::fair::Source;
use super::guesses::Guesses;
use super::passwords::Passwords;
use super::{Access, Credentials, Denied, Identity, scram};

/// Rounds of one exchange; no method of ours needs as many.
pub const ROUNDS_MAX: u32 = 8;

/// What the client is told next.
pub enum Step {
    /// It is to answer this.
    Ask { data: Vec<u8>, exchange: Box<dyn Exchange> },
    /// It is known.
    Done { data: Vec<u8>, identity: Identity },
}

/// Waits for the client's next answer.
#[async_trait]
pub trait Exchange: Send {
    async fn answer(self: Box<Self>, data: &[u8]) -> Result<Step, Denied>;

    /// Who the client says that it is, where that is known.
    fn user(&self) -> Option<&str> {
        None
    }
}

/// How one authenticator begins an exchange.
pub struct Begun {
    /// Whether it has the client. One that it does not have meets the same
    /// steps, and is refused at their end.
    pub known: bool,
    pub step: Step,
}

impl Access {
    /// The first round: `data` is what the client says by itself.
    pub async fn begin(&self, method: &str, data: &[u8], who: &Credentials<'_>) -> Result<Step, Denied> {
        let mut unknown = None;
        for authenticator in &self.authenticators {
            match authenticator.begin(method, data, who).await? {
                Some(Begun { known: true, step }) => return Ok(step),
                Some(begun) => unknown = unknown.or(Some(begun.step)),
                None => {}
            }
        }
        unknown.ok_or(Denied::BadMethod)
    }
}

struct Scram {
    exchange: scram::Exchange,
    user: String,
    source: Source,
    guesses: Arc<Guesses>,
    /// `None` for who does not exist.
    identity: Option<Identity>,
}

impl Passwords {
    /// SCRAM-SHA-256, for users with a verifier beside their passwords.
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
