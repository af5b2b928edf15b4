//! Combines the CRC32C of two consecutive runs of bytes.
//!
//! A CRC is a polynomial over GF(2) modulo P. The CRC of A followed by B is crc(A) x^(8 |B|) + crc(B),
//! and x^(8 |B|) is a product of the powers below, one for each bit of |B|. So a thread that copies
//! bytes computes their CRC while they are in its cache, and the committer computes only the CRC of the
//! rest. (The crate's `crc32c_combine` squares some twenty matrices for this in each call.)

/// Castagnoli's polynomial, with the bit of x^31 lowest, without x^32.
const P: u32 = 0x82f6_3b78;
/// The polynomial 1.
const ONE: u32 = 1 << 31;
/// x^8, x^16, x^32: each is the square of the previous one.
const POWERS: [u32; 32] = {
    let mut powers = [ONE >> 8; 32];
    let mut i = 1;
    while i < powers.len() {
        powers[i] = product(powers[i - 1], powers[i - 1]);
        i += 1;
    }
    powers
};

/// Returns the CRC32C of bytes with the CRC `crc`, followed by `len` bytes with the CRC `next`.
pub fn followed_by(crc: u32, next: u32, len: u32) -> u32 {
    let powers = POWERS.iter().enumerate().filter(|(bit, _)| len >> bit & 1 == 1);
    powers.fold(crc, |crc, (_, power)| product(crc, *power)) ^ next
}

/// Returns the product modulo P.
const fn product(a: u32, mut b: u32) -> u32 {
    let mut sum = 0;
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        // Masks, not branches: the bits of a CRC cannot be foreseen.
        sum ^= b & (a >> bit & 1).wrapping_neg();
        b = b >> 1 ^ P & (b & 1).wrapping_neg();
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_sum_of_two_runs_is_that_of_all_bytes(
            bytes in prop::collection::vec(any::<u8>(), 0..3_000),
            cut in any::<prop::sample::Index>(),
        ) {
            let (a, b) = bytes.split_at(cut.index(bytes.len() + 1));
            let sum = super::followed_by(crc32c::crc32c(a), crc32c::crc32c(b), b.len() as u32);
            prop_assert_eq!(sum, crc32c::crc32c(&bytes));
        }
    }

    #[test]
    fn every_power_is_right() {
        for bit in 0..32 {
            let crate_says = crc32c::crc32c_combine(0x1234_5678, 0x9abc_def0, 1 << bit);
            assert_eq!(super::followed_by(0x1234_5678, 0x9abc_def0, 1 << bit), crate_says, "2^{bit} bytes");
        }
    }
}
