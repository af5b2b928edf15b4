//! A segment file: a header in the first 4 KiB, then frames. Little-endian.
//!
//! | at | size | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `HWSEGLOG` |
//! | 8 | 2 | version, 1 |
//! | 10 | 2 | header length, 128 |
//! | 12 | 4 | compatible features: an older reader may go on |
//! | 16 | 4 | incompatible features: a reader that does not know one refuses |
//! | 20 | 16 | UUID of the log |
//! | 36 | 4 | generation |
//! | 40 | 8 | sequence, also the file's name |
//! | 48 | 8 | base offset |
//! | 56 | 8 | first frame's sequence: frames of older segments from there on are void |
//! | 64 | 8 | writer epoch: counts the openings |
//! | 72 | 8 | random salt: every frame's marker |
//! | 80 | 4 | key id: 0, not encrypted |
//! | 84 | 2 | partitions |
//! | 86 | 2 | reserved, 0 |
//! | 88 | 8 | append clock when it was made |
//! | 96 | 4 | header CRC of the frame before |
//! | 100 | 8 | id of the opening that wrote it; 0: by a version that had none |
//! | 108 | 8 | first offset of that opening |
//! | 116 | 8 | reserved, 0 |
//! | 124 | 4 | CRC32C of the header before it |

use uuid::Uuid;

/// Position of the first frame.
pub const FRAMES_AT: u64 = 4096;
const HEADER_BYTES: usize = 128;
const MAGIC: &[u8; 8] = b"HWSEGLOG";
const VERSION: u16 = 1;
/// Incompatible features that this version can read.
const INCOMPATIBLE_KNOWN: u32 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub log: Uuid,
    pub generation: u32,
    pub sequence: u64,
    pub base: u64,
    pub first_frame: u64,
    pub epoch: u64,
    pub salt: u64,
    pub partitions: u16,
    pub clock_us: u64,
    pub previous_crc: u32,
    pub opening: u64,
    pub opening_first: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("the segment's header is damaged")]
    Damaged,
    #[error(
        "the segment was written by a newer version of headworks (version {0}, features {1:#x}): use that version"
    )]
    Newer(u16, u32),
}

impl Header {
    pub fn encode(&self) -> [u8; FRAMES_AT as usize] {
        let mut out = [0; FRAMES_AT as usize];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(10, &(HEADER_BYTES as u16).to_le_bytes());
        put(20, self.log.as_bytes());
        put(36, &self.generation.to_le_bytes());
        put(40, &self.sequence.to_le_bytes());
        put(48, &self.base.to_le_bytes());
        put(56, &self.first_frame.to_le_bytes());
        put(64, &self.epoch.to_le_bytes());
        put(72, &self.salt.to_le_bytes());
        put(84, &self.partitions.to_le_bytes());
        put(88, &self.clock_us.to_le_bytes());
        put(96, &self.previous_crc.to_le_bytes());
        put(100, &self.opening.to_le_bytes());
        put(108, &self.opening_first.to_le_bytes());
        let crc = crc32c::crc32c(&out[..HEADER_BYTES - 4]);
        out[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Decodes a header. Accepts any bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Broken> {
        let head: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(Broken::Damaged)?;
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if &head[..8] != MAGIC || crc32c::crc32c(&head[..HEADER_BYTES - 4]) != u32_at(HEADER_BYTES - 4) {
            return Err(Broken::Damaged);
        }
        if u16_at(8) > VERSION || u32_at(16) & !INCOMPATIBLE_KNOWN != 0 {
            return Err(Broken::Newer(u16_at(8), u32_at(16)));
        }
        Ok(Self {
            log: Uuid::from_slice(&head[20..36]).map_err(|_| Broken::Damaged)?,
            generation: u32_at(36),
            sequence: u64_at(40),
            base: u64_at(48),
            first_frame: u64_at(56),
            epoch: u64_at(64),
            salt: u64_at(72),
            partitions: u16_at(84),
            clock_us: u64_at(88),
            previous_crc: u32_at(96),
            opening: u64_at(100),
            opening_first: u64_at(108),
        })
    }
}

/// Returns the file name of a segment: `00000000000000000007.seg`.
pub fn name(sequence: u64) -> String {
    format!("{sequence:020}.seg")
}

/// Returns the sequence number in a file's name, if it is a segment's.
pub fn sequence_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_any_flipped_byte_is_seen() {
        let header = Header {
            log: Uuid::new_v4(),
            generation: 3,
            sequence: 7,
            base: u64::MAX - 1,
            first_frame: 9,
            epoch: 4,
            salt: 0x0123_4567_89ab_cdef,
            partitions: 64,
            clock_us: 17,
            previous_crc: 5,
            opening: 6,
            opening_first: 8,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Ok(header));
        for at in 0..HEADER_BYTES {
            let mut bytes = bytes;
            bytes[at] ^= 0x10;
            assert_eq!(Header::decode(&bytes), Err(Broken::Damaged), "{at}");
        }
        assert_eq!(sequence_of(&name(7)), Some(7));
        assert_eq!(sequence_of("7.seg"), None);
    }
}
