//! Batches made by hand, and stand-ins for the host's services where a plugin
//! runs natively: in its own unit tests and in benchmarks.

use alloc::string::String;
use alloc::vec::Vec;

use crate::abi::{self, entry, flags};
use crate::batch::{Header, Messages};

/// Lays messages out as the host does.
#[derive(Clone, Debug)]
pub struct BatchBuilder {
    header: Header,
    index: Vec<u8>,
    data: Vec<u8>,
    count: u32,
}

impl BatchBuilder {
    pub fn new(now_us: u64) -> Self {
        Self { header: Header::at(now_us), index: Vec::new(), data: Vec::new(), count: 0 }
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
        words[entry::RECEIVED_US] = self.header.now_us as u32;
        words[entry::RECEIVED_US + 1] = (self.header.now_us >> 32) as u32;
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
        self
    }

    /// Header, index and the one segment.
    pub fn parts(&self) -> (Header, &[u8], &[u8]) {
        (self.header, &self.index, &self.data)
    }

    pub fn messages<'a>(&'a self, namespace: &'a [String]) -> Messages<'a> {
        Messages::new(self.header, &self.index, [&self.data[..]], namespace)
            .expect("laid out by this builder")
    }
}
