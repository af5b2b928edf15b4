//! Write a Headworks plugin in Rust: a function of one borrowed message.

extern crate alloc;

pub mod json;
