//! The result of `validate --connect` for a sink: whether it could write now.

use super::{Claim, Found, Position};

/// What a sink would find if it opened now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// What exists, or what the sink would create.
    pub found: Vec<String>,
    /// What prevents the sink from writing rows, each with what to do; empty if it would write.
    pub problems: Vec<String>,
    /// What works but is probably not intended.
    pub warnings: Vec<String>,
    /// What each claim would find if it were opened now.
    pub claims: Vec<Looked>,
}

/// A claim that was looked up and not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    pub claim: Claim,
    /// Positions, as in [`super::Opened`].
    pub positions: Vec<Position>,
    pub found: Found,
}
