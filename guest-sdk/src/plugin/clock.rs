//! The `now` of the batch, the same again on replay; within `process`,
//! `message.now_us()` says the same without a call. Natively: 0.

/// Microseconds since 1970, UTC.
pub fn now_us() -> u64 {
    #[cfg(target_family = "wasm")]
    return crate::bindings::headworks::plugin::clock::now_us();
    #[cfg(not(target_family = "wasm"))]
    0
}
