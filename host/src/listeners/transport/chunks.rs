//! Rewrites a WebSocket client's data frames as messages of at most [`CHUNK_BYTES`]. The library buffers
//! a message until it is complete, and a client may send messages of any size slowly. The protocol
//! inside does not depend on frame boundaries. Other frames, and invalid data, are passed to the library
//! unchanged, which answers or refuses them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes of a rewritten message. This is a multiple of the mask's length, so that the bytes of each
/// chunk stay masked as they were.
pub(super) const CHUNK_BYTES: usize = 4 << 10;
/// Number of bytes that are read and rewritten at a time.
const READ_BYTES: usize = 4 << 10;
/// Opcodes and flags of RFC 6455, 5.2.
const CONTINUATION: u8 = 0;
const BINARY: u8 = 2;
const CONTROL: u8 = 8;
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// A socket whose incoming frames are rewritten. Writes are passed through.
pub(super) struct Chunks<S> {
    io: S,
    frames: Frames,
    /// Rewritten bytes that have not been read.
    ready: BytesMut,
    /// Error that is returned once `ready` has been read.
    failed: Option<&'static str>,
}

#[derive(Default)]
struct Frames {
    message_bytes_max: u64,
    /// The received part of the next frame's header.
    header: Vec<u8>,
    /// Bytes of the current frame that have not been received.
    frame_left: u64,
    /// Mask of the current frame, or `None` if the frame is passed through.
    mask: Option<[u8; 4]>,
    /// Bytes of the current chunk that have not been received.
    chunk_left: usize,
    /// Bytes of the frames so far of a message whose last frame has not been received.
    message: Option<u64>,
}

impl<S> Chunks<S> {
    /// Wraps a socket. `begun` holds bytes of frames that were already read. A message of more than
    /// `message_bytes_max`, in one frame or several, is an error.
    pub(super) fn new(io: S, begun: &[u8], message_bytes_max: usize) -> Self {
        let frames = Frames { message_bytes_max: message_bytes_max as u64, ..Frames::default() };
        let mut chunks = Self { io, frames, ready: BytesMut::new(), failed: None };
        chunks.rewrite(begun);
        chunks
    }

    fn rewrite(&mut self, bytes: &[u8]) {
        self.failed = self.frames.rewrite(bytes, &mut self.ready).err();
    }
}

impl Frames {
    fn rewrite(&mut self, mut bytes: &[u8], out: &mut BytesMut) -> Result<(), &'static str> {
        while let Some((first, rest)) = bytes.split_first() {
            if self.frame_left == 0 {
                self.header.push(*first);
                bytes = rest;
                if header_len(&self.header) == Some(self.header.len()) {
                    self.begin(out)?;
                    self.header.clear();
                }
                continue;
            }
            if self.chunk_left == 0 {
                self.begin_chunk(out);
            }
            let (now, rest) = bytes.split_at(self.chunk_left.min(bytes.len()));
            out.extend_from_slice(now);
            self.chunk_left -= now.len();
            self.frame_left -= now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Begins the frame whose header is complete.
    fn begin(&mut self, out: &mut BytesMut) -> Result<(), &'static str> {
        let (first, second) = (self.header[0], self.header[1]);
        let len = payload_len(&self.header);
        let opcode = first & 0x0f;
        self.frame_left = len;
        let is_data = first & !FIN == opcode && [CONTINUATION, BINARY].contains(&opcode);
        if !is_data || second & MASKED == 0 {
            if opcode < CONTROL && len > CHUNK_BYTES as u64 {
                return Err("a frame that is not of binary data, or not masked");
            }
            self.mask = None;
            self.chunk_left = usize::try_from(len).map_err(|_| "a frame that is too large")?;
            out.extend_from_slice(&self.header);
            return Ok(());
        }
        let before = match (opcode, self.message.take()) {
            (BINARY, None) => 0,
            (CONTINUATION, Some(before)) => before,
            _ => return Err("a message that begins within another, or continues without a beginning"),
        };
        let message = before.saturating_add(len);
        if message > self.message_bytes_max {
            return Err("a message that is larger than max_frame_size");
        }
        self.message = (first & FIN == 0).then_some(message);
        self.mask = self.header[self.header.len() - 4..].first_chunk().copied();
        if len == 0 {
            self.begin_chunk(out);
        }
        Ok(())
    }

    fn begin_chunk(&mut self, out: &mut BytesMut) {
        let len = self.frame_left.min(CHUNK_BYTES as u64) as usize;
        self.chunk_left = len;
        out.put_u8(FIN | BINARY);
        if len < 126 {
            out.put_u8(MASKED | len as u8);
        } else {
            out.put_u8(MASKED | 126);
            out.put_u16(len as u16);
        }
        out.put_slice(&self.mask.unwrap_or_default());
    }
}

/// Returns the length of a header, once enough of it has been received.
fn header_len(header: &[u8]) -> Option<usize> {
    let second = header.get(1)?;
    let extended = match second & !MASKED {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    Some(2 + extended + if second & MASKED == 0 { 0 } else { 4 })
}

fn payload_len(header: &[u8]) -> u64 {
    let extended = &header[2..];
    match header[1] & !MASKED {
        126 => extended.first_chunk().map_or(0, |len| u16::from_be_bytes(*len).into()),
        127 => extended.first_chunk().map_or(0, |len| u64::from_be_bytes(*len)),
        len => len.into(),
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Chunks<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.ready.is_empty() {
            if let Some(failed) = self.failed {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, failed)));
            }
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.rewrite(read.filled());
        }
        let len = self.ready.len().min(out.remaining());
        out.put_slice(&self.ready[..len]);
        self.ready.advance(len);
        if self.ready.is_empty() {
            // An idle connection keeps none.
            self.ready = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Chunks<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MASK: [u8; 4] = [1, 2, 3, 4];

    fn masked(payload: &[u8]) -> Vec<u8> {
        payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect()
    }

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            len @ ..126 => frame.push(MASKED | len as u8),
            len @ ..65_536 => {
                frame.push(MASKED | 126);
                frame.put_u16(len as u16);
            }
            len => {
                frame.push(MASKED | 127);
                frame.put_u64(len as u64);
            }
        }
        [frame, MASK.to_vec(), masked(payload)].concat()
    }

    /// First byte and payload of each frame.
    fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let header = header_len(bytes).unwrap();
            let (header, rest) = bytes.split_at(header);
            let (payload, rest) = rest.split_at(payload_len(header) as usize);
            frames.push((header[0], masked(payload)));
            bytes = rest;
        }
        frames
    }

    fn rewritten(pieces: &[&[u8]], max: u64) -> (Vec<u8>, Result<(), &'static str>) {
        let (mut frames, mut out) = (Frames { message_bytes_max: max, ..Frames::default() }, BytesMut::new());
        let done = pieces.iter().try_for_each(|piece| frames.rewrite(piece, &mut out));
        (out.to_vec(), done)
    }

    proptest! {
        #[test]
        fn however_frames_come_their_bytes_are_the_same_in_small_messages(
            messages in prop::collection::vec(
                prop::collection::vec(prop_oneof![0..200_usize, 4_000..10_000_usize, Just(70_000)], 1..4), 1..5),
            cut in 1..9_000_usize,
        ) {
            let (mut sent, mut payload) = (Vec::new(), Vec::new());
            for (number, parts) in messages.iter().enumerate() {
                for (at, len) in parts.iter().enumerate() {
                    let part: Vec<u8> = (0..*len).map(|n| (n + number * 7 + at) as u8).collect();
                    let opcode = if at == 0 { BINARY } else { CONTINUATION };
                    let fin = if at + 1 == parts.len() { FIN } else { 0 };
                    sent.extend(frame(fin | opcode, &part));
                    sent.extend(frame(FIN | 9, b"ping"));
                    payload.extend(part);
                }
            }
            let pieces: Vec<&[u8]> = sent.chunks(cut).collect();
            let (out, done) = rewritten(&pieces, 1 << 20);
            prop_assert_eq!(done, Ok(()));
            let mut heard = Vec::new();
            for (first, part) in frames(&out) {
                if first == FIN | 9 {
                    prop_assert_eq!(part, b"ping");
                    continue;
                }
                prop_assert_eq!(first, FIN | BINARY);
                prop_assert!(part.len() <= CHUNK_BYTES);
                heard.extend(part);
            }
            prop_assert!(heard == payload);
        }
    }

    #[test]
    fn a_message_that_is_too_large_or_out_of_order_is_refused_at_its_header() {
        let small = frame(BINARY, b"x");
        let header = |first: u8, len: usize| frame(first, &vec![0; len])[..8].to_vec();
        for (bytes, is_refused) in [
            (header(FIN | BINARY, 1_000), false),
            (header(FIN | BINARY, 1_001), true),
            ([small.clone(), header(FIN | CONTINUATION, 999)].concat(), false),
            ([small.clone(), header(FIN | CONTINUATION, 1_000)].concat(), true),
            ([small.clone(), small.clone()].concat(), true),
            (frame(CONTINUATION, b"x"), true),
            // A text of any size would be kept.
            (header(FIN | 1, 1 << 13), true),
            (vec![BINARY, 127, 0, 0, 0, 0, 0, 1, 0, 0], true),
        ] {
            assert_eq!(rewritten(&[&bytes], 1_000).1.is_err(), is_refused, "{bytes:?}");
        }
    }
}
