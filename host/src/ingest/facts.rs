//! Writes what listeners say of a message into its properties, the same way for all protocols: steps,
//! rows and subscribers need not know which one a message came by.

use crate::access::Identity;
use crate::properties::facts::{CLIENT_ID, USERNAME};
use crate::properties::{self, Origin};

/// Appends a fact of the protocol, by a name of [`properties::facts`].
#[inline]
pub fn push(out: &mut Vec<u8>, fact: &str, value: &[u8]) {
    properties::push(out, Origin::Listener, fact, value);
}

/// Appends a name and value that the device itself has set.
#[inline]
pub fn push_user(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    properties::push(out, Origin::Device, name, value);
}

/// Appends who the client is.
#[inline]
pub fn push_sender(out: &mut Vec<u8>, client_id: Option<&str>, identity: &Identity) {
    if let Some(client_id) = client_id {
        push(out, CLIENT_ID, client_id.as_bytes());
    }
    if let Some(username) = &identity.name {
        push(out, USERNAME, username.as_bytes());
    }
    out.extend_from_slice(&identity.attributes);
}
