//! The access control in force, which all listeners share and a reload replaces.
//!
//! Each client has rights of the version that admitted it. A listener compares the number of that version
//! with the one in force, which is one atomic load, and has rights of another version renewed before it acts
//! on them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::{Access, Admitted, Entrance};

pub struct Current {
    access: RwLock<Arc<Access>>,
    /// Generation of `access`.
    generation: AtomicU64,
}

/// The connection of a client whose rights are renewed.
#[derive(Clone, Copy)]
pub struct Connected<'a> {
    /// `None` if the host assigned the client id, which is allowed then.
    pub own_client_id: Option<&'a str>,
    pub client_id: &'a str,
    pub entrance: &'a Entrance,
}

/// The client would not be admitted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmittedNoMore;

impl Current {
    pub fn new(access: Access) -> Arc<Self> {
        let generation = AtomicU64::new(access.generation);
        Arc::new(Self { access: RwLock::new(Arc::new(access)), generation })
    }

    pub fn get(&self) -> Arc<Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns whether the rights are of the version in force.
    #[inline]
    pub fn is_of(&self, rights: &Admitted) -> bool {
        self.generation.load(Ordering::Acquire) == rights.access.generation
    }

    /// Puts another version in force, which [`Access::reopen`] has made of the present one.
    pub fn replace(&self, next: Access) {
        next.clients.wait_max.set(next.wait_max);
        let generation = next.generation;
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        *access = Arc::new(next);
        self.generation.store(generation, Ordering::Release);
    }
}

impl Access {
    /// Returns the rights that a connected client has in this version. Its credentials are not asked for
    /// again: the client stays admitted as long as the authenticator that recognised it is still
    /// configured, as an anonymous client as long as its listener allows these, and with a client id
    /// that it may have. The standing stays with `rights`: see [`Admitted::succeed`]. Returns `None` if the
    /// rights are the same in this version.
    pub fn renew(
        self: &Arc<Self>,
        rights: &Admitted,
        of: Connected<'_>,
    ) -> Result<Option<Admitted>, AdmittedNoMore> {
        let identity = &rights.identity;
        let is_admitted = match identity.admitted_by {
            _ if self.config.is_none() => true,
            Some(by) => self.authenticators.iter().any(|one| one.id() == by),
            None => identity.name.is_none() && of.entrance.allows_anonymous(),
        };
        let may_have_id = of.own_client_id.is_none_or(|id| self.may_have_id(identity, id));
        if !is_admitted || !may_have_id {
            return Err(AdmittedNoMore);
        }
        if self.has_rules_of(&rights.access) {
            return Ok(None);
        }
        let mut renewed = self.rights_of(identity.clone(), of.client_id);
        if let (Some(renewed), Some(before)) = (&mut renewed.questions, &rights.questions) {
            renewed.narrowed = before.narrowed;
        }
        Ok(Some(renewed))
    }

    /// Returns the number of authenticators whose clients are not admitted by `next` any more.
    pub fn authorities_gone(&self, next: &Self) -> usize {
        let stays = |id| next.authenticators.iter().any(|one| one.id() == id);
        self.authenticators.iter().filter(|one| !stays(one.id())).count()
    }

    /// Returns whether the rights of clients of `other` are the same in this version.
    fn has_rules_of(&self, other: &Self) -> bool {
        match (&self.config, &other.config) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        }
    }
}

impl Admitted {
    /// Puts rights in the place of the client's former ones, whose standing they take over.
    pub fn succeed(&mut self, former: &mut Self) {
        self.standing = former.standing.take();
    }

    /// Makes the rights those of another version that has the same rules.
    pub fn belong_to(&mut self, access: Arc<Access>) {
        self.access = access;
    }
}
