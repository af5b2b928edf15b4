//! The form in which sinks into streams kept positions before [`super`] had one form for all. It is read,
//! and replaced by the other form in the append that takes its claim.
//!
//! ```text
//! out/ PIPELINE \0 SINK \0 LOG GENERATION c                   epoch, holder
//! out/ PIPELINE \0 SINK \0 LOG GENERATION p PARTITION CHUNK   next offset, length of lineage, lineage,
//!                                                             1 and dead letters of a pass, where there are
//! ```
//!
//! Numbers are big endian. What is in this form is newer than what the other form has of the same
//! partition: it was removed when the claim was taken, so that an older host wrote it since.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{Change, Entries, Id, Kept, KeptPartition, Taken};
use crate::sinks::{Claim, Name};
use crate::stream::StateEntries;

/// Begin of all keys.
pub const PREFIX: &[u8] = b"out/";
const CLAIM: u8 = b'c';
const PARTITION: u8 = b'p';

/// Reads claims of entries. What cannot be read is left out.
pub fn read(entries: StateEntries) -> BTreeMap<Id, Kept> {
    let mut claims: BTreeMap<Id, Kept> = BTreeMap::new();
    let mut chunks: BTreeMap<(Id, u16), Vec<u8>> = BTreeMap::new();
    for (key, value) in entries {
        match read_key(&key) {
            Some((id, None)) => {
                let Some((epoch, holder)) = value.split_first_chunk() else { continue };
                let (epoch, holder) = (u64::from_be_bytes(*epoch), text(holder));
                let kept = claims.entry(id).or_default();
                kept.taken = Some(Taken { epoch, holder, at: None, target: String::new() });
            }
            // Chunks come in their order, because it is that of the keys.
            Some((id, Some(partition))) => chunks.entry((id, partition)).or_default().extend(value),
            None => {}
        }
    }
    for ((id, partition), bytes) in chunks {
        let Some(kept) = read_position(&bytes) else { continue };
        claims.entry(id).or_default().partitions.insert(partition, kept);
    }
    claims
}

/// Returns the changes that remove what is in this form of the claim under one of its names.
pub fn removed(entries: Entries<'_>, claim: &Claim, (pipeline, sink): &Name) -> Vec<Change> {
    let names = [PREFIX, pipeline.as_bytes(), &[0], sink.as_bytes(), &[0]].concat();
    let claim = [&names[..], claim.log.as_bytes(), &claim.generation.to_be_bytes()].concat();
    entries(&claim).into_iter().map(|(key, _)| (key, None)).collect()
}

impl Kept {
    /// Takes over what the former form has of the same claim.
    pub fn overlay(&mut self, former: Kept) {
        let epoch = |kept: &Kept| kept.taken.as_ref().map(|taken| taken.epoch);
        if epoch(&former) > epoch(self) {
            self.taken = former.taken;
        }
        self.partitions.extend(former.partitions);
        self.is_former = true;
    }
}

/// Reads a key: whose it is, and of which partition, if of one.
fn read_key(key: &[u8]) -> Option<(Id, Option<u16>)> {
    let mut names = key.strip_prefix(PREFIX)?.splitn(3, |byte| *byte == 0);
    let name = (text(names.next()?), text(names.next()?));
    let (log, rest) = names.next()?.split_first_chunk()?;
    let (generation, rest) = rest.split_first_chunk()?;
    let partition = match rest {
        [CLAIM] => None,
        [PARTITION, high, low, _, _] => Some(u16::from_be_bytes([*high, *low])),
        _ => return None,
    };
    Some(((Uuid::from_bytes(*log), u32::from_be_bytes(*generation), name), partition))
}

fn read_position(bytes: &[u8]) -> Option<KeptPartition> {
    let (next, rest) = bytes.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let (lineage, letters) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some(KeptPartition {
        next: Some(u64::from_be_bytes(*next)),
        openings: Some(text(lineage)),
        letters: letters.split_first().map(|(_, letters)| letters.to_vec()),
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
