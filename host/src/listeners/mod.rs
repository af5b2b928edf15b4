//! Entries for devices. Each listener takes messages in its own protocol,
//! appends them to a stream and acknowledges only what the stream made durable.
//! All of them stand on [`transport`].

pub mod http;
pub mod mqtt;
mod permits;
pub mod refused_clients;
pub mod transport;

/// What to do where an address cannot be listened on.
pub fn bind_advice(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::AddrInUse => "stop the other process, or set another address",
        ErrorKind::PermissionDenied => "ports below 1024 need CAP_NET_BIND_SERVICE; set another one",
        ErrorKind::AddrNotAvailable => "this machine does not have the address; set another one",
        _ => "set another address",
    }
}
