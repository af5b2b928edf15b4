//! Closes a connection so that the peer can read the reason.
//!
//! If a socket is closed while it holds unread data, or while its peer is still sending, it is reset,
//! and data in transit to the peer is lost (RFC 1122, 4.2.2.13). So the write side is closed first, and
//! incoming data is read and discarded for a moment.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Time for writing the last bytes. The client may be gone, or may not read.
const LAST_WRITE_MAX: Duration = Duration::from_secs(1);
/// Time for the client to read the last bytes and to close its side.
const LINGER_MAX: Duration = Duration::from_secs(2);
const READ_BYTES: usize = 4 << 10;

/// Sends the last bytes and closes the write side. Returns the number of bytes that were sent.
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
