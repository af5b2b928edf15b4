//! Random moments of a test that kills, which its seed brings back.

/// The seed is printed so that a failure can be told from luck.
#[derive(Debug)]
pub struct Moments(u64);

impl Moments {
    /// Takes the seed from `CRASH_SEED`, else from the clock.
    pub fn seeded(name: &str) -> Self {
        let seed = std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
            now.as_nanos() as u64
        });
        println!("{name}: CRASH_SEED={seed}");
        Self(seed | 1)
    }

    /// Returns a number below the bound: xorshift64 (Marsaglia 2003).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
