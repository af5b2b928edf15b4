//! PROXY protocol, version 2 (haproxy.org, doc/proxy-protocol.txt, section 2.2): a load balancer sends
//! the client's address before any other data.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

use super::Failed;
use super::config::ProxyProtocol;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const HEAD_BYTES: usize = 16;
/// Most bytes after the fixed part: addresses, and extensions of the balancer.
const BODY_BYTES_MAX: usize = 4_096;
const CRC32C: u8 = 0x03;

/// Reads exactly the header. Returns `None` for a connection of the balancer itself (LOCAL), or of an
/// unknown address family.
pub(super) async fn accept<S: AsyncRead + Unpin>(
    io: &mut S,
    balancer: SocketAddr,
    config: &ProxyProtocol,
) -> Result<Option<SocketAddr>, Failed> {
    if !config.from.iter().any(|network| network.contains(balancer.ip())) {
        let kind = "not one of proxy_protocol.from, closed: add the load balancer's network there, \
                    or give clients without one a listener of their own";
        return Err(Failed::new("proxy", kind, balancer.ip()));
    }
    let mut header = vec![0; HEAD_BYTES];
    // Told apart early: a client's own first bytes would be waited on for more.
    io.read_exact(&mut header[..SIGNATURE.len()]).await.map_err(|error| Failed::lost(&error))?;
    if !header.starts_with(&SIGNATURE) {
        return Err(malformed(if header.starts_with(b"PROXY ") {
            "PROXY protocol version 1: set the load balancer to version 2 (haproxy: send-proxy-v2)"
        } else {
            "no PROXY header: let the load balancer send one (haproxy: send-proxy-v2)"
        }));
    }
    io.read_exact(&mut header[SIGNATURE.len()..]).await.map_err(|error| Failed::lost(&error))?;
    let len = usize::from(u16::from_be_bytes([header[14], header[15]]));
    if len > BODY_BYTES_MAX {
        return Err(malformed("PROXY header too large"));
    }
    header.resize(HEAD_BYTES + len, 0);
    io.read_exact(&mut header[HEAD_BYTES..]).await.map_err(|error| Failed::lost(&error))?;
    parse(&header).map_err(malformed)
}

fn malformed(what: &str) -> Failed {
    Failed::new("proxy", what, "closed")
}

/// Parses a complete header, whose signature and length were checked.
fn parse(header: &[u8]) -> Result<Option<SocketAddr>, &'static str> {
    let (head, body) = header.split_at_checked(HEAD_BYTES).ok_or("PROXY header too short")?;
    let is_local = match head[12] {
        0x20 => true,
        0x21 => false,
        _ => return Err("PROXY header of an unknown version or command"),
    };
    let (addresses_len, client) = match head[13] {
        0x11 | 0x12 => {
            let octets = body.first_chunk::<4>().ok_or("PROXY header too short")?;
            (12, Some((Ipv4Addr::from(*octets).into(), 8)))
        }
        0x21 | 0x22 => {
            let octets = body.first_chunk::<16>().ok_or("PROXY header too short")?;
            (36, Some((Ipv6Addr::from(*octets).into(), 32)))
        }
        0x31 | 0x32 => (216, None),
        0x00 => (0, None),
        _ if is_local => return Ok(None),
        _ => return Err("PROXY header of an unknown address family"),
    };
    if is_local {
        return Ok(None);
    }
    let extensions = body.get(addresses_len..).ok_or("PROXY header too short")?;
    check_extensions(header, extensions)?;
    Ok(client.map(|(ip, port_at): (std::net::IpAddr, usize)| {
        SocketAddr::new(ip.to_canonical(), u16::from_be_bytes([body[port_at], body[port_at + 1]]))
    }))
}

/// Checks the extensions (type, length, value). A checksum must be right if there is one (2.2.4).
fn check_extensions(header: &[u8], mut rest: &[u8]) -> Result<(), &'static str> {
    const WRONG: &str = "PROXY header with an extension cut short";
    while !rest.is_empty() {
        let (head, after) = rest.split_at_checked(3).ok_or(WRONG)?;
        let len = usize::from(u16::from_be_bytes([head[1], head[2]]));
        let (value, after) = after.split_at_checked(len).ok_or(WRONG)?;
        if head[0] == CRC32C {
            let said: [u8; 4] = value.try_into().map_err(|_| WRONG)?;
            let at = header.len() - after.len() - said.len();
            let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..at]), &[0; 4]);
            if crc32c::crc32c_append(crc, after) != u32::from_be_bytes(said) {
                return Err("PROXY header with a wrong checksum");
            }
        }
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let len = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &len, body].concat()
    }

    fn v4(extensions: &[u8]) -> Vec<u8> {
        header(0x21, 0x11, &[&[192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 7, 0x5b][..], extensions].concat())
    }

    fn from(networks: &[&str]) -> ProxyProtocol {
        ProxyProtocol { from: networks.iter().map(|network| network.parse().unwrap()).collect() }
    }

    #[tokio::test]
    async fn a_header_in_bits_gives_the_clients_address_and_leaves_what_follows() {
        let (mut balancer, mut io) = tokio::io::duplex(1);
        let sent = [&v4(&[4, 0, 1, 9])[..], b"MQTT"].concat();
        let send = tokio::spawn(async move { balancer.write_all(&sent).await.map(|()| balancer) });
        let config = from(&["10.0.0.0/8"]);
        let found = accept(&mut io, "10.1.1.1:9".parse().unwrap(), &config).await.ok().unwrap();
        assert_eq!(found, Some("192.0.2.7:12345".parse().unwrap()));
        let mut rest = [0; 4];
        io.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"MQTT");
        drop(send.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn a_header_is_taken_from_nobody_else() {
        let sent = v4(&[]);
        let config = from(&["10.0.0.0/8"]);
        let refused = accept(&mut &sent[..], "11.1.1.1:9".parse().unwrap(), &config).await.err().unwrap();
        assert_eq!((refused.cause, refused.detail.as_str()), ("proxy", "11.1.1.1"));
        let mut text = &b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n"[..];
        let first = accept(&mut text, "10.1.1.1:9".parse().unwrap(), &config);
        assert!(first.await.err().unwrap().kind.contains("send-proxy-v2"));
    }

    #[test]
    fn families_commands_and_checksums() {
        let v6 = [&[0xfd; 16][..], &[0; 16], &[0, 80, 0, 81]].concat();
        let client = "[fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd]:80".parse().unwrap();
        assert_eq!(parse(&header(0x21, 0x21, &v6)), Ok(Some(client)));
        assert_eq!(parse(&header(0x20, 0x00, &[])), Ok(None));
        assert_eq!(parse(&header(0x21, 0x00, &[])), Ok(None));
        assert_eq!(parse(&header(0x21, 0x31, &[0; 216])), Ok(None));
        assert!(parse(&header(0x21, 0x11, &[0; 11])).is_err());
        assert!(parse(&header(0x11, 0x11, &[0; 12])).is_err());
        assert!(parse(&header(0x21, 0x13, &[0; 12])).is_err());
        assert!(parse(&v4(&[4, 0, 2, 9])).is_err());
        let mut summed = v4(&[CRC32C, 0, 4, 0, 0, 0, 0]);
        let crc = crc32c::crc32c(&summed).to_be_bytes();
        assert!(parse(&summed).is_err());
        let at = summed.len() - 4;
        summed[at..].copy_from_slice(&crc);
        assert!(parse(&summed).is_ok());
    }

    proptest! {
        #[test]
        fn no_header_breaks_the_parser(command in 0x20u8..0x23, family: u8, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&header(command, family, &body));
            let _ = parse(&body);
        }
    }
}
