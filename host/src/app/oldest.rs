//! How long the oldest message waits that a sink has not committed: the lag of a sink in seconds.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::batch::Offset;
use crate::pipeline::{PipelineStatus, SinkStatus};
use crate::stream::{Read, Stream};

/// By pipeline and sink: the first message that is not committed, and when it was appended.
#[derive(Default)]
pub struct Oldest(Mutex<HashMap<(String, String), (Offset, SystemTime)>>);

impl Oldest {
    /// Reads from the stream when the first message that each sink lacks was appended.
    pub async fn find(&self, status: &PipelineStatus, stream: &dyn Stream) {
        for sink in &status.sinks {
            let key = (status.name.clone(), sink.name.clone());
            let known = self.lock().get(&key).map(|(offset, _)| *offset);
            if sink.lag_messages == 0 {
                self.lock().remove(&key);
                continue;
            }
            if known == Some(sink.next) {
                continue;
            }
            let mut cursor = stream.peek(sink.next);
            while let Ok(Some(read)) = cursor.try_next().await {
                if let Read::Batch(batch) = read {
                    let appended = SystemTime::UNIX_EPOCH + Duration::from_micros(batch.now_us);
                    self.lock().insert(key, (sink.next, appended));
                    break;
                }
            }
        }
    }

    /// Returns the age of the oldest message that the sink has not committed, as of the last look.
    pub fn age(&self, status: &PipelineStatus, sink: &SinkStatus) -> Option<Duration> {
        let key = (status.name.clone(), sink.name.clone());
        let (_, appended) = *self.lock().get(&key).filter(|_| sink.lag_messages > 0)?;
        SystemTime::now().duration_since(appended).ok()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), (Offset, SystemTime)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
            state: State::Running,
            committed: Some(Offset(next)),
            next: Offset(next),
            lag_messages: end - next,
            since: SystemTime::now(),
            last_commit: None,
            own_lane: false,
        };
        PipelineStatus {
            name: "p".to_owned(),
            stream: "s".to_owned(),
            state: State::Running,
            wants_room: false,
            chain: None,
            swap_refused: None,
            read: Offset(0),
            end: Offset(end),
            sinks: vec![sink],
        }
    }

    #[tokio::test]
    async fn a_sink_lags_by_the_age_of_the_oldest_message_that_it_lacks() {
        let stream = MemoryStream::new("s", 1);
        let oldest = Oldest::default();
        let age = |status: &PipelineStatus| oldest.age(status, &status.sinks[0]);
        let before = SystemTime::now();
        stream.append(&[message("a/b", b"1")], &[]).unwrap();
        let between = SystemTime::now();
        stream.append(&[message("a/b", b"2")], &[]).unwrap();

        let lacks_both = status(0, 2);
        assert_eq!(age(&lacks_both), None, "nobody has looked yet");
        oldest.find(&lacks_both, &*stream).await;
        let of_first = age(&lacks_both).unwrap();
        // The time of an append is in whole microseconds.
        let us = Duration::from_micros(1);
        assert!(of_first <= before.elapsed().unwrap() + us);
        oldest.find(&status(1, 2), &*stream).await;
        let of_second = age(&status(1, 2)).unwrap();
        assert!(of_second <= between.elapsed().unwrap() + us);

        let has_all = status(2, 2);
        assert_eq!(age(&has_all), None);
        oldest.find(&has_all, &*stream).await;
        assert_eq!(age(&lacks_both), None, "what it was is forgotten");
    }
}
