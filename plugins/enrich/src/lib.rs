//! Adds what is known of a device to its messages.
//!
//! The host's table of devices holds a JSON object per device. Its fields that
//! the config names are spliced into the payload, but never over what the
//! device sent, unless told so. Each device of a batch is asked for once.

mod settings;

pub use settings::{Settings, Unknown};

use headworks_guest::devices::Lookup;
use headworks_guest::json::Raw;
use headworks_guest::prelude::*;

pub struct Enrich {
    settings: Settings,
    devices: Lookup,
    /// Why the devices of this batch are not known.
    unavailable: Option<String>,
    /// Per distinct device of the batch.
    additions: Vec<Addition>,
    /// Members as JSON, `"site":"north","model":"T1"`, one device after another.
    members: Vec<u8>,
}

/// What is to be added for one device.
#[derive(Clone, Copy)]
enum Addition {
    /// The host's table does not have it.
    Unknown,
    /// A part of `members`; empty where its object has none of the fields.
    Members { begin: usize, end: usize },
}

impl Plugin for Enrich {
    const CONFIG_SCHEMA: &'static str = include_str!("config.schema.json");

    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        Ok(Self {
            settings: Settings::read(config)?,
            devices: Lookup::new(),
            unavailable: None,
            additions: Vec::new(),
            members: Vec::new(),
        })
    }

    fn begin(&mut self, messages: &Messages<'_>) {
        self.additions.clear();
        self.members.clear();
        self.unavailable = None;
        if let Err(error) = self.devices.load(messages) {
            self.unavailable = Some(format!("the table of devices is not available: {}", error.reason));
            return;
        }
        for number in 0..self.devices.len() {
            let addition = render(&self.settings, self.devices.object(number), &mut self.members);
            self.additions.push(addition);
        }
    }

    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
        if let Some(reason) = &self.unavailable {
            return Verdict::retry(reason.clone());
        }
        let number = self.devices.number(message);
        let members = match self.additions[number] {
            Addition::Unknown => return self.unknown(message),
            Addition::Members { begin, end } if begin == end => return Verdict::Keep,
            Addition::Members { begin, end } => &self.members[begin..end],
        };
        let payload = message.payload();
        let names = self.settings.names();
        let mut sent = [None; Settings::FIELDS_MAX];
        if let Err(error) = find(payload, names, &mut sent) {
            return Verdict::fail(format!("payload is not a JSON object: {error}"));
        }
        if sent.iter().all(Option::is_none) {
            return out
                .emit()
                .payload_with(|buffer| {
                    json::insert_members(payload, members, buffer).expect("it was checked above");
                })
                .verdict();
        }
        let object = self.devices.object(number);
        match merge(&self.settings, payload, object, &sent) {
            Some(merged) => out.emit().payload(&merged).verdict(),
            None => Verdict::Keep,
        }
    }
}

impl Enrich {
    fn unknown(&self, message: &Message<'_>) -> Verdict {
        match self.settings.unknown {
            Unknown::Keep => Verdict::Keep,
            Unknown::Drop => Verdict::Drop,
            Unknown::Fail => {
                Verdict::fail(format!("device {:?} is not in the table of devices", message.device()))
            }
        }
    }
}

/// The fields of a device's object that the config names, ready to be spliced in.
fn render(settings: &Settings, object: &[u8], members: &mut Vec<u8>) -> Addition {
    if object.is_empty() {
        return Addition::Unknown;
    }
    let begin = members.len();
    let mut known = [None; Settings::FIELDS_MAX];
    if find(object, settings.fields(), &mut known).is_err() {
        return Addition::Unknown;
    }
    for (name, value) in settings.names().iter().zip(known) {
        if let Some(value) = value {
            if members.len() > begin {
                members.push(b',');
            }
            json::write_member_name(members, name);
            members.extend_from_slice(value.as_bytes());
        }
    }
    Addition::Members { begin, end: members.len() }
}

/// The way for payloads that have some of the fields already. None if nothing changes.
fn merge(settings: &Settings, payload: &[u8], object: &[u8], sent: &[Option<Raw<'_>>]) -> Option<Vec<u8>> {
    let mut known = [None; Settings::FIELDS_MAX];
    find(object, settings.fields(), &mut known).ok()?;
    let mut merged = payload.to_vec();
    let mut changed = false;
    for ((name, value), sent) in settings.names().iter().zip(known).zip(sent) {
        let Some(value) = value else { continue };
        if sent.is_some() && !settings.overwrite {
            continue;
        }
        let mut next = Vec::new();
        json::set_field(&merged, name, value.as_bytes(), &mut next).ok()?;
        merged = next;
        changed = true;
    }
    changed.then_some(merged)
}

fn find<'a>(
    doc: &'a [u8],
    names: &[String],
    found: &mut [Option<Raw<'a>>; Settings::FIELDS_MAX],
) -> Result<(), json::Error> {
    json::get_each(doc, names, found)
}

headworks_guest::plugin!(Enrich);
