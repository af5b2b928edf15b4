//! Authentication and access rules, independent of a protocol's packets.
//!
//! A listener passes [`Credentials`], receives an [`Admitted`], and asks it about each topic.
//! Authenticators are asked in the order of the config until one knows the client. A client that none
//! knows is refused, and an action that no rule allows is denied.

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

/// Longest user name in bytes. The user name is stored with each message.
const NAME_BYTES_MAX: usize = 1_024;

/// The credentials that a client presents.
#[derive(Clone, Copy, Debug)]
pub struct Credentials<'a> {
    pub client_id: &'a str,
    pub username: Option<&'a str>,
    pub password: Option<&'a [u8]>,
    /// The name in the certificate that was verified in the TLS handshake.
    pub certificate: Option<&'a str>,
    /// Proof that the certificate is still valid. Rights end with it, whichever authenticator grants
    /// them.
    pub proof: Option<&'a Arc<dyn Proof>>,
    /// Certificates that the client sent, in DER, its own first. Empty if no authenticator uses them:
    /// see [`Access::looks_at_certificates`].
    pub certificates: &'a [Box<[u8]>],
    pub ip: IpAddr,
    /// Whether the client is connected, and authenticates again.
    pub is_connected: bool,
    pub entrance: &'a Entrance,
    /// Whether the listener serves clients without credentials.
    pub allow_anonymous: bool,
}

impl Credentials<'_> {
    /// Returns whether the client presents neither user name nor password. A certificate does not count.
    pub fn shows_nothing(&self) -> bool {
        self.username.is_none() && self.password.is_none()
    }
}

/// The listener through which a client connects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entrance {
    /// Address of the listener as the config writes it.
    pub listener: String,
    /// Number of the transport in the plugin contract.
    pub transport: u32,
    /// Whether the listener serves clients without credentials.
    pub allow_anonymous: bool,
}

/// The identity of a client.
#[derive(Clone, Default)]
pub struct Identity {
    /// User name; `None` for an anonymous client.
    pub name: Option<Arc<str>>,
    /// Values for `{field}` in rules.
    pub fields: BTreeMap<String, String>,
    /// Rules that are tried before those of the config.
    pub rules: Vec<Rule>,
    /// Whether the client may do everything.
    pub superuser: bool,
    /// Encoded properties that are added to each message of the client.
    pub attributes: Vec<u8>,
    /// Device of the client's messages, whatever their topics are.
    pub device: Option<Box<str>>,
    /// Time at which the connection ends.
    pub valid_until: Option<Instant>,
    /// Proofs on which the rights rest. The connection ends when one of them no longer holds.
    pub proofs: Vec<Arc<dyn Proof>>,
    /// Decides the questions that `rules` leave open.
    authorizer: Option<Arc<dyn Authorize>>,
}

/// Identity of clients about which nothing is known. All of them share it, because many hosts have no
/// others.
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

/// Reason why a client is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    BadCredentials,
    NotAuthorized,
    /// There were so many wrong passwords from this address that this one is not verified now.
    TooMany,
    /// No authenticator supports this method.
    BadMethod,
    /// The authenticator cannot be asked now.
    Unavailable(&'static str),
    /// The authenticator cannot be asked now, after a failure that is reported separately with its
    /// cause.
    Failed(&'static str),
}

/// One way to authenticate clients.
#[async_trait]
pub trait Authenticate: Send + Sync {
    /// Authenticates a client. `Ok(None)` means that this authenticator does not know the client, and
    /// the next one is asked. An error ends the search: this authenticator knows the client and refuses
    /// it, or cannot decide.
    async fn authenticate(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied>;

    /// Checks whether the file of clients has changed, and returns whether its contents differ. Blocks
    /// on the disk.
    fn refresh(&self) -> bool {
        false
    }

    /// Begins an exchange with `method`. `Ok(None)` means that this authenticator does not support the
    /// method.
    async fn begin(
        &self,
        _method: &str,
        _data: &[u8],
        _who: &Credentials<'_>,
    ) -> Result<Option<Begun>, Denied> {
        Ok(None)
    }

    /// Takes as long as refusing a known client, after no authenticator knew this one. Returns false if
    /// that takes no time.
    async fn pretend(&self, _who: &Credentials<'_>) -> Result<bool, Denied> {
        Ok(false)
    }
}

/// Dependencies of access control.
pub struct Deps<'a> {
    /// A secret that stays the same after a restart and is never disclosed.
    pub secret: &'a [u8; 32],
    /// Runs access plugins; `None` refuses a config with one.
    pub plugins: Option<&'a AccessEngine>,
    /// How long a client waits for an answer.
    pub wait_max: Duration,
    pub failures: &'a Failures,
}

/// A client that was admitted, with its rights.
pub struct Admitted {
    pub identity: Arc<Identity>,
    policy: Policy,
    /// Questions for an access plugin, if the rules have any.
    questions: Option<Box<Questions>>,
    /// Standing of the connection, if the identity rests on something that can change.
    standing: Option<Box<Standing>>,
}

pub struct Access {
    /// `None` without a section `access`: every client may do everything.
    config: Option<Config>,
    authenticators: Vec<Box<dyn Authenticate>>,
    limits: Limits,
    users: Users,
    standings: Standings,
    /// Memory for the answers of access plugins about all clients.
    answers: Arc<Room>,
    connects: Option<Mutex<Connects>>,
    publishes: Option<Mutex<Allowance>>,
    wait_max: Duration,
}

impl Admitted {
    /// Returns whether the client may do everything, so that nothing needs to be checked.
    #[inline]
    pub fn is_everything(&self) -> bool {
        self.policy.is_everything()
    }

    /// Returns whether deliveries must be checked.
    #[inline]
    pub fn limits_receive(&self) -> bool {
        self.policy.limits_receive()
    }

    /// Returns whether the client may publish to a topic. Does not allocate. `Verdict::Ask`, also from
    /// the next two functions, means that the access plugin must be asked first.
    #[inline]
    pub fn publish(&self, topic: &str) -> Verdict {
        self.known(self.policy.publish(topic), Act::Publish, topic)
    }

    /// Returns whether the client may subscribe to every topic that `filter` can match.
    pub fn subscribe(&self, filter: &TopicFilter) -> Verdict {
        self.known(self.policy.subscribe(filter), Act::Subscribe, filter.as_str())
    }

    /// Returns whether the client may receive a message of a topic to which it is subscribed. Does not
    /// allocate.
    pub fn receive(&self, topic: &str) -> Verdict {
        self.known(self.policy.receive(topic), Act::Receive, topic)
    }

    /// Returns what the rules say, without the answers of an access plugin.
    pub fn rule_for_subscribe(&self, filter: &TopicFilter) -> Verdict {
        self.policy.subscribe(filter)
    }

    /// Records that some of the session's subscriptions were removed.
    pub fn narrow(&mut self) {
        if let Some(questions) = &mut self.questions {
            questions.narrowed = true;
        }
    }

    pub fn is_narrowed(&self) -> bool {
        self.questions.as_ref().is_some_and(|questions| questions.narrowed)
    }

    /// Returns whether the credentials that admitted the client are no longer valid.
    pub fn is_revoked(&self) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.is_revoked())
    }

    /// Begins to ask the access plugin, unless a call is running, whose end must be awaited first.
    pub fn ask(&mut self, act: Act, topics: Vec<Box<str>>) {
        if let Some(questions) = &mut self.questions {
            questions.ask(act, topics);
        }
    }

    pub fn is_asking(&self) -> bool {
        self.questions.as_ref().is_some_and(|questions| questions.is_asking())
    }

    /// Returns when there are answers. Never returns while no call runs. Cancel safe.
    pub async fn answered(&mut self) {
        match &mut self.questions {
            // Boxed: a connection that asks nothing does not carry it.
            Some(questions) => Box::pin(questions.answered()).await,
            None => std::future::pending().await,
        }
    }

    /// Asks the access plugin and waits. An error means that it cannot be asked, and the answers are no
    /// for now.
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
    /// Reads the files of the authenticators. Errors name the file.
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

    /// Returns the rights of a client. `proof` is that of its certificate.
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

    /// Calls `wake` when the credentials that admitted the client are no longer valid.
    pub fn watch(&self, rights: &mut Admitted, wake: impl Fn() + Send + Sync + 'static) {
        rights.standing = None;
        if !rights.identity.proofs.is_empty() {
            let proofs = std::mem::take(&mut Arc::make_mut(&mut rights.identity).proofs);
            rights.standing = Some(Box::new(self.standings.enter(proofs, wake)));
        }
    }

    /// Checks the proofs of all connected clients and ends the connections whose proofs no longer hold.
    pub fn recheck(&self) {
        let clients = self.standings.recheck();
        if clients > 0 {
            tracing::info!(
                clients,
                "access: the credentials of these clients have changed: they are disconnected"
            );
        }
    }

    /// Reads changed files of users and keys again. Blocks on the disk.
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

    /// Returns whether user names are verified. Without a config they are what clients claim.
    pub fn is_checked(&self) -> bool {
        self.config.is_some()
    }

    /// Returns whether the client may use the client id that it asks for.
    pub fn may_have_id(&self, identity: &Identity, client_id: &str) -> bool {
        let patterns = self.config.as_ref().map_or(&[][..], |config| &config.client_ids);
        let who = Who { client_id, user: identity.name.as_deref(), fields: &identity.fields };
        patterns.is_empty() || rules::fits_client_id(patterns, &who)
    }

    /// Returns whether an authenticator uses whole certificates, as plugins do.
    pub fn looks_at_certificates(&self) -> bool {
        let authenticators = self.config.as_ref().map_or(&[][..], |config| &config.authenticate);
        authenticators.iter().any(|one| matches!(one, Authenticator::Plugin(_)))
    }

    /// Returns whether another CONNECT from this address is within `connects_per_s`.
    pub fn may_connect(&self, ip: IpAddr) -> bool {
        let Some(connects) = &self.connects else { return true };
        let mut connects = connects.lock().unwrap_or_else(PoisonError::into_inner);
        connects.try_take(Source::of(ip), Instant::now())
    }

    /// Returns a place for a connection of the user, empty if there is no limit. Returns `None` if the
    /// user already has `connections_per_user_max` other client ids connected.
    pub fn enter(&self, identity: &Identity, client_id: &str) -> Option<Option<UserPlace>> {
        match (&identity.name, self.limits.connections_per_user_max) {
            (Some(name), Some(max)) => self.users.enter(name, client_id, max).map(Some),
            _ => Some(None),
        }
    }

    /// Returns the publish rates of one connection; `None` without a limit.
    pub fn allowance(&self) -> Option<Box<Allowance>> {
        Allowance::of_client(&self.limits, Instant::now()).map(Box::new)
    }

    /// Returns the publish rate of all clients together.
    pub fn publishes(&self) -> Option<&Mutex<Allowance>> {
        self.publishes.as_ref()
    }

    #[inline]
    pub fn is_too_deep(&self, topic: &str) -> bool {
        self.limits.topic_levels_max.is_some_and(|max| topic.split('/').nth(max as usize).is_some())
    }

    /// Returns whether an MQTT 3.1.1 client stays connected after a denied publish.
    pub fn drops_denied(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.denied_publish == DeniedPublish::Drop)
    }
}

/// Reads the files that the config names and adds what is wrong with them.
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

/// Runs blocking work on the runtime's pool for it.
async fn off_the_reactor<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Denied> {
    // Fails only while the runtime ends.
    tokio::task::spawn_blocking(work).await.map_err(|_| Denied::Unavailable("shutdown"))
}
