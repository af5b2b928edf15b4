//! Whose a session is: the user who made it. A client id alone says little, because
//! by default any client may choose any id.
//!
//! Another user with the same client id gets a session of its own, and the old one ends
//! as at a clean start; a client without credentials is refused while a user has one.
//! Without `mqtt.access` nobody has checked any name, and sessions belong to their ids.

use std::fmt;

use crate::access::{Access, Identity};

/// Longer user names are refused: they are part of the durable state.
pub const USER_NAME_BYTES_MAX: usize = 1_024;

const ANONYMOUS: u8 = 1;
const USER: u8 = 2;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// Made without `mqtt.access`, or by version 0.1.0: the next client that has the id
    /// owns the session.
    #[default]
    Unchecked,
    Anonymous,
    User(Box<str>),
}

impl Owner {
    pub fn of(access: &Access, identity: &Identity) -> Self {
        match &identity.name {
            _ if !access.is_checked() => Self::Unchecked,
            None => Self::Anonymous,
            Some(name) => Self::User((**name).into()),
        }
    }

    /// Whether a session of `self` goes on for `client`.
    pub fn is(&self, client: &Self) -> bool {
        self == client || *self == Self::Unchecked || *client == Self::Unchecked
    }

    /// Whether `client`, which [`Self::is`] not, may have the id, and end the session.
    pub fn gives_way_to(&self, client: &Self) -> bool {
        !(matches!(self, Self::User(_)) && *client == Self::Anonymous)
    }

    pub fn has_name(&self, name: Option<&[u8]>) -> bool {
        match self {
            Self::Unchecked => true,
            Self::Anonymous => name.is_none(),
            Self::User(user) => name == Some(user.as_bytes()),
        }
    }

    /// As a session's durable record ends.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Unchecked => Vec::new(),
            Self::Anonymous => vec![ANONYMOUS],
            Self::User(user) => [&[USER], user.as_bytes()].concat(),
        }
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [] => Some(Self::Unchecked),
            [ANONYMOUS] => Some(Self::Anonymous),
            [USER, user @ ..] => Some(Self::User(std::str::from_utf8(user).ok()?.into())),
            _ => None,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unchecked => f.write_str("any user"),
            Self::Anonymous => f.write_str("an anonymous client"),
            Self::User(user) => write!(f, "user {user}"),
        }
    }
}
