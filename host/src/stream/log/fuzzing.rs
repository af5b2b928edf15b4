//! A target of [`crate::fuzzing`]: what lies on the disk.

use super::frame::{Changes, HEADER_BYTES, change_len, decode, entry};
use super::segment;

const PARTITIONS: u16 = 4;

/// A frame, or the header of a segment: as it is, and with right checksums.
pub fn log_frame(data: &[u8]) {
    frame(data);
    if data.len() >= HEADER_BYTES {
        frame(&resealed(data.to_vec()));
    }
    segment_header(data);
    if let Some(head) = data.first_chunk::<128>() {
        let mut head = *head;
        let crc = crc32c::crc32c(&head[..124]);
        head[124..].copy_from_slice(&crc.to_le_bytes());
        segment_header(&head);
    }
}

/// Reads all that a decoded frame points to.
pub fn frame(bytes: &[u8]) {
    let Ok(decoded) = decode(bytes, PARTITIONS) else { return };
    assert!(decoded.header.total_len() <= bytes.len() as u64);
    let (entries, data) = (&bytes[decoded.entries], &bytes[decoded.data]);
    for i in 0..decoded.header.count as usize {
        let entry = entry(entries, i);
        for span in [entry.topic, entry.payload, entry.properties, entry.route, entry.device] {
            assert!(data.get(span.range()).is_some());
        }
        assert!(std::str::from_utf8(&data[entry.topic.range()]).is_ok() && entry.partition.0 < PARTITIONS);
    }
    let state = &bytes[decoded.state];
    let read: usize = Changes(state).map(|(key, value)| change_len(key, value)).sum();
    assert!(read <= state.len());
}

/// A frame whose CRCs are right whatever was changed in it.
pub fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..]);
    bytes[36..40].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn segment_header(bytes: &[u8]) {
    if let Ok(header) = segment::Header::decode(bytes) {
        assert_eq!(segment::Header::decode(&header.encode()), Ok(header));
    }
}
