//! JSON without a tree: find fields in a document, add fields to it.
//!
//! [`get_many`] walks a document once, keeps where the wanted fields lie and
//! checks everything on the way, to the last byte: what it accepts is what
//! `serde_json` accepts as a `Value` (RFC 8259, at most 127 levels deep,
//! numbers within f64), and of two fields with one name the last one wins.
//! Nothing is allocated but for strings that contain escapes. [`insert_field`]
//! then copies the document with one field more. Plugins and host share this
//! page; it needs no more than `alloc`.

mod raw;
mod scan;
mod splice;
#[cfg(test)]
mod tests;

pub use raw::{Elements, Kind, Members, Raw};
pub use splice::{
    insert_field, insert_members, set_field, write_i64, write_member_name, write_str_content, write_string,
};

use scan::Scan;

/// Deepest nesting that is accepted, the same as serde_json's.
pub const DEPTH_MAX: u32 = 127;

/// What is wrong with a document, and where: `expected a value at byte 12`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// Byte of the document, from 0.
    pub at: usize,
    pub what: &'static str,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} at byte {}", self.what, self.at)
    }
}

impl core::error::Error for Error {}

/// Checks a whole document, of any kind.
pub fn validate(doc: &[u8]) -> Result<(), Error> {
    parse(doc).map(|_| ())
}

/// Checks a whole document and gives its value.
pub fn parse(doc: &[u8]) -> Result<Raw<'_>, Error> {
    let mut scan = Scan::new(doc);
    scan.space();
    let start = scan.at;
    scan.value(0)?;
    let end = scan.at;
    scan.finish()?;
    Ok(Raw::new(&doc[start..end], start))
}

/// The field `key` of a document that is an object; none where it has no such field.
pub fn get<'a>(doc: &'a [u8], key: &str) -> Result<Option<Raw<'a>>, Error> {
    get_many(doc, [key]).map(|[value]| value)
}

/// Several fields of a document that is an object, in one walk.
#[inline]
pub fn get_many<'a, const N: usize>(doc: &'a [u8], keys: [&str; N]) -> Result<[Option<Raw<'a>>; N], Error> {
    let mut found = [None; N];
    members(doc, |name, escaped, value| {
        for (slot, key) in found.iter_mut().zip(keys) {
            if raw::same_name(name, escaped, key) {
                *slot = Some(value);
            }
        }
    })?;
    Ok(found)
}

/// The same for a number of keys that is known at run time only: `found[i]`
/// becomes the value of `keys[i]`, the rest of `found` none. Keys that have no
/// place in `found` are not looked for.
pub fn get_each<'a, K: AsRef<str>>(
    doc: &'a [u8],
    keys: &[K],
    found: &mut [Option<Raw<'a>>],
) -> Result<(), Error> {
    found.fill(None);
    members(doc, |name, escaped, value| {
        for (slot, key) in found.iter_mut().zip(keys) {
            if raw::same_name(name, escaped, key.as_ref()) {
                *slot = Some(value);
            }
        }
    })
}

/// The value that a JSON pointer (RFC 6901) names: `""` is the whole document,
/// `"/a/b/0"` the first element of field b of field a. None where the document
/// has no such value.
pub fn pointer<'a>(doc: &'a [u8], pointer: &str) -> Result<Option<Raw<'a>>, Error> {
    let mut value = parse(doc)?;
    if pointer.is_empty() {
        return Ok(Some(value));
    }
    let Some(path) = pointer.strip_prefix('/') else {
        return Err(Error { at: 0, what: "a JSON pointer must start with a slash" });
    };
    for token in path.split('/') {
        match value.child(token) {
            Some(child) => value = child,
            None => return Ok(None),
        }
    }
    Ok(Some(value))
}

/// Walks the fields of an object, then checks that nothing follows it.
#[inline(always)]
fn members<'a>(doc: &'a [u8], mut each: impl FnMut(&'a [u8], bool, Raw<'a>)) -> Result<(), Error> {
    let mut scan = Scan::new(doc);
    scan.space();
    if scan.peek() != b'{' {
        let start = scan.at;
        validate(doc)?;
        return Err(Error { at: start, what: "expected an object" });
    }
    scan.at += 1;
    scan.space();
    if scan.peek() == b'}' {
        scan.at += 1;
        return scan.finish();
    }
    loop {
        let name_start = scan.at + 1;
        let escaped = scan.name()?;
        let name = &doc[name_start..scan.name_end];
        let start = scan.at;
        scan.value(1)?;
        each(name, escaped, Raw::new(&doc[start..scan.at], start));
        scan.space();
        match scan.peek() {
            b',' => {
                scan.at += 1;
                scan.space();
            }
            b'}' => {
                scan.at += 1;
                return scan.finish();
            }
            _ => return Err(scan.error("expected a comma or a closing brace")),
        }
    }
}
