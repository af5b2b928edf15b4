//! The owner of a session: the user who created it. The client id alone does not identify a client,
//! because by default any client may choose any id.
//!
//! Another user with the same client id gets a session of its own, and the old one ends as at a clean
//! start. A client without credentials is refused while a user has a session with its id. Without
//! `mqtt.access` names are not verified, and sessions belong to their client ids.

use std::fmt;

use crate::access::{Access, Identity};

/// Longest user name. Longer ones are refused, because the name is part of the durable state.
pub const USER_NAME_BYTES_MAX: usize = 1_024;

const ANONYMOUS: u8 = 1;
const USER: u8 = 2;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// Created without `mqtt.access`, or by version 0.1.0. The next client with the id owns the session.
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

    /// Returns whether `client` may resume a session of `self`.
    pub fn is(&self, client: &Self) -> bool {
        self == client || *self == Self::Unchecked || *client == Self::Unchecked
    }

    /// Returns whether `client`, for which [`Self::is`] is false, may use the id and end the session.
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

    /// Returns the encoding at the end of a session's durable record.
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
