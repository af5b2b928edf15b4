//! Durable objects of any size in the state of a stream, whose values are limited. An object is split
//! into chunks that are written in one append, so that after a crash there are all of them or none.

use crate::stream::{STATE_VALUE_BYTES_MAX, Stream};

use super::session::Change;

const NUMBER_BYTES: usize = 2;
const ID_BYTES: usize = 16;
const KEY_BYTES: usize = size_of::<Kind>() + ID_BYTES + NUMBER_BYTES;

/// Name of an object among those of its kind.
pub type Id = [u8; ID_BYTES];

/// The first two bytes of all keys of a kind.
pub type Kind = [u8; 2];

/// Place of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    kind: Kind,
    id: Id,
    chunks: u16,
}

impl Blob {
    /// Returns the place for an object of at most 4 GiB that is to be written.
    pub fn new(kind: Kind, id: Id, bytes: &[u8]) -> Self {
        Self { kind, id, chunks: bytes.len().div_ceil(STATE_VALUE_BYTES_MAX) as u16 }
    }

    pub fn id(&self) -> Id {
        self.id
    }

    /// Adds the changes that write the object. `old` is the object previously stored under its name.
    pub fn write(&self, bytes: &[u8], old: Option<&Blob>, changes: &mut Vec<Change>) {
        for (number, chunk) in bytes.chunks(STATE_VALUE_BYTES_MAX).enumerate() {
            changes.push((self.key(number as u16), Some(chunk.into())));
        }
        if let Some(old) = old {
            changes.extend((self.chunks..old.chunks).map(|number| (old.key(number), None)));
        }
    }

    pub fn remove(&self, changes: &mut Vec<Change>) {
        changes.extend((0..self.chunks).map(|number| (self.key(number), None)));
    }

    fn key(&self, number: u16) -> Vec<u8> {
        [&self.kind[..], &self.id, &number.to_be_bytes()].concat()
    }
}

/// Returns the size that an object of `len` bytes takes in a stream's state, with its keys.
pub fn state_bytes(len: usize) -> usize {
    len + len.div_ceil(STATE_VALUE_BYTES_MAX) * KEY_BYTES
}

/// Returns all objects of a kind in `stream`, with their bytes.
pub fn load(stream: &dyn Stream, kind: Kind) -> Vec<(Blob, Vec<u8>)> {
    let mut found: Vec<(Blob, Vec<u8>)> = Vec::new();
    // In key order: the chunks of a thing follow each other.
    for (key, value) in stream.state(&kind) {
        let Ok(rest) = <[u8; ID_BYTES + NUMBER_BYTES]>::try_from(&key[kind.len()..]) else { continue };
        let (id, _) = rest.split_first_chunk::<ID_BYTES>().expect("it is longer");
        match found.last_mut().filter(|(blob, _)| blob.id == *id) {
            Some((blob, bytes)) => {
                blob.chunks += 1;
                bytes.extend(value);
            }
            None => found.push((Blob { kind, id: *id, chunks: 1 }, value)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{StateChange, memory};

    fn apply(stream: &dyn Stream, changes: &[Change]) {
        let changes: Vec<_> =
            changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
        stream.append(&[], &changes).unwrap();
    }

    #[test]
    fn what_is_written_is_there_whatever_its_size_and_what_was_larger_before_leaves_nothing() {
        let stream = &*memory::MemoryStream::new("test", 1);
        let large = vec![7; 3 * STATE_VALUE_BYTES_MAX + 1];
        let (id, other) = ([1; 16], [2; 16]);
        let first = Blob::new(*b"xx", id, &large);
        let mut changes = Vec::new();
        first.write(&large, None, &mut changes);
        Blob::new(*b"xx", other, b"small").write(b"small", None, &mut changes);
        apply(stream, &changes);
        assert_eq!(load(stream, *b"xx")[0], (first, large));

        let second = Blob::new(*b"xx", id, b"less");
        changes.clear();
        second.write(b"less", Some(&first), &mut changes);
        apply(stream, &changes);
        assert_eq!(load(stream, *b"xx")[0], (second, b"less".to_vec()));

        changes.clear();
        second.remove(&mut changes);
        apply(stream, &changes);
        let rest = load(stream, *b"xx");
        assert_eq!((rest.len(), rest[0].0.id()), (1, other));
    }
}
