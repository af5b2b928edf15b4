//! One authenticator of the configuration, with the number by which a client remembers who admitted it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::config::{self, Authenticator};
use super::wait::WaitMax;
use super::{Authenticate, Deps, http, jwt, passwords, plugin};

/// Number of an authenticator within this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuthorityId(u64);

/// One way to authenticate clients, as the configuration describes it.
pub struct Authority {
    config: Authenticator,
    id: AuthorityId,
    by: Box<dyn Authenticate>,
}

impl AuthorityId {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Authority {
    /// Reads the files of an authenticator. Errors name the file.
    pub fn open(config: &Authenticator, deps: &Deps<'_>, wait_max: &WaitMax) -> Result<Self, String> {
        let failures = deps.failures.clone();
        let by: Box<dyn Authenticate> = match config {
            Authenticator::Passwords(config) => {
                Box::new(passwords::Passwords::open(config, deps.secret, wait_max.clone(), failures)?)
            }
            Authenticator::Jwt(config) => Box::new(jwt::Jwt::open(config, failures)?),
            Authenticator::Certificate(config) => Box::new(config.clone()),
            Authenticator::Http(config) => Box::new(http::Http::new(config, failures)?),
            Authenticator::Plugin(config) => {
                let engine = deps.plugins.ok_or("plugins cannot be run here")?;
                Box::new(plugin::Plugin::open(config, engine, wait_max.clone(), failures))
            }
        };
        Ok(Self { config: config.clone(), id: AuthorityId::new(), by })
    }

    pub fn config(&self) -> &Authenticator {
        &self.config
    }

    pub fn id(&self) -> AuthorityId {
        self.id
    }

    pub fn by(&self) -> &dyn Authenticate {
        &*self.by
    }

    /// Returns whether clients that `former` admitted stay admitted, because the same service decides about
    /// them. How long it may take and what is remembered of its answers does not matter.
    ///
    /// The clients of a password file and of token keys rest on the file itself, so that another
    /// configuration is another authenticator for them.
    pub fn speaks_for(&self, former: &Self) -> bool {
        match (&self.config, &former.config) {
            (Authenticator::Http(now), Authenticator::Http(before)) => {
                let config::Http { url, ca, timeout: _, cache_ttl: _, cache_entries_max: _, requests_max: _ } =
                    now;
                (url, ca) == (&before.url, &before.ca)
            }
            (Authenticator::Plugin(now), Authenticator::Plugin(before)) => {
                let config::Plugin { file, config, limits: _, instances_max: _ } = now;
                (file, config) == (&before.file, &before.config)
            }
            _ => false,
        }
    }

    /// Takes the clients of `former` over.
    pub fn succeed(&mut self, former: &Self) {
        self.id = former.id;
    }
}
