use proptest::prelude::*;

use super::super::answer::{MADE_PAYLOAD_BYTES_MAX, ROUTE_BYTES_MAX};
use super::super::arena::spans;
use super::*;
use crate::topic::{self, DEVICE_ID_BYTES_MAX};

fn input(messages: usize) -> Batch {
    let entry = |number: u32| Entry {
        offset: number,
        topic: Span::new(0, 0, 3),
        payload: Span::new(0, 3, 5),
        ..Entry::default()
    };
    Batch {
        segments: vec![bytes::Bytes::from_static(b"a/bhello, world")],
        entries: (0..messages as u32).map(entry).collect(),
        ..Batch::default()
    }
}

/// Words that are often right and often just wrong.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        0..20_u32,
        any::<u32>(),
        (0..17_u32, 0..40_u32).prop_map(|(segment, len)| (segment % 16) << 28 | len),
        Just(u32::MAX),
    ]
}

fn raw() -> impl Strategy<Value = Raw> {
    let header = prop_oneof![
        8 => Just(None),
        1 => prop::collection::vec(word(), 8).prop_map(Some),
    ];
    let records = prop::collection::vec((0..5_u32, 0..128_u32, prop::collection::vec(word(), 14)), 0..6);
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        Just(b"topic/route-and-device-and-payload".to_vec())
    ];
    (prop::collection::vec(0..6_u8, 0..5), header, records, data, 0..3_usize).prop_map(
        |(verdicts, header, mut records, data, cut)| {
            records.sort_by_key(|record| record.0);
            let header = header.unwrap_or_else(|| vec![1, 8, 16, records.len() as u32, 0, 0, 0, 0]);
            let words =
                records.iter().flat_map(|(source, set, rest)| [&[*source, *set][..], &rest[..]].concat());
            let mut outputs: Vec<u8> = header.into_iter().chain(words).flat_map(u32::to_le_bytes).collect();
            outputs.truncate(outputs.len() - cut.min(outputs.len()) * (cut / 2));
            Raw { verdicts, outputs, data }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever a plugin answers, the check does not panic, and what it lets
    /// through is a batch that every reader may trust.
    #[test]
    fn what_passes_the_check_is_a_sound_batch(raw in raw(), gathered in any::<bool>()) {
        let batch = input(4);
        let namespace = Namespace::default();
        let numbers = [0, 1, 2, 3];
        let target = Target {
            batch: &batch,
            numbers: gathered.then_some(&numbers[..]),
            namespace: &namespace,
            retries_used_up: true,
        };
        let verdicts = raw.verdicts.clone();
        let mut collected = Collected::default();
        if collected.take(&batch, raw, &Limits::default(), 1 << 20, &target).is_err() {
            // Nothing of it was taken: the batch goes on as it came.
            let Outcome { passed, refused, dropped, retry, .. } = collected.into_outcome(batch.clone());
            prop_assert_eq!((passed.entries, passed.segments), (batch.entries, batch.segments));
            prop_assert!(refused.is_empty() && dropped == 0 && retry.is_none());
        } else {
            let Outcome { passed, refused, dropped, .. } = collected.into_outcome(batch);
            for entry in &passed.entries {
                for span in spans(entry) {
                    prop_assert!(span.is_empty() || passed.segments[span.segment()].get(span.range()).is_some());
                }
                for text in [entry.topic, entry.route, entry.device] {
                    prop_assert!(std::str::from_utf8(passed.bytes(text)).is_ok());
                }
                prop_assert!(topic::is_valid_name(passed.text(entry.topic)));
                prop_assert!(passed.bytes(entry.route).len() <= ROUTE_BYTES_MAX);
                prop_assert!(passed.bytes(entry.device).len() <= DEVICE_ID_BYTES_MAX);
                prop_assert!(properties::is_valid(passed.bytes(entry.properties)));
                prop_assert!(entry.flags & flags::QOS_MASK != 3);
            }
            prop_assert!(passed.entries.windows(2).all(|pair| pair[0].offset <= pair[1].offset));
            prop_assert!(refused.windows(2).all(|pair| pair[0].index < pair[1].index));
            let of = |wanted: &[u8]| verdicts.iter().filter(|v| wanted.contains(v)).count();
            prop_assert_eq!(dropped as usize, of(&[verdict::DROP]));
            prop_assert_eq!(refused.len(), of(&[verdict::FAIL, verdict::RETRY]));
            prop_assert!(refused.iter().all(|r| r.kind != RefusedKind::Fault));
        }
    }
}

#[test]
fn a_payload_that_a_plugin_made_has_at_most_8_mib() {
    let batch = input(1);
    let check = |len: usize| {
        let mut words = [0_u32; 8 + 16];
        words[..4].copy_from_slice(&[1, 8, 16, 1]);
        words[9] = set::PAYLOAD;
        words[13] = (DATA_SEGMENT as u32) << 28 | len as u32;
        let outputs = words.into_iter().flat_map(u32::to_le_bytes).collect();
        let raw = Raw { verdicts: vec![verdict::EMIT], outputs, data: vec![b'x'; len] };
        let target =
            Target { batch: &batch, numbers: None, namespace: &Namespace::default(), retries_used_up: true };
        Collected::default().take(&batch, raw, &Limits::default(), 1 << 30, &target)
    };
    assert_eq!(check(MADE_PAYLOAD_BYTES_MAX), Ok(()));
    let what = "its payload is larger than its source's and than 8 MiB";
    assert_eq!(check(MADE_PAYLOAD_BYTES_MAX + 1), Err(Fault::Record { record: 0, what }));
}
