//! How a connection is closed so that the other side can read why.
//!
//! A socket that is closed while there is something unread in it, or while its peer goes
//! on sending, is reset, and what was on its way to the peer is lost (RFC 1122,
//! 4.2.2.13). So the write side is closed first, and what comes is read for a moment.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// For the last bytes: the client may be gone, or not read.
const LAST_WRITE_MAX: Duration = Duration::from_secs(1);
/// For the client to read them and to close its side.
const LINGER_MAX: Duration = Duration::from_secs(2);
const READ_BYTES: usize = 4 << 10;

/// Sends the last bytes and closes the write side; returns how many bytes were sent.
pub async fn say_last<S: AsyncWrite + Unpin>(io: &mut S, out: &mut BytesMut) -> usize {
    let left = out.len();
    // An error: nobody is there to hear it.
    let _ = timeout(LAST_WRITE_MAX, async {
        io.write_all_buf(out).await?;
        io.shutdown().await
    })
    .await;
    left - out.len()
}

/// Reads and discards what the peer still sends, until it closes its side.
pub async fn linger<S: AsyncRead + Unpin>(io: &mut S) {
    let _ = timeout(LINGER_MAX, async {
        let mut discarded = vec![0; READ_BYTES];
        while matches!(io.read(&mut discarded).await, Ok(1..)) {}
    })
    .await;
}
