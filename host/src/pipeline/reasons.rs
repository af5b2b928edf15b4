//! Why redrives had letters rejected again, where the reason is another one than the letter's own.
//!
//! The mark of a letter names a reason by a hash, and the state of the dead letters has the texts:
//! most letters that are rejected again share a few of them. The redrives of all pipelines together keep
//! at most [`REASONS_MAX`] texts ([`KeptReasons`]). Those that no mark names any more are removed before
//! a redrive begins.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::xxh3_64;

use super::letter::shortened;
use super::marks::{Change, MARK_PREFIX};
use crate::stream::{StateEntries, Stream};
use crate::telemetry::alike;

/// Begins the state keys, then the hash, big-endian.
const REASON_PREFIX: &[u8] = b"rr";
/// Texts that are kept; half of them as they are, the others without their numbers.
pub const REASONS_MAX: usize = if cfg!(test) { 16 } else { 256 };
const TEXT_BYTES_MAX: usize = 1_024;
/// Stands for all reasons beyond those that are kept.
const OTHER: u64 = 0;
const OTHER_TEXT: &str = "another reason than the first one: there are too many different ones to keep; send it alone to learn its own";

/// How often redrives had a letter rejected as before, and why the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tries {
    pub count: u32,
    /// `None`: the letter's own reason.
    reason: Option<u64>,
}

impl Tries {
    /// `3`, or `3 9f8a7c6b5d4e3f21`; empty where it was never rejected again.
    pub fn text(self) -> String {
        match (self.count, self.reason) {
            (0, None) => String::new(),
            (count, None) => count.to_string(),
            (count, Some(reason)) => format!("{count} {reason:016x}"),
        }
    }

    /// Reads what [`Self::text`] wrote.
    pub fn read(text: &str) -> Self {
        let (count, reason) =
            text.split_once(' ').map_or((text, None), |(count, reason)| (count, Some(reason)));
        let reason = reason.and_then(|reason| u64::from_str_radix(reason, 16).ok());
        Self { count: count.parse().unwrap_or_default(), reason }
    }
}

/// The texts that the state has.
#[derive(Clone, Debug, Default)]
pub struct Reasons(BTreeMap<u64, String>);

/// Texts that are to be added.
type NewReasons = BTreeMap<u64, String>;

/// The texts of a host's dead letters, which all its redrives share: those that the state has, and those
/// that a redrive is about to add.
#[derive(Debug, Default)]
pub struct KeptReasons(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    texts: Reasons,
    /// Texts whose marks are about to be appended, and by how many.
    noted: BTreeMap<u64, usize>,
}

impl KeptReasons {
    pub fn of(dead_letters: &dyn Stream) -> Self {
        let texts = Reasons::read(&dead_letters.state(MARK_PREFIX));
        Self(Mutex::new(Kept { texts, ..Kept::default() }))
    }

    /// Held from a look at all marks to the removal of what none of them names, and over the append of
    /// marks of letters that a redrive takes. Below the sendings of a pass, above the dead letters' log.
    pub fn change(&self) -> ReasonsChange<'_> {
        ReasonsChange(self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No redrive notes a reason, or takes letters, before this is dropped.
pub struct ReasonsChange<'k>(MutexGuard<'k, Kept>);

impl ReasonsChange<'_> {
    /// Returns the texts that none of these names, and that no mark which is about to be appended names.
    pub fn unused(&self, tries: impl Iterator<Item = Tries>) -> Vec<u64> {
        let used: BTreeSet<u64> = tries.filter_map(|tries| tries.reason).collect();
        let kept = self.0.texts.0.keys().copied();
        kept.filter(|hash| !used.contains(hash) && !self.0.noted.contains_key(hash)).collect()
    }

    /// Forgets a text whose removal is appended.
    pub fn forget(&mut self, reason: u64) {
        self.0.texts.0.remove(&reason);
    }
}

/// Reasons of letters whose marks are about to be appended. Their texts are kept until this is dropped:
/// once the marks are in the state, these keep them.
#[derive(Debug)]
pub struct Noted {
    kept: Arc<KeptReasons>,
    new: NewReasons,
}

impl Noted {
    pub fn new(kept: &Arc<KeptReasons>) -> Self {
        Self { kept: Arc::clone(kept), new: NewReasons::new() }
    }

    /// As [`Reasons::note`].
    pub fn note(&mut self, tries: Tries, is_counted: bool, reason: &str, own: u64) -> Tries {
        let kept = &mut *self.kept.lock();
        let before = self.new.len();
        let tries = kept.texts.note(tries, is_counted, reason, own, &mut self.new);
        if let Some(reason) = tries.reason.filter(|_| self.new.len() > before) {
            *kept.noted.entry(reason).or_default() += 1;
        }
        kept.texts.add(&self.new);
        tries
    }

    /// Returns the changes that keep the texts, to be appended with the marks.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        self.new.iter().map(|(hash, text)| (key(*hash), Some(text.clone().into_bytes())))
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        let noted = &mut self.kept.lock().noted;
        for hash in self.new.keys() {
            if let Some(count) = noted.get_mut(hash) {
                *count -= 1;
                if *count == 0 {
                    noted.remove(hash);
                }
            }
        }
    }
}

impl Reasons {
    /// Reads them from the dead letters' state below [`MARK_PREFIX`].
    pub fn read(state: &StateEntries) -> Self {
        debug_assert!(REASON_PREFIX.starts_with(MARK_PREFIX));
        let text = |(key, value): &(Vec<u8>, Vec<u8>)| {
            let hash = key.strip_prefix(REASON_PREFIX)?.try_into().ok().map(u64::from_be_bytes)?;
            Some((hash, String::from_utf8_lossy(value).into_owned()))
        };
        Self(state.iter().filter_map(text).collect())
    }

    /// Returns why a letter was rejected the last time; `None`: for its own reason.
    pub fn text(&self, tries: Tries) -> Option<&str> {
        let reason = tries.reason?;
        Some(self.0.get(&reason).map_or(OTHER_TEXT, String::as_str))
    }

    /// Counts one more rejection, unless `is_counted`, for a reason. `own`: the hash of the letter's
    /// own one. What is not kept yet goes into `new`.
    fn note(&self, tries: Tries, is_counted: bool, reason: &str, own: u64, new: &mut NewReasons) -> Tries {
        let count = tries.count.saturating_add(u32::from(!is_counted));
        let reason = (hash(reason) != own).then(|| self.keep(reason, new));
        Tries { count, reason }
    }

    fn keep(&self, reason: &str, new: &mut NewReasons) -> u64 {
        for (text, max) in [(reason, REASONS_MAX / 2), (&*alike(reason), REASONS_MAX)] {
            let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
            let hash = xxh3_64(text.as_bytes()).max(OTHER + 1);
            let is_kept = self.0.contains_key(&hash);
            if is_kept || self.0.len() < max {
                // Also one that is kept: the redrive that noted it may find no room for it.
                new.entry(hash).or_insert_with(|| text.to_owned());
                return hash;
            }
        }
        OTHER
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn add(&mut self, new: &NewReasons) {
        let missing = new
            .iter()
            .filter(|(hash, _)| !self.0.contains_key(hash))
            .map(|(hash, text)| (*hash, text.clone()));
        self.0.extend(missing.collect::<Vec<_>>());
    }
}

/// The hash of a reason as a letter has it.
pub fn hash(reason: &str) -> u64 {
    xxh3_64(shortened(reason).as_bytes())
}

/// State key of a text.
pub fn key(hash: u64) -> Vec<u8> {
    [REASON_PREFIX, &hash.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_reason_is_told_and_their_number_is_bounded() {
        let own = hash("column 1");
        let kept = Arc::new(KeptReasons::default());
        let mut reasons = Reasons::default();
        let reject = |reasons: &mut Reasons, tries, reason: &str| {
            let mut noted = Noted::new(&kept);
            let tries = noted.note(tries, false, reason, own);
            let state = noted.changes().filter_map(|(key, value)| Some((key, value?))).collect();
            reasons.add(&Reasons::read(&state).0);
            assert_eq!(Tries::read(&tries.text()), tries);
            tries
        };
        let same = reject(&mut reasons, Tries::default(), "column 1");
        assert_eq!((same.count, reasons.text(same)), (1, None));
        let other = reject(&mut reasons, same, "column 2");
        assert_eq!((other.count, reasons.text(other)), (2, Some("column 2")));
        let first = reject(&mut reasons, other, "column 1");
        assert_eq!(reasons.text(first), None, "as at first");
        for n in 3..1_000 {
            let tries = reject(&mut reasons, other, &format!("column {n}"));
            let text = reasons.text(tries).unwrap();
            assert!(text == format!("column {n}") || text == "column 0", "{text}");
        }
        for n in 0..1_000 {
            reject(&mut reasons, other, &"x".repeat(n));
        }
        assert_eq!(reasons.0.len(), REASONS_MAX);
        let last = reject(&mut reasons, other, "yes");
        assert!(reasons.text(last).unwrap().starts_with("another reason"));
        assert_eq!(kept.change().unused([other].into_iter()).len(), REASONS_MAX - 1);
        assert_eq!(Tries::read(""), Tries::default());
    }
}
