//! Reads the body of a request: within its bounds of size and time, and of the memory that the bodies of
//! all clients take together.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::body::{Body as _, Incoming};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::answer::Refusal;
use crate::listeners::permits::{FREE_BYTES, Permit, Permits, TooSlow};

/// The cause of a refusal where the client has ended a body before its end.
pub const BROKEN_OFF: &str = "body";
/// A body may take a second more for each of these.
const BYTES_PER_S_LEAST: u64 = 1 << 10;

/// Bytes that are still read of an HTTP/2 request that is answered before its body has come. A client that learns of
/// the answer while it sends may take a reset for an error (curl 7.88 does).
const DISCARDED_BYTES_MAX: usize = 1 << 20;
/// Time in which they are read.
const DISCARDED_TIME_MAX: Duration = Duration::from_secs(5);

/// A whole body; it counts for the memory of all until it is dropped.
pub struct Body {
    pub bytes: Bytes,
    _permit: Option<Box<Permit>>,
}

/// Reads a body of at most `bytes_max`. It may take `time`, and more where it is long. `window`: what the
/// client may send before the body is read is counted by it; it is given back once there is room for the body.
pub async fn read(
    body: &mut Incoming,
    bytes_max: usize,
    time: Duration,
    permits: &Arc<Permits>,
    mut window: Option<OwnedSemaphorePermit>,
) -> Result<Body, Refusal> {
    let expected = body.size_hint().exact();
    if expected.is_some_and(|expected| expected > bytes_max as u64) {
        return Err(too_large(bytes_max));
    }
    let most = expected.unwrap_or(bytes_max as u64);
    let until = Instant::now() + time + Duration::from_secs(most / BYTES_PER_S_LEAST);
    let mut permit = None;
    // Where nobody knows the length of a body, no more than the free bytes are read without a permit.
    Permit::set(&mut permit, expected.map(|expected| expected as usize), permits);
    let (mut first, mut rest) = (None, BytesMut::new());
    loop {
        while permit.as_deref().is_some_and(|permit: &Permit| !permit.is_given()) {
            let given = timeout_at(until, Permit::changed(permit.as_deref_mut())).await;
            given.map_err(|_| slow())?.map_err(|TooSlow| slow())?;
        }
        if permit.is_some() {
            drop(window.take());
        }
        let frame = tokio::select! {
            frame = timeout_at(until, body.frame()) => frame.map_err(|_| slow())?,
            changed = Permit::changed(permit.as_deref_mut()) => match changed {
                Ok(()) => continue,
                Err(TooSlow) => return Err(slow()),
            },
        };
        let Some(frame) = frame else { break };
        let frame =
            frame.map_err(|error| Refusal::bad(BROKEN_OFF, format!("the body is cut short: {error}")))?;
        // Trailers say nothing to us.
        let Ok(data) = frame.into_data() else { continue };
        let len = first.as_ref().map_or(0, Bytes::len) + rest.len() + data.len();
        if len > bytes_max {
            return Err(too_large(bytes_max));
        }
        if let Some(permit) = &mut permit {
            permit.add(data.len());
        }
        match &first {
            None => first = Some(data),
            Some(_) => rest.extend_from_slice(&data),
        }
        if permit.is_none() && len > FREE_BYTES {
            Permit::set(&mut permit, Some(bytes_max), permits);
        }
    }
    let first = first.unwrap_or_default();
    let bytes = if rest.is_empty() {
        first
    } else {
        // Not before all is there: a client that only says how much comes takes no memory.
        let mut whole = BytesMut::with_capacity(first.len() + rest.len());
        whole.extend_from_slice(&first);
        whole.extend_from_slice(&rest);
        whole.freeze()
    };
    Ok(Body { bytes, _permit: permit })
}

/// Reads and drops what a client still sends of a request that is answered.
pub async fn discard(mut body: Incoming) {
    let until = Instant::now() + DISCARDED_TIME_MAX;
    let mut left = DISCARDED_BYTES_MAX;
    while let Ok(Some(Ok(frame))) = timeout_at(until, body.frame()).await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}

pub fn too_large(bytes_max: usize) -> Refusal {
    let reason = format!("the body is larger than {bytes_max} bytes");
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", reason)
}

fn slow() -> Refusal {
    Refusal::new(StatusCode::REQUEST_TIMEOUT, "slow", "the body came too slowly")
}
