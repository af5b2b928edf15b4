//! An access plugin as authenticator: called off the reactor, few at a time. Its
//! answer is checked; a fault refuses the client, and never lets one in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::config::{self, RULES_MAX, Rule};
use super::exchange::{Begun, Exchange, Step};
use super::rules::{self, Action, Effect};
use super::watched::Watched;
use super::{Authenticate, Credentials, Denied, Identity};
use crate::plugin::access::{self, AccessEngine, AccessPlugin, Connecting, Decision, Property, Seat};
use crate::properties::{self, Origin};
use crate::telemetry::Failures;

const FILE_BYTES_MAX: u64 = 128 << 20;
const NAME_BYTES_MAX: usize = 1_024;
/// Of all of a client's: they go with each of its messages.
const ATTRIBUTES_BYTES_MAX: usize = 4 << 10;
/// What only a listener says of a message.
const FACTS: [&str; 9] = [
    "content-type",
    "response-topic",
    "correlation-data",
    "expiry-s",
    "client-id",
    "username",
    "cert-subject",
    "kafka-key",
    "remote-addr",
];

pub struct Plugin(Arc<Inner>);

struct Inner {
    file: String,
    plugin: Watched<AccessPlugin>,
    /// As many as instances.
    turns: Arc<Semaphore>,
    exchanges: AtomicU64,
    failures: Failures,
}

/// What a plugin said, checked.
enum Answer {
    Accept(Box<Identity>),
    Pass,
    Refuse(Denied),
    More(Vec<u8>, Seat),
}

struct Running {
    inner: Arc<Inner>,
    plugin: Arc<AccessPlugin>,
    seat: Seat,
    number: u64,
}

impl Plugin {
    pub fn open(config: &config::Plugin, engine: &AccessEngine, failures: Failures) -> Result<Self, String> {
        let (engine, settings) = (engine.clone(), config.clone());
        let load = move |bytes: &[u8]| {
            let loaded =
                engine.load(bytes, &settings.config, settings.limits, settings.instances_max as usize);
            loaded.map_err(|error| error.to_string())
        };
        let plugin = Watched::open(&config.file, FILE_BYTES_MAX, failures.clone(), load)?;
        Ok(Self(Arc::new(Inner {
            file: config.file.display().to_string(),
            plugin,
            turns: Arc::new(Semaphore::new(config.instances_max as usize)),
            exchanges: AtomicU64::new(0),
            failures,
        })))
    }

    async fn ask(
        &self,
        who: &Credentials<'_>,
        method: Option<(&str, &[u8])>,
    ) -> Result<(Answer, Arc<AccessPlugin>, u64), Denied> {
        let number = self.0.exchanges.fetch_add(1, Ordering::Relaxed);
        let connecting = connecting(number, who, method);
        let inner = self.0.clone();
        let called = self.0.off_the_reactor(move || {
            let plugin = inner.plugin.get();
            (plugin.authenticate(&connecting), plugin)
        });
        let (decision, plugin) = called.await?;
        let answer = decision.and_then(|(decision, seat)| checked(decision, seat, method.is_some()));
        Ok((self.0.counted(answer)?, plugin, number))
    }
}

impl Inner {
    /// When it has its turn; runs on when its client has gone.
    async fn off_the_reactor<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Denied> {
        let turn = self.turns.clone().acquire_owned().await.expect("the semaphore is never closed");
        super::off_the_reactor(move || {
            let _held = turn;
            work()
        })
        .await
    }

    fn counted(&self, answer: Result<Answer, String>) -> Result<Answer, Denied> {
        let outcome = match &answer {
            Ok(Answer::Accept(_)) => "accepted",
            Ok(Answer::Pass) => "passed",
            Ok(Answer::Refuse(_)) => "refused",
            Ok(Answer::More(..)) => "asked",
            Err(_) => "fault",
        };
        metrics::counter!("headworks_access_plugin_calls_total", "outcome" => outcome).increment(1);
        answer.map_err(|reason| {
            let kind = format!("access: plugin {} failed, the client is refused", self.file);
            self.failures.report(&kind, 1, &reason, "");
            Denied::Unavailable("plugin")
        })
    }
}

#[async_trait]
impl Authenticate for Plugin {
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        match self.ask(who, None).await?.0 {
            Answer::Accept(identity) => Ok(Some(*identity)),
            Answer::Refuse(denied) => Err(denied),
            Answer::Pass | Answer::More(..) => Ok(None),
        }
    }

    async fn begin(&self, method: &str, data: &[u8], who: &Credentials<'_>) -> Result<Option<Begun>, Denied> {
        let (answer, plugin, number) = self.ask(who, Some((method, data))).await?;
        let running = |seat| Running { inner: self.0.clone(), plugin, seat, number };
        match answer {
            Answer::Pass | Answer::Refuse(Denied::BadMethod) => Ok(None),
            Answer::Refuse(denied) => Err(denied),
            Answer::Accept(identity) => {
                let step = Step::Done { data: Vec::new(), identity: *identity };
                Ok(Some(Begun { known: true, step }))
            }
            Answer::More(data, seat) => {
                let step = Step::Ask { data, exchange: Box::new(running(seat)) };
                Ok(Some(Begun { known: true, step }))
            }
        }
    }
}

#[async_trait]
impl Exchange for Running {
    async fn answer(self: Box<Self>, data: &[u8]) -> Result<Step, Denied> {
        let Running { inner, plugin, seat, number } = *self;
        let (data, called) = (data.to_vec(), plugin.clone());
        let decision = inner.off_the_reactor(move || called.go_on(seat, number, &data)).await?;
        let answer = decision.and_then(|decision| checked(decision, seat, true));
        match inner.counted(answer)? {
            Answer::Accept(identity) => Ok(Step::Done { data: Vec::new(), identity: *identity }),
            Answer::More(data, seat) => {
                Ok(Step::Ask { data, exchange: Box::new(Running { inner, plugin, seat, number }) })
            }
            Answer::Refuse(denied) => Err(denied),
            // It was its client a round ago.
            Answer::Pass => Err(Denied::NotAuthorized),
        }
    }
}

fn connecting(exchange: u64, who: &Credentials<'_>, method: Option<(&str, &[u8])>) -> Connecting {
    let fact =
        |name: &str, value: &[u8]| Property { origin: 1, name: name.to_owned(), value: value.to_vec() };
    let mut properties = Vec::new();
    if let Some(name) = who.certificate {
        properties.push(fact("cert-subject", name.as_bytes()));
    }
    if let Some((method, data)) = method {
        properties.push(fact("auth-method", method.as_bytes()));
        properties.push(fact("auth-data", data));
    }
    Connecting {
        exchange,
        client_id: who.client_id.to_owned(),
        username: who.username.map(str::to_owned),
        password: who.password.map(<[u8]>::to_vec),
        certificates: Vec::new(),
        remote_addr: who.ip.to_string(),
        listener: String::new(),
        transport: 0,
        properties,
    }
}

fn checked(decision: Decision, seat: Seat, may_ask: bool) -> Result<Answer, String> {
    match decision {
        Decision::Accept(identity) => self::identity(identity).map(Box::new).map(Answer::Accept),
        Decision::Refuse(refusal) if refusal.code < 0x80 => Ok(Answer::Pass),
        Decision::Refuse(refusal) => {
            tracing::debug!(code = refusal.code, reason = refusal.reason, "access plugin refuses a client");
            Ok(Answer::Refuse(match refusal.code {
                0x86 => Denied::BadCredentials,
                0x88 | 0x89 => Denied::Unavailable("plugin"),
                0x8c => Denied::BadMethod,
                _ => Denied::NotAuthorized,
            }))
        }
        Decision::More(_) if !may_ask => {
            Err("bad answer: it asks more of a client that named no authentication method".to_owned())
        }
        Decision::More(data) if data.len() > usize::from(u16::MAX) => {
            Err("bad answer: it asks with more than 65535 bytes".to_owned())
        }
        Decision::More(data) => Ok(Answer::More(data, seat)),
    }
}

fn identity(raw: access::Identity) -> Result<Identity, String> {
    let bad = |what: String| Err(format!("bad answer: {what}"));
    if raw.name.is_empty() || raw.name.len() > NAME_BYTES_MAX || raw.name.chars().any(char::is_control) {
        return bad(format!("a name has 1 to {NAME_BYTES_MAX} bytes and no control characters"));
    }
    if raw.device.is_some() {
        return bad("`device` is not served by this version of Headworks".to_owned());
    }
    if raw.rules.len() > RULES_MAX {
        return bad(format!("at most {RULES_MAX} rules, are {}", raw.rules.len()));
    }
    let rules = raw.rules.into_iter().map(rule).collect::<Result<Vec<_>, _>>();
    let rules = rules.map_err(|what| format!("bad answer: {what}"))?.into_iter().flatten().collect();
    let mut attributes = Vec::new();
    for Property { name, value, .. } in &raw.attributes {
        if name.is_empty()
            || FACTS.contains(&name.as_str())
            || name.len() + value.len() > ATTRIBUTES_BYTES_MAX
        {
            return bad(format!("attribute {name:?}: empty, too long, or the listener's own"));
        }
        properties::push(&mut attributes, Origin::Listener, name, value);
    }
    if attributes.len() > ATTRIBUTES_BYTES_MAX {
        return bad(format!("attributes have at most {ATTRIBUTES_BYTES_MAX} bytes"));
    }
    let valid_for = Duration::from_secs(raw.valid_for_s.into());
    Ok(Identity {
        name: Some(raw.name.into()),
        rules,
        attributes,
        valid_until: (!valid_for.is_zero()).then(|| Instant::now() + valid_for),
        ..Identity::default()
    })
}

/// `None` where it has no bearing here: what may be received was decided when
/// it was subscribed to.
fn rule(raw: access::Rule) -> Result<Option<Rule>, String> {
    const PUBLISH: u32 = 1;
    const SUBSCRIBE: u32 = 2;
    const RECEIVE: u32 = 4;
    rules::check_topic(&raw.filter)?;
    if raw.actions == 0 || raw.actions > PUBLISH + SUBSCRIBE + RECEIVE {
        return Err(format!("rule {:?}: actions {}", raw.filter, raw.actions));
    }
    let effect = match raw.effect {
        0 => Effect::Deny,
        1 => Effect::Allow,
        2 => return Err(format!("rule {:?}: `ask` is not served by this version of Headworks", raw.filter)),
        other => return Err(format!("rule {:?}: effect {other}", raw.filter)),
    };
    // Nobody is subscribed to what may not be received.
    let denies = effect == Effect::Deny && raw.actions & RECEIVE != 0;
    let action = match (raw.actions & PUBLISH != 0, raw.actions & SUBSCRIBE != 0 || denies) {
        (true, true) => Action::Both,
        (true, false) => Action::Publish,
        (false, true) => Action::Subscribe,
        (false, false) => return Ok(None),
    };
    let topics = vec![raw.filter];
    Ok(Some(Rule { effect, user: None, client: None, anonymous: None, action, topics }))
}
