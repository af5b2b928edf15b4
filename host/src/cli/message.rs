//! Output of a message.

use serde_json::{Map, Value, json};

use super::output::{one_line, time};
use crate::batch::{MessageRef, flags};
use crate::properties;

const PAYLOAD_CHARS_MAX: usize = 160;
/// Most bytes of a binary payload in one line.
const HEX_BYTES_SHOWN: usize = 32;

/// Returns all fields, for scripts. `payload` is the value if the payload is JSON, otherwise text; a
/// binary payload is in `payload_hex`.
pub fn to_json(message: &MessageRef<'_>) -> Map<String, Value> {
    let entry = message.entry;
    let mut all = Map::new();
    all.insert("offset".into(), message.offset().0.into());
    all.insert("partition".into(), entry.partition.0.into());
    all.insert("received".into(), time(entry.received_us).into());
    if let Some(event_us) = message.event_us() {
        all.insert("event_time".into(), time(event_us).into());
    }
    all.insert("topic".into(), message.topic().into());
    all.insert("device".into(), message.device().into());
    if !message.route().is_empty() {
        all.insert("route".into(), message.route().into());
    }
    all.insert("qos".into(), (entry.flags & flags::QOS_MASK).into());
    all.insert("retain".into(), (entry.flags & flags::RETAIN != 0).into());
    let payload = message.payload();
    match (serde_json::from_slice::<Value>(payload), std::str::from_utf8(payload)) {
        (Ok(value), _) => all.insert("payload".into(), value),
        (_, Ok(text)) => all.insert("payload".into(), text.into()),
        _ => all.insert("payload_hex".into(), hex(payload).into()),
    };
    let properties: Vec<Value> = properties::iter(message.properties())
        .map(|p| {
            let origin = ["device", "listener", "pipeline"].get(usize::from(p.origin)).unwrap_or(&"?");
            match std::str::from_utf8(p.value) {
                Ok(value) => json!({ "origin": origin, "name": p.name, "value": value }),
                Err(_) => json!({ "origin": origin, "name": p.name, "value_hex": hex(p.value) }),
            }
        })
        .collect();
    if !properties.is_empty() {
        all.insert("properties".into(), properties.into());
    }
    all
}

/// Returns one line with offset, time, topic, device and payload.
pub fn to_line(message: &MessageRef<'_>) -> String {
    format!(
        "{:>8}  {}  {}  {}  {}",
        message.offset().0,
        time(message.entry.received_us),
        one_line(message.topic(), PAYLOAD_CHARS_MAX),
        one_line(message.device(), PAYLOAD_CHARS_MAX),
        payload_line(message.payload()),
    )
}

pub fn payload_line(payload: &[u8]) -> String {
    match std::str::from_utf8(payload) {
        Ok(text) => one_line(text, PAYLOAD_CHARS_MAX),
        Err(_) => {
            let dots = if payload.len() > HEX_BYTES_SHOWN { "…" } else { "" };
            format!("{} bytes: {}{dots}", payload.len(), hex(&payload[..payload.len().min(HEX_BYTES_SHOWN)]))
        }
    }
}

/// Formats a payload: JSON indented, text unchanged, binary data as a hex dump.
pub fn payload_whole(payload: &[u8]) -> String {
    if let Ok(value) = serde_json::from_slice::<Value>(payload) {
        return serde_json::to_string_pretty(&value).unwrap_or_default();
    }
    match std::str::from_utf8(payload) {
        Ok(text) => text.to_owned(),
        Err(_) => hex_dump(payload),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn hex_dump(bytes: &[u8]) -> String {
    let mut dump = String::new();
    for (line, bytes) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let text: String =
            bytes.iter().map(|&b| if (32..127).contains(&b) { b as char } else { '.' }).collect();
        dump += &format!("{:08x}  {:<47}  {text}\n", line * 16, hex.join(" "));
    }
    dump
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Entry, Span};

    #[test]
    fn an_event_before_1970_has_its_time() {
        let entry = Entry { flags: flags::EVENT_TIME, event_us: -1_500_000, ..Entry::default() };
        let entry = Entry { topic: Span::new(0, 0, 1), ..entry };
        let segments = vec![bytes::Bytes::from_static(b"t")];
        let batch = Batch { segments, entries: vec![entry].into(), ..Batch::default() };
        let shown = to_json(&batch.messages().next().unwrap());
        assert_eq!(shown["event_time"], "1969-12-31T23:59:58.500Z");
    }

    #[test]
    fn payloads_are_shown_as_what_they_are() {
        assert_eq!(payload_whole(br#"{"b":1}"#), "{\n  \"b\": 1\n}");
        assert_eq!(payload_whole(b"not json"), "not json");
        assert_eq!(
            payload_whole(&[0xff, 0x41, 0x00]),
            "00000000  ff 41 00                                         .A.\n"
        );
        assert_eq!(payload_line(&[0xff, 0x00]), "2 bytes: ff00");
    }
}
