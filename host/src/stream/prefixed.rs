//! A stream as its subscribers see it: with a prefix in front of each topic.
//!
//! The output of pipelines for a message has the topic of that message, but is in another stream. A
//! subscriber to `acme/#` would receive both. So subscribers see the messages of such a stream below a
//! prefix of their own, while pipelines and the command line read the stream itself.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{BufMut, BytesMut};
use tokio::sync::watch;

use super::{
    AppendError, Appended, Attachment, Cursor, GapCause, Identity, Lack, NewMessage, OnLag, Opening, Read,
    ReadError, Stall, StateChange, StateEntries, Stream, Ticket,
};
use crate::batch::{Batch, Entry, Offset, Span, flags};
use crate::topic::TOPIC_BYTES_MAX;

pub struct Prefixed {
    stream: Arc<dyn Stream>,
    /// The prefix with a trailing `/`.
    prefix: Arc<str>,
}

impl Prefixed {
    pub fn new(stream: Arc<dyn Stream>, prefix: &str) -> Self {
        Self { stream, prefix: format!("{prefix}/").into() }
    }

    fn prefixed(&self, cursor: Box<dyn Cursor>) -> Box<dyn Cursor> {
        Box::new(PrefixedCursor { cursor, prefix: Arc::clone(&self.prefix) })
    }
}

#[async_trait]
impl Stream for Prefixed {
    fn name(&self) -> &str {
        self.stream.name()
    }

    fn identity(&self) -> Identity {
        self.stream.identity()
    }

    /// Appends messages unchanged, because the caller sets the topics.
    fn append(
        &self,
        messages: &[NewMessage<'_>],
        state: &[StateChange<'_>],
    ) -> Result<Appended, AppendError> {
        self.stream.append(messages, state)
    }

    async fn writable(&self) {
        self.stream.writable().await;
    }

    async fn out_of_space(&self) {
        self.stream.out_of_space().await;
    }

    fn durable(&self) -> watch::Receiver<Ticket> {
        self.stream.durable()
    }

    fn bounds(&self) -> Range<Offset> {
        self.stream.bounds()
    }

    fn openings(&self) -> Vec<Opening> {
        self.stream.openings()
    }

    fn is_past_age(&self, append_us: u64) -> bool {
        self.stream.is_past_age(append_us)
    }

    fn cursor(&self, from: Offset) -> Box<dyn Cursor> {
        self.prefixed(self.stream.cursor(from))
    }

    fn peek(&self, from: Offset) -> Box<dyn Cursor> {
        self.prefixed(self.stream.peek(from))
    }

    fn lose(&self, lost: Range<Offset>, cause: GapCause) {
        self.stream.lose(lost, cause);
    }

    async fn seek_time(&self, append_us: u64) -> Result<Offset, ReadError> {
        self.stream.seek_time(append_us).await
    }

    fn attach(&self, consumer: &str, from: Offset, on_lag: OnLag) -> Box<dyn Attachment> {
        self.stream.attach(consumer, from, on_lag)
    }

    fn rename_reader(&self, former: &str, consumer: &str) {
        self.stream.rename_reader(former, consumer);
    }

    fn lack(&self) -> Option<Lack> {
        self.stream.lack()
    }

    fn stall(&self) -> Option<Stall> {
        self.stream.stall()
    }

    fn has_room(&self) -> bool {
        self.stream.has_room()
    }

    fn state(&self, prefix: &[u8]) -> StateEntries {
        self.stream.state(prefix)
    }

    fn state_room(&self) -> usize {
        self.stream.state_room()
    }

    async fn stopped(&self) -> Arc<str> {
        self.stream.stopped().await
    }

    async fn close(&self) {
        self.stream.close().await;
    }
}

struct PrefixedCursor {
    cursor: Box<dyn Cursor>,
    prefix: Arc<str>,
}

#[async_trait]
impl Cursor for PrefixedCursor {
    async fn next(&mut self) -> Result<Read, ReadError> {
        Ok(with_prefix(self.cursor.next().await?, &self.prefix))
    }

    async fn try_next(&mut self) -> Result<Option<Read>, ReadError> {
        Ok(self.cursor.try_next().await?.map(|read| with_prefix(read, &self.prefix)))
    }

    fn position(&self) -> Offset {
        self.cursor.position()
    }
}

/// Adds the prefix to the topics. A topic that would become too long is left out, because no subscriber
/// could receive it. Writers to the stream reject such topics, so this concerns only messages from
/// before the prefix was set.
fn with_prefix(read: Read, prefix: &str) -> Read {
    let Read::Batch(batch) = read else { return read };
    let fits = |entry: &&Entry| prefix.len() + entry.topic.len() <= TOPIC_BYTES_MAX;
    let segment = batch.segments.len();
    let mut topics = BytesMut::with_capacity(batch.len() * (prefix.len() + 64));
    let entry = |entry: &Entry| {
        let begin = topics.len();
        topics.put_slice(prefix.as_bytes());
        topics.put_slice(batch.bytes(entry.topic));
        let topic = Span::new(segment, begin, topics.len() - begin);
        Entry { topic, flags: entry.flags & !flags::FITS_NAMESPACE, ..*entry }
    };
    let entries = batch.entries.iter().filter(fits).map(entry).collect();
    let mut segments = batch.segments.clone();
    segments.push(topics.freeze());
    Read::Batch(Batch { segments, entries, exclusive: false, ..batch })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::conformance::{self, message, read_all};
    use crate::stream::memory::MemoryStream;

    fn prefixed(memory: &Arc<MemoryStream>) -> Arc<dyn Stream> {
        Arc::new(Prefixed::new(Arc::clone(memory) as Arc<dyn Stream>, "clean"))
    }

    #[tokio::test]
    async fn subscribers_see_each_topic_below_the_prefix_and_all_else_as_it_is() {
        let memory = MemoryStream::with_hooks("clean", 4);
        let sent = [message("acme/sensor-1/reading", b"1"), message("acme/sensor-2/reading", b"2")];
        memory.append(&sent, &[]).expect("there is room");
        for mut cursor in [prefixed(&memory).cursor(Offset(1)), prefixed(&memory).peek(Offset(1))] {
            let Ok(Read::Batch(batch)) = cursor.next().await else { panic!("it is there") };
            assert_eq!(batch.len(), 1);
            let seen = batch.message(0);
            assert_eq!((seen.topic(), seen.device()), ("clean/acme/sensor-2/reading", "sensor-2"));
            assert_eq!((seen.payload(), seen.offset()), (&b"2"[..], Offset(1)));
            assert!(cursor.try_next().await.expect("it runs").is_none());
            assert_eq!(cursor.position(), Offset(2));
        }
        let Ok(Read::Batch(batch)) = memory.cursor(Offset(0)).next().await else { panic!("it is there") };
        assert_eq!(batch.message(0).topic(), "acme/sensor-1/reading", "for all others");
    }

    #[tokio::test]
    async fn a_topic_without_room_for_the_prefix_is_passed_over() {
        let memory = MemoryStream::with_hooks("clean", 4);
        let longest = format!("a/b/{}", "t".repeat(TOPIC_BYTES_MAX - 4));
        memory.append(&[message(&longest, b"1"), message("a/b", b"2")], &[]).expect("there is room");
        let seen = read_all(&*prefixed(&memory), 0).await;
        assert_eq!(seen, [(1, Some(b"2".to_vec()))]);
    }

    #[tokio::test]
    async fn it_is_the_stream_in_all_else() {
        conformance::all_but_topics(|| prefixed(&MemoryStream::with_hooks("clean", 4))).await;
    }
}
