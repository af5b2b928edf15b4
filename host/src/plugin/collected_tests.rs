use proptest::prelude::*;

use super::super::answer::MADE_PAYLOAD_BYTES_MAX;
use super::super::fuzzing::{self, input};
use super::*;

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

    #[test]
    fn what_passes_the_check_is_a_sound_batch(raw in raw(), gathered in any::<bool>()) {
        fuzzing::check(raw, gathered);
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
            Target { batch: &batch, numbers: None, namespace: &Namespace::default(), attempt: Attempt::ONLY };
        Collected::new(1 << 30).take(&batch, raw, &Limits::default(), 1 << 30, &target)
    };
    assert_eq!(check(MADE_PAYLOAD_BYTES_MAX), Ok(()));
    let what = "its payload is larger than its source's and than 8 MiB";
    assert_eq!(check(MADE_PAYLOAD_BYTES_MAX + 1), Err(Fault::Record { record: 0, what }));
}
