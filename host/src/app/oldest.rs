//! How long the oldest message waits that a sink has not committed: the lag of a sink in seconds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::batch::Offset;
use crate::pipeline::{PipelineStatus, SinkStatus};
use crate::stream::{Read, Stream};

/// Holds the first message that is not committed, by pipeline and sink, and since when it waits, on
/// a clock that nobody sets.
#[derive(Default)]
pub struct Oldest(Mutex<HashMap<(String, String), (Offset, Instant)>>);

impl Oldest {
    /// Reads from the streams when the first message that each sink lacks was appended.
    pub async fn find(&self, status: &PipelineStatus, streams: &[Arc<dyn Stream>]) {
        for sink in &status.sinks {
            let Some(stream) = streams.iter().find(|stream| stream.name() == sink.stream) else { continue };
            let key = (status.name.clone(), sink.name.clone());
            let known = self.lock().get(&key).copied();
            if sink.lag_messages == 0 {
                self.lock().remove(&key);
                continue;
            }
            if known.is_some_and(|(offset, _)| offset == sink.next) {
                continue;
            }
            // What waits in front of the steps is not in this stream yet.
            self.lock().remove(&key);
            let mut cursor = stream.peek(sink.next);
            while let Ok(Some(read)) = cursor.try_next().await {
                if let Read::Batch(batch) = read {
                    let appended = SystemTime::UNIX_EPOCH + Duration::from_micros(batch.now_us);
                    // One that came later does not wait for longer.
                    let before = known.filter(|(offset, _)| *offset < sink.next).map(|(_, since)| since);
                    let since = since(appended, SystemTime::now(), Instant::now(), before);
                    self.lock().insert(key, (sink.next, since));
                    break;
                }
            }
        }
    }

    /// Returns the age of the oldest message that the sink has not committed, as of the last look.
    pub fn age(&self, status: &PipelineStatus, sink: &SinkStatus) -> Option<Duration> {
        let key = (status.name.clone(), sink.name.clone());
        let (_, since) = *self.lock().get(&key).filter(|_| sink.lag_messages > 0)?;
        Some(since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), (Offset, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns since when a message waits that was appended at a time of a clock that may have been set
/// since; `before`: since when an older message waited.
fn since(appended: SystemTime, time: SystemTime, now: Instant, before: Option<Instant>) -> Instant {
    let age = time.duration_since(appended).unwrap_or_default();
    let since = now.checked_sub(age).unwrap_or(now);
    before.map_or(since, |before| before.max(since))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::State;
    use crate::stream::conformance::message;
    use crate::stream::memory::MemoryStream;

    fn status(next: u64, end: u64) -> PipelineStatus {
        let sink = SinkStatus {
            name: "w".to_owned(),
            stream: "s".to_owned(),
            end: Offset(end),
            state: State::Running,
            to_do: crate::pipeline::ToDo::Mend,
            committed: Some(Offset(next)),
            next: Offset(next),
            lag_messages: end - next,
            gone_messages: 0,
            since: Instant::now(),
            last_commit: None,
            own_lane: false,
        };
        PipelineStatus {
            name: "p".to_owned(),
            stream: "s".to_owned(),
            state: State::Running,
            since: std::time::Instant::now(),
            wants_room: false,
            chain: None,
            swap_refused: None,
            swap_waits: None,
            retries: None,
            read: Offset(0),
            end: Offset(end),
            sinks: vec![sink],
        }
    }

    #[tokio::test]
    async fn a_sink_lags_by_the_age_of_the_oldest_message_that_it_lacks() {
        let stream: Arc<dyn Stream> = MemoryStream::new("s", 1);
        let streams = [Arc::clone(&stream)];
        let oldest = Oldest::default();
        let age = |status: &PipelineStatus| oldest.age(status, &status.sinks[0]);
        let before = SystemTime::now();
        stream.append(&[message("a/b", b"1")], &[]).unwrap();
        let between = SystemTime::now();
        stream.append(&[message("a/b", b"2")], &[]).unwrap();

        let lacks_both = status(0, 2);
        assert_eq!(age(&lacks_both), None, "nobody has looked yet");
        oldest.find(&lacks_both, &streams).await;
        let of_first = age(&lacks_both).unwrap();
        // The time of an append is in whole microseconds.
        let us = Duration::from_micros(1);
        assert!(of_first <= before.elapsed().unwrap() + us);
        oldest.find(&status(1, 2), &streams).await;
        let of_second = age(&status(1, 2)).unwrap();
        assert!(of_second <= between.elapsed().unwrap() + us);

        let has_all = status(2, 2);
        assert_eq!(age(&has_all), None);
        oldest.find(&has_all, &streams).await;
        assert_eq!(age(&lacks_both), None, "what it was is forgotten");
    }

    #[test]
    fn a_clock_that_is_set_makes_no_message_wait_longer_than_an_older_one_or_since_later_than_now() {
        let (time, now) = (SystemTime::now(), Instant::now());
        let (second, hours) = (Duration::from_secs(1), Duration::from_secs(7_200));
        assert_eq!(since(time - second, time, now, None), now - second);
        assert_eq!(since(time + hours, time, now, None), now, "set back");
        let older = now - 2 * second;
        assert_eq!(since(time - hours, time, now, Some(older)), older, "set ahead");
        assert_eq!(since(time - second, time, now, Some(older)), now - second);
    }
}
