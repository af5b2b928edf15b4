//! What `validate --connect` finds out about a sink: whether it could write now.

use super::{Claim, Found, Position};

/// What a sink would meet if it opened now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Names what is there, or what the sink would create.
    pub found: Vec<String>,
    /// Says what keeps the sink from writing rows, each with what to do; none where it would write.
    pub problems: Vec<String>,
    /// Says what works and is hardly meant.
    pub warnings: Vec<String>,
    /// Says what each claim would find if it were taken now.
    pub claims: Vec<Looked>,
}

/// A claim that was looked up and not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    pub claim: Claim,
    /// As [`super::Opened`] has them.
    pub positions: Vec<Position>,
    pub found: Found,
}
