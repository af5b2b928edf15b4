//! Listeners for devices. Each receives messages with its own protocol, appends them to a stream, and
//! acknowledges only messages that are durable. All listeners share [`transport`].

pub mod http;
pub mod mqtt;
mod permits;
pub mod refused_clients;
mod reload;
pub mod transport;

/// Returns what to do if an address cannot be bound.
pub fn bind_advice(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::AddrInUse => "stop the other process, or set another address",
        ErrorKind::PermissionDenied => "ports below 1024 need CAP_NET_BIND_SERVICE; set another one",
        ErrorKind::AddrNotAvailable => "this machine does not have the address; set another one",
        _ => "set another address",
    }
}
