//! Listening sockets: TCP, and Unix sockets with a file mode.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

use super::Address;
use super::bind::{Bind, SocketMode};
use super::config::Endpoint;

/// Connections that the kernel queues until they are accepted, at most `net.core.somaxconn`. A further
/// client gets no answer and tries again after a second.
const BACKLOG: u32 = 4_096;

pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

pub(super) enum Listener {
    Tcp(TcpListener, Bind),
    Unix(UnixListener, SocketFile),
}

/// Binds an address. Connections are refused until the socket listens.
pub(super) fn take(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A port whose connections have just ended may be taken again.
    socket.set_reuseaddr(true)?;
    // Its connections have it too: a client that vanished, and whose protocol has no keep alive, is
    // noticed in the end (`net.ipv4.tcp_keepalive_time`).
    socket.set_keepalive(true)?;
    socket.bind(address)?;
    Ok(socket)
}

impl Listener {
    pub async fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match &endpoint.bind {
            Bind::Tcp(address) => {
                let listener = take(*address)?.listen(BACKLOG)?;
                let address = listener.local_addr()?;
                Ok(Self::Tcp(listener, Bind::Tcp(address)))
            }
            Bind::Unix(path) => {
                let mode = endpoint.mode.unwrap_or_default().0;
                let (listener, file) = SocketFile::bind(path, mode).await?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    pub fn address(&self) -> Bind {
        match self {
            Self::Tcp(_, address) => address.clone(),
            Self::Unix(_, file) => Bind::Unix(file.path.clone()),
        }
    }

    /// Creates the file of a Unix socket again if it was removed, and returns whether it was. Fails if
    /// another file has taken its place, in which case no client can reach the socket.
    pub async fn put_back(&mut self, endpoint: &Endpoint) -> io::Result<bool> {
        match self {
            Self::Unix(_, file) if !file.is_there() => {
                *self = Self::bind(endpoint).await?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    pub async fn accept(&self) -> io::Result<(Socket, Address)> {
        match self {
            Self::Tcp(listener, _) => {
                let (socket, from) = listener.accept().await?;
                Ok((Socket::Tcp(socket), Address::Ip(from)))
            }
            Self::Unix(listener, _) => {
                let (socket, _) = listener.accept().await?;
                let uid = socket.peer_cred().ok().map(|peer| peer.uid());
                Ok((Socket::Unix(socket), Address::Unix { uid }))
            }
        }
    }
}

/// File of a Unix socket. It is removed with the listener, unless another file has taken its place.
pub(super) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    /// Binds a socket under a temporary name and renames it, so that it is visible only with its mode,
    /// and replaces a stale file.
    async fn bind(path: &Path, mode: u32) -> io::Result<(UnixListener, Self)> {
        make_way(path).await?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let new = path.with_file_name(name);
        make_way(&new).await?;
        // Left by a run that was killed between the bind and the rename.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&new)?;
        fs::set_permissions(&new, Permissions::from_mode(mode))?;
        let inode = inode(&new)?;
        fs::rename(&new, path)?;
        Ok((listener, Self { path: path.to_owned(), inode }))
    }

    fn is_there(&self) -> bool {
        inode(&self.path).is_ok_and(|inode| inode == self.inode)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_there() {
            // One that stays behind is stale, and replaced by the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Changes who may connect to a socket.
pub(super) fn set_mode(path: &Path, mode: SocketMode) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode.0))
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Checks that a socket may be created at the path: nothing is there, or a socket on which no process
/// listens.
async fn make_way(path: &Path) -> io::Result<()> {
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !file.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is not a socket"));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_storm_of_connects_waits_to_be_accepted() {
        let endpoint = Endpoint::at("127.0.0.1:0".parse().unwrap());
        let listener = Listener::bind(&endpoint).await.unwrap();
        let somaxconn = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let storm = somaxconn.trim().parse().unwrap_or(128).min(500);
        let mut connected = Vec::new();
        for _ in 0..storm {
            // Never answered where there is no place for it.
            connected.push(TcpStream::connect(listener.address().tcp().unwrap()).await.unwrap());
        }
    }

    #[tokio::test]
    async fn a_peer_that_vanished_without_a_word_is_noticed_by_the_kernel() {
        let listener = Listener::bind(&Endpoint::at("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let _peer = TcpStream::connect(listener.address().tcp().unwrap()).await.unwrap();
        let (Socket::Tcp(socket), _) = listener.accept().await.unwrap() else { panic!("not TCP") };
        assert!(TcpSocket::from_std_stream(socket.into_std().unwrap()).keepalive().unwrap());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("listener.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (listener, file) = SocketFile::bind(&path, 0o600).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let refused = SocketFile::bind(&path, 0o600).await.err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop((listener, file));
        assert!(!path.exists());
        fs::write(&path, "data").unwrap();
        assert!(SocketFile::bind(&path, 0o600).await.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn a_socket_whose_file_was_removed_is_reached_again_unless_another_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("listener.sock");
        let endpoint = Endpoint::at(format!("unix:{}", path.display()).parse().unwrap());
        let mut listener = Listener::bind(&endpoint).await.unwrap();
        assert!(!listener.put_back(&endpoint).await.unwrap());
        fs::remove_file(&path).unwrap();
        assert!(listener.put_back(&endpoint).await.unwrap());
        let (connected, accepted) = tokio::join!(UnixStream::connect(&path), listener.accept());
        assert!(connected.is_ok() && accepted.is_ok());
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(listener.put_back(&endpoint).await.is_err());
        drop(other);
        assert!(listener.put_back(&endpoint).await.unwrap(), "what is there is stale");
    }
}
