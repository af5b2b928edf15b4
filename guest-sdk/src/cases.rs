//! Case files: a plugin's config, some messages, and what must become of them.
//!
//! A case is a JSON file in `plugins/NAME/cases/`; `plugins/README.md` describes
//! the format. The same files run natively here ([`check_folder`]) and in the
//! host's own runtime.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::abi::{entry, record, set, verdict};
use crate::batch::{Answer, Messages};
use crate::config::Config;
use crate::plugin::{Context, Plugin, devices};
use crate::testing::BatchBuilder;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// The promise, for a person.
    pub about: String,
    #[serde(default)]
    pub config: serde_json::Value,
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// The batch's `now`; 2026-01-01T00:00:00Z if not said.
    #[serde(default = "default_now_us")]
    pub now_us: u64,
    /// The host's table.
    #[serde(default)]
    pub devices: BTreeMap<String, serde_json::Value>,
    /// All in one batch.
    #[serde(default)]
    pub messages: Vec<CaseMessage>,
    /// What is wrong with the config; then there are no messages.
    #[serde(default)]
    pub problems: Vec<CaseProblem>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaseMessage {
    pub topic: String,
    #[serde(default)]
    pub payload: Payload,
    /// From the topic where it fits the namespace, else `client`.
    pub device: Option<String>,
    #[serde(default)]
    pub route: String,
    pub event_us: Option<i64>,
    pub expect: Expect,
}

/// Text, or `{"base64": "…"}`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Payload {
    Text(String),
    Bytes { base64: String },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expect {
    /// It goes on as it came, in every field.
    Keep,
    Drop,
    /// To dead letters, with exactly this reason.
    Fail(String),
    Retry(String),
    /// These go on, in this order.
    Emit(Vec<CaseOutput>),
}

/// What is not said must be as the message has it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CaseOutput {
    pub topic: Option<String>,
    pub payload: Option<Payload>,
    pub device: Option<String>,
    pub route: Option<String>,
    pub event_us: Option<i64>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CaseProblem {
    pub path: String,
    pub reason: String,
}

/// A message that goes on, with every field as it then is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub topic: String,
    pub payload: Vec<u8>,
    pub device: String,
    pub route: String,
    pub event_us: Option<i64>,
}

/// What became of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Became {
    /// One with the fields of the source is the same as kept.
    Sent(Vec<Sent>),
    Dropped,
    Failed(String),
    Retried(String),
}

impl Case {
    pub fn read(path: &Path) -> Self {
        let text =
            std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Every case of a folder with its file name, by name.
    pub fn read_folder(folder: &Path) -> Vec<(String, Self)> {
        let entries =
            std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut paths: Vec<_> =
            entries.map(|entry| entry.expect("a folder that can be read").path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        paths.iter().map(|path| (name(path), Self::read(path))).collect()
    }

    /// The field names of the namespace by level.
    pub fn namespace_fields(&self) -> Vec<String> {
        self.namespace.split('/').map(|level| level.trim_matches(['{', '}']).to_owned()).collect()
    }

    /// The config as the host hands it over.
    pub fn config_text(&self) -> String {
        if self.config.is_null() { String::from("{}") } else { self.config.to_string() }
    }

    /// The message as it comes in, and whether its topic fits the namespace.
    pub fn source(&self, message: &CaseMessage) -> (Sent, bool) {
        let levels: Vec<&str> = message.topic.split('/').collect();
        let fields = self.namespace_fields();
        let fits = levels.len() == fields.len() && levels.iter().all(|level| !level.is_empty());
        let level = fields.iter().position(|field| field == "device_id").filter(|_| fits);
        let device = message.device.clone();
        let device = device.unwrap_or_else(|| level.map_or("client", |level| levels[level]).to_owned());
        let sent = Sent {
            topic: message.topic.clone(),
            payload: message.payload.bytes(),
            device,
            route: message.route.clone(),
            event_us: message.event_us,
        };
        (sent, fits)
    }

    /// What must become of the message.
    pub fn expected(&self, message: &CaseMessage) -> Became {
        let source = self.source(message).0;
        match &message.expect {
            Expect::Keep => Became::Sent(vec![source]),
            Expect::Drop => Became::Dropped,
            Expect::Fail(reason) => Became::Failed(reason.clone()),
            Expect::Retry(reason) => Became::Retried(reason.clone()),
            Expect::Emit(outputs) => {
                Became::Sent(outputs.iter().map(|output| output.over(&source)).collect())
            }
        }
    }

    /// Fails the test with file and message number where something else became of one.
    pub fn check(&self, file: &str, became: &[Became]) {
        assert_eq!(became.len(), self.messages.len(), "{file}: {}: answers", self.about);
        for (number, (message, became)) in self.messages.iter().zip(became).enumerate() {
            let expected = self.expected(message);
            assert!(
                *became == expected,
                "{file}: {}: message {number}\n  expected {}\n  became   {}",
                self.about,
                expected.shown(),
                became.shown()
            );
        }
    }
}

impl CaseOutput {
    fn over(&self, source: &Sent) -> Sent {
        Sent {
            topic: self.topic.clone().unwrap_or_else(|| source.topic.clone()),
            payload: self.payload.as_ref().map_or_else(|| source.payload.clone(), Payload::bytes),
            device: self.device.clone().unwrap_or_else(|| source.device.clone()),
            route: self.route.clone().unwrap_or_else(|| source.route.clone()),
            event_us: self.event_us.or(source.event_us),
        }
    }
}

impl Default for Payload {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl Payload {
    pub fn bytes(&self) -> Vec<u8> {
        use base64::Engine as _;
        match self {
            Self::Text(text) => text.clone().into_bytes(),
            Self::Bytes { base64 } => {
                base64::engine::general_purpose::STANDARD.decode(base64).expect("base64 in a case file")
            }
        }
    }
}

impl Became {
    fn shown(&self) -> String {
        match self {
            Self::Sent(messages) => {
                let one = |m: &Sent| {
                    let payload = String::from_utf8_lossy(&m.payload).into_owned();
                    format!(
                        "\n    {} {payload} device {:?} route {:?} event {:?}",
                        m.topic, m.device, m.route, m.event_us
                    )
                };
                format!("sent:{}", messages.iter().map(one).collect::<String>())
            }
            other => format!("{other:?}"),
        }
    }
}

/// Runs every case of a folder natively; panics at the first that fails.
pub fn check_folder<P: Plugin>(folder: impl AsRef<Path>) {
    let cases = Case::read_folder(folder.as_ref());
    assert!(!cases.is_empty(), "no cases in {}", folder.as_ref().display());
    for (file, case) in cases {
        check_natively::<P>(&file, &case);
    }
}

fn check_natively<P: Plugin>(file: &str, case: &Case) {
    devices::set_for_tests(case.devices.iter().map(|(id, object)| (id.clone(), object.to_string())));
    let context = Context {
        step: "test/step".into(),
        partitions: 1,
        namespace: case.namespace_fields(),
        ..Context::default()
    };
    let mut plugin = match P::new(&Config::new(case.config_text()), &context) {
        Ok(plugin) => plugin,
        Err(problems) => {
            let found: Vec<_> =
                problems.into_iter().map(|p| CaseProblem { path: p.path, reason: p.reason }).collect();
            assert_eq!(found, case.problems, "{file}: {}", case.about);
            return;
        }
    };
    assert!(case.problems.is_empty(), "{file}: {}: its config was accepted", case.about);
    let mut batch = BatchBuilder::new(case.now_us);
    for message in &case.messages {
        let (source, fits) = case.source(message);
        batch.message_with(
            &source.topic,
            &source.payload,
            &source.device,
            fits,
            &source.route,
            source.event_us,
        );
    }
    let messages = batch.messages(&context.namespace);
    let mut answer = Answer::new();
    plugin.begin(&messages);
    plugin.process_all(&messages, &mut answer);
    case.check(file, &read_answer(&messages, &batch, &answer));
}

/// What the host makes of an answer, without its checks.
fn read_answer(messages: &Messages<'_>, batch: &BatchBuilder, answer: &Answer) -> Vec<Became> {
    let (_, index, segment) = batch.parts();
    let word =
        |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at * 4..at * 4 + 4].try_into().expect("4 bytes"));
    let mut records = answer.outputs.chunks_exact(64).collect::<Vec<_>>();
    if !answer.outputs.is_empty() {
        records = answer.outputs[32..].chunks_exact(64).collect();
    }
    messages
        .iter()
        .map(|message| {
            let number = message.number();
            let entry = &index[number * 64..][..64];
            let mine = || records.iter().filter(|r| word(r, record::SOURCE) as usize == number);
            let span = |bytes: &[u8], at: usize| {
                let (begin, rest) = (word(bytes, at) as usize, word(bytes, at + 1));
                let from = if rest >> 28 == 15 { &answer.data[..] } else { segment };
                from[begin..begin + (rest & 0x0fff_ffff) as usize].to_vec()
            };
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8, as the contract says");
            let sent = |r: Option<&[u8]>| {
                let field = |bit: u32, at: usize, source: usize| match r {
                    Some(r) if word(r, record::SET) & bit != 0 => span(r, at),
                    _ => span(entry, source),
                };
                let event_us = match r {
                    Some(r) if word(r, record::SET) & set::EVENT_US != 0 => {
                        let (low, high) = (word(r, record::EVENT_US), word(r, record::EVENT_US + 1));
                        Some((u64::from(high) << 32 | u64::from(low)) as i64)
                    }
                    _ => message.event_us(),
                };
                Sent {
                    topic: text(field(set::TOPIC, record::TOPIC, entry::TOPIC)),
                    payload: field(set::PAYLOAD, record::PAYLOAD, entry::PAYLOAD),
                    device: text(field(set::DEVICE, record::DEVICE, entry::DEVICE)),
                    route: text(field(set::ROUTE, record::ROUTE, entry::ROUTE)),
                    event_us,
                }
            };
            let reason = || text(span(mine().next().expect("a reason"), record::PAYLOAD));
            match answer.verdicts.get(number).copied().unwrap_or(verdict::KEEP) {
                verdict::KEEP => Became::Sent(vec![sent(None)]),
                verdict::DROP => Became::Dropped,
                verdict::FAIL => Became::Failed(reason()),
                verdict::RETRY => Became::Retried(reason()),
                _ => Became::Sent(mine().map(|r| sent(Some(r))).collect()),
            }
        })
        .collect()
}

fn default_namespace() -> String {
    String::from("{org}/{site}/{device_type}/{device_id}/{measurement}")
}

fn default_now_us() -> u64 {
    1_767_225_600_000_000
}
