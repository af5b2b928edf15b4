//! The most recent durable frames, in memory, so that readers that are up to date need no disk.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::frame::{self, ENTRY_BYTES};
use crate::batch::{Batch, Offset};

/// Messages of one commit. Every entry was checked or created here.
#[derive(Clone, Debug)]
pub struct Frame {
    pub base: u64,
    pub count: u32,
    pub append_us: u64,
    /// Entries in their encoding on disk.
    pub entries: Bytes,
    pub data: Bytes,
}

impl Frame {
    pub fn end(&self) -> u64 {
        self.base + u64::from(self.count)
    }

    /// Returns at most `max` messages from offset `from` on.
    pub fn batch(&self, from: u64, max: usize) -> Batch {
        let begin = from.saturating_sub(self.base) as usize;
        let end = (begin + max).min(self.entries.len() / ENTRY_BYTES);
        Batch {
            base: Offset(self.base),
            now_us: self.append_us,
            segments: vec![self.data.clone()],
            entries: (begin..end).map(|i| frame::entry(&self.entries, i)).collect(),
            exclusive: begin == 0 && end == self.count as usize,
        }
    }

    fn bytes(&self) -> usize {
        self.entries.len() + self.data.len() + size_of::<Self>()
    }
}

pub struct Tail {
    frames: VecDeque<Arc<Frame>>,
    bytes: usize,
    bytes_max: usize,
}

impl Tail {
    pub fn new(bytes_max: usize) -> Self {
        Self { frames: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Adds the newest frame. Returns a frame that was dropped, so that its buffer can be reused.
    pub fn push(&mut self, frame: Frame) -> Option<Arc<Frame>> {
        self.bytes += frame.bytes();
        self.frames.push_back(Arc::new(frame));
        let mut left = None;
        while self.bytes > self.bytes_max {
            let Some(oldest) = self.frames.pop_front() else { break };
            self.bytes -= oldest.bytes();
            left = Some(oldest);
        }
        left
    }

    /// Returns the frame that holds `offset`.
    pub fn get(&self, offset: u64) -> Option<Arc<Frame>> {
        let next = self.frames.partition_point(|frame| frame.end() <= offset);
        self.frames.get(next).filter(|frame| frame.base <= offset).cloned()
    }
}
