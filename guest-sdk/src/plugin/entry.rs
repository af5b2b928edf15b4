//! The arguments and the result of `batch.process` as the canonical ABI has
//! them (component-model `CanonicalABI.md`, lifting and lowering of lists).
//!
//! By hand, because what is generated copies the list of `later`, allocates
//! each answer anew and has the host come back to free it: an entry into wasm,
//! and more than the work of a short batch.

use alloc::string::String;
use alloc::vec::Vec;
use core::slice;

use crate::batch::{Answer, Header, Messages};

/// A byte string that the host put into memory that it got of `cabi_realloc`;
/// freed when dropped.
#[repr(C)]
pub struct Bytes {
    begin: *mut u8,
    len: usize,
}

/// A batch as the host lowered it.
pub struct Lowered {
    pub header: Header,
    pub index: Bytes,
    pub data: Bytes,
    pub later: Vec<Bytes>,
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
    /// # Safety
    /// A list as the host gave it: in memory of `cabi_realloc`, owned by nobody else.
    #[inline(always)]
    pub unsafe fn new(begin: *mut u8, len: usize) -> Self {
        Self { begin, len }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: a whole allocation, as `new`'s caller promised, ours until dropped.
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
    /// `later` of the arguments as the host gave them: nothing if it is not `given`,
    /// else a list, each item and the list itself as for [`Bytes::new`].
    #[inline(always)]
    pub unsafe fn later(given: u32, later: *mut Bytes, len: usize) -> Vec<Bytes> {
        if given == 0 {
            return Vec::new();
        }
        // SAFETY: as promised; a list of lists is pairs of begin and length.
        unsafe { Vec::from_raw_parts(later, len, len) }
    }

    pub fn messages<'a>(&'a self, namespace: &'a [String]) -> Messages<'a> {
        let segments = core::iter::once(&self.data).chain(&self.later).map(Bytes::as_slice);
        Messages::new(self.header, self.index.as_slice(), segments, namespace)
            .expect("entries as the contract says")
    }
}

impl Lists {
    pub fn of(answer: &Answer) -> Self {
        let lists = [&answer.verdicts, &answer.outputs, &answer.data];
        Self(lists.map(|list| List { begin: list.as_ptr(), len: list.len() }))
    }
}
