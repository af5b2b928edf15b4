//! Documents with fields added, and strings as JSON.

use alloc::vec::Vec;

use super::scan::string_stops;
use super::{Error, get};

/// Copies `doc` to `out` with the field `key` added at its end. `doc` must be an
/// object that was checked (by [`super::get`], say) and has no such field: this
/// looks at its end only. `value` is JSON.
#[inline]
pub fn insert_field(doc: &[u8], key: &str, value: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
    let (head, empty) = open_end(doc)?;
    out.reserve(head.len() + key.len() + value.len() + 6);
    out.extend_from_slice(head);
    if !empty {
        out.push(b',');
    }
    write_member_name(out, key);
    out.extend_from_slice(value);
    out.push(b'}');
    Ok(())
}

/// The same with several fields at once, written as they stand in an object
/// but without its braces: `"site":"north","model":"T1"`. May be empty.
#[inline]
pub fn insert_members(doc: &[u8], members: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
    let (head, empty) = open_end(doc)?;
    out.reserve(head.len() + members.len() + 2);
    out.extend_from_slice(head);
    if !empty && !members.is_empty() {
        out.push(b',');
    }
    out.extend_from_slice(members);
    out.push(b'}');
    Ok(())
}

/// Copies `doc` to `out` with `key` set to `value`, in place where `doc` has it.
/// Checks the whole document.
pub fn set_field(doc: &[u8], key: &str, value: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
    match get(doc, key)? {
        None => insert_field(doc, key, value, out),
        Some(old) => {
            let range = old.range();
            out.reserve(doc.len() + value.len());
            out.extend_from_slice(&doc[..range.start]);
            out.extend_from_slice(value);
            out.extend_from_slice(&doc[range.end..]);
            Ok(())
        }
    }
}

/// Up to the closing brace without the white space before it; true if no field
/// is in it. In a checked object a brace that opens can only stand right
/// before the one that closes if that is the whole object.
#[inline]
fn open_end(doc: &[u8]) -> Result<(&[u8], bool), Error> {
    let Some((b'}', head)) = doc.trim_ascii_end().split_last() else {
        return Err(Error { at: doc.len(), what: "expected a closing brace" });
    };
    let head = head.trim_ascii_end();
    Ok((head, head.last() == Some(&b'{')))
}

/// `"name":`
#[inline]
pub fn write_member_name(out: &mut Vec<u8>, name: &str) {
    write_string(out, name);
    out.push(b':');
}

/// A string with quotes, escaped.
#[inline]
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    write_str_content(out, text);
    out.push(b'"');
}

/// The same without its quotes.
#[inline]
pub fn write_str_content(out: &mut Vec<u8>, text: &str) {
    let mut rest = text.as_bytes();
    loop {
        let plain = plain_len(rest);
        out.extend_from_slice(&rest[..plain]);
        let Some(&byte) = rest.get(plain) else { return };
        rest = &rest[plain + 1..];
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            control => {
                let hex = |n: u8| if n < 10 { b'0' + n } else { b'a' + n - 10 };
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(control >> 4), hex(control & 15)]);
            }
        }
    }
}

/// How many bytes need no escape.
#[inline]
fn plain_len(text: &[u8]) -> usize {
    let mut at = 0;
    while let Some(chunk) = text[at..].first_chunk::<8>() {
        let stops = string_stops(u64::from_le_bytes(*chunk));
        if stops != 0 {
            return at + stops.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while at < text.len() && text[at] >= b' ' && text[at] != b'"' && text[at] != b'\\' {
        at += 1;
    }
    at
}

/// A whole number in decimal, without the formatting machinery.
#[inline]
pub fn write_i64(out: &mut Vec<u8>, value: i64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}
