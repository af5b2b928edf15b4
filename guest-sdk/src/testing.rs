//! Batches made by hand, and stand-ins for the host's services where a plugin
//! runs natively: in its own unit tests and in benchmarks.

use alloc::string::String;
use alloc::vec::Vec;

use crate::abi::{self, entry, flags, header};
use crate::batch::Messages;

/// Lays messages out as the host does.
#[derive(Clone, Debug)]
pub struct BatchBuilder {
    index: Vec<u8>,
    data: Vec<u8>,
    count: u32,
}

impl BatchBuilder {
    pub fn new(now_us: u64) -> Self {
        let mut batch = Self { index: alloc::vec![0; abi::INDEX_HEADER_BYTES], data: Vec::new(), count: 0 };
        batch.header(header::LAYOUT, abi::LAYOUT);
        batch.header(header::HEADER_WORDS, abi::INDEX_HEADER_WORDS as u32);
        batch.header(header::STRIDE, abi::STRIDE_WORDS as u32);
        batch.header(header::NOW_US, now_us as u32);
        batch.header(header::NOW_US + 1, (now_us >> 32) as u32);
        batch.header(header::WATERMARK_US + 1, 1 << 31);
        batch.header(header::ATTEMPT, 1);
        batch
    }

    /// `fits`: the topic fits the namespace. Received at the batch's `now`.
    pub fn message(&mut self, topic: &str, payload: &[u8], device: &str, fits: bool) -> &mut Self {
        self.message_with(topic, payload, device, fits, "", None)
    }

    pub fn message_with(
        &mut self,
        topic: &str,
        payload: &[u8],
        device: &str,
        fits: bool,
        route: &str,
        event_us: Option<i64>,
    ) -> &mut Self {
        let mut words = [0u32; abi::STRIDE_WORDS];
        words[entry::FLAGS] = if fits { flags::FITS_NAMESPACE } else { 0 };
        words[entry::OFFSET] = self.count;
        words[entry::RECEIVED_US] = self.word(header::NOW_US);
        words[entry::RECEIVED_US + 1] = self.word(header::NOW_US + 1);
        if let Some(us) = event_us {
            words[entry::FLAGS] |= flags::EVENT_TIME;
            words[entry::EVENT_US] = us as u32;
            words[entry::EVENT_US + 1] = (us >> 32) as u32;
        }
        let spans = [
            (entry::TOPIC, topic.as_bytes()),
            (entry::PAYLOAD, payload),
            (entry::ROUTE, route.as_bytes()),
            (entry::DEVICE, device.as_bytes()),
        ];
        for (at, bytes) in spans {
            words[at] = self.data.len() as u32;
            words[at + 1] = abi::span_word(0, bytes.len());
            self.data.extend_from_slice(bytes);
        }
        self.index.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        self.count += 1;
        self.header(header::COUNT, self.count);
        self
    }

    /// Index and the one segment.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        (&self.index, &self.data)
    }

    pub fn messages<'a>(&'a self, namespace: &'a [String]) -> Messages<'a> {
        Messages::new(&self.index, [&self.data[..]], namespace).expect("laid out by this builder")
    }

    fn header(&mut self, at: usize, word: u32) {
        self.index[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = &self.index[at * 4..at * 4 + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}
