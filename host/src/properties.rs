//! A message's properties in one byte string, as the plugin contract lays them
//! out: `u8 origin | u8 reserved | u16 name length | u32 value length | name |
//! value`, little-endian, repeated. Order and duplicates are kept.

/// At most 65,535 bytes for all properties of a message.
pub const PROPERTIES_BYTES_MAX: usize = 65_535;
/// At most this many properties a message.
pub const PROPERTIES_MAX: usize = 1_024;
const HEADER_BYTES: usize = 8;

/// Names of what only a listener says of a message, the same for all protocols.
pub mod facts {
    pub const CONTENT_TYPE: &str = "content-type";
    pub const RESPONSE_TOPIC: &str = "response-topic";
    pub const CORRELATION_DATA: &str = "correlation-data";
    /// Seconds, in decimal digits.
    pub const EXPIRY_S: &str = "expiry-s";
    pub const CLIENT_ID: &str = "client-id";
    pub const USERNAME: &str = "username";
    /// These, and those of listeners to come: nobody else may set them.
    pub const ALL: [&str; 9] = [
        CONTENT_TYPE,
        RESPONSE_TOPIC,
        CORRELATION_DATA,
        EXPIRY_S,
        CLIENT_ID,
        USERNAME,
        "cert-subject",
        "kafka-key",
        "remote-addr",
    ];
}

/// Who set a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Origin {
    /// Sent by the device: MQTT user property, Kafka or HTTP header.
    Device = 0,
    /// A fact of the protocol, set by the listener; nobody else can set it.
    Listener = 1,
    /// Set by a plugin or by the host on the way.
    Pipeline = 2,
}

impl Origin {
    /// As a property says it; what nobody knows is the pipeline's.
    pub fn of(origin: u8) -> Self {
        match origin {
            0 => Self::Device,
            1 => Self::Listener,
            _ => Self::Pipeline,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Property<'a> {
    pub origin: u8,
    pub name: &'a str,
    pub value: &'a [u8],
}

/// Appends one property. The caller keeps names within u16 and the whole
/// within [`PROPERTIES_BYTES_MAX`].
pub fn push(out: &mut Vec<u8>, origin: Origin, name: &str, value: &[u8]) {
    out.push(origin as u8);
    out.push(0);
    out.extend_from_slice(&(name.len() as u16).to_le_bytes());
    out.extend_from_slice(&(value.len() as u32).to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(value);
}

/// The properties in order; ends at the first that is not whole.
pub fn iter(mut bytes: &[u8]) -> impl Iterator<Item = Property<'_>> {
    std::iter::from_fn(move || {
        let (property, rest) = split_first(bytes)?;
        bytes = rest;
        Some(property)
    })
}

/// The first property with this origin and name.
pub fn get<'a>(bytes: &'a [u8], origin: Origin, name: &str) -> Option<&'a [u8]> {
    iter(bytes).find(|p| p.origin == origin as u8 && p.name == name).map(|p| p.value)
}

/// Whether `bytes` is whole properties within the bounds, origins 0 to 2, names UTF-8.
pub fn is_valid(bytes: &[u8]) -> bool {
    if bytes.len() > PROPERTIES_BYTES_MAX {
        return false;
    }
    let mut rest = bytes;
    let mut count = 0;
    while !rest.is_empty() {
        match split_first(rest) {
            Some((property, after)) if property.origin <= 2 && count < PROPERTIES_MAX => rest = after,
            _ => return false,
        }
        count += 1;
    }
    true
}

fn split_first(bytes: &[u8]) -> Option<(Property<'_>, &[u8])> {
    let header = bytes.get(..HEADER_BYTES)?;
    let name_len = u16::from_le_bytes([header[2], header[3]]) as usize;
    let value_len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    let name_end = HEADER_BYTES + name_len;
    let value_end = name_end.checked_add(value_len)?;
    let name = std::str::from_utf8(bytes.get(HEADER_BYTES..name_end)?).ok()?;
    let value = bytes.get(name_end..value_end)?;
    Some((Property { origin: header[0], name, value }, &bytes[value_end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_keep_order_and_duplicates() {
        let mut bytes = Vec::new();
        push(&mut bytes, Origin::Device, "k", b"1");
        push(&mut bytes, Origin::Listener, "client-id", b"dev");
        push(&mut bytes, Origin::Device, "k", b"");
        assert!(is_valid(&bytes));
        let values: Vec<_> = iter(&bytes).map(|p| (p.origin, p.name, p.value)).collect();
        assert_eq!(values, [(0, "k", &b"1"[..]), (1, "client-id", b"dev"), (0, "k", b"")]);
        assert_eq!(get(&bytes, Origin::Listener, "client-id"), Some(&b"dev"[..]));
        assert!(!is_valid(&bytes[..bytes.len() - 1]));
    }
}
