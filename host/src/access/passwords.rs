//! The password file: one line `user:$argon2id$...` for each user, followed by `:SCRAM-SHA-256$...` if
//! the user may log in with SCRAM.
//!
//! Argon2 is slow on purpose, so it runs on a few threads that clients use in turn, behind a bounded
//! queue. A password that was recently found right or wrong is recognised by a keyed hash. Refusing an
//! unknown user takes as long as refusing a known one, but costs almost no CPU time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use argon2::password_hash::PasswordHasher;
use argon2::password_hash::phc::{Output, PasswordHash};
use argon2::{Algorithm, Argon2, Params, Version};
use sha2::{Digest, Sha256};

use super::config;
use super::fair::{Fair, Place, Source};
use super::guesses::{Guesses, Trying};
use super::hash_memory::HashMemory;
use super::pace::Pace;
use super::recent::{Fingerprint, Recent};
use super::scram::Verifier;
use super::standing::Proof;
use super::wait::WaitMax;
use super::watched::Watched;
use super::{Denied, Identity};
use crate::hints::{Hint, Hints};
use crate::telemetry::Failures;

const FILE_BYTES_MAX: u64 = 64 << 20;
/// Most verifications that wait, however fast they are.
const QUEUE_MAX: usize = 1_024;
/// How long a password is remembered as right or wrong, unless the user's line changes.
const KNOWN_FOR: Duration = Duration::from_secs(300);
const KNOWN_MAX: usize = 100_000;
/// Most memory of a hash in KiB. Hashes with more memory, passes or lanes are refused, because each
/// connect would cost them.
const MEMORY_KIB_MAX: u32 = 256 << 10;
const PASSES_MAX: u32 = 16;
const LANES_MAX: u32 = 16;

/// Users and their hashes, as in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users(BTreeMap<String, Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    hash: String,
    scram: Option<Verifier>,
}

/// The file's contents.
#[derive(Debug)]
struct Loaded {
    users: Users,
    /// Iteration counts of the users with a verifier. A user that does not exist is given one of these.
    iterations: Vec<u32>,
    /// A hash with the highest cost in the file.
    costliest: Arc<str>,
}

pub struct Passwords {
    file: Arc<Watched<Loaded>>,
    /// Contents that [`Authenticate::refresh`](super::Authenticate::refresh) saw last.
    seen: Mutex<Arc<Loaded>>,
    /// Secret from which decoys for SCRAM are derived.
    secret: [u8; 32],
    right: Recent<()>,
    wrong: Recent<()>,
    /// Passwords that are being verified.
    trying: Trying,
    guesses: Arc<Guesses>,
    /// Places for concurrent verifications.
    places: Arc<Fair>,
    threads: usize,
    memory: Arc<HashMemory>,
    pace: Mutex<Pace>,
    /// Longest time that a client waits. After that the client has given up.
    wait_max: WaitMax,
}

/// The user name and address of a client that presents a password.
#[derive(Clone, Copy)]
pub struct Asker<'a> {
    pub user: &'a str,
    pub source: Source,
}

/// Holds while the user's line is unchanged.
#[derive(Debug)]
struct LineProof {
    file: Arc<Watched<Loaded>>,
    user: Box<str>,
    digest: [u8; 32],
}

impl Passwords {
    pub fn open(
        config: &config::Passwords,
        secret: &[u8; 32],
        wait_max: WaitMax,
        failures: Failures,
    ) -> Result<Self, String> {
        let path = config.file.clone();
        let load = move |bytes: &[u8]| {
            let users = Users::parse(bytes)?;
            let costliest = users.0.values().max_by_key(|entry| cost(&entry.hash)).map(|entry| &*entry.hash);
            // Written by who had no room for it, or not written yet.
            let add = || Hints::default().command(Hint::Passwd(&path));
            let costliest = costliest.ok_or_else(|| format!("has no user: add one with `{}`", add()))?.into();
            let scram = users.0.values().filter_map(|entry| entry.scram.as_ref());
            let iterations = scram.map(|scram| scram.iterations).collect::<BTreeSet<_>>();
            Ok(Loaded { iterations: iterations.into_iter().collect(), costliest, users })
        };
        let file = Arc::new(Watched::open(&config.file, FILE_BYTES_MAX, failures, load)?);
        let costliest = &file.newest().costliest;
        let (begun, mut pace) = (Instant::now(), Pace::default());
        let memory = HashMemory::new();
        is_password_of(&memory, costliest, b"nobody's");
        pace.note(cost(costliest), begun.elapsed(), Instant::now());
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
        Ok(Self {
            seen: Mutex::new(file.newest()),
            file,
            secret: *secret,
            right: Recent::new(KNOWN_MAX, KNOWN_FOR),
            wrong: Recent::new(KNOWN_MAX, KNOWN_FOR),
            trying: Trying::default(),
            guesses: Arc::new(Guesses::new()),
            places: Fair::new(threads),
            threads,
            memory: Arc::new(memory),
            pace: Mutex::new(pace),
            wait_max,
        })
    }

    /// Verifies a password. Returns the user if it is right, and `None` if the file does not have the
    /// user.
    pub async fn check(&self, who: Asker<'_>, password: &[u8]) -> Result<Option<Identity>, Denied> {
        let file = self.loaded().await?;
        let Some(Entry { hash, .. }) = file.users.0.get(who.user) else { return Ok(None) };
        let is_right = self.try_password(who, password, hash, &file.costliest).await?;
        if is_right { Ok(self.identity(&file, who.user)) } else { Err(Denied::BadCredentials) }
    }

    /// Refuses an unknown user, no sooner than [`Self::check`] refuses a known one.
    pub async fn pretend(&self, who: Asker<'_>, password: &[u8]) -> Result<(), Denied> {
        let file = self.loaded().await?;
        self.try_password(who, password, "", &file.costliest).await.map(drop)
    }

    /// Verifies a password against a hash, which is empty for a user that does not exist.
    async fn try_password(
        &self,
        who: Asker<'_>,
        password: &[u8],
        hash: &str,
        costliest: &Arc<str>,
    ) -> Result<bool, Denied> {
        let fingerprint = self.right.fingerprint(&[who.user.as_bytes(), password, hash.as_bytes()]);
        if let Some(known) = self.known(&fingerprint) {
            return Ok(known);
        }
        let mut tried = self.trying.enter(fingerprint);
        let now = Instant::now();
        // The same password by several at a time is one guess.
        let begin = |now| self.guesses.begin(who.source, who.user, now);
        let guess = if tried.counts() { Some(begin(now)?) } else { None };
        tokio::time::sleep(self.guesses.delay(who.source, now)).await;
        let begun = Instant::now();
        let (is_right, is_known) = if hash.is_empty() {
            (false, false)
        } else {
            let place = self.place(who).await?;
            // Found out meanwhile by others, who had their turn before.
            match self.known(&fingerprint) {
                Some(known) => (known, true),
                None => (self.verify(place, hash.into(), password).await?, false),
            }
        };
        // Whoever verified it: the guess counts, unless its client has gone, whose place another takes.
        let guess = guess.or_else(|| tried.counts().then(|| begin(Instant::now()).ok()).flatten());
        tried.settle();
        if is_right {
            self.right.put(fingerprint, (), Instant::now());
            if let Some(guess) = guess {
                guess.right();
            }
            return Ok(true);
        }
        self.wrong.put(fingerprint, (), Instant::now());
        if let Some(guess) = guess {
            guess.wrong(Instant::now());
        }
        if is_known {
            return Ok(false);
        }
        if cost(hash) < cost(costliest) {
            self.take_as_long(begun, who, costliest, password).await?;
        }
        Ok(false)
    }

    fn known(&self, fingerprint: &Fingerprint) -> Option<bool> {
        let now = Instant::now();
        let is_right = self.right.get(fingerprint, now).map(|()| true);
        is_right.or_else(|| self.wrong.get(fingerprint, now).map(|()| false))
    }

    /// Returns when a user with the costliest hash that came at `begun` would be refused. Computes that
    /// hash occasionally, to measure it; unknown clients do not cost more.
    async fn take_as_long(
        &self,
        begun: Instant,
        who: Asker<'_>,
        costliest: &Arc<str>,
        password: &[u8],
    ) -> Result<(), Denied> {
        let cost = cost(costliest);
        if self.pace().is_due(cost, Instant::now()) {
            let place = self.place(who).await?;
            return self.verify(place, costliest.clone(), password).await.map(drop);
        }
        let turns = self.places.turns_before(who.source).div_ceil(self.threads);
        let waits = self.pace().mean() * u32::try_from(turns).unwrap_or(u32::MAX);
        let until = begun + self.pace().expected(cost) + waits;
        tokio::time::sleep_until(until.into()).await;
        Ok(())
    }

    /// Returns the verifier for the user's password, and the user's identity. For a user without one, it
    /// returns a verifier that no password satisfies, made at the same cost.
    pub async fn verifier(&self, user: &str) -> Result<(Verifier, Option<Identity>), Denied> {
        let file = self.loaded().await?;
        let decoy = Verifier::decoy(&self.secret, user, &file.iterations);
        let known = file.users.0.get(user).and_then(|entry| entry.scram.clone());
        Ok(known.map_or((decoy, None), |verifier| (verifier, self.identity(&file, user))))
    }

    /// Returns the identity of a user in `file`, valid as long as the user's line stays the same.
    fn identity(&self, file: &Loaded, user: &str) -> Option<Identity> {
        let digest = file.digest_of(user)?;
        let proof = LineProof { file: self.file.clone(), user: user.into(), digest };
        Some(Identity { name: Some(user.into()), proofs: vec![Arc::new(proof)], ..Identity::default() })
    }

    pub fn guesses(&self) -> &Arc<Guesses> {
        &self.guesses
    }

    /// Returns whether the file has changed since the last call, and frees memory that no verification
    /// uses. Blocks on the disk.
    pub fn refresh(&self) -> bool {
        self.memory.give_back_unused(Instant::now());
        self.file.refresh(&self.seen)
    }

    async fn loaded(&self) -> Result<Arc<Loaded>, Denied> {
        let file = self.file.clone();
        super::off_the_reactor(move || file.get()).await
    }

    /// Returns a place for a verification when it is the client's turn. At most as many clients wait as
    /// can be served before they give up.
    async fn place(&self, who: Asker<'_>) -> Result<Place, Denied> {
        let served = self.wait_max.get().div_duration_f64(self.pace().mean()) as usize;
        let waiting_max = served.saturating_mul(self.threads).clamp(self.threads, QUEUE_MAX);
        let place = self.places.enter(who.source, who.user, waiting_max).await;
        place.map_err(|_| Denied::Unavailable("passwords"))
    }

    async fn verify(&self, place: Place, hash: Arc<str>, password: &[u8]) -> Result<bool, Denied> {
        let (password, verified, memory) = (password.to_owned(), hash.clone(), self.memory.clone());
        // The place goes with the work: it runs on when its client has gone.
        let work = move || {
            let _held = place;
            let begun = Instant::now();
            (is_password_of(&memory, &verified, &password), begun.elapsed())
        };
        let (is_right, took) = super::off_the_reactor(work).await?;
        let is_right = is_right.ok_or(Denied::Unavailable("passwords"))?;
        self.pace().note(cost(&hash), took, Instant::now());
        Ok(is_right)
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        lock(&self.pace)
    }
}

impl Loaded {
    fn digest_of(&self, user: &str) -> Option<[u8; 32]> {
        let Entry { hash, scram } = self.users.0.get(user)?;
        let scram = scram.as_ref().map(Verifier::to_string).unwrap_or_default();
        Some(Sha256::digest(format!("{hash}:{scram}")).into())
    }
}

impl Proof for LineProof {
    fn holds(&self) -> bool {
        self.file.newest().digest_of(&self.user) == Some(self.digest)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Users {
    /// Parses a file. Errors name the line.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "must be UTF-8 text".to_owned())?;
        let mut users = BTreeMap::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim_end();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let at = |reason: &str| format!("line {}: {reason}", i + 1);
            let (user, secrets) = line.split_once(':').ok_or_else(|| at("must be user:hash"))?;
            let (hash, scram) = secrets.split_once(':').map_or((secrets, None), |(a, b)| (a, Some(b)));
            check_user(user).and_then(|()| check_hash(hash)).map_err(|reason| at(&reason))?;
            let scram = scram.map(Verifier::parse).transpose().map_err(|reason| at(&reason))?;
            if users.insert(user.to_owned(), Entry { hash: hash.to_owned(), scram }).is_some() {
                return Err(at(&format!("user \"{user}\" is there twice")));
            }
        }
        Ok(Self(users))
    }

    /// Sets the password of a user, and returns true if the user had one before. `scram_iterations`
    /// allows SCRAM. A user that could use it before keeps it, with the new password.
    pub fn set(&mut self, user: &str, password: &str, scram_iterations: Option<u32>) -> Result<bool, String> {
        check_user(user)?;
        let before = self.0.get(user).and_then(|entry| entry.scram.as_ref());
        let iterations = scram_iterations.or(before.map(|scram| scram.iterations));
        if iterations.is_some() && !stringprep::saslprep(user).is_ok_and(|prepared| prepared == user) {
            return Err(format!("SCRAM has no user {user:?}: it is not as RFC 4013 (SASLprep) writes it"));
        }
        let scram = iterations.map(|iterations| Verifier::new(password, iterations)).transpose()?;
        let entry = Entry { hash: hash(password.as_bytes())?, scram };
        Ok(self.0.insert(user.to_owned(), entry).is_some())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Removes a user. Returns false if there is no such user.
    pub fn remove(&mut self, user: &str) -> bool {
        self.0.remove(user).is_some()
    }

    pub fn to_text(&self) -> String {
        let line = |(user, entry): (&String, &Entry)| match &entry.scram {
            Some(scram) => format!("{user}:{}:{scram}\n", entry.hash),
            None => format!("{user}:{}\n", entry.hash),
        };
        self.0.iter().map(line).collect()
    }
}

fn check_user(user: &str) -> Result<(), String> {
    let bad = |c: char| c == ':' || c.is_control();
    if user.is_empty() || user.starts_with('#') || user.contains(bad) || user.trim() != user {
        return Err(format!(
            "a user name has no colon, no control character, no `#` at its front and no space at its ends, is {user:?}"
        ));
    }
    Ok(())
}

/// Verifies a password, which takes long. Returns `None` if there is no memory to compute the hash in.
fn is_password_of(memory: &HashMemory, hash: &str, password: &[u8]) -> Option<bool> {
    let Some((argon2, hash)) = parsed(hash) else { return Some(false) };
    let (Some(salt), Some(expected)) = (hash.salt, hash.hash) else { return Some(false) };
    let mut output = [0; Output::MAX_LENGTH];
    let output = &mut output[..expected.len()];
    let computed = memory.with(argon2.params().block_count(), |blocks| {
        argon2.hash_password_into_with_memory(password, &salt, output, blocks)
    })?;
    // Outputs are compared in constant time.
    Some(computed.is_ok() && Output::new(output).is_ok_and(|output| output == expected))
}

fn parsed(hash: &str) -> Option<(Argon2<'static>, PasswordHash)> {
    let hash = PasswordHash::new(hash).ok()?;
    let algorithm = Algorithm::try_from(hash.algorithm.as_str()).ok()?;
    let version = hash.version.map_or(Ok(Version::default()), Version::try_from).ok()?;
    Some((Argon2::new(algorithm, version, Params::try_from(&hash).ok()?), hash))
}

/// Returns the relative cost of verifying a hash; 0 for text that is not a hash.
fn cost(hash: &str) -> u64 {
    let parameters = PasswordHash::new(hash).ok().and_then(|hash| Params::try_from(&hash).ok());
    parameters.map_or(0, |it| u64::from(it.m_cost()) * u64::from(it.t_cost()))
}

fn check_hash(hash: &str) -> Result<(), String> {
    let parsed = PasswordHash::new(hash).ok().filter(|hash| hash.algorithm.as_str() == "argon2id");
    let wanted = "must be an argon2id hash, as the command `passwd` makes it";
    let parsed = parsed.filter(|hash| hash.hash.is_some() && hash.salt.is_some()).ok_or(wanted)?;
    let cost = Params::try_from(&parsed).map_err(|_| wanted)?;
    if cost.m_cost() > MEMORY_KIB_MAX || cost.t_cost() > PASSES_MAX || cost.p_cost() > LANES_MAX {
        return Err(format!(
            "the hash costs too much: at most m={MEMORY_KIB_MAX}, t={PASSES_MAX}, p={LANES_MAX}"
        ));
    }
    Ok(())
}

/// Hashes a password at the cost that OWASP recommends: 19 MiB, two passes.
fn hash(password: &[u8]) -> Result<String, String> {
    let hash = Argon2::default().hash_password(password);
    hash.map(|hash| hash.to_string()).map_err(|error| format!("cannot hash the password: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::watched::put;
    use super::*;

    fn users(pairs: &[(&str, &str)]) -> String {
        let mut users = Users::default();
        for (user, password) in pairs {
            users.set(user, password, None).unwrap();
        }
        users.to_text()
    }

    fn open(path: &std::path::Path) -> Passwords {
        let config = config::Passwords { file: path.to_owned() };
        Passwords::open(&config, &[7; 32], WaitMax::new(Duration::from_secs(10)), Failures::default())
            .unwrap()
    }

    async fn check(passwords: &Passwords, user: &str, password: &str) -> Option<bool> {
        match passwords.check(asker(user), password.as_bytes()).await {
            Ok(identity) => identity.map(|_| true),
            Err(Denied::BadCredentials) => Some(false),
            Err(denied) => panic!("{denied:?}"),
        }
    }

    fn asker(user: &str) -> Asker<'_> {
        Asker { user, source: Source::of([127, 0, 0, 1].into()) }
    }

    #[tokio::test]
    async fn a_changed_file_counts_and_a_broken_or_emptied_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        put(&path, users(&[("ann", "old")]));
        let passwords = open(&path);
        let proofs = passwords.check(asker("ann"), b"old").await.unwrap().unwrap().proofs;
        for _ in 0..2 {
            assert_eq!(check(&passwords, "ann", "old").await, Some(true));
            assert_eq!(check(&passwords, "ann", "new").await, Some(false));
        }
        assert_eq!(check(&passwords, "bob", "old").await, None);
        for broken in ["ann:secret\n", "", "# nobody\n"] {
            put(&path, broken);
            assert_eq!(check(&passwords, "ann", "old").await, Some(true), "{broken:?}");
            assert!(!passwords.refresh() && proofs[0].holds());
        }
        put(&path, users(&[("ann", "new"), ("bob", "b")]));
        assert!(passwords.refresh() && !passwords.refresh());
        assert!(!proofs[0].holds(), "her line is another");
        assert_eq!(check(&passwords, "ann", "old").await, Some(false));
        assert_eq!(check(&passwords, "ann", "new").await, Some(true));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(check(&passwords, "bob", "b").await, Some(true));
    }

    #[tokio::test]
    async fn a_wrong_password_is_verified_once_however_many_show_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        put(&path, users(&[("ann", "new")]));
        let passwords = open(&path);
        let first = check(&passwords, "ann", "old").await;
        // Nothing is free any more: who would verify waits.
        let mut held = Vec::new();
        for _ in 0..passwords.threads {
            held.push(passwords.places.enter(asker("x").source, "x", 0).await.ok().unwrap());
        }
        for user in ["ann", "ann"] {
            assert_eq!((first, check(&passwords, user, "old").await), (Some(false), Some(false)));
        }
        let both = [check(&passwords, "ann", "x"), check(&passwords, "ann", "x")];
        let mut both = futures_util::future::join_all(both);
        assert!(futures_util::poll!(&mut both).is_pending());
        drop(held);
        assert_eq!(both.await, [Some(false), Some(false)]);
        // Both together were one guess more.
        for guess in ["1", "2", "3"] {
            assert_eq!(check(&passwords, "ann", guess).await, Some(false));
        }
        assert_eq!(passwords.guesses.count(asker("ann").source, "ann"), 5);
        assert_eq!(check(&passwords, "ann", "old").await, Some(false), "no guess: it is known");
    }

    /// Polls a check until as many wait for a place.
    async fn until_waiting(
        passwords: &Passwords,
        check: &mut (impl Future<Output = Option<bool>> + Unpin),
        waiting: usize,
    ) {
        while passwords.places.turns_before(asker("ann").source) < 1 + waiting {
            assert!(futures_util::poll!(&mut *check).is_pending());
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_guess_counts_whoever_of_those_who_show_it_has_it_verified() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        put(&path, users(&[("ann", "new")]));
        let passwords = open(&path);
        let count = || passwords.guesses.count(asker("ann").source, "ann");
        let hold = async || {
            let mut held = Vec::new();
            for _ in 0..passwords.threads {
                held.push(passwords.places.enter(asker("x").source, "x", 0).await.ok().unwrap());
            }
            held
        };
        // The first has left before its turn.
        let held = hold().await;
        let mut first = Box::pin(check(&passwords, "ann", "x"));
        until_waiting(&passwords, &mut first, 1).await;
        let mut second = Box::pin(check(&passwords, "ann", "x"));
        until_waiting(&passwords, &mut second, 2).await;
        drop(first);
        drop(held);
        assert_eq!((second.await, count()), (Some(false), 1));
        // Another has found it out before the first had its turn.
        let held = hold().await;
        let mut first = Box::pin(check(&passwords, "ann", "y"));
        until_waiting(&passwords, &mut first, 1).await;
        let file = passwords.loaded().await.unwrap();
        let hash = file.users.0["ann"].hash.as_bytes();
        let fingerprint = passwords.right.fingerprint(&[b"ann", b"y", hash]);
        passwords.wrong.put(fingerprint, (), Instant::now());
        drop(held);
        assert_eq!((first.await, count()), (Some(false), 2));
    }

    #[tokio::test]
    async fn users_that_do_not_exist_cost_no_place_and_are_refused_as_late_as_the_costliest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        put(&path, users(&[("ann", "a")]));
        let passwords = open(&path);
        let (cost, never_due) = (cost(&passwords.file.newest().costliest), Instant::now() + KNOWN_FOR);
        passwords.pace().note(cost, Duration::from_millis(50), never_due);
        let mut held = Vec::new();
        for _ in 0..passwords.threads {
            held.push(passwords.places.enter(asker("x").source, "x", 0).await.ok().unwrap());
        }
        let begun = Instant::now();
        for user in ["eve", "mallory"] {
            passwords.pretend(asker(user), b"x").await.unwrap();
        }
        assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
        for guess in [&b"1"[..], b"2", b"3", b"4"] {
            passwords.pretend(asker("eve"), guess).await.unwrap();
        }
        assert_eq!(passwords.guesses.count(asker("eve").source, "eve"), 5);
    }

    #[tokio::test]
    async fn a_new_password_leaves_no_way_in_by_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        let mut users = Users::default();
        users.set("ann", "old", Some(5_000)).unwrap();
        users.set("bob", "b", None).unwrap();
        put(&path, users.to_text());
        let passwords = open(&path);
        let (old, known) = passwords.verifier("ann").await.unwrap();
        assert!(known.is_some());
        let (decoy, known) = passwords.verifier("bob").await.unwrap();
        assert!(known.is_none() && decoy.iterations == 5_000);
        let mut users = Users::parse(&std::fs::read(&path).unwrap()).unwrap();
        users.set("ann", "new", None).unwrap();
        put(&path, users.to_text());
        let (new, known) = passwords.verifier("ann").await.unwrap();
        assert!(known.is_some() && new != old && new.iterations == 5_000);
        assert_eq!(check(&passwords, "ann", "new").await, Some(true));
        assert_eq!(passwords.verifier("bob").await.unwrap().0, decoy);
    }

    #[test]
    fn files_that_would_do_harm_are_refused_by_line() {
        let good = users(&[("ann", "x")]);
        assert_eq!(Users::parse(format!("# people\n\n{good}").as_bytes()).unwrap().to_text(), good);
        let hash = good.trim().split_once(':').unwrap().1;
        for bad in [
            "ann".to_owned(),
            "ann:plain".to_owned(),
            format!(":{hash}"),
            format!("{good}{good}"),
            format!("ann:{}", hash.replace("argon2id", "argon2i")),
            format!("ann:{}", hash.replace("m=19456", "m=4000000")),
            format!("ann:{hash}:"),
            format!("ann:{hash}:SCRAM-SHA-256$1:AA==$AA==:AA=="),
        ] {
            assert!(Users::parse(bad.as_bytes()).unwrap_err().starts_with("line "), "{bad}");
        }
    }
}
