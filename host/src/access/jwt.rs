//! JSON Web Tokens as passwords: RFC 7515 (JWS, compact form), 7517 (JWK), 7518 (algorithms), 7519
//! (claims), with ring. The token's algorithm must match the kind of the key, so that no key is used as
//! another kind; `none` is not supported.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use ring::hmac;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use x509_cert::der::asn1::AnyRef;
use x509_cert::der::{Decode, SliceReader, Tag, Tagged};
use x509_cert::spki::{ObjectIdentifier, SubjectPublicKeyInfoRef};

use super::config::{self, RULES_MAX, Rule};
use super::standing::Proof;
use super::watched::Watched;
use super::{Denied, Identity, rules};
use crate::telemetry::Failures;

const FILE_BYTES_MAX: u64 = 1 << 20;
const SECRET_BYTES_MIN: usize = 32;
const SECRET_DIFFERENT_MIN: usize = 8;
const OPEN_SSH: [&str; 3] = ["ssh-", "ecdsa-sha2-", "sk-"];
/// Longest token in bytes. A longer password is not a token.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// Longest lifetime of a connection with a token that expires later.
const LIVES_MAX: Duration = Duration::from_secs(365 * 24 * 3_600);

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

pub struct Jwt {
    config: config::Jwt,
    keys: Arc<Watched<Vec<Key>>>,
    /// Keys that [`Authenticate::refresh`](super::Authenticate::refresh) saw last.
    seen: Mutex<Arc<Vec<Key>>>,
}

/// Holds while the file still has the key that signed the token.
#[derive(Debug)]
struct KeyProof {
    keys: Arc<Watched<Vec<Key>>>,
    digest: [u8; 32],
}

struct Key {
    /// `kid` and `alg` of an entry of a key set. A token that names others is not verified with this
    /// key.
    id: Option<String>,
    algorithm: Option<String>,
    material: Material,
}

enum Material {
    Secret(Vec<u8>),
    /// An RSA key in PKCS#1 format, as ring expects it.
    Rsa(Vec<u8>),
    RsaParts {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    P256(Vec<u8>),
    P384(Vec<u8>),
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl Jwt {
    pub fn open(config: &config::Jwt, failures: Failures) -> Result<Self, String> {
        type Parse = fn(&[u8]) -> Result<Vec<Key>, String>;
        let (path, parse): (_, Parse) =
            match (&config.secret_file, &config.public_key_file, &config.jwks_file) {
                (Some(path), None, None) => (path, secret),
                (None, Some(path), None) => (path, public_key),
                (None, None, Some(path)) => (path, key_set),
                _ => return Err("jwt: exactly one file of keys must be named".to_owned()),
            };
        let keys = Arc::new(Watched::open(path, FILE_BYTES_MAX, failures, parse)?);
        Ok(Self { config: config.clone(), seen: Mutex::new(keys.newest()), keys })
    }

    /// Returns whether the file has changed since the last call. Blocks on the disk.
    pub fn refresh(&self) -> bool {
        self.keys.refresh(&self.seen)
    }

    /// Verifies a token. Returns `None` if the password is not a token.
    pub async fn check(&self, password: &[u8]) -> Result<Option<Identity>, Denied> {
        let Some(token) = Token::read(password) else { return Ok(None) };
        let keys = self.keys.clone();
        let keys = super::off_the_reactor(move || keys.get()).await?;
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let key = keys.iter().find(|key| token.is_signed_by(key)).ok_or(Denied::BadCredentials)?;
        let claims = token.claims.filter(|_| token.header.crit.is_none());
        let mut identity = self.identity(&claims.ok_or(Denied::BadCredentials)?, now_s)?;
        identity.proofs.push(Arc::new(KeyProof { keys: self.keys.clone(), digest: key.digest() }));
        Ok(Some(identity))
    }

    fn identity(&self, claims: &Map<String, Value>, now_s: u64) -> Result<Identity, Denied> {
        let config = &self.config;
        let leeway_s = config.leeway.0.as_secs_f64();
        let now_s = now_s as f64;
        // A claim of another type than it must have refuses, as one that is not met.
        let time = |name: &str| claims.get(name).map(|value| value.as_f64().unwrap_or(f64::NAN));
        let left_s = time("exp").map_or(f64::NAN, |until| until + leeway_s - now_s);
        let lives = left_s > 0.0;
        let has_begun = time("nbf").is_none_or(|from| now_s + leeway_s >= from);
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let issued = config.issuer.as_deref().is_none_or(|issuer| text("iss") == Some(issuer));
        let meant = config.audience.as_deref().is_none_or(|audience| match claims.get("aud") {
            Some(Value::String(one)) => one == audience,
            Some(Value::Array(all)) => all.iter().any(|one| one == audience),
            _ => false,
        });
        if !(lives && has_begun && issued && meant) {
            return Err(Denied::BadCredentials);
        }
        let name = text(&config.user_claim).filter(|name| !name.is_empty()).ok_or(Denied::BadCredentials)?;
        let rules = match config.rules_claim.as_ref().and_then(|claim| claims.get(claim)) {
            Some(rules) => read_rules(rules).ok_or(Denied::NotAuthorized)?,
            None => Vec::new(),
        };
        let texts =
            claims.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        let left = Duration::try_from_secs_f64(left_s).map_or(LIVES_MAX, |left| left.min(LIVES_MAX));
        let valid_until = Some(Instant::now() + left);
        Ok(Identity {
            name: Some(name.into()),
            fields: texts.collect(),
            rules,
            valid_until,
            ..Identity::default()
        })
    }
}

impl Key {
    fn digest(&self) -> [u8; 32] {
        let (kind, parts): (u8, [&[u8]; 2]) = match &self.material {
            Material::Secret(key) => (0, [key, &[]]),
            Material::Rsa(key) => (1, [key, &[]]),
            Material::RsaParts { n, e } => (2, [n, e]),
            Material::P256(key) => (3, [key, &[]]),
            Material::P384(key) => (4, [key, &[]]),
        };
        let mut digest = Sha256::new_with_prefix([kind]);
        parts.iter().for_each(|part| digest.update(Sha256::digest(part)));
        digest.finalize().into()
    }
}

impl Proof for KeyProof {
    fn holds(&self) -> bool {
        self.keys.newest().iter().any(|key| key.digest() == self.digest)
    }
}

/// Reads rules from outside the config. Returns `None` if one cannot be used.
pub fn read_rules(value: &Value) -> Option<Vec<Rule>> {
    let rules = Vec::<Rule>::deserialize(value).ok()?;
    let topics_ok = |rule: &Rule| rule.topics.iter().all(|topic| rules::check_topic(topic).is_ok());
    (rules.len() <= RULES_MAX && rules.iter().all(topics_ok)).then_some(rules)
}

struct Token<'t> {
    header: Header,
    claims: Option<Map<String, Value>>,
    signed: &'t [u8],
    signature: Vec<u8>,
}

impl<'t> Token<'t> {
    fn read(password: &'t [u8]) -> Option<Self> {
        let text = std::str::from_utf8(password).ok().filter(|text| text.len() <= TOKEN_BYTES_MAX)?;
        let (signed, signature) = text.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).ok();
        Some(Self {
            header: serde_json::from_slice(&decode(header)?).ok()?,
            claims: serde_json::from_slice(&decode(claims)?).ok(),
            signed: signed.as_bytes(),
            signature: decode(signature)?,
        })
    }

    fn is_signed_by(&self, key: &Key) -> bool {
        let algorithm = self.header.alg.as_str();
        let other_id = matches!((&self.header.kid, &key.id), (Some(named), Some(id)) if named != id);
        if other_id || key.algorithm.as_deref().is_some_and(|only| only != algorithm) {
            return false;
        }
        let verify = |with: &'static dyn signature::VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(with, key).verify(self.signed, &self.signature).is_ok()
        };
        let rsa: Option<&'static signature::RsaParameters> = match algorithm {
            "RS256" => Some(&signature::RSA_PKCS1_2048_8192_SHA256),
            "RS384" => Some(&signature::RSA_PKCS1_2048_8192_SHA384),
            "RS512" => Some(&signature::RSA_PKCS1_2048_8192_SHA512),
            _ => None,
        };
        match (&key.material, algorithm) {
            (Material::Secret(secret), "HS256") => self.has_mac(hmac::HMAC_SHA256, secret),
            (Material::Secret(secret), "HS384") => self.has_mac(hmac::HMAC_SHA384, secret),
            (Material::Secret(secret), "HS512") => self.has_mac(hmac::HMAC_SHA512, secret),
            (Material::Rsa(key), _) => rsa.is_some_and(|rsa| verify(rsa, key)),
            (Material::RsaParts { n, e }, _) => rsa.is_some_and(|rsa| {
                RsaPublicKeyComponents { n, e }.verify(rsa, self.signed, &self.signature).is_ok()
            }),
            (Material::P256(key), "ES256") => verify(&signature::ECDSA_P256_SHA256_FIXED, key),
            (Material::P384(key), "ES384") => verify(&signature::ECDSA_P384_SHA384_FIXED, key),
            _ => false,
        }
    }

    fn has_mac(&self, algorithm: hmac::Algorithm, secret: &[u8]) -> bool {
        hmac::verify(&hmac::Key::new(algorithm, secret), self.signed, &self.signature).is_ok()
    }
}

fn secret(bytes: &[u8]) -> Result<Vec<Key>, String> {
    const ADVICE: &str = "name a public key as public_key_file, a key set as jwks_file; \
                          make a secret of this: openssl rand -base64 48";
    if let Some(what) = public_material(bytes) {
        return Err(format!("is {what}, not a secret: {ADVICE}"));
    }
    let secret = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if secret.len() < SECRET_BYTES_MIN {
        return Err(format!("a secret must have at least {SECRET_BYTES_MIN} bytes, has {}", secret.len()));
    }
    let different = secret.iter().collect::<BTreeSet<_>>().len();
    if different < SECRET_DIFFERENT_MIN {
        return Err(format!("has only {different} different bytes, which can be guessed: {ADVICE}"));
    }
    Ok(vec![Key { id: None, algorithm: None, material: Material::Secret(secret.to_owned()) }])
}

/// Returns what kind of public file this is, if it is one. If it were used as a secret, anyone with the
/// file could sign tokens.
fn public_material(bytes: &[u8]) -> Option<&'static str> {
    let text = std::str::from_utf8(bytes).unwrap_or_default();
    let packed: String = text.split_whitespace().collect();
    let decoded = [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD];
    let decoded = decoded.into_iter().find_map(|base64| base64.decode(&packed).ok()).unwrap_or_default();
    let is_json =
        |bytes: &[u8]| matches!(serde_json::from_slice(bytes), Ok(Value::Object(_) | Value::Array(_)));
    let has = |what: &[u8]| bytes.windows(what.len()).any(|at| at == what);
    if has(b"-----BEGIN ") || has(b"---- BEGIN ") {
        Some("a PEM file")
    } else if is_der(bytes) || is_der(&decoded) {
        Some("a key or a certificate in DER")
    } else if is_json(bytes) || is_json(&decoded) {
        Some("JSON")
    } else if OPEN_SSH.iter().any(|kind| text.trim_start().starts_with(kind)) {
        Some("a public key of SSH")
    } else if Token::read(text.trim().as_bytes()).is_some() {
        Some("a token")
    } else {
        None
    }
}

/// Returns whether the bytes are exactly one DER SEQUENCE, as keys and certificates are.
fn is_der(bytes: &[u8]) -> bool {
    AnyRef::from_der(bytes).is_ok_and(|whole| {
        whole.tag() == Tag::Sequence
            && SliceReader::new(whole.value()).is_ok_and(|mut inner| AnyRef::decode(&mut inner).is_ok())
    })
}

fn public_key(bytes: &[u8]) -> Result<Vec<Key>, String> {
    let wanted = || "must be an RSA or an EC (P-256, P-384) public key, PEM (BEGIN PUBLIC KEY)".to_owned();
    if bytes.windows(20).any(|at| at == b"BEGIN RSA PUBLIC KEY") {
        return Err(format!("{}; make one of this: openssl rsa -RSAPublicKey_in -pubout", wanted()));
    }
    let der = SubjectPublicKeyInfoDer::from_pem_slice(bytes).map_err(|_| wanted())?;
    let key = SubjectPublicKeyInfoRef::from_der(&der).map_err(|_| wanted())?;
    let curve = || key.algorithm.parameters_oid().ok();
    let raw = key.subject_public_key.as_bytes().ok_or_else(wanted)?.to_owned();
    let material = match key.algorithm.oid {
        RSA => Material::Rsa(raw),
        EC if curve() == Some(P256) => Material::P256(raw),
        EC if curve() == Some(P384) => Material::P384(raw),
        _ => return Err(wanted()),
    };
    Ok(vec![Key { id: None, algorithm: None, material }])
}

/// Reads a key set. Keys of unsupported kinds or uses are left out (RFC 7517, 5).
fn key_set(bytes: &[u8]) -> Result<Vec<Key>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Map<String, Value>>,
    }
    let set: Set = serde_json::from_slice(bytes).map_err(|error| format!("no JSON Web Key Set: {error}"))?;
    let keys: Vec<Key> = set.keys.iter().filter_map(key_of_set).collect();
    if keys.is_empty() {
        return Err("has no key that can be used: RSA, EC (P-256, P-384) or oct of 32 bytes".to_owned());
    }
    Ok(keys)
}

fn key_of_set(key: &Map<String, Value>) -> Option<Key> {
    let text = |name: &str| key.get(name).and_then(Value::as_str);
    let bytes = |name: &str| text(name).and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
    let point = |len: usize| {
        let (x, y) = (bytes("x")?, bytes("y")?);
        (x.len() == len && y.len() == len).then(|| [&[4][..], &x, &y].concat())
    };
    if text("use").is_some_and(|used_for| used_for != "sig") {
        return None;
    }
    let material = match (text("kty")?, text("crv")) {
        ("oct", _) => Material::Secret(bytes("k").filter(|secret| secret.len() >= SECRET_BYTES_MIN)?),
        ("RSA", _) => Material::RsaParts { n: bytes("n")?, e: bytes("e")? },
        ("EC", Some("P-256")) => Material::P256(point(32)?),
        ("EC", Some("P-384")) => Material::P384(point(48)?),
        _ => return None,
    };
    Some(Key { id: text("kid").map(Into::into), algorithm: text("alg").map(Into::into), material })
}

#[cfg(test)]
#[path = "jwt_tests.rs"]
mod tests;
