//! Frame decoding is total: any bytes give a checked frame or an error.

use bytes::BytesMut;
use proptest::prelude::*;

use super::*;
use crate::stream::log::frame::{Around, Broken, Header, Kind, decode};
use crate::stream::log::fuzzing::{self, resealed};

fn encoded(payloads: &[Vec<u8>], key: &[u8]) -> Vec<u8> {
    let (mut entries, mut data, mut state) = (BytesMut::new(), BytesMut::new(), Vec::new());
    for payload in payloads {
        frame::push_message(&mut entries, &mut data, &message("acme/d/reading", payload));
    }
    frame::push_change(&mut state, key, Some(b"v"));
    let mut header = Header {
        marker: 77,
        kind: Kind::Data,
        flags: 0,
        stored_len: 0,
        base: 5,
        count: payloads.len() as u32,
        body_crc: 0,
        durable_frames: 1,
        durable_through: 5,
        append_us: 9,
        received_least_us: 7,
        received_greatest_us: 7,
        sequence: 1,
        previous_crc: 3,
        header_len: 0,
        crc: 0,
    };
    Around::new(&mut header, &entries, &data, &state).parts(&entries, &data, &state).concat()
}

#[test]
fn a_stream_that_takes_any_message_takes_one_larger_than_its_buffer_alone() {
    let large = payload(1, small().commit_buffer_bytes_max.0 as usize);
    for takes_any_message in [false, true] {
        let (disk, clock) = (SimDisk::new(3), new_clock());
        let config = Config { takes_any_message, ..small() };
        let (log, _) = manual(&disk, &config, &clock).unwrap();
        log.append(&[message("a/b", b"before")], &[]).unwrap();
        let one = [message("a/b", &large)];
        let two = [one[0], one[0]];
        assert!(matches!(log.append(&two, &[]), Err(AppendError::TooLarge(_))));
        if !takes_any_message {
            assert!(matches!(log.append(&one, &[]), Err(AppendError::TooLarge(_))));
            continue;
        }
        assert_eq!(log.append(&one, &[]), Err(AppendError::Full), "not beside others");
        commit(&log).unwrap();
        log.append(&one, &[StateChange { key: b"k", value: Some(b"v") }]).unwrap();
        commit(&log).unwrap();
        log.append(&[message("a/b", b"after")], &[]).unwrap();
        commit(&log).unwrap();
        disk.restart_process();
        let (log, _) = manual(&disk, &config, &clock).unwrap();
        let read = block_on(read_all(&*log, 1));
        assert_eq!(read, [(1, Some(large.clone())), (2, Some(b"after".to_vec()))]);
    }
}

#[test]
fn every_flipped_byte_of_a_frame_is_seen() {
    let bytes = encoded(&[b"one".to_vec(), b"second".to_vec()], b"key");
    assert!(decode(&bytes, 4).is_ok());
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 4;
        assert!(decode(&bytes, 4).is_err(), "byte {at}");
        assert!(decode(&bytes[..at], 4).is_err());
    }
    assert_eq!(decode(&bytes[..10], 4), Err(Broken::Short));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzzing::frame(&bytes);
        if bytes.len() >= frame::HEADER_BYTES {
            fuzzing::frame(&resealed(bytes));
        }
    }

    #[test]
    fn a_changed_frame_with_right_checksums_never_points_outside(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..5),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in 0..64_usize,
    ) {
        let mut bytes = encoded(&payloads, b"key");
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        fuzzing::frame(&resealed(bytes.clone()));
        bytes.truncate(bytes.len() - cut.min(bytes.len() - frame::HEADER_BYTES));
        fuzzing::frame(&resealed(bytes));
    }
}
