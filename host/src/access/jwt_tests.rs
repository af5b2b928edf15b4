//! Tokens, made here and by the keys of a key set.

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
    RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RsaEncoding, RsaKeyPair,
};
use serde_json::json;

use super::*;

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn token(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let signed = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
    let signature = sign(signed.as_bytes());
    format!("{signed}.{}", encode(signature))
}

fn hs256(claims: &Value) -> String {
    token(&json!({"alg": "HS256"}), claims, mac)
}

fn mac(signed: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, SECRET), signed).as_ref().to_vec()
}

fn open(file: &str, content: &[u8], more: Value) -> (Jwt, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    std::fs::write(&path, content).unwrap();
    let mut config = json!({ file: path });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config = serde_json::from_value(config).unwrap();
    (Jwt::open(&config, Failures::default()).unwrap(), folder)
}

async fn check(jwt: &Jwt, token: &str) -> Result<Option<Arc<str>>, Denied> {
    jwt.check(token.as_bytes()).await.map(|found| found.and_then(|identity| identity.name))
}

const FAR: u64 = 32_503_680_000;

#[tokio::test]
async fn only_a_token_signed_in_time_for_us_is_taken() {
    let more = json!({"issuer": "plant", "audience": "mqtt"});
    let (jwt, _folder) = open("secret_file", &[SECRET, b"\n"].concat(), more);
    let good = json!({"sub": "ann", "exp": FAR, "iss": "plant", "aud": ["x", "mqtt"]});
    assert_eq!(check(&jwt, &hs256(&good)).await, Ok(Some("ann".into())));
    for (claim, value) in [
        ("exp", json!(1_000)),
        ("exp", json!("32503680000")),
        ("exp", Value::Null),
        ("nbf", json!(FAR)),
        ("nbf", json!("0")),
        ("iss", json!("other")),
        ("aud", json!("other")),
        ("sub", json!("")),
        ("sub", json!(7)),
        ("sub", Value::Null),
        ("exp", json!(true)),
        ("aud", json!("mqt")),
        ("aud", json!("mqtt ")),
        ("aud", json!([["mqtt"]])),
        ("aud", json!({"mqtt": true})),
        ("iss", json!(["plant"])),
    ] {
        let mut claims = good.clone();
        claims[claim] = value.clone();
        assert_eq!(check(&jwt, &hs256(&claims)).await, Err(Denied::BadCredentials), "{claim} {value}");
    }
    let missing = json!({"sub": "ann", "iss": "plant", "aud": "mqtt"});
    assert_eq!(check(&jwt, &hs256(&missing)).await, Err(Denied::BadCredentials));
    assert_eq!(check(&jwt, "a password").await, Ok(None));
}

#[test]
fn a_connection_is_valid_until_its_token_ends() {
    let (jwt, _folder) = open("secret_file", SECRET, json!({"leeway": "5s"}));
    for (exp, left) in [(1_060, 65), (1_000, 5), (FAR, LIVES_MAX.as_secs())] {
        let claims = json!({"sub": "ann", "exp": exp});
        let before = Instant::now();
        let until = jwt.identity(claims.as_object().unwrap(), 1_000).ok().unwrap().valid_until.unwrap();
        let left = Duration::from_secs(left);
        assert!(before + left <= until && until <= Instant::now() + left, "{exp}");
    }
}

#[tokio::test]
async fn the_algorithm_is_of_the_keys_kind_and_never_none() {
    let claims = json!({"sub": "ann", "exp": FAR});
    let (jwt, _folder) = open("secret_file", SECRET, json!({}));
    for alg in ["none", "None", "HS512", "RS256", "ES256"] {
        let forged = token(&json!({"alg": alg}), &claims, mac);
        assert_eq!(check(&jwt, &forged).await, Err(Denied::BadCredentials), "{alg}");
    }
    let unsigned = token(&json!({"alg": "none"}), &claims, |_| Vec::new());
    assert_eq!(check(&jwt, &unsigned).await, Err(Denied::BadCredentials));
    let critical = token(&json!({"alg": "HS256", "crit": ["x"]}), &claims, mac);
    assert_eq!(check(&jwt, &critical).await, Err(Denied::BadCredentials));
    // A token brings no key of its own.
    let own = b"a key that the token brings with it";
    let embedded =
        json!({"alg": "HS256", "jku": "http://127.0.0.1/keys", "jwk": {"kty": "oct", "k": encode(own)}});
    let sign = |signed: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, own), signed).as_ref().to_vec();
    assert_eq!(check(&jwt, &token(&embedded, &claims, sign)).await, Err(Denied::BadCredentials));
    let good = hs256(&claims);
    let padded = format!("{good}=");
    let of_four = format!("{good}.{}", encode("x"));
    let endless = hs256(&json!({"sub": "ann", "exp": FAR, "fill": "x".repeat(1 << 20)}));
    for odd in [padded, of_four, endless, good.replace('.', ".."), good[..good.len() - 1].to_owned()] {
        assert_ne!(check(&jwt, &odd).await, Ok(Some("ann".into())), "{odd:.80}");
    }
    for at in [10, good.len() / 2, good.len() - 10] {
        let mut changed = good.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        assert_ne!(check(&jwt, std::str::from_utf8(&changed).unwrap()).await, Ok(Some("ann".into())));
    }
}

#[tokio::test]
async fn a_key_set_finds_the_key_by_its_id_and_claims_bring_rules() {
    let random = SystemRandom::new();
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
    let point = pair.public_key().as_ref();
    let set = json!({"keys": [
        {"kty": "OKP", "crv": "Ed25519", "kid": "other"},
        {"kty": "EC", "crv": "P-256", "kid": "k1", "alg": "ES256", "x": encode(&point[1..33]), "y": encode(&point[33..])},
    ]});
    let (jwt, _folder) = open("jwks_file", set.to_string().as_bytes(), json!({"rules_claim": "acl"}));
    let sign = |signed: &[u8]| pair.sign(&random, signed).unwrap().as_ref().to_vec();
    let acl = json!([{"effect": "allow", "action": "publish", "topics": ["acme/{site}/#"]}]);
    let claims = json!({"sub": "ann", "exp": FAR, "site": "f1", "acl": acl});
    let good = token(&json!({"alg": "ES256", "kid": "k1"}), &claims, sign);
    let identity = jwt.check(good.as_bytes()).await.unwrap().unwrap();
    assert_eq!(identity.rules.len(), 1);
    assert_eq!(identity.fields.get("site").map(String::as_str), Some("f1"));
    let other = token(&json!({"alg": "ES256", "kid": "k2"}), &claims, sign);
    assert_eq!(check(&jwt, &other).await, Err(Denied::BadCredentials));
    // The public key must not pass for a secret.
    let confused = token(&json!({"alg": "HS256", "kid": "k1"}), &claims, |signed| {
        hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, point), signed).as_ref().to_vec()
    });
    assert_eq!(check(&jwt, &confused).await, Err(Denied::BadCredentials));
    let claims = json!({"sub": "ann", "exp": FAR, "acl": [{"effect": "allow", "topics": ["a/#/b"]}]});
    let broken = token(&json!({"alg": "ES256", "kid": "k1"}), &claims, sign);
    assert_eq!(check(&jwt, &broken).await, Err(Denied::NotAuthorized));
}

/// By OpenSSL, as a person makes it: ring makes no RSA keys. The public key as
/// `BEGIN PUBLIC KEY` and as `BEGIN RSA PUBLIC KEY`.
fn rsa() -> (RsaKeyPair, String, String) {
    let openssl = |args: &str, input: &[u8]| {
        let mut command = std::process::Command::new("openssl");
        command.args(args.split(' ')).stdin(std::process::Stdio::piped());
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "openssl {args}");
        output.stdout
    };
    let pem = openssl("genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048", b"");
    let public = |form: &str| String::from_utf8(openssl(&format!("rsa {form}"), &pem)).unwrap();
    let pkcs8 = rustls::pki_types::PrivatePkcs8KeyDer::from_pem_slice(&pem).unwrap();
    (
        RsaKeyPair::from_pkcs8(pkcs8.secret_pkcs8_der()).unwrap(),
        public("-pubout"),
        public("-RSAPublicKey_out"),
    )
}

#[tokio::test]
async fn rsa_keys_verify_from_pem_and_from_a_key_set() {
    let random = SystemRandom::new();
    let (pair, pem, pkcs1) = rsa();
    let RsaPublicKeyComponents::<Vec<u8>> { n, e } = pair.public().into();
    let set = json!({"keys": [{"kty": "RSA", "kid": "r1", "n": encode(n), "e": encode(e)}]});
    let claims = json!({"sub": "ann", "exp": FAR});
    let files = [
        open("public_key_file", pem.as_bytes(), json!({})),
        open("jwks_file", set.to_string().as_bytes(), json!({})),
    ];
    for (jwt, _folder) in &files {
        let algorithms: [(&str, &'static dyn RsaEncoding); 3] =
            [("RS256", &RSA_PKCS1_SHA256), ("RS384", &RSA_PKCS1_SHA384), ("RS512", &RSA_PKCS1_SHA512)];
        for (alg, encoding) in algorithms {
            let sign = |signed: &[u8]| {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(encoding, &random, signed, &mut signature).unwrap();
                signature
            };
            let good = token(&json!({"alg": alg}), &claims, sign);
            assert_eq!(check(jwt, &good).await, Ok(Some("ann".into())), "{alg}");
            // Signed by the same key, but not as it says.
            let other = if alg == "RS256" { "RS512" } else { "RS256" };
            let bad = token(&json!({"alg": other}), &claims, sign);
            assert_eq!(check(jwt, &bad).await, Err(Denied::BadCredentials), "{alg} as {other}");
            let (head, signature) = good.rsplit_once('.').unwrap();
            let forged = format!("{head}.{}", encode(vec![0; signature.len() * 3 / 4]));
            assert_eq!(check(jwt, &forged).await, Err(Denied::BadCredentials));
        }
        let confused = token(&json!({"alg": "HS256"}), &claims, |signed| {
            hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, pem.as_bytes()), signed).as_ref().to_vec()
        });
        assert_eq!(check(jwt, &confused).await, Err(Denied::BadCredentials));
    }
    let refused = secret(pem.as_bytes()).err().unwrap();
    assert!(refused.contains("public_key_file"), "a public key is no secret: {refused}");
    let refused = public_key(pkcs1.as_bytes()).err().unwrap();
    assert!(refused.contains("openssl rsa -RSAPublicKey_in -pubout"), "{refused}");
}

#[tokio::test]
async fn p384_keys_verify_from_pem_and_from_a_key_set() {
    let random = SystemRandom::new();
    let made = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let pair =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &made.serialize_der(), &random).unwrap();
    let point = pair.public_key().as_ref();
    let set = json!({"keys": [
        {"kty": "EC", "crv": "P-384", "kid": "k1", "x": encode(&point[1..49]), "y": encode(&point[49..])},
    ]});
    let pem = made.public_key_pem();
    let claims = json!({"sub": "ann", "exp": FAR});
    let sign = |signed: &[u8]| pair.sign(&random, signed).unwrap().as_ref().to_vec();
    for (file, content) in [("public_key_file", pem), ("jwks_file", set.to_string())] {
        let (jwt, _folder) = open(file, content.as_bytes(), json!({}));
        assert_eq!(
            check(&jwt, &token(&json!({"alg": "ES384"}), &claims, sign)).await,
            Ok(Some("ann".into()))
        );
        for alg in ["ES256", "RS256", "HS384"] {
            let bad = token(&json!({"alg": alg}), &claims, sign);
            assert_eq!(check(&jwt, &bad).await, Err(Denied::BadCredentials), "{alg}");
        }
    }
}

#[test]
fn what_others_may_have_is_no_secret_however_it_is_written() {
    let authority = headworks_test_certificates::Authority::new("idp");
    let pem = authority.pem.as_bytes();
    let der = rustls::pki_types::CertificateDer::from_pem_slice(pem).unwrap().to_vec();
    let spki = rcgen::KeyPair::from_pem(&authority.key()).unwrap().public_key_pem();
    let spki = SubjectPublicKeyInfoDer::from_pem_slice(spki.as_bytes()).unwrap().to_vec();
    let set = json!({"keys": [{"kty": "RSA", "n": encode(vec![7; 256]), "e": "AQAB"}]}).to_string();
    let base64 = base64::engine::general_purpose::STANDARD.encode(&spki);
    for (what, bytes) in [
        ("text before PEM", [b"Certificate:\n    Data:\n", pem].concat()),
        ("a certificate", der.clone()),
        ("a public key", spki.clone()),
        ("base64 of one", base64.clone().into_bytes()),
        ("in lines", [base64.as_bytes()[..64].to_vec(), base64.as_bytes()[64..].to_vec()].join(&b"\n"[..])),
        ("for URLs", encode(&spki).into_bytes()),
        ("a key set", set.clone().into_bytes()),
        ("a key set in base64", encode(set).into_bytes()),
        ("a key of SSH", format!("ssh-rsa {base64} idp").into_bytes()),
        ("a token", hs256(&json!({"sub": "ann", "exp": FAR})).into_bytes()),
        ("zeros", vec![0; 40]),
        ("blanks", vec![b' '; 40]),
        ("a word again and again", b"secret".repeat(9)),
    ] {
        assert!(secret(&bytes).is_err(), "{what} is taken for a secret");
    }
    for n in 0..=255 {
        let random = Sha256::digest([n; 4]);
        assert!(secret(&[&random[..], &random[..]].concat()).is_ok(), "{n}");
        assert!(secret(base64::engine::general_purpose::STANDARD.encode(random).as_bytes()).is_ok(), "{n}");
    }
}

#[tokio::test]
async fn a_token_stands_as_long_as_the_key_that_signed_it_is_listed() {
    let key = |secret: &[u8]| json!({"kty": "oct", "k": encode(secret)});
    let other = [3; 32];
    let set = |keys: &[Value]| json!({ "keys": keys }).to_string();
    let (jwt, folder) = open("jwks_file", set(&[key(&other), key(SECRET)]).as_bytes(), json!({}));
    let token = hs256(&json!({"sub": "ann", "exp": FAR}));
    let identity = jwt.check(token.as_bytes()).await.unwrap().unwrap();
    let file = folder.path().join("keys");
    for (content, holds) in [
        (set(&[key(SECRET)]), true),
        (String::new(), true),
        ("{\"keys\":[".to_owned(), true),
        (set(&[key(&other)]), false),
    ] {
        crate::access::watched::put(&file, &content);
        jwt.refresh();
        assert_eq!(identity.proofs[0].holds(), holds, "{content}");
    }
}
