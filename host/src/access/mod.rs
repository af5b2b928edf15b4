//! Authentication and access rules, independent of a protocol's packets.
//!
//! A listener passes [`Credentials`], receives an [`Admitted`], and asks it about each topic.
//! Authenticators are asked in the order of the config until one knows the client. A client that none
//! knows is refused, and an action that no rule allows is denied.

mod authority;
mod caution;
mod config;
mod current;
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
mod wait;
mod watched;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use self::authority::{Authority, AuthorityId};
use self::exchange::Begun;
use self::fair::Source;
use self::limits::{Connects, Users};
use self::questions::{ANSWERS_OF_ALL_BYTES_MAX, Authorize, Questions};
use self::rules::{Policy, Who};
use self::standing::{Standing, Standings};
use self::wait::WaitMax;
use crate::plugin::access::AccessEngine;
use crate::problems::{KeyPath, Problems};
use crate::room::Room;
use crate::telemetry::Failures;
use crate::topic::TopicFilter;

pub use self::caution::{is_for_all, readable};
pub use self::config::{Authenticator, Certificate, Config, DeniedPublish, Limits, Overlap, Rule};
pub use self::current::{AdmittedNoMore, Connected, Current};
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
#[derive(Debug, Default)]
pub struct Entrance {
    /// Address of the listener as the config writes it.
    pub listener: String,
    /// Number of the transport in the plugin contract.
    pub transport: u32,
    /// Shared by all that stand for one address.
    allows_anonymous: Arc<AtomicBool>,
}

impl Entrance {
    pub fn new(listener: String, transport: u32, allow_anonymous: bool) -> Self {
        Self { listener, transport, allows_anonymous: Arc::new(AtomicBool::new(allow_anonymous)) }
    }

    /// Returns the same listener with another transport. Both serve clients without credentials, or none does.
    pub fn by(&self, transport: u32) -> Self {
        let (listener, allows_anonymous) = (self.listener.clone(), self.allows_anonymous.clone());
        Self { listener, transport, allows_anonymous }
    }

    /// Returns whether the listener serves clients without credentials.
    pub fn allows_anonymous(&self) -> bool {
        self.allows_anonymous.load(Ordering::Acquire)
    }

    /// Changes whether the listener serves clients without credentials, also those that are connected.
    pub fn set_allows_anonymous(&self, allows: bool) {
        self.allows_anonymous.store(allows, Ordering::Release);
    }
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
    /// The authenticator that recognised the client; `None` for an anonymous client.
    admitted_by: Option<AuthorityId>,
}

/// Identity of clients about which nothing is known. All of them share it, because many hosts have no
/// others.
static NOBODY: LazyLock<Arc<Identity>> = LazyLock::new(Arc::default);

impl Identity {
    fn shared(self) -> Arc<Self> {
        if self.is_nobody() { NOBODY.clone() } else { Arc::new(self) }
    }

    fn is_nobody(&self) -> bool {
        let Self {
            name,
            fields,
            rules,
            superuser,
            attributes,
            device,
            valid_until,
            proofs,
            authorizer,
            admitted_by,
        } = self;
        let has_name = name.is_some() || device.is_some() || *superuser;
        let has_lists =
            !(fields.is_empty() && rules.is_empty() && attributes.is_empty() && proofs.is_empty());
        let is_vouched_for = authorizer.is_some() || admitted_by.is_some();
        !has_name && !has_lists && valid_until.is_none() && !is_vouched_for
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
    /// The access control that these rights are of.
    access: Arc<Access>,
    pub identity: Arc<Identity>,
    policy: Policy,
    /// Questions for an access plugin, if the rules have any.
    questions: Option<Box<Questions>>,
    /// Standing of the connection, if the identity rests on something that can change.
    standing: Option<Box<Standing>>,
}

pub struct Access {
    /// Number of this version; a reload makes the next one.
    generation: u64,
    /// `None` without a section `access`: every client may do everything.
    config: Option<Arc<Config>>,
    authenticators: Vec<Arc<Authority>>,
    limits: Limits,
    clients: Arc<Clients>,
    connects: Option<Arc<Mutex<Connects>>>,
    publishes: Option<Arc<Mutex<Allowance>>>,
    /// How long a client waits for an answer, once this version is in force.
    wait_max: Duration,
}

/// What is known of connected clients, which stays over a reload.
struct Clients {
    users: Users,
    standings: Standings,
    /// Memory for the answers of access plugins about all clients.
    answers: Arc<Room>,
    /// How long a client waits for an answer of an authenticator.
    wait_max: WaitMax,
}

impl Admitted {
    /// Returns the access control that the rights are of.
    #[inline]
    pub fn access(&self) -> &Arc<Access> {
        &self.access
    }

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
        let wait_max = WaitMax::new(deps.wait_max);
        let wanted = config.map_or(&[][..], |config| &config.authenticate).iter();
        let authenticators = wanted
            .map(|one| Authority::open(one, deps, &wait_max).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let (users, standings) = Default::default();
        let answers = Room::new(ANSWERS_OF_ALL_BYTES_MAX);
        Ok(Self {
            generation: 0,
            config: config.cloned().map(Arc::new),
            authenticators,
            clients: Arc::new(Clients { users, standings, answers, wait_max }),
            connects: limits.connects_per_s.map(|per_s| Arc::new(Mutex::new(Connects::new(per_s, now)))),
            publishes: Allowance::of_all(limits, now).map(|all| Arc::new(Mutex::new(all))),
            wait_max: deps.wait_max,
            limits: limits.clone(),
        })
    }

    /// Returns the next version, for another configuration. What stays the same is taken over with all
    /// that it has learned: authenticators with their caches, rates with what is spent of them.
    /// Reads the files of new authenticators; errors name the file. Changes nothing that runs.
    pub fn reopen(&self, config: Option<&Config>, limits: &Limits, deps: &Deps<'_>) -> Result<Self, String> {
        let now = Instant::now();
        let is_same = self.config.as_deref() == config;
        let mut left: Vec<_> = self.authenticators.iter().collect();
        let mut authenticators = Vec::new();
        for wanted in config.map_or(&[][..], |config| &config.authenticate) {
            let same = left.iter().position(|one| one.config() == wanted);
            authenticators.push(match same {
                Some(same) => left.remove(same).clone(),
                None => Arc::new(Authority::open(wanted, deps, &self.clients.wait_max)?),
            });
        }
        for one in &mut authenticators {
            let former = left.iter().position(|former| one.speaks_for(former));
            if let (Some(former), Some(one)) = (former, Arc::get_mut(one)) {
                one.succeed(left.remove(former));
            }
        }
        let Limits { messages_per_s, bytes_per_s, connects_per_s, .. } = limits;
        let is_same_rate =
            (messages_per_s, bytes_per_s) == (&self.limits.messages_per_s, &self.limits.bytes_per_s);
        let of_all = || Allowance::of_all(limits, now).map(|all| Arc::new(Mutex::new(all)));
        let connects = || connects_per_s.map(|per_s| Arc::new(Mutex::new(Connects::new(per_s, now))));
        let is_same_connects = *connects_per_s == self.limits.connects_per_s;
        Ok(Self {
            generation: self.generation + 1,
            config: if is_same { self.config.clone() } else { config.cloned().map(Arc::new) },
            authenticators,
            clients: self.clients.clone(),
            connects: if is_same_connects { self.connects.clone() } else { connects() },
            publishes: if is_same_rate { self.publishes.clone() } else { of_all() },
            wait_max: deps.wait_max,
            limits: limits.clone(),
        })
    }

    pub async fn admit(self: &Arc<Self>, who: &Credentials<'_>) -> Result<Admitted, Denied> {
        let identity = match &self.config {
            Some(_) => self.identify(who).await?,
            // Nobody has checked the user name that it gives.
            None => Identity { name: who.certificate.map(Into::into), ..Identity::default() },
        };
        Ok(self.rights(identity, who.client_id, who.proof))
    }

    /// Returns the rights of a client. `proof` is that of its certificate.
    pub fn rights(
        self: &Arc<Self>,
        mut identity: Identity,
        client_id: &str,
        proof: Option<&Arc<dyn Proof>>,
    ) -> Admitted {
        if let Some(proof) = proof {
            identity.valid_until = identity.valid_until.into_iter().chain(proof.valid_until()).min();
            identity.proofs.push(proof.clone());
        }
        self.rights_of(identity.shared(), client_id)
    }

    /// Returns the rights of a client whose identity is complete.
    fn rights_of(self: &Arc<Self>, identity: Arc<Identity>, client_id: &str) -> Admitted {
        let access = self.clone();
        let Some(config) = &self.config else {
            return Admitted {
                access,
                identity,
                policy: Policy::everything(),
                questions: None,
                standing: None,
            };
        };
        let policy = if identity.superuser {
            Policy::everything()
        } else {
            let user = identity.name.as_deref();
            let compiled_for = Who { client_id, user, fields: &self.fields_of(&identity) };
            Policy::compile(identity.rules.iter().chain(&config.rules), &compiled_for, config.overlap)
        };
        let authorizer = identity.authorizer.clone().filter(|_| policy.asks());
        let questions = authorizer.zip(identity.name.as_ref()).map(|(authorizer, name)| {
            Questions::new(authorizer, name, client_id, self.wait_max, &self.clients.answers)
        });
        let questions = questions.map(Box::new);
        Admitted { access, identity, policy, questions, standing: None }
    }

    /// Returns the client's values for `{field}`: its own, and over them those of the config.
    fn fields_of<'i>(&self, identity: &'i Identity) -> Cow<'i, BTreeMap<String, String>> {
        let users = self.config.as_ref().map(|config| &config.users);
        match users.zip(identity.name.as_deref()).and_then(|(users, name)| users.get(name)) {
            None => Cow::Borrowed(&identity.fields),
            Some(known) => {
                let mut fields = identity.fields.clone();
                fields.extend(known.clone());
                Cow::Owned(fields)
            }
        }
    }

    /// Calls `wake` when the credentials that admitted the client are no longer valid.
    pub fn watch(&self, rights: &mut Admitted, wake: impl Fn() + Send + Sync + 'static) {
        rights.standing = None;
        if !rights.identity.proofs.is_empty() {
            let proofs = std::mem::take(&mut Arc::make_mut(&mut rights.identity).proofs);
            rights.standing = Some(Box::new(self.clients.standings.enter(proofs, wake)));
        }
    }

    /// Checks the proofs of all connected clients and ends the connections whose proofs no longer hold.
    pub fn recheck(&self) {
        let clients = self.clients.standings.recheck();
        if clients > 0 {
            tracing::info!(
                clients,
                "access: the credentials of these clients have changed: they are disconnected"
            );
        }
    }

    /// Reads changed files of users and keys again. Blocks on the disk.
    pub fn refresh(&self) {
        let changed = self.authenticators.iter().filter(|authenticator| authenticator.by().refresh()).count();
        if changed > 0 {
            self.recheck();
        }
    }

    async fn identify(&self, who: &Credentials<'_>) -> Result<Identity, Denied> {
        for authenticator in &self.authenticators {
            if let Some(mut identity) = authenticator.by().authenticate(who).await? {
                identity.admitted_by = Some(authenticator.id());
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
            if authenticator.by().pretend(who).await? {
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
        let who = Who { client_id, user: identity.name.as_deref(), fields: &self.fields_of(identity) };
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
            (Some(name), Some(max)) => self.clients.users.enter(name, client_id, max).map(Some),
            _ => Some(None),
        }
    }

    /// Returns the publish rates of one connection; `None` without a limit.
    pub fn allowance(&self) -> Option<Box<Allowance>> {
        Allowance::of_client(&self.limits, Instant::now()).map(Box::new)
    }

    /// Returns the publish rate of all clients together.
    pub fn publishes(&self) -> Option<&Mutex<Allowance>> {
        self.publishes.as_deref()
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
            _ => Authority::open(authenticator, &deps, &WaitMax::new(deps.wait_max)).map(drop),
        };
        if let Err(reason) = looked {
            problems.add(path.key("authenticate").index(i), reason);
        }
    }
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
