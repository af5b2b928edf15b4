//! Who a client is, and what it may do. Knows nothing of a protocol's packets:
//! a listener gives [`Credentials`], gets an [`Admitted`], and asks that for
//! each topic.
//!
//! Authenticators are asked in the order of the config until one knows the
//! client; what none knows is refused, and what no rule allows is forbidden.

mod caution;
mod config;
mod exchange;
mod fair;
mod guesses;
mod hash_memory;
mod http;
mod jwt;
mod limits;
mod pace;
mod passwords;
mod plugin;
mod questions;
mod recent;
mod rules;
mod scram;
mod standing;
mod watched;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use self::exchange::Begun;
use self::fair::Source;
use self::limits::{Connects, Users};
use self::questions::{ANSWERS_OF_ALL_BYTES_MAX, Authorize, Questions};
use self::rules::{Policy, Who};
use self::standing::{Standing, Standings};
use crate::plugin::access::AccessEngine;
use crate::problems::{KeyPath, Problems};
use crate::room::Room;
use crate::telemetry::Failures;
use crate::topic::TopicFilter;

pub use self::caution::{is_for_all, readable};
pub use self::config::{Authenticator, Certificate, Config, DeniedPublish, Limits, Overlap, Rule};
pub use self::exchange::{Exchange, ROUNDS_MAX, Step};
pub use self::limits::{Allowance, UserPlace};
pub use self::passwords::Users as PasswordFile;
pub use self::questions::{Act, QUESTIONS_MAX};
pub use self::rules::{Action, Effect, Verdict};
#[cfg(test)]
pub use self::scram::client_final;
pub use self::scram::{ITERATIONS_DEFAULT, ITERATIONS_MAX, ITERATIONS_MIN};
pub use self::standing::Proof;
#[cfg(test)]
pub use self::watched::put as put_file;

/// A user name is stored with each message.
const NAME_BYTES_MAX: usize = 1_024;

/// What a client shows.
#[derive(Clone, Copy, Debug)]
pub struct Credentials<'a> {
    pub client_id: &'a str,
    pub username: Option<&'a str>,
    pub password: Option<&'a [u8]>,
    /// The name in the certificate that the TLS handshake has verified.
    pub certificate: Option<&'a str>,
    /// What that certificate rests on: rights never outlast it, whoever gives them.
    pub proof: Option<&'a Arc<dyn Proof>>,
    /// What the client showed there, DER, that certificate first. Empty where no
    /// authenticator looks at it: see [`Access::looks_at_certificates`].
    pub certificates: &'a [Box<[u8]>],
    pub ip: IpAddr,
    /// The client is connected, and authenticates again.
    pub is_connected: bool,
    pub entrance: &'a Entrance,
    /// The listener serves clients that show nothing.
    pub allow_anonymous: bool,
}

impl Credentials<'_> {
    /// A certificate apart.
    pub fn shows_nothing(&self) -> bool {
        self.username.is_none() && self.password.is_none()
    }
}

/// Where clients come in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entrance {
    /// As the config writes its address.
    pub listener: String,
    /// The plugin contract's number.
    pub transport: u32,
    /// It serves clients that show nothing.
    pub allow_anonymous: bool,
}

/// Who a client is.
#[derive(Clone, Default)]
pub struct Identity {
    /// `None`: anonymous.
    pub name: Option<Arc<str>>,
    /// For `{field}` in rules.
    pub fields: BTreeMap<String, String>,
    /// Before those of the config.
    pub rules: Vec<Rule>,
    /// May do everything.
    pub superuser: bool,
    /// Properties of each of its messages, encoded.
    pub attributes: Vec<u8>,
    /// The device of its messages, whatever their topics say.
    pub device: Option<Box<str>>,
    /// The connection ends then.
    pub valid_until: Option<Instant>,
    /// And when one of these holds no longer.
    pub proofs: Vec<Arc<dyn Proof>>,
    /// Who is asked where `rules` say so.
    authorizer: Option<Arc<dyn Authorize>>,
}

/// What is known of clients of which nothing is known. All of them share it: many hosts have no others.
static NOBODY: LazyLock<Arc<Identity>> = LazyLock::new(Arc::default);

impl Identity {
    fn shared(self) -> Arc<Self> {
        if self.is_nobody() { NOBODY.clone() } else { Arc::new(self) }
    }

    fn is_nobody(&self) -> bool {
        let Self { name, fields, rules, superuser, attributes, device, valid_until, proofs, authorizer } =
            self;
        let has_name = name.is_some() || device.is_some() || *superuser;
        let has_lists =
            !(fields.is_empty() && rules.is_empty() && attributes.is_empty() && proofs.is_empty());
        !has_name && !has_lists && valid_until.is_none() && authorizer.is_none()
    }
}

/// Why a client is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    BadCredentials,
    NotAuthorized,
    /// So many wrong passwords came from there that this one is not looked at yet.
    TooMany,
    /// No authenticator has this method.
    BadMethod,
    /// Who would know cannot be asked now.
    Unavailable(&'static str),
    /// The same, after a failure that is reported by itself, with its cause.
    Failed(&'static str),
}

/// One way to know clients.
#[async_trait]
pub trait Authenticate: Send + Sync {
    /// `Ok(None)`: not a client of its; the next is asked. An error ends the
    /// search: the client is of its, and refused, or it cannot tell.
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied>;

    /// Looks whether the file that it knows clients by has changed; true where it now says something
    /// else. Blocks on the disk.
    fn refresh(&self) -> bool {
        false
    }

    /// Begins an exchange by `method`. `Ok(None)`: not a method of its.
    async fn begin(
        &self,
        _method: &str,
        _data: &[u8],
        _who: &Credentials<'_>,
    ) -> Result<Option<Begun>, Denied> {
        Ok(None)
    }

    /// Spends the time that refusing a known client takes, after nobody knew it;
    /// false where that is none.
    async fn pretend(&self, _who: &Credentials<'_>) -> Result<bool, Denied> {
        Ok(false)
    }
}

/// What access control stands on.
pub struct Deps<'a> {
    /// The same after a restart, and told to nobody.
    pub secret: &'a [u8; 32],
    /// `None`: an access plugin is refused.
    pub plugins: Option<&'a AccessEngine>,
    /// How long a client waits for an answer.
    pub wait_max: Duration,
    pub failures: &'a Failures,
}

/// A client that is served.
pub struct Admitted {
    pub identity: Arc<Identity>,
    policy: Policy,
    /// Where the rules ask.
    questions: Option<Box<Questions>>,
    /// Where the identity rests on something that can change.
    standing: Option<Box<Standing>>,
}

pub struct Access {
    /// `None`: no section `access`, everybody may do everything.
    config: Option<Config>,
    authenticators: Vec<Box<dyn Authenticate>>,
    limits: Limits,
    users: Users,
    standings: Standings,
    /// Room for what access plugins answered about all clients.
    answers: Arc<Room>,
    connects: Option<Mutex<Connects>>,
    publishes: Option<Mutex<Allowance>>,
    wait_max: Duration,
}

impl Admitted {
    /// May do everything: nothing needs to be looked at.
    #[inline]
    pub fn is_everything(&self) -> bool {
        self.policy.is_everything()
    }

    /// Whether a delivery must be looked at.
    #[inline]
    pub fn limits_receive(&self) -> bool {
        self.policy.limits_receive()
    }

    /// Allocates nothing. `Verdict::Ask` of this and the next two: an answer is to be had first.
    #[inline]
    pub fn publish(&self, topic: &str) -> Verdict {
        self.known(self.policy.publish(topic), Act::Publish, topic)
    }

    /// To every topic that `filter` can match.
    pub fn subscribe(&self, filter: &TopicFilter) -> Verdict {
        self.known(self.policy.subscribe(filter), Act::Subscribe, filter.as_str())
    }

    /// A message of a topic that it is subscribed to. Allocates nothing.
    pub fn receive(&self, topic: &str) -> Verdict {
        self.known(self.policy.receive(topic), Act::Receive, topic)
    }

    /// What the rules say, whatever was answered.
    pub fn rule_for_subscribe(&self, filter: &TopicFilter) -> Verdict {
        self.policy.subscribe(filter)
    }

    /// Some of the session's subscriptions were taken from it.
    pub fn narrow(&mut self) {
        if let Some(questions) = &mut self.questions {
            questions.narrowed = true;
        }
    }

    pub fn is_narrowed(&self) -> bool {
        self.questions.as_ref().is_some_and(|questions| questions.narrowed)
    }

    /// What let the client in does so no longer.
    pub fn is_revoked(&self) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.is_revoked())
    }

    /// Asks, unless a call runs already: its end comes first.
    pub fn ask(&mut self, act: Act, topics: Vec<Box<str>>) {
        if let Some(questions) = &mut self.questions {
            questions.ask(act, topics);
        }
    }

    pub fn is_asking(&self) -> bool {
        self.questions.as_ref().is_some_and(|questions| questions.is_asking())
    }

    /// Returns when there are answers. Pending while nothing is asked. Safe to drop.
    pub async fn answered(&mut self) {
        match &mut self.questions {
            // Boxed: a connection that asks nothing does not carry it.
            Some(questions) => Box::pin(questions.answered()).await,
            None => std::future::pending().await,
        }
    }

    /// Asks and waits. An error: the answers are no for now, because it cannot be asked.
    pub async fn ask_now(&mut self, act: Act, topics: Vec<Box<str>>) -> Result<(), Denied> {
        match &mut self.questions {
            Some(questions) => questions.ask_now(act, topics).await,
            None => Ok(()),
        }
    }

    #[inline]
    fn known(&self, verdict: Verdict, act: Act, topic: &str) -> Verdict {
        match (verdict, &self.questions) {
            (Verdict::Ask, Some(questions)) => questions.known(act, topic),
            (Verdict::Ask, None) => Verdict::No,
            (verdict, _) => verdict,
        }
    }
}

impl Access {
    /// Reads the files of the authenticators; errors name them.
    pub fn open(config: Option<&Config>, limits: &Limits, deps: &Deps<'_>) -> Result<Self, String> {
        let now = Instant::now();
        let authenticators = config.map_or(&[][..], |config| &config.authenticate).iter();
        Ok(Self {
            config: config.cloned(),
            authenticators: authenticators.map(|one| open(one, deps)).collect::<Result<_, _>>()?,
            users: Users::default(),
            standings: Standings::default(),
            answers: Room::new(ANSWERS_OF_ALL_BYTES_MAX),
            connects: limits.connects_per_s.map(|per_s| Mutex::new(Connects::new(per_s, now))),
            publishes: Allowance::of_all(limits, now).map(Mutex::new),
            wait_max: deps.wait_max,
            limits: limits.clone(),
        })
    }

    pub async fn admit(&self, who: &Credentials<'_>) -> Result<Admitted, Denied> {
        let identity = match &self.config {
            Some(_) => self.identify(who).await?,
            // Nobody has checked the user name that it gives.
            None => Identity { name: who.certificate.map(Into::into), ..Identity::default() },
        };
        Ok(self.rights(identity, who.client_id, who.proof))
    }

    /// What a client may do that is known; `proof` is that of its certificate.
    pub fn rights(
        &self,
        mut identity: Identity,
        client_id: &str,
        proof: Option<&Arc<dyn Proof>>,
    ) -> Admitted {
        if let Some(proof) = proof {
            identity.valid_until = identity.valid_until.into_iter().chain(proof.valid_until()).min();
            identity.proofs.push(proof.clone());
        }
        let Some(config) = &self.config else {
            let (identity, policy) = (identity.shared(), Policy::everything());
            return Admitted { identity, policy, questions: None, standing: None };
        };
        if let Some(known) = identity.name.as_deref().and_then(|name| config.users.get(name)) {
            identity.fields.extend(known.clone());
        }
        let policy = if identity.superuser {
            Policy::everything()
        } else {
            let user = identity.name.as_deref();
            let compiled_for = Who { client_id, user, fields: &identity.fields };
            Policy::compile(identity.rules.iter().chain(&config.rules), &compiled_for, config.overlap)
        };
        let authorizer = identity.authorizer.take().filter(|_| policy.asks());
        let questions = authorizer.zip(identity.name.as_ref()).map(|(authorizer, name)| {
            Questions::new(authorizer, name, client_id, self.wait_max, &self.answers)
        });
        let questions = questions.map(Box::new);
        Admitted { identity: identity.shared(), policy, questions, standing: None }
    }

    /// From now on `wake` is called when what let the client in does so no longer.
    pub fn watch(&self, rights: &mut Admitted, wake: impl Fn() + Send + Sync + 'static) {
        rights.standing = None;
        if !rights.identity.proofs.is_empty() {
            let proofs = std::mem::take(&mut Arc::make_mut(&mut rights.identity).proofs);
            rights.standing = Some(Box::new(self.standings.enter(proofs, wake)));
        }
    }

    /// Looks at what let the connected clients in, and ends those that it lets in no longer.
    pub fn recheck(&self) {
        let clients = self.standings.recheck();
        if clients > 0 {
            tracing::info!(clients, "access: what let these clients in has changed: they are disconnected");
        }
    }

    /// Reads the files that clients are known by where they have changed. Blocks on the disk.
    pub fn refresh(&self) {
        let changed = self.authenticators.iter().filter(|authenticator| authenticator.refresh()).count();
        if changed > 0 {
            self.recheck();
        }
    }

    async fn identify(&self, who: &Credentials<'_>) -> Result<Identity, Denied> {
        for authenticator in &self.authenticators {
            if let Some(identity) = authenticator.authenticate(who).await? {
                let is_name =
                    |name: &Arc<str>| name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control);
                return if identity.name.iter().all(is_name) {
                    Ok(identity)
                } else {
                    Err(Denied::BadCredentials)
                };
            }
        }
        if who.shows_nothing() {
            return if who.allow_anonymous { Ok(Identity::default()) } else { Err(Denied::NotAuthorized) };
        }
        for authenticator in &self.authenticators {
            // Once: a known client is refused by one of them.
            if authenticator.pretend(who).await? {
                break;
            }
        }
        Err(Denied::BadCredentials)
    }

    /// Whether clients' names are checked: without a config they are what clients say.
    pub fn is_checked(&self) -> bool {
        self.config.is_some()
    }

    /// Whether the client may have the id that it asks for.
    pub fn may_have_id(&self, identity: &Identity, client_id: &str) -> bool {
        let patterns = self.config.as_ref().map_or(&[][..], |config| &config.client_ids);
        let who = Who { client_id, user: identity.name.as_deref(), fields: &identity.fields };
        patterns.is_empty() || rules::fits_client_id(patterns, &who)
    }

    /// Whether whole certificates are of use: a plugin is shown them.
    pub fn looks_at_certificates(&self) -> bool {
        let authenticators = self.config.as_ref().map_or(&[][..], |config| &config.authenticate);
        authenticators.iter().any(|one| matches!(one, Authenticator::Plugin(_)))
    }

    /// Whether one more CONNECT from there is within `connects_per_s`.
    pub fn may_connect(&self, ip: IpAddr) -> bool {
        let Some(connects) = &self.connects else { return true };
        let mut connects = connects.lock().unwrap_or_else(PoisonError::into_inner);
        connects.try_take(Source::of(ip), Instant::now())
    }

    /// A place of the user's, empty where there is no bound; `None` where the
    /// user has `connections_per_user_max` already, with other client ids.
    pub fn enter(&self, identity: &Identity, client_id: &str) -> Option<Option<UserPlace>> {
        match (&identity.name, self.limits.connections_per_user_max) {
            (Some(name), Some(max)) => self.users.enter(name, client_id, max).map(Some),
            _ => Some(None),
        }
    }

    /// For one connection; `None` without a bound.
    pub fn allowance(&self) -> Option<Box<Allowance>> {
        Allowance::of_client(&self.limits, Instant::now()).map(Box::new)
    }

    /// Of all clients together.
    pub fn publishes(&self) -> Option<&Mutex<Allowance>> {
        self.publishes.as_ref()
    }

    #[inline]
    pub fn is_too_deep(&self, topic: &str) -> bool {
        self.limits.topic_levels_max.is_some_and(|max| topic.split('/').nth(max as usize).is_some())
    }

    /// Whether an MQTT 3.1.1 client stays that published where it may not.
    pub fn drops_denied(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.denied_publish == DeniedPublish::Drop)
    }
}

/// Reads the files that the config names; adds what is wrong with them.
pub fn look(config: &Config, path: &KeyPath, problems: &mut Problems) {
    let has_plugin = config.authenticate.iter().any(|one| matches!(one, Authenticator::Plugin(_)));
    let plugins = has_plugin.then(|| AccessEngine::new(&crate::plugin::Config::default(), None));
    let plugins = plugins.and_then(|engine| {
        engine.inspect_err(|error| problems.add(path.key("authenticate"), error.to_string())).ok()
    });
    let failures = &Failures::default();
    let deps = Deps { secret: &[0; 32], plugins: plugins.as_ref(), wait_max: Duration::ZERO, failures };
    for (i, authenticator) in config.authenticate.iter().enumerate() {
        let looked = match (authenticator, deps.plugins) {
            (Authenticator::Plugin(config), Some(engine)) => plugin::look(config, engine),
            _ => open(authenticator, &deps).map(drop),
        };
        if let Err(reason) = looked {
            problems.add(path.key("authenticate").index(i), reason);
        }
    }
}

fn open(config: &Authenticator, deps: &Deps<'_>) -> Result<Box<dyn Authenticate>, String> {
    let failures = deps.failures.clone();
    Ok(match config {
        Authenticator::Passwords(config) => {
            Box::new(passwords::Passwords::open(config, deps.secret, deps.wait_max, failures)?)
        }
        Authenticator::Jwt(config) => Box::new(jwt::Jwt::open(config, failures)?),
        Authenticator::Certificate(config) => Box::new(config.clone()),
        Authenticator::Http(config) => Box::new(http::Http::new(config, failures)?),
        Authenticator::Plugin(config) => {
            let engine = deps.plugins.ok_or("plugins cannot be run here")?;
            Box::new(plugin::Plugin::open(config, engine, deps.wait_max, failures))
        }
    })
}

#[async_trait]
impl Authenticate for passwords::Passwords {
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        let (Some(user), Some(password)) = (who.username, who.password) else { return Ok(None) };
        let source = Source::of(who.ip);
        self.check(passwords::Asker { user, source }, password).await
    }

    fn refresh(&self) -> bool {
        self.refresh()
    }

    async fn begin(&self, method: &str, data: &[u8], who: &Credentials<'_>) -> Result<Option<Begun>, Denied> {
        self.begin_exchange(method, data, who).await
    }

    async fn pretend(&self, who: &Credentials<'_>) -> Result<bool, Denied> {
        let asker = passwords::Asker { user: who.username.unwrap_or_default(), source: Source::of(who.ip) };
        passwords::Passwords::pretend(self, asker, who.password.unwrap_or_default()).await.map(|()| true)
    }
}

#[async_trait]
impl Authenticate for jwt::Jwt {
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        match who.password {
            Some(password) => self.check(password).await,
            None => Ok(None),
        }
    }

    fn refresh(&self) -> bool {
        self.refresh()
    }
}

#[async_trait]
impl Authenticate for Certificate {
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        Ok(who.certificate.map(|name| Identity { name: Some(name.into()), ..Identity::default() }))
    }
}

#[async_trait]
impl Authenticate for http::Http {
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        self.check(who).await
    }
}

/// Runs what may block on the pool for it.
async fn off_the_reactor<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Denied> {
    // Fails only while the runtime ends.
    tokio::task::spawn_blocking(work).await.map_err(|_| Denied::Unavailable("shutdown"))
}
