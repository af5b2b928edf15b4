//! The host's table of devices. Natively: what `set_for_tests` was given.

use alloc::string::String;
use alloc::vec::Vec;

pub use crate::bindings::headworks::plugin::types::Error;
use crate::bindings::headworks::plugin::types::Packed;

use crate::batch::{Message, Messages};

/// The JSON object of one device. In a batch of many, use [`Lookup`].
pub fn get(id: &str) -> Result<Option<String>, Error> {
    #[cfg(target_family = "wasm")]
    return crate::bindings::headworks::plugin::devices::get(id);
    #[cfg(not(target_family = "wasm"))]
    Ok(native::get(id.as_bytes()))
}

/// The devices of a batch, each asked for once, all in one call. Keeps what it
/// allocates from batch to batch.
pub struct Lookup {
    ids: Packed,
    found: Packed,
    /// Number of the device among the distinct ones, by message.
    of_message: Vec<u32>,
    /// Open addressing by hash of the id; 0 is free, else number + 1.
    table: Vec<u32>,
}

impl Default for Lookup {
    fn default() -> Self {
        let empty = || Packed { data: Vec::new(), ends: Vec::new() };
        Self { ids: empty(), found: empty(), of_message: Vec::new(), table: Vec::new() }
    }
}

impl Lookup {
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the devices of all messages of the batch.
    pub fn load(&mut self, messages: &Messages<'_>) -> Result<(), Error> {
        self.collect(messages);
        self.found = lookup(&self.ids)?;
        Ok(())
    }

    /// How many distinct devices the batch has.
    pub fn len(&self) -> usize {
        self.ids.ends.len() / 4
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of the message's device among the distinct ones.
    #[inline]
    pub fn number(&self, message: &Message<'_>) -> usize {
        self.of_message[message.number()] as usize
    }

    /// What is known of distinct device `number`: a JSON object, empty where
    /// nothing is.
    pub fn object(&self, number: usize) -> &[u8] {
        item(&self.found, number)
    }

    fn collect(&mut self, messages: &Messages<'_>) {
        self.ids.data.clear();
        self.ids.ends.clear();
        self.of_message.clear();
        let slots = (messages.len() * 2).next_power_of_two().max(16);
        self.table.clear();
        self.table.resize(slots, 0);
        for message in messages.iter() {
            let number = self.number_of(message.device_bytes());
            self.of_message.push(number);
        }
    }

    /// At most half of the table is used, so that the search ends.
    #[inline]
    fn number_of(&mut self, id: &[u8]) -> u32 {
        let mask = self.table.len() - 1;
        let mut slot = hash(id) as usize & mask;
        loop {
            match self.table[slot] {
                0 => {
                    let number = self.len() as u32;
                    self.table[slot] = number + 1;
                    self.ids.data.extend_from_slice(id);
                    self.ids.ends.extend_from_slice(&(self.ids.data.len() as u32).to_le_bytes());
                    return number;
                }
                taken if item(&self.ids, taken as usize - 1) == id => return taken - 1,
                _ => slot = (slot + 1) & mask,
            }
        }
    }
}

fn lookup(ids: &Packed) -> Result<Packed, Error> {
    #[cfg(target_family = "wasm")]
    return crate::bindings::headworks::plugin::devices::lookup(ids);
    #[cfg(not(target_family = "wasm"))]
    Ok(native::lookup(ids))
}

#[inline]
fn item(packed: &Packed, number: usize) -> &[u8] {
    let end = |i: usize| {
        let bytes = packed.ends.get(i * 4..i * 4 + 4);
        bytes.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    let begin = if number == 0 { 0 } else { end(number - 1) };
    packed.data.get(begin..end(number)).unwrap_or_default()
}

/// Multiply and fold, eight bytes at a time; ids come from devices, but a
/// table of one batch is small enough that collisions cannot hurt much.
#[inline]
fn hash(id: &[u8]) -> u32 {
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = id.len() as u64;
    let (words, rest) = id.as_chunks::<8>();
    for word in words {
        hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(MULTIPLIER);
        hash ^= hash >> 32;
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    hash = (hash ^ u64::from_le_bytes(last)).wrapping_mul(MULTIPLIER);
    (hash >> 32) as u32
}

#[cfg(not(target_family = "wasm"))]
pub use native::set_for_tests;

#[cfg(not(target_family = "wasm"))]
mod native {
    use super::*;
    use std::cell::RefCell;
    use std::collections::HashMap;

    thread_local! {
        static TABLE: RefCell<HashMap<Vec<u8>, String>> = RefCell::default();
    }

    /// The table of devices of this thread: id and JSON object.
    pub fn set_for_tests(devices: impl IntoIterator<Item = (String, String)>) {
        let devices = devices.into_iter().map(|(id, object)| (id.into_bytes(), object));
        TABLE.with_borrow_mut(|table| *table = devices.collect());
    }

    pub(super) fn get(id: &[u8]) -> Option<String> {
        TABLE.with_borrow(|table| table.get(id).cloned())
    }

    pub(super) fn lookup(ids: &Packed) -> Packed {
        let mut found = Packed { data: Vec::new(), ends: Vec::new() };
        for number in 0..ids.ends.len() / 4 {
            found.data.extend(get(item(ids, number)).unwrap_or_default().into_bytes());
            found.ends.extend((found.data.len() as u32).to_le_bytes());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::BatchBuilder;

    #[test]
    fn each_device_of_a_batch_is_asked_for_once() {
        set_for_tests([("d-1".into(), "{\"site\":\"north\"}".into())]);
        let mut batch = BatchBuilder::new(0);
        for i in 0..300 {
            batch.message("a", b"", &format!("d-{}", i % 100), false);
        }
        let mut lookup = Lookup::new();
        for _ in 0..2 {
            let messages = batch.messages(&[]);
            lookup.load(&messages).unwrap();
            assert_eq!(lookup.len(), 100);
            for message in messages.iter() {
                let expected: &[u8] = if message.device() == "d-1" { b"{\"site\":\"north\"}" } else { b"" };
                assert_eq!(lookup.object(lookup.number(&message)), expected);
            }
        }
    }
}
