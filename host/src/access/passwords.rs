//! The password file: a line `user:$argon2id$...` for each user, with
//! `:SCRAM-SHA-256$...` behind it for who may log in by SCRAM too.
//!
//! Argon2 is slow on purpose, so it runs on a few threads, with a bounded queue
//! before them, and a password that was right lately is known again by a keyed
//! hash. A user that does not exist costs as much as one that does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Argon2, Params};
use tokio::sync::Semaphore;

use super::Denied;
use super::config;
use super::recent::Recent;
use super::scram::Verifier;
use super::watched::Watched;
use crate::telemetry::Failures;

const FILE_BYTES_MAX: u64 = 64 << 20;
/// Verifications that run or wait; one more is refused as Server Unavailable.
const QUEUE_MAX: usize = 1_024;
/// A right password is taken for right again so long, unless the user's line changes.
const RIGHT_FOR: Duration = Duration::from_secs(300);
const RIGHT_MAX: usize = 100_000;
/// More memory, in KiB, more passes and lanes are refused: each connect would cost them.
const MEMORY_KIB_MAX: u32 = 256 << 10;
const PASSES_MAX: u32 = 16;
const LANES_MAX: u32 = 16;

/// Users and their hashes, as the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users(BTreeMap<String, Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    hash: String,
    scram: Option<Verifier>,
}

/// The file as it is read.
struct Loaded {
    users: Users,
    /// Of the users with a verifier: who does not exist is given one of these.
    iterations: Vec<u32>,
}

pub struct Passwords {
    file: Arc<Watched<Loaded>>,
    /// Decoys for SCRAM come from it.
    secret: [u8; 32],
    /// Verified for users that do not exist.
    decoy: Arc<str>,
    right: Recent<()>,
    queue: Arc<Semaphore>,
    threads: Arc<Semaphore>,
}

impl Passwords {
    pub fn open(config: &config::Passwords, secret: &[u8; 32], failures: Failures) -> Result<Self, String> {
        let load = |bytes: &[u8]| {
            let users = Users::parse(bytes)?;
            let scram = users.0.values().filter_map(|entry| entry.scram.as_ref());
            let iterations = scram.map(|scram| scram.iterations).collect();
            Ok(Loaded { users, iterations })
        };
        let file = Watched::open(&config.file, FILE_BYTES_MAX, failures, load)?;
        let decoy = hash(b"nobody's")?;
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
        Ok(Self {
            file: Arc::new(file),
            secret: *secret,
            decoy: decoy.into(),
            right: Recent::new(RIGHT_MAX, RIGHT_FOR),
            queue: Arc::new(Semaphore::new(QUEUE_MAX)),
            threads: Arc::new(Semaphore::new(threads)),
        })
    }

    /// Whether the password is right; `None` where the file does not have the user.
    pub async fn check(&self, user: &str, password: &[u8]) -> Result<Option<bool>, Denied> {
        let file = self.loaded().await?;
        let Some(Entry { hash, .. }) = file.users.0.get(user) else { return Ok(None) };
        let fingerprint = self.right.fingerprint(&[user.as_bytes(), password, hash.as_bytes()]);
        if self.right.get(&fingerprint, Instant::now()).is_some() {
            return Ok(Some(true));
        }
        let is_right = self.verify(hash.as_str().into(), password).await?;
        if is_right {
            self.right.put(fingerprint, (), Instant::now());
        }
        Ok(Some(is_right))
    }

    /// Takes as long as to refuse a user that exists.
    pub async fn pretend(&self, password: &[u8]) -> Result<(), Denied> {
        let file = self.loaded().await?;
        let first = file.users.0.values().next();
        let hash = first.map_or(self.decoy.clone(), |entry| entry.hash.as_str().into());
        self.verify(hash, password).await.map(drop)
    }

    /// What proves the user's password, and whether there is one: for who has
    /// none it is one that nothing proves, made at the same cost.
    pub async fn verifier(&self, user: &str) -> Result<(Verifier, bool), Denied> {
        let file = self.loaded().await?;
        let decoy = Verifier::decoy(&self.secret, user, &file.iterations);
        let known = file.users.0.get(user).and_then(|entry| entry.scram.clone());
        Ok(known.map_or((decoy, false), |verifier| (verifier, true)))
    }

    async fn loaded(&self) -> Result<Arc<Loaded>, Denied> {
        let file = self.file.clone();
        super::off_the_reactor(move || file.get()).await
    }

    async fn verify(&self, hash: Arc<str>, password: &[u8]) -> Result<bool, Denied> {
        let place = self.queue.clone().try_acquire_owned().map_err(|_| Denied::Unavailable("passwords"))?;
        let turn = self.threads.clone().acquire_owned().await.expect("the semaphore is never closed");
        let password = password.to_owned();
        // Both go with the work: it runs on when its client has gone.
        super::off_the_reactor(move || {
            let _held = (place, turn);
            let hash = PasswordHash::new(&hash);
            hash.is_ok_and(|hash| Argon2::default().verify_password(&password, &hash).is_ok())
        })
        .await
    }
}

impl Users {
    /// Errors name the line.
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

    /// True where the user had a password before. With `scram_iterations` SCRAM
    /// can be used too; a user for whom it could before keeps it, with the new password.
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

    /// False where there is no such user.
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

fn check_hash(hash: &str) -> Result<(), String> {
    let parsed = PasswordHash::new(hash).ok().filter(|hash| hash.algorithm.as_str() == "argon2id");
    let wanted = "must be an argon2id hash, as `headworks passwd` makes it";
    let parsed = parsed.filter(|hash| hash.hash.is_some() && hash.salt.is_some()).ok_or(wanted)?;
    let cost = Params::try_from(&parsed).map_err(|_| wanted)?;
    if cost.m_cost() > MEMORY_KIB_MAX || cost.t_cost() > PASSES_MAX || cost.p_cost() > LANES_MAX {
        return Err(format!(
            "the hash costs too much: at most m={MEMORY_KIB_MAX}, t={PASSES_MAX}, p={LANES_MAX}"
        ));
    }
    Ok(())
}

/// With the cost that OWASP advises: 19 MiB, two passes.
fn hash(password: &[u8]) -> Result<String, String> {
    let hash = Argon2::default().hash_password(password);
    hash.map(|hash| hash.to_string()).map_err(|error| format!("cannot hash the password: {error}"))
}

#[cfg(test)]
mod tests {
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
        Passwords::open(&config, &[7; 32], Failures::default()).unwrap()
    }

    #[tokio::test]
    async fn a_changed_file_counts_at_once_and_a_broken_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        std::fs::write(&path, users(&[("ann", "old")])).unwrap();
        let passwords = open(&path);
        assert_eq!(passwords.check("ann", b"old").await, Ok(Some(true)));
        assert_eq!(passwords.check("ann", b"old").await, Ok(Some(true)));
        assert_eq!(passwords.check("ann", b"new").await, Ok(Some(false)));
        assert_eq!(passwords.check("bob", b"old").await, Ok(None));
        std::fs::write(&path, users(&[("ann", "new"), ("bob", "b")])).unwrap();
        assert_eq!(passwords.check("ann", b"old").await, Ok(Some(false)));
        assert_eq!(passwords.check("ann", b"new").await, Ok(Some(true)));
        std::fs::write(&path, "ann:secret\n").unwrap();
        assert_eq!(passwords.check("bob", b"b").await, Ok(Some(true)));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(passwords.check("ann", b"new").await, Ok(Some(true)));
    }

    #[tokio::test]
    async fn a_new_password_leaves_no_way_in_by_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        let mut users = Users::default();
        users.set("ann", "old", Some(5_000)).unwrap();
        users.set("bob", "b", None).unwrap();
        std::fs::write(&path, users.to_text()).unwrap();
        let passwords = open(&path);
        let (old, known) = passwords.verifier("ann").await.unwrap();
        assert!(known);
        let (decoy, known) = passwords.verifier("bob").await.unwrap();
        assert!(!known && decoy.iterations == 5_000);
        let mut users = Users::parse(&std::fs::read(&path).unwrap()).unwrap();
        users.set("ann", "new", None).unwrap();
        std::fs::write(&path, users.to_text()).unwrap();
        let (new, known) = passwords.verifier("ann").await.unwrap();
        assert!(known && new != old && new.iterations == 5_000);
        assert_eq!(passwords.check("ann", b"new").await, Ok(Some(true)));
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
