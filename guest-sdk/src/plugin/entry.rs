//! The arguments and the result of `batch.process` as the canonical ABI has
//! them (component-model `CanonicalABI.md`, lifting and lowering of lists).
//!
//! By hand, because what is generated copies the list of segments, allocates
//! each answer anew and has the host come back to free it: an entry into wasm,
//! and more than the work of a short batch.

use alloc::vec::Vec;
use core::slice;

use crate::batch::Answer;

/// A byte string that the host put into memory that it got of `cabi_realloc`;
/// freed when dropped.
#[repr(C)]
pub struct Bytes {
    begin: *mut u8,
    len: usize,
}

/// A batch as the host lowered it.
pub struct Lowered {
    index: Bytes,
    segments: Vec<Bytes>,
}

/// An answer as the host lifts it: verdicts, outputs, data. Borrows nothing: it
/// counts until the answer is touched again.
#[repr(C)]
pub struct Lists([List; 3]);

#[repr(C)]
struct List {
    begin: *const u8,
    len: usize,
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        // SAFETY: `Lowered::new`'s caller gave a whole allocation, ours until dropped.
        unsafe { slice::from_raw_parts(self.begin, self.len) }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: allocated by `cabi_realloc`, which is the global allocator, with
        // this length and alignment 1, or, if empty, no allocation.
        drop(unsafe { Vec::from_raw_parts(self.begin, self.len, self.len) });
    }
}

impl Lowered {
    /// # Safety
    /// The arguments of `batch.process` as the host gave them: two lists, each in
    /// memory of `cabi_realloc`, that nobody else owns.
    #[inline(always)]
    pub unsafe fn new(index: *mut u8, index_len: usize, segments: *mut Bytes, segments_len: usize) -> Self {
        let index = Bytes { begin: index, len: index_len };
        // SAFETY: as promised; a list of lists is pairs of begin and length.
        let segments = unsafe { Vec::from_raw_parts(segments, segments_len, segments_len) };
        Self { index, segments }
    }

    pub fn index(&self) -> &[u8] {
        self.index.as_slice()
    }

    pub fn segments(&self) -> impl Iterator<Item = &[u8]> {
        self.segments.iter().map(Bytes::as_slice)
    }
}

impl Lists {
    pub fn of(answer: &Answer) -> Self {
        let lists = [&answer.verdicts, &answer.outputs, &answer.data];
        Self(lists.map(|list| List { begin: list.as_ptr(), len: list.len() }))
    }
}
