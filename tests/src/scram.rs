//! A client of SCRAM-SHA-256 (RFC 5802, 7677), written apart from the host's server.

use std::num::NonZeroU32;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::{digest, hmac, pbkdf2};

/// What a client says, and what the server must answer.
#[derive(Debug)]
pub struct Login {
    gs2: String,
    bare: String,
    password: String,
}

#[derive(Debug)]
pub struct Final {
    pub message: String,
    pub server_final: String,
    pub salt: String,
}

impl Login {
    /// `gs2`: `n,,` for no channel binding.
    pub fn new(gs2: &str, user: &str, password: &str) -> Self {
        Self {
            gs2: gs2.into(),
            bare: format!("n={user},r=fyko+d2lbbFgONRv9qkxdawL"),
            password: password.into(),
        }
    }

    pub fn first(&self) -> String {
        format!("{}{}", self.gs2, self.bare)
    }

    pub fn answer(&self, server_first: &[u8]) -> Final {
        let server_first = std::str::from_utf8(server_first).expect("server-first-message is text");
        let field = |name: &str| {
            let found = server_first.split(',').find_map(|field| field.strip_prefix(name));
            found.unwrap_or_else(|| panic!("{name} in {server_first}"))
        };
        let iterations: NonZeroU32 = field("i=").parse().expect("a count");
        let salt = STANDARD.decode(field("s=")).expect("base64");
        let mut salted = [0; 32];
        let password = self.password.as_bytes();
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, password, &mut salted);
        let unproven = format!("c={},r={}", STANDARD.encode(&self.gs2), field("r="));
        let said = format!("{},{server_first},{unproven}", self.bare);
        let client_key = mac(&salted, "Client Key");
        let stored_key = digest::digest(&digest::SHA256, &client_key);
        let signature = mac(stored_key.as_ref(), &said);
        let proof: Vec<u8> = client_key.iter().zip(signature).map(|(key, bits)| key ^ bits).collect();
        Final {
            message: format!("{unproven},p={}", STANDARD.encode(proof)),
            server_final: format!("v={}", STANDARD.encode(mac(&mac(&salted, "Server Key"), &said))),
            salt: field("s=").to_owned(),
        }
    }
}

fn mac(key: &[u8], message: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message.as_bytes()).as_ref().to_vec()
}
