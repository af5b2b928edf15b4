//! A value where it lies in a checked document.

use alloc::borrow::Cow;
use alloc::string::String;

use super::scan::Scan;

/// The raw text of a value, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw<'a> {
    text: &'a [u8],
    start: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Null,
    Bool,
    Number,
    String,
    Array,
    Object,
}

impl Kind {
    /// For messages to people: `a number`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Number => "a number",
            Self::String => "a string",
            Self::Array => "an array",
            Self::Object => "an object",
        }
    }
}

impl<'a> Raw<'a> {
    /// `text` is one value of a document that was checked.
    #[inline(always)]
    pub(super) fn new(text: &'a [u8], start: usize) -> Self {
        Self { text, start }
    }

    /// As it stands in the document: a string with its quotes.
    #[inline]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.text
    }

    /// Where it lies in the document.
    #[inline]
    pub fn range(&self) -> core::ops::Range<usize> {
        self.start..self.start + self.text.len()
    }

    #[inline]
    pub fn kind(&self) -> Kind {
        match self.text.first() {
            Some(b'"') => Kind::String,
            Some(b'{') => Kind::Object,
            Some(b'[') => Kind::Array,
            Some(b't' | b'f') => Kind::Bool,
            Some(b'n') | None => Kind::Null,
            Some(_) => Kind::Number,
        }
    }

    #[inline]
    pub fn is_null(&self) -> bool {
        self.kind() == Kind::Null
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self.kind() {
            Kind::Bool => Some(self.text[0] == b't'),
            _ => None,
        }
    }

    /// A number, rounded to the nearest f64.
    #[inline]
    pub fn as_f64(&self) -> Option<f64> {
        if self.kind() != Kind::Number { None } else { parse_f64(self.text) }
    }

    /// A number without fraction or exponent that fits.
    #[inline]
    pub fn as_i64(&self) -> Option<i64> {
        match self.kind() {
            Kind::Number => core::str::from_utf8(self.text).ok()?.parse().ok(),
            _ => None,
        }
    }

    /// A string's content; allocates only where it contains escapes.
    pub fn as_str(&self) -> Option<Cow<'a, str>> {
        let content = self.content()?;
        if memchr::memchr(b'\\', content).is_none() {
            return core::str::from_utf8(content).ok().map(Cow::Borrowed);
        }
        unescape(content).map(Cow::Owned)
    }

    /// A string's content without its quotes, escapes as they stand.
    #[inline]
    pub fn content(&self) -> Option<&'a [u8]> {
        match self.text {
            [b'"', content @ .., b'"'] => Some(content),
            _ => None,
        }
    }

    /// True if this is a string that reads `text`; allocates only where it contains escapes.
    #[inline]
    pub fn is_str(&self, text: &str) -> bool {
        match self.content() {
            Some(content) if content == text.as_bytes() => !text.contains('\\'),
            Some(content) if content.contains(&b'\\') => unescape(content).is_some_and(|s| s == text),
            _ => false,
        }
    }

    /// The fields of an object, in order; nothing for other kinds.
    pub fn members(&self) -> Members<'a> {
        Members { inner: Children::new(*self, b'{') }
    }

    /// The elements of an array, in order; nothing for other kinds.
    pub fn elements(&self) -> Elements<'a> {
        Elements { inner: Children::new(*self, b'[') }
    }

    /// The field `key` of an object; the last one where it is there twice.
    pub fn get(&self, key: &str) -> Option<Raw<'a>> {
        self.members().filter(|(name, _)| name == key).last().map(|(_, value)| value)
    }

    /// One step of a JSON pointer (RFC 6901), still escaped.
    pub(super) fn child(&self, token: &str) -> Option<Raw<'a>> {
        match self.kind() {
            Kind::Object if token.contains('~') => self.get(&token.replace("~1", "/").replace("~0", "~")),
            Kind::Object => self.get(token),
            Kind::Array => {
                let digits =
                    token.bytes().all(|b| b.is_ascii_digit()) && (token == "0" || !token.starts_with('0'));
                let index: usize = token.parse().ok().filter(|_| digits)?;
                self.elements().nth(index)
            }
            _ => None,
        }
    }
}

/// Fields of an object: name and value.
pub struct Members<'a> {
    inner: Children<'a>,
}

impl<'a> Iterator for Members<'a> {
    type Item = (Cow<'a, str>, Raw<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value) = self.inner.next()?;
        Some((name?.as_str()?, value))
    }
}

/// Elements of an array.
pub struct Elements<'a> {
    inner: Children<'a>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Raw<'a>;

    fn next(&mut self) -> Option<Raw<'a>> {
        self.inner.next().map(|(_, value)| value)
    }
}

struct Children<'a> {
    scan: Scan<'a>,
    whole: Raw<'a>,
    object: bool,
    done: bool,
}

impl<'a> Children<'a> {
    fn new(whole: Raw<'a>, open: u8) -> Self {
        let mut scan = Scan::new(whole.text);
        let done = scan.peek() != open;
        scan.at += 1;
        Self { scan, whole, object: open == b'{', done }
    }

    /// The document was checked, so that an error can only mean the end.
    fn next(&mut self) -> Option<(Option<Raw<'a>>, Raw<'a>)> {
        if self.done {
            return None;
        }
        self.done = true;
        self.scan.space();
        if self.scan.peek() == b',' {
            self.scan.at += 1;
            self.scan.space();
        }
        let name = if self.object {
            let start = self.scan.at;
            self.scan.name().ok()?;
            Some(self.part(start, self.scan.name_end + 1))
        } else {
            None
        };
        let start = self.scan.at;
        self.scan.value(0).ok()?;
        self.done = false;
        Some((name, self.part(start, self.scan.at)))
    }

    fn part(&self, start: usize, end: usize) -> Raw<'a> {
        Raw::new(&self.whole.text[start..end], self.whole.start + start)
    }
}

/// `name` as it stands between its quotes, against a key.
#[inline(always)]
pub(super) fn same_name(name: &[u8], escaped: bool, key: &str) -> bool {
    if escaped {
        return unescape(name).is_some_and(|name| name == key);
    }
    name == key.as_bytes()
}

#[inline(never)]
fn unescape(content: &[u8]) -> Option<String> {
    let text = core::str::from_utf8(content).ok()?;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = *rest.as_bytes().get(at + 1)?;
        rest = &rest[at + 2..];
        out.push(match escape {
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = hex4(rest)?;
                rest = &rest[4..];
                if (0xd800..0xdc00).contains(&first) {
                    let second = hex4(rest.strip_prefix("\\u")?)?;
                    rest = &rest[6..];
                    char::from_u32(0x1_0000 + ((first - 0xd800) << 10) + second.checked_sub(0xdc00)?)?
                } else {
                    char::from_u32(first)?
                }
            }
            other => char::from(other),
        });
    }
    out.push_str(rest);
    Some(out)
}

fn hex4(text: &str) -> Option<u32> {
    u32::from_str_radix(text.get(..4)?, 16).ok()
}

/// Exact for what fits 2^53 with at most 22 digits behind the point (both
/// then are exact in f64, and one division rounds once); the rest goes the
/// long way.
#[inline]
fn parse_f64(text: &[u8]) -> Option<f64> {
    const POWERS: [f64; 23] = [
        1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17,
        1e18, 1e19, 1e20, 1e21, 1e22,
    ];
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let mut mantissa: u64 = 0;
    let mut fraction = None;
    if digits.len() <= 16 {
        for (i, &byte) in digits.iter().enumerate() {
            match byte {
                b'0'..=b'9' => mantissa = mantissa * 10 + u64::from(byte - b'0'),
                b'.' => fraction = Some(digits.len() - i - 1),
                _ => return parse_f64_slow(text),
            }
        }
        if mantissa <= 1 << 53 {
            let value = mantissa as f64 / POWERS[fraction.unwrap_or(0)];
            return Some(if negative { -value } else { value });
        }
    }
    parse_f64_slow(text)
}

#[inline(never)]
fn parse_f64_slow(text: &[u8]) -> Option<f64> {
    core::str::from_utf8(text).ok()?.parse().ok()
}
