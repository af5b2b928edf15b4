//! The walk over a document: checks and skips, eight bytes at a time where it pays.

use super::{DEPTH_MAX, Error};

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

pub(super) struct Scan<'a> {
    doc: &'a [u8],
    pub at: usize,
    /// Where the text of the last name ended (its closing quote).
    pub name_end: usize,
    /// Every word read within strings, or-ed: a high bit means that the
    /// document is not plain ASCII and its UTF-8 must be checked at the end.
    wide: u64,
}

impl<'a> Scan<'a> {
    #[inline]
    pub fn new(doc: &'a [u8]) -> Self {
        Self { doc, at: 0, name_end: 0, wide: 0 }
    }

    /// The byte here; 0 past the end, which JSON allows nowhere.
    #[inline(always)]
    pub fn peek(&self) -> u8 {
        self.byte(self.at)
    }

    #[inline(always)]
    fn byte(&self, at: usize) -> u8 {
        if at < self.doc.len() { self.doc[at] } else { 0 }
    }

    #[inline(always)]
    fn word(&self, at: usize) -> Option<u64> {
        let bytes = self.doc.get(at..)?.first_chunk::<8>()?;
        Some(u64::from_le_bytes(*bytes))
    }

    #[cold]
    pub fn error(&self, what: &'static str) -> Error {
        self.error_at(self.at, what)
    }

    #[cold]
    fn error_at(&self, at: usize, what: &'static str) -> Error {
        if at >= self.doc.len() {
            return Error { at: self.doc.len(), what: "the document ends too early" };
        }
        Error { at, what }
    }

    #[inline(always)]
    pub fn space(&mut self) {
        while matches!(self.peek(), b' ' | b'\n' | b'\t' | b'\r') {
            self.at += 1;
        }
    }

    /// Nothing but white space may follow.
    #[inline(always)]
    pub fn finish(&mut self) -> Result<(), Error> {
        self.space();
        if self.at < self.doc.len() {
            return Err(self.error("unexpected text after the document"));
        }
        if self.wide & HIGHS != 0 {
            return check_utf8(self.doc);
        }
        Ok(())
    }

    /// `"name" :` and the space after it; true if the name contains escapes.
    #[inline(always)]
    pub fn name(&mut self) -> Result<bool, Error> {
        if self.peek() != b'"' {
            return Err(self.error("expected a field name in quotes"));
        }
        let escaped = self.string()?;
        self.name_end = self.at - 1;
        self.space();
        if self.peek() != b':' {
            return Err(self.error("expected a colon"));
        }
        self.at += 1;
        self.space();
        Ok(escaped)
    }

    /// Skips one value, with everything in it; `outer` containers are open around it.
    #[inline(always)]
    pub fn value(&mut self, outer: u32) -> Result<(), Error> {
        match self.peek() {
            b'"' => self.string().map(|_| ()),
            b'{' | b'[' => self.container(outer),
            _ => self.scalar(),
        }
    }

    #[inline(always)]
    fn scalar(&mut self) -> Result<(), Error> {
        match self.peek() {
            b'-' | b'0'..=b'9' => self.number(),
            b't' => self.literal(b"true"),
            b'f' => self.literal(b"false"),
            b'n' => self.literal(b"null"),
            _ => Err(self.error("expected a value")),
        }
    }

    /// Without recursion: one bit per open container says if it is an object.
    #[inline(never)]
    fn container(&mut self, outer: u32) -> Result<(), Error> {
        let mut objects: u128 = 0;
        let mut depth = outer;
        loop {
            let open = self.peek();
            match open {
                b'{' | b'[' => {
                    if depth == DEPTH_MAX {
                        return Err(self.error("nested deeper than 127 levels"));
                    }
                    depth += 1;
                    objects = objects << 1 | u128::from(open == b'{');
                    self.at += 1;
                    self.space();
                    // '{' + 2 is '}', '[' + 2 is ']'.
                    if self.peek() != open + 2 {
                        if open == b'{' {
                            self.name()?;
                        }
                        continue;
                    }
                    self.at += 1;
                    objects >>= 1;
                    depth -= 1;
                }
                b'"' => {
                    self.string()?;
                }
                _ => self.scalar()?,
            }
            // A value has ended: close what closes here, up to the next value.
            loop {
                if depth == outer {
                    return Ok(());
                }
                self.space();
                let object = objects & 1 == 1;
                match self.peek() {
                    b',' => {
                        self.at += 1;
                        self.space();
                        if object {
                            self.name()?;
                        }
                        break;
                    }
                    b'}' if object => {}
                    b']' if !object => {}
                    _ if object => return Err(self.error("expected a comma or a closing brace")),
                    _ => return Err(self.error("expected a comma or a closing bracket")),
                }
                self.at += 1;
                objects >>= 1;
                depth -= 1;
            }
        }
    }

    /// From the opening quote to past the closing one; true if it contains escapes.
    #[inline(always)]
    fn string(&mut self) -> Result<bool, Error> {
        let mut at = self.at + 1;
        let mut escaped = false;
        loop {
            match self.word(at) {
                Some(word) => {
                    // What lies past the closing quote may be or-ed in too: a
                    // needless check at worst.
                    self.wide |= word;
                    let stops = string_stops(word);
                    if stops == 0 {
                        at += 8;
                        continue;
                    }
                    at += stops.trailing_zeros() as usize / 8;
                }
                None => {
                    let byte = self.byte(at);
                    if byte >= b' ' && byte != b'"' && byte != b'\\' {
                        self.wide |= u64::from(byte);
                        at += 1;
                        continue;
                    }
                }
            }
            match self.byte(at) {
                b'"' => {
                    self.at = at + 1;
                    return Ok(escaped);
                }
                b'\\' => {
                    escaped = true;
                    at = self.escape(at)?;
                }
                _ => return Err(self.error_at(at, "control character in a string")),
            }
        }
    }

    /// From a backslash to past the escape, both halves of a surrogate pair.
    #[inline(never)]
    fn escape(&self, at: usize) -> Result<usize, Error> {
        match self.byte(at + 1) {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(at + 2),
            b'u' => match self.hex4(at + 2)? {
                0xd800..=0xdbff => {
                    if self.byte(at + 6) != b'\\' || self.byte(at + 7) != b'u' {
                        return Err(self.error_at(at, "half of a surrogate pair"));
                    }
                    match self.hex4(at + 8)? {
                        0xdc00..=0xdfff => Ok(at + 12),
                        _ => Err(self.error_at(at, "half of a surrogate pair")),
                    }
                }
                0xdc00..=0xdfff => Err(self.error_at(at, "half of a surrogate pair")),
                _ => Ok(at + 6),
            },
            _ => Err(self.error_at(at + 1, "unknown escape")),
        }
    }

    fn hex4(&self, at: usize) -> Result<u32, Error> {
        let mut value = 0;
        for i in at..at + 4 {
            match char::from(self.byte(i)).to_digit(16) {
                Some(digit) => value = value << 4 | digit,
                None => return Err(self.error_at(i, "expected four hex digits")),
            }
        }
        Ok(value)
    }

    #[inline(always)]
    fn number(&mut self) -> Result<(), Error> {
        let start = self.at;
        let mut at = start + usize::from(self.byte(start) == b'-');
        match self.byte(at) {
            b'0' => at += 1,
            b'1'..=b'9' => at = self.digits(at),
            _ => return Err(self.error_at(at, "expected a digit")),
        }
        if self.byte(at) == b'.' {
            at = self.some_digits(at + 1)?;
        }
        let mut maybe_huge = at - start > 300;
        if self.byte(at) | 0x20 == b'e' {
            at += 1 + usize::from(matches!(self.byte(at + 1), b'+' | b'-'));
            at = self.some_digits(at)?;
            maybe_huge = true;
        }
        if maybe_huge {
            check_finite(&self.doc[start..at], start)?;
        }
        self.at = at;
        Ok(())
    }

    #[inline(always)]
    fn some_digits(&self, at: usize) -> Result<usize, Error> {
        let end = self.digits(at);
        if end == at { Err(self.error_at(at, "expected a digit")) } else { Ok(end) }
    }

    /// The end of the digits that start at `at`.
    #[inline(always)]
    fn digits(&self, mut at: usize) -> usize {
        while let Some(word) = self.word(at) {
            let others = not_digits(word);
            if others != 0 {
                return at + others.trailing_zeros() as usize / 8;
            }
            at += 8;
        }
        while self.byte(at).is_ascii_digit() {
            at += 1;
        }
        at
    }

    #[inline(always)]
    fn literal(&mut self, text: &'static [u8]) -> Result<(), Error> {
        for (i, &byte) in text.iter().enumerate() {
            if self.byte(self.at + i) != byte {
                return Err(self.error("expected a value"));
            }
        }
        self.at += text.len();
        Ok(())
    }
}

/// The high bit of each byte that ends a run of plain string text: a quote, a
/// backslash, a control character. Bits above the lowest set one may be wrong
/// (the subtractions borrow), so only that one may be used.
#[inline(always)]
pub(super) fn string_stops(word: u64) -> u64 {
    let quote = word ^ (ONES * b'"' as u64);
    let backslash = word ^ (ONES * b'\\' as u64);
    ((quote.wrapping_sub(ONES) & !quote)
        | (backslash.wrapping_sub(ONES) & !backslash)
        | (word.wrapping_sub(ONES * 0x20) & !word))
        & HIGHS
}

/// The high bit of each byte that is not '0'..='9'.
#[inline(always)]
fn not_digits(word: u64) -> u64 {
    // '0'..='9' become 0..=9; adding 0x76 to the low seven bits then sets the
    // high bit of all others, and never carries into the next byte.
    let x = word ^ (ONES * b'0' as u64);
    ((x & !HIGHS).wrapping_add(ONES * 0x76) | x) & HIGHS
}

#[inline(never)]
fn check_utf8(doc: &[u8]) -> Result<(), Error> {
    match core::str::from_utf8(doc) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error { at: error.valid_up_to(), what: "not UTF-8" }),
    }
}

#[inline(never)]
fn check_finite(number: &[u8], at: usize) -> Result<(), Error> {
    match core::str::from_utf8(number).ok().and_then(|text| text.parse::<f64>().ok()) {
        Some(value) if value.is_finite() => Ok(()),
        _ => Err(Error { at, what: "number out of range" }),
    }
}
