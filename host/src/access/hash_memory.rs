//! The memory in which Argon2 computes: 19 MiB for a hash made by `headworks passwd`.
//!
//! Buffers are reused from one verification to the next. If each verification allocated a new buffer,
//! the memory would not be reused: glibc before 2.38 does not reuse a freed block of the heap for the
//! next aligned block of the same size (sourceware bug 14581), and each verifying thread has a heap of
//! its own.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use argon2::Block;

/// Time after which buffers that no verification has used are freed.
const UNUSED_MAX: Duration = Duration::from_secs(10);
/// Smallest address space of a buffer in blocks; only used blocks take memory. An allocation above 64
/// MiB never comes from a heap, which would keep it: no heap of glibc is larger, and none of its
/// thresholds for `mmap` and trimming rises above that.
const RESERVED_BLOCKS: usize = (65 << 20) / Block::SIZE;

/// Buffers for as many verifications as run concurrently, each as large as the costliest hash for which
/// it was used.
pub(super) struct HashMemory(Mutex<Unused>);

struct Unused {
    buffers: Vec<Vec<Block>>,
    since: Instant,
}

impl HashMemory {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Unused { buffers: Vec::new(), since: Instant::now() }))
    }

    /// Runs `work` with `blocks` blocks, whose contents are unspecified. Returns `None` if the system
    /// has no memory for them.
    pub(super) fn with<T>(&self, blocks: usize, work: impl FnOnce(&mut [Block]) -> T) -> Option<T> {
        let unused = self.lock().buffers.pop();
        let mut buffer = unused.filter(|buffer| buffer.capacity() >= blocks).unwrap_or_default();
        if buffer.capacity() < blocks {
            buffer.try_reserve_exact(blocks.max(RESERVED_BLOCKS)).ok()?;
        }
        if buffer.len() < blocks {
            buffer.resize(blocks, Block::new());
        }
        let done = work(&mut buffer[..blocks]);
        let mut unused = self.lock();
        unused.buffers.push(buffer);
        unused.since = Instant::now();
        Some(done)
    }

    /// Frees the buffers that were not used for [`UNUSED_MAX`].
    pub(super) fn give_back_unused(&self, now: Instant) {
        let mut unused = self.lock();
        if now.saturating_duration_since(unused.since) >= UNUSED_MAX {
            let buffers = std::mem::take(&mut unused.buffers);
            drop(unused);
            drop(buffers);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Unused> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl HashMemory {
        /// Number of buffers that wait for a verification, and their blocks.
        fn unused(&self) -> (usize, usize) {
            let unused = self.lock();
            (unused.buffers.len(), unused.buffers.iter().map(Vec::len).sum())
        }
    }

    #[test]
    fn one_verification_after_the_other_uses_the_same_memory_however_much_each_needs() {
        let memory = HashMemory::new();
        for (blocks, kept) in [(8, 8), (64, 64), (8, 64), (RESERVED_BLOCKS + 1, RESERVED_BLOCKS + 1)] {
            assert_eq!(memory.with(blocks, |given| given.len()), Some(blocks));
            assert_eq!(memory.unused(), (1, kept));
        }
        memory.with(8, |_| memory.with(8, |_| ()));
        assert_eq!(memory.unused().0, 2, "two at a time");
    }

    #[test]
    fn memory_that_nobody_uses_goes_back_to_the_system() {
        let memory = HashMemory::new();
        memory.with(8, |_| ());
        let used_at = memory.lock().since;
        memory.give_back_unused(used_at + UNUSED_MAX / 2);
        assert_eq!(memory.unused().0, 1);
        memory.give_back_unused(used_at + UNUSED_MAX);
        assert_eq!(memory.unused().0, 0);
    }

    #[test]
    fn more_memory_than_there_can_be_is_no_verification() {
        assert_eq!(HashMemory::new().with(usize::MAX, |_| ()), None);
    }
}
