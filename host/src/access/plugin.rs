//! An access plugin as authenticator. It is called on other threads than the reactor's, a few calls at a
//! time. Its answers are checked; a fault refuses the client, and never admits one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::config::{self, RULES_MAX, Rule};
use super::exchange::{Begun, Exchange, Step};
use super::fair::{Crowded, Fair, Place, Source};
use super::questions::{Act, Authorize};
use super::rules::{self, Action, Effect};
use super::wait::WaitMax;
use super::watched::{Opening, Watched};
use super::{Authenticate, Credentials, Denied, Identity};
use crate::plugin::access::{
    self, AccessEngine, AccessPlugin, Connecting, Decision, Property, Question, Seat,
};
use crate::properties::{self, Origin, facts};
use crate::telemetry::{Failures, Standing};
use crate::topic::DEVICE_ID_BYTES_MAX;

const FILE_BYTES_MAX: u64 = 128 << 20;
/// Most waiting calls for clients that connect. A client leaves when `mqtt.connect_timeout` has passed.
const WAITING_MAX: usize = 8_192;
const NAME_BYTES_MAX: usize = 1_024;
/// Most bytes of the attributes of a client, which are stored with each of its messages.
const ATTRIBUTES_BYTES_MAX: usize = 4 << 10;
pub struct Plugin(Arc<Inner>);

struct Inner {
    file: String,
    plugin: Arc<Opening<AccessPlugin>>,
    /// How long a client waits for the first version.
    wait_max: WaitMax,
    /// Turns for calls, as many as there are instances.
    turns: Arc<Fair>,
    exchanges: AtomicU64,
    failures: Failures,
}

/// A checked answer of the plugin.
enum Answer {
    Accept(Box<Identity>),
    Pass,
    Refuse(Denied),
    More(Vec<u8>, Seat),
}

/// The client for which a call is made.
#[derive(Clone)]
struct Caller {
    source: Source,
    client_id: Box<str>,
    /// Whether the client is connected. Its calls are made before those of clients that connect.
    is_connected: bool,
}

struct Running {
    inner: Arc<Inner>,
    caller: Caller,
    plugin: Arc<AccessPlugin>,
    seat: Seat,
    number: u64,
}

impl Plugin {
    /// Begins to load the plugin. Clients wait for it at most half of `wait_max`, so that they can be
    /// told if loading takes longer.
    pub fn open(
        config: &config::Plugin,
        engine: &AccessEngine,
        wait_max: WaitMax,
        failures: Failures,
    ) -> Self {
        let (engine, settings, said) = (engine.clone(), config.clone(), failures.clone());
        let plugin = Opening::begin(failures.clone(), move || {
            let opened = watch(&settings, &engine, said.clone());
            note_opened(&settings.file, opened.as_ref().err(), &said);
            opened
        });
        Self(Arc::new(Inner {
            file: config.file.display().to_string(),
            plugin,
            wait_max,
            turns: Fair::new(config.instances_max as usize),
            exchanges: AtomicU64::new(0),
            failures,
        }))
    }

    async fn ask(
        &self,
        who: &Credentials<'_>,
        method: Option<(&str, &[u8])>,
    ) -> Result<(Answer, Arc<AccessPlugin>, u64), Denied> {
        let number = self.0.exchanges.fetch_add(1, Ordering::Relaxed);
        let connecting = connecting(number, who, method);
        let watched = self.0.watched().await?;
        let caller = Caller::of(who);
        let called = self.0.off_the_reactor(&caller, move || {
            let plugin = watched.ready();
            (plugin.authenticate(&connecting), plugin)
        });
        let (decision, plugin) = called.await?;
        let answer = decision.and_then(|(decision, seat)| self.0.checked(decision, seat, method.is_some()));
        Ok((self.0.counted(answer)?, plugin, number))
    }
}

/// Loads the plugin and returns what is wrong with the file or its config.
pub fn look(config: &config::Plugin, engine: &AccessEngine) -> Result<(), String> {
    watch(config, engine, Failures::default()).map(drop)
}

/// Reports a first version that cannot be used as a problem, until there is one that can.
fn note_opened(file: &Path, wrong: Option<&String>, failures: &Failures) {
    let (part, kind) = (format!("access plugin {}", file.display()), "plugin_failed");
    let Some(reason) = wrong else { return failures.mended(&part, kind) };
    failures.stands(Standing {
        part,
        kind,
        cause: format!("{reason}; clients that it is asked about are refused"),
        advice: format!("mend or replace {}; it is checked again when a client connects", file.display()),
    });
}

fn watch(
    config: &config::Plugin,
    engine: &AccessEngine,
    failures: Failures,
) -> Result<Watched<AccessPlugin>, String> {
    let (engine, settings) = (engine.clone(), config.clone());
    let load = move |bytes: &[u8]| {
        let loaded = engine.load(bytes, &settings.config, settings.limits, settings.instances_max as usize);
        loaded.map_err(|error| error.to_string())
    };
    Watched::open(&config.file, FILE_BYTES_MAX, failures, load)
}

impl Caller {
    fn of(who: &Credentials<'_>) -> Self {
        let source = Source::of(who.ip);
        Self { source, client_id: who.client_id.into(), is_connected: who.is_connected }
    }
}

impl Inner {
    async fn watched(&self) -> Result<Arc<Watched<AccessPlugin>>, Denied> {
        self.plugin.opened(self.wait_max.get() / 2).await.ok_or(Denied::Unavailable("plugin"))
    }

    /// Runs a call when it is its turn. The call continues if its client leaves.
    async fn off_the_reactor<T: Send + 'static>(
        &self,
        caller: &Caller,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Denied> {
        let turn = self.turn(caller).await?;
        super::off_the_reactor(move || {
            let _held = turn;
            work()
        })
        .await
    }

    async fn turn(&self, caller: &Caller) -> Result<Place, Denied> {
        let Caller { source, client_id, is_connected } = caller;
        if *is_connected {
            return Ok(self.turns.enter_first(*source, client_id).await);
        }
        let turn = self.turns.enter(*source, client_id, WAITING_MAX).await;
        turn.map_err(|Crowded| Denied::Unavailable("plugin"))
    }

    fn checked(self: &Arc<Self>, decision: Decision, seat: Seat, may_ask: bool) -> Result<Answer, String> {
        let mut answer = checked(decision, seat, may_ask)?;
        if let Answer::Accept(identity) = &mut answer {
            identity.authorizer = Some(Arc::new(self.clone()));
        }
        Ok(answer)
    }

    fn counted(&self, answer: Result<Answer, String>) -> Result<Answer, Denied> {
        let outcome = match &answer {
            Ok(Answer::Accept(_)) => "accepted",
            Ok(Answer::Pass) => "passed",
            Ok(Answer::Refuse(_)) => "refused",
            Ok(Answer::More(..)) => "asked",
            Err(_) => "fault",
        };
        count(outcome);
        answer.map_err(|reason| self.failed("the client is refused", &reason))
    }

    fn failed(&self, what: &str, reason: &str) -> Denied {
        let kind = format!("access: plugin {} failed, {what}", self.file);
        self.failures.report(&kind, 1, reason, "");
        Denied::Failed("plugin")
    }
}

fn count(outcome: &'static str) {
    metrics::counter!("headworks_access_plugin_calls_total", "outcome" => outcome).increment(1);
}

#[async_trait]
impl Authorize for Arc<Inner> {
    async fn authorize(
        &self,
        name: &str,
        client_id: &str,
        act: Act,
        topics: &[Box<str>],
    ) -> Result<Vec<bool>, Denied> {
        let question = |topic: &str| Question {
            name: name.to_owned(),
            client_id: client_id.to_owned(),
            action: act as u32,
            topic: topic.to_owned(),
        };
        let questions: Vec<_> = topics.iter().map(|topic| question(topic)).collect();
        let watched = self.watched().await?;
        let caller =
            Caller { source: Source::of_user(name), client_id: client_id.into(), is_connected: true };
        let called = self.off_the_reactor(&caller, move || watched.ready().authorize(&questions)).await?;
        match called.and_then(|raw| answers(&raw, topics.len())) {
            Ok(answers) => {
                count("answered");
                Ok(answers)
            }
            Err(reason) => {
                count("fault");
                Err(self.failed("what was asked is refused", &reason))
            }
        }
    }
}

/// Reads an answer, which has one byte for each question.
fn answers(raw: &[u8], questions: usize) -> Result<Vec<bool>, String> {
    if raw.len() != questions {
        return Err(format!("bad answer: {} answers to {questions} questions", raw.len()));
    }
    let answer = |byte: &u8| match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("bad answer: {other} is neither 0 nor 1")),
    };
    raw.iter().map(answer).collect()
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
        let running = |seat| Running { inner: self.0.clone(), caller: Caller::of(who), plugin, seat, number };
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
        let Running { inner, caller, plugin, seat, number } = *self;
        let (data, called) = (data.to_vec(), plugin.clone());
        let decision = inner.off_the_reactor(&caller, move || called.go_on(seat, number, &data)).await?;
        let answer = decision.and_then(|decision| inner.checked(decision, seat, true));
        match inner.counted(answer)? {
            Answer::Accept(identity) => Ok(Step::Done { data: Vec::new(), identity: *identity }),
            Answer::More(data, seat) => {
                let exchange = Box::new(Running { inner, caller, plugin, seat, number });
                Ok(Step::Ask { data, exchange })
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
        certificates: who.certificates.iter().map(|der| der.to_vec()).collect(),
        remote_addr: who.ip.to_string(),
        listener: who.entrance.listener.clone(),
        transport: who.entrance.transport,
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
    if raw.device.as_ref().is_some_and(|device| !is_device(device)) {
        return bad(format!("a device has 1 to {DEVICE_ID_BYTES_MAX} bytes and no control characters"));
    }
    if raw.rules.len() > RULES_MAX {
        return bad(format!("at most {RULES_MAX} rules, are {}", raw.rules.len()));
    }
    let rules = raw.rules.into_iter().map(rule).collect::<Result<Vec<_>, _>>();
    let rules = rules.map_err(|what| format!("bad answer: {what}"))?.into_iter().flatten().collect();
    let mut attributes = Vec::new();
    for Property { name, value, .. } in &raw.attributes {
        if name.is_empty()
            || facts::ALL.contains(&name.as_str())
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
        device: raw.device.map(Into::into),
        valid_until: (!valid_for.is_zero()).then(|| Instant::now() + valid_for),
        ..Identity::default()
    })
}

fn is_device(device: &str) -> bool {
    (1..=DEVICE_ID_BYTES_MAX).contains(&device.len()) && !device.chars().any(char::is_control)
}

/// Converts a rule of the plugin into one for the client's own actions and one for deliveries to it.
fn rule(raw: access::Rule) -> Result<impl Iterator<Item = Rule>, String> {
    const PUBLISH: u32 = Act::Publish as u32;
    const SUBSCRIBE: u32 = Act::Subscribe as u32;
    const RECEIVE: u32 = Act::Receive as u32;
    rules::check_topic(&raw.filter)?;
    if raw.actions == 0 || raw.actions > PUBLISH + SUBSCRIBE + RECEIVE {
        return Err(format!("rule {:?}: actions {}", raw.filter, raw.actions));
    }
    let effect = match raw.effect {
        0 => Effect::Deny,
        1 => Effect::Allow,
        2 => Effect::Ask,
        other => return Err(format!("rule {:?}: effect {other}", raw.filter)),
    };
    let own = match (raw.actions & PUBLISH != 0, raw.actions & SUBSCRIBE != 0) {
        (true, true) => Some(Action::Both),
        (true, false) => Some(Action::Publish),
        (false, true) => Some(Action::Subscribe),
        (false, false) => None,
    };
    let receive = (raw.actions & RECEIVE != 0).then_some(Action::Receive);
    Ok([own, receive].into_iter().flatten().map(move |action| Rule {
        effect,
        user: None,
        client: None,
        anonymous: None,
        action,
        topics: vec![raw.filter.clone()],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_byte_of_0_or_1_for_each_question() {
        assert_eq!(answers(&[0, 1], 2), Ok(vec![false, true]));
        assert!(answers(&[1], 2).is_err() && answers(&[1, 1, 1], 2).is_err());
        assert!(answers(&[1, 2], 2).is_err());
    }

    #[test]
    fn a_rule_of_the_contract_is_one_of_its_own_for_what_is_received() {
        let raw = |actions, effect| access::Rule { actions, filter: "a/#".to_owned(), effect };
        let actions = |raw| rule(raw).map(|rules| rules.map(|rule| rule.action).collect::<Vec<_>>());
        assert_eq!(actions(raw(7, 2)), Ok(vec![Action::Both, Action::Receive]));
        assert_eq!(actions(raw(5, 0)), Ok(vec![Action::Publish, Action::Receive]));
        assert_eq!(actions(raw(4, 1)), Ok(vec![Action::Receive]));
        for bad in [raw(0, 1), raw(8, 1), raw(1, 3)] {
            assert!(rule(bad).is_err());
        }
    }

    #[test]
    fn a_device_is_an_id_that_a_message_can_have() {
        assert!(is_device("press 7") && is_device(&"x".repeat(256)));
        assert!(!is_device("") && !is_device(&"x".repeat(257)) && !is_device("a\nb"));
    }
}
