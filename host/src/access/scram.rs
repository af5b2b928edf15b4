//! SCRAM-SHA-256, the server's side, without channel binding (RFC 5802, 7677). Performs no I/O.
//!
//! A verifier is written as in PostgreSQL and RFC 5803,
//! `SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY`, with the last three in base64. The verifier
//! alone does not permit a login, but passwords can be tested against it.

use std::fmt;
use std::num::NonZeroU32;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use ring::{digest, hmac, pbkdf2};
use stringprep::saslprep;
use subtle::ConstantTimeEq;

pub const METHOD: &str = "SCRAM-SHA-256";
/// Iterations that OWASP recommends for PBKDF2 with HMAC-SHA-256. The client computes them each time it
/// connects, the server only when a password is set.
pub const ITERATIONS_DEFAULT: u32 = 600_000;
/// Fewest iterations (RFC 7677, section 4).
pub const ITERATIONS_MIN: u32 = 4_096;
/// Most iterations: ten seconds on a fast client.
pub const ITERATIONS_MAX: u32 = 10_000_000;

const SALT_BYTES: usize = 16;
const NONCE_BYTES: usize = 18;
const CLIENT_NONCE_BYTES_MAX: usize = 256;
const USER_BYTES_MAX: usize = 1_024;

type Key = [u8; 32];

/// Data with which a password is verified without storing it.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    pub iterations: u32,
    salt: [u8; SALT_BYTES],
    stored_key: Key,
    server_key: Key,
}

impl Verifier {
    /// Computes a verifier, which is slow on purpose.
    pub fn new(password: &str, iterations: u32) -> Result<Self, String> {
        let mut salt = [0; SALT_BYTES];
        SystemRandom::new().fill(&mut salt).map_err(|_| "the system gives no random bytes".to_owned())?;
        Self::with_salt(password, iterations, salt)
    }

    fn with_salt(password: &str, iterations: u32, salt: [u8; SALT_BYTES]) -> Result<Self, String> {
        let rounds = check_iterations(iterations)?;
        let password = saslprep(password)
            .map_err(|_| "the password has a character that SCRAM does not allow (RFC 4013)".to_owned())?;
        let mut salted = Key::default();
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, password.as_bytes(), &mut salted);
        Ok(Self {
            iterations,
            salt,
            stored_key: sha256(&mac(&salted, b"Client Key")),
            server_key: mac(&salted, b"Server Key"),
        })
    }

    /// Returns the verifier of a user that does not exist. It is always the same for a name, as a real
    /// one is, and no password satisfies it. `secret` must not be known to others.
    pub fn decoy(secret: &[u8; 32], user: &str, iterations: &[u32]) -> Self {
        let part = |what: &str| mac(secret, format!("{what} {user}").as_bytes());
        let mut salt = [0; SALT_BYTES];
        salt.copy_from_slice(&part("salt")[..SALT_BYTES]);
        // That with the highest draw for this name: another count in the list changes few names', and theirs to it.
        let highest = iterations.iter().max_by_key(|count| part(&format!("iterations {count}")));
        Self {
            iterations: highest.copied().unwrap_or(ITERATIONS_DEFAULT),
            salt,
            stored_key: part("stored key"),
            server_key: part("server key"),
        }
    }

    pub fn parse(text: &str) -> Result<Self, String> {
        let wanted =
            || format!("must be {METHOD}$ITERATIONS:SALT$STOREDKEY:SERVERKEY with a salt of 16 bytes");
        let parts = || {
            let (cost, keys) = text.strip_prefix(METHOD)?.strip_prefix('$')?.split_once('$')?;
            Some((cost.split_once(':')?, keys.split_once(':')?))
        };
        let ((iterations, salt), (stored_key, server_key)) = parts().ok_or_else(wanted)?;
        let iterations = iterations.parse().map_err(|_| wanted())?;
        check_iterations(iterations)?;
        Ok(Self {
            iterations,
            salt: decode(salt).ok_or_else(wanted)?,
            stored_key: decode(stored_key).ok_or_else(wanted)?,
            server_key: decode(server_key).ok_or_else(wanted)?,
        })
    }
}

impl fmt::Display for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [salt, stored, server] =
            [&self.salt[..], &self.stored_key, &self.server_key].map(|bytes| STANDARD.encode(bytes));
        write!(f, "{METHOD}${}:{salt}${stored}:{server}", self.iterations)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

/// The client-first-message.
#[derive(Debug)]
pub struct First<'a> {
    /// User name, prepared according to RFC 4013.
    pub user: String,
    gs2: &'a str,
    bare: &'a str,
    nonce: &'a str,
}

impl<'a> First<'a> {
    /// Parses the message. Returns `None` if it is malformed, binds a channel, acts for another user, or
    /// requires an extension.
    pub fn read(data: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(data).ok()?;
        let bare = text.strip_prefix("n,,").or_else(|| text.strip_prefix("y,,"))?;
        let (user, rest) = bare.strip_prefix("n=")?.split_once(",r=")?;
        let nonce = rest.split(',').next()?;
        let printable = |b: u8| matches!(b, 0x21..=0x7e);
        let nonce_ok = (1..=CLIENT_NONCE_BYTES_MAX).contains(&nonce.len()) && nonce.bytes().all(printable);
        if !nonce_ok || user.is_empty() || user.len() > USER_BYTES_MAX {
            return None;
        }
        let user = saslprep(&unescape(user)?).ok()?.into_owned();
        Some(Self { user, gs2: &text[..3], bare, nonce })
    }
}

/// State of the server after server-first-message, while it waits for client-final-message.
#[derive(Debug)]
pub struct Exchange {
    verifier: Verifier,
    /// Required value of `c=`.
    binding: String,
    nonce: String,
    /// The part of AuthMessage before client-final-message-without-proof.
    said: String,
}

impl Exchange {
    /// Begins an exchange and returns it with server-first-message.
    pub fn begin(first: &First<'_>, verifier: Verifier) -> Option<(Self, String)> {
        let mut random = [0; NONCE_BYTES];
        SystemRandom::new().fill(&mut random).ok()?;
        Some(Self::with_nonce(first, verifier, &STANDARD.encode(random)))
    }

    fn with_nonce(first: &First<'_>, verifier: Verifier, ours: &str) -> (Self, String) {
        let nonce = format!("{}{ours}", first.nonce);
        let salt = STANDARD.encode(verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", verifier.iterations);
        let said = format!("{},{server_first},", first.bare);
        (Self { verifier, binding: STANDARD.encode(first.gs2), nonce, said }, server_first)
    }

    /// Returns server-final-message if client-final-message proves the password.
    pub fn finish(&self, client_final: &[u8]) -> Option<String> {
        let text = std::str::from_utf8(client_final).ok()?;
        let (unproven, proof) = text.rsplit_once(",p=")?;
        let (binding, rest) = unproven.strip_prefix("c=")?.split_once(",r=")?;
        let nonce = rest.split(',').next()?;
        if binding != self.binding || nonce != self.nonce {
            return None;
        }
        let proof: Key = decode(proof)?;
        let message = format!("{}{unproven}", self.said);
        let signature = mac(&self.verifier.stored_key, message.as_bytes());
        let client_key: Key = std::array::from_fn(|i| proof[i] ^ signature[i]);
        let is_right: bool = sha256(&client_key).ct_eq(&self.verifier.stored_key).into();
        let answer = || STANDARD.encode(mac(&self.verifier.server_key, message.as_bytes()));
        is_right.then(|| format!("v={}", answer()))
    }
}

fn check_iterations(iterations: u32) -> Result<NonZeroU32, String> {
    let within = (ITERATIONS_MIN..=ITERATIONS_MAX).contains(&iterations);
    NonZeroU32::new(iterations).filter(|_| within).ok_or_else(|| {
        format!("SCRAM iterations must be {ITERATIONS_MIN} to {ITERATIONS_MAX}, are {iterations}")
    })
}

/// Decodes a saslname: `=2C` is a comma, `=3D` an equals sign, and no other `=` is allowed.
fn unescape(name: &str) -> Option<String> {
    let mut parts = name.split('=');
    let mut out = parts.next()?.to_owned();
    for part in parts {
        let (c, rest) = match part.split_at_checked(2)? {
            ("2C", rest) => (',', rest),
            ("3D", rest) => ('=', rest),
            _ => return None,
        };
        out.push(c);
        out.push_str(rest);
    }
    (!out.contains('\0')).then_some(out)
}

fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

fn mac(key: &[u8], message: &[u8]) -> Key {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message);
    tag.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn sha256(bytes: &[u8]) -> Key {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Computes the client's side, for tests.
#[cfg(test)]
pub fn client_final(password: &str, client_first: &str, server_first: &str) -> Option<String> {
    let field = |name: &str| server_first.split(',').find_map(|field| field.strip_prefix(name));
    let iterations = NonZeroU32::new(field("i=")?.parse().ok()?)?;
    let salt = STANDARD.decode(field("s=")?).ok()?;
    let mut salted = Key::default();
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, password.as_bytes(), &mut salted);
    let (gs2, bare) = client_first.split_at(3);
    let unproven = format!("c={},r={}", STANDARD.encode(gs2), field("r=")?);
    let key = mac(&salted, b"Client Key");
    let signature = mac(&sha256(&key), format!("{bare},{server_first},{unproven}").as_bytes());
    let proof: Key = std::array::from_fn(|i| key[i] ^ signature[i]);
    Some(format!("{unproven},p={}", STANDARD.encode(proof)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 7677, section 3.
    const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    const SERVER_FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const CLIENT_FINAL: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    const SERVER_FINAL: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn example() -> (Exchange, String) {
        let salt = decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = Verifier::with_salt("pencil", 4_096, salt).unwrap();
        Exchange::with_nonce(&First::read(CLIENT_FIRST.as_bytes()).unwrap(), verifier, SERVER_NONCE)
    }

    #[test]
    fn the_example_of_rfc_7677_is_reproduced() {
        let (exchange, server_first) = example();
        assert_eq!(server_first, SERVER_FIRST);
        assert_eq!(exchange.finish(CLIENT_FINAL.as_bytes()).as_deref(), Some(SERVER_FINAL));
        assert_eq!(client_final("pencil", CLIENT_FIRST, SERVER_FIRST).as_deref(), Some(CLIENT_FINAL));
    }

    proptest! {
        #[test]
        fn a_damaged_client_final_never_passes(
            at in 0..CLIENT_FINAL.len(), byte: u8, kind in 0..4, more in "[ -~]{1,8}",
        ) {
            let (exchange, _) = example();
            let mut damaged = CLIENT_FINAL.as_bytes().to_vec();
            match kind {
                0 => damaged[at] = byte,
                1 => drop(damaged.remove(at)),
                2 => damaged.truncate(at),
                _ => drop(damaged.splice(at..at, more.bytes())),
            }
            prop_assume!(damaged != CLIENT_FINAL.as_bytes());
            prop_assert_eq!(exchange.finish(&damaged), None);
        }

        #[test]
        fn whatever_comes_first_is_read_or_refused(data: Vec<u8>, text in "[ny],,(m=x,)?n=[a=2CD]{0,6},r=[!-~]{0,6}") {
            First::read(&data);
            First::read(text.as_bytes());
        }
    }

    #[test]
    fn a_first_message_that_binds_a_channel_or_acts_for_another_is_refused() {
        for bad in [
            "p=tls-unique,,n=user,r=x",
            "n,a=other,n=user,r=x",
            "n,,m=ext,n=user,r=x",
            "n,,n=,r=x",
            "n,,n=user,r=",
            "n,,n=user",
            "n,,n=a=b,r=x",
            "n,,n=a=,r=x",
            "n,,n=us\u{7}er,r=x",
            "n,,r=x,n=user",
            "x,,n=user,r=x",
            "",
        ] {
            assert!(First::read(bad.as_bytes()).is_none(), "{bad}");
        }
        let user = |text: &str| First::read(text.as_bytes()).unwrap().user;
        assert_eq!(user("y,,n=a=2Cb=3Dc,r=x,ext=1"), "a,b=c");
        assert_eq!(user("n,,n=\u{aa}\u{ad},r=x"), "a", "prepared as RFC 4013 says");
    }

    #[test]
    fn a_verifier_reads_what_it_wrote_and_refuses_what_would_do_harm() {
        let verifier = Verifier::new("pencil", ITERATIONS_MIN).unwrap();
        let text = verifier.to_string();
        assert_eq!(Verifier::parse(&text), Ok(verifier));
        for bad in [
            text.replace("$4096:", "$4095:"),
            text.replace("$4096:", "$10000001:"),
            text.replace("$4096:", "$-1:"),
            text.replace("256$", "1$"),
            text[..text.len() - 2].to_owned(),
            format!("{text}:x"),
            String::new(),
        ] {
            assert!(Verifier::parse(&bad).is_err(), "{bad}");
        }
        assert!(Verifier::new("a\u{7}b", ITERATIONS_MIN).is_err());
    }

    #[test]
    fn who_does_not_exist_has_a_salt_that_stays_and_is_nobody_elses() {
        let decoy = |secret: u8, user| Verifier::decoy(&[secret; 32], user, &[5_000]);
        assert_eq!(decoy(1, "eve"), decoy(1, "eve"));
        assert_ne!(decoy(1, "eve").salt, decoy(1, "bob").salt);
        assert_ne!(decoy(1, "eve").salt, decoy(2, "eve").salt);
        assert_eq!(decoy(1, "eve").iterations, 5_000);
        assert_eq!(Verifier::decoy(&[1; 32], "eve", &[]).iterations, ITERATIONS_DEFAULT);
        for name in ["eve", "mallory", "trudy", "oscar", "sybil"] {
            let of = |counts: &[u32]| Verifier::decoy(&[1; 32], name, counts).iterations;
            let (before, after) = (of(&[5_000, 6_000]), of(&[5_000, 6_000, 7_000]));
            assert!(after == before || after == 7_000, "{name}: {before}, {after}");
            assert_eq!(of(&[6_000, 5_000]), before);
        }
    }
}
