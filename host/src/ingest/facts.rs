//! Encodes what a listener knows about a message into the message's properties, in the same way for all
//! protocols, so that steps, rows and subscribers need not know the protocol.

use crate::access::Identity;
use crate::properties::facts::{CLIENT_ID, USERNAME};
use crate::properties::{self, Origin};

/// Appends a protocol fact, whose name is one of [`properties::facts`].
#[inline]
pub fn push(out: &mut Vec<u8>, fact: &str, value: &[u8]) {
    properties::push(out, Origin::Listener, fact, value);
}

/// Appends a property that the device itself has set.
#[inline]
pub fn push_user(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    properties::push(out, Origin::Device, name, value);
}

/// Appends the facts about the client.
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
