//! SOCKS5 proxy on loopback for the programs of one fetch, with nothing but CONNECT (RFC 1928).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{Egress, Obstacle};

/// A proxy on a port of its own; dropping it closes its connections.
#[derive(Debug)]
pub(crate) struct EgressProxy {
    port: u16,
    _serving: AbortOnDropHandle<()>,
}

const VERSION: u8 = 5;
const CONNECT: u8 = 1;
const NO_AUTHENTICATION: u8 = 0;
const NO_ACCEPTABLE_METHOD: u8 = 0xff;

/// The code of a reply.
#[derive(Copy, Clone)]
#[repr(u8)]
enum Reply {
    Succeeded = 0,
    NotAllowed = 2,
    HostUnreachable = 4,
    CommandNotSupported = 7,
    AddressNotSupported = 8,
}

impl EgressProxy {
    /// Maximum number of connections; further ones wait.
    const CONNECTIONS: usize = 16;
    /// Maximum time for a client to say what it wants.
    const HANDSHAKE: Duration = Duration::from_secs(10);

    /// Starts a proxy whose clients get the connections of `egress`.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no free port.
    pub(crate) async fn start(egress: Arc<Egress>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let serving = AbortOnDropHandle::new(tokio::spawn(serve(listener, egress)));
        Ok(Self { port, _serving: serving })
    }

    /// Returns the URL of the proxy, by which it resolves names, too.
    pub(crate) fn url(&self) -> String {
        format!("socks5h://127.0.0.1:{}", self.port)
    }
}

async fn serve(listener: TcpListener, egress: Arc<Egress>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < EgressProxy::CONNECTIONS => {
                match accepted {
                    Ok((client, _)) => {
                        let egress = Arc::clone(&egress);
                        connections.spawn(async move {
                            if let Err(error) = handle(client, &egress).await {
                                tracing::debug!(%error, "a connection of a fetch ended");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection of a fetch");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn handle(mut client: TcpStream, egress: &Egress) -> io::Result<()> {
    let wanted = timeout(EgressProxy::HANDSHAKE, handshake(&mut client)).await;
    let Some((host, port)) = wanted.map_err(|_| io::ErrorKind::TimedOut)?? else { return Ok(()) };
    match egress.connect(&host, port).await {
        Ok(server) => {
            reply(&mut client, Reply::Succeeded).await?;
            relay(client, server, egress, &host).await
        }
        Err(Obstacle::Forbidden(_)) => reply(&mut client, Reply::NotAllowed).await,
        Err(Obstacle::Unreachable { .. } | Obstacle::TooLarge | Obstacle::Silent(_)) => {
            reply(&mut client, Reply::HostUnreachable).await
        }
    }
}

/// Returns the host and port that a client wants; `None` if the client was sent a refusal.
async fn handshake(client: &mut TcpStream) -> io::Result<Option<(String, u16)>> {
    let version = client.read_u8().await?;
    let mut methods = vec![0; usize::from(client.read_u8().await?)];
    client.read_exact(&mut methods).await?;
    if version != VERSION || !methods.contains(&NO_AUTHENTICATION) {
        client.write_all(&[VERSION, NO_ACCEPTABLE_METHOD]).await?;
        return Ok(None);
    }
    client.write_all(&[VERSION, NO_AUTHENTICATION]).await?;

    let mut request = [0; 4];
    client.read_exact(&mut request).await?;
    let [_version, command, _reserved, kind] = request;
    let host = match kind {
        1 => Some(IpAddr::from(Ipv4Addr::from(client.read_u32().await?)).to_string()),
        3 => {
            let mut name = vec![0; usize::from(client.read_u8().await?)];
            client.read_exact(&mut name).await?;
            String::from_utf8(name).ok().filter(|name| !name.is_empty())
        }
        4 => Some(IpAddr::from(Ipv6Addr::from(client.read_u128().await?)).to_string()),
        _ => None,
    };
    let Some(host) = host else {
        reply(client, Reply::AddressNotSupported).await?;
        return Ok(None);
    };
    let port = client.read_u16().await?;
    if command != CONNECT {
        reply(client, Reply::CommandNotSupported).await?;
        return Ok(None);
    }
    Ok(Some((host, port)))
}

/// Sends a reply, whose address no client looks at.
async fn reply(client: &mut TcpStream, code: Reply) -> io::Result<()> {
    client.write_all(&[VERSION, code as u8, 0, 1, 0, 0, 0, 0, 0, 0]).await
}

/// Relays bytes in both directions until the server has sent everything, too much, or nothing for a while.
async fn relay(client: TcpStream, server: TcpStream, egress: &Egress, host: &str) -> io::Result<()> {
    const BUFFER: usize = 16 * 1024;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async {
        copy(&mut from_client, &mut to_server).await?;
        to_server.shutdown().await?;
        // What the server sends goes on.
        std::future::pending().await
    };
    let down = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            let Ok(read) = timeout(Egress::SILENCE, from_server.read(&mut buffer)).await else {
                egress.remember(Obstacle::Silent(host.to_owned()));
                return Err(io::ErrorKind::TimedOut.into());
            };
            let length = read?;
            if length == 0 {
                return to_client.shutdown().await;
            }
            egress.count(length).map_err(io::Error::other)?;
            to_client.write_all(&buffer[..length]).await?;
        }
    };
    tokio::select! {
        ended = down => ended,
        ended = up => ended,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: [u8; 3] = [VERSION, 1, NO_AUTHENTICATION];

    /// Sends a request to a proxy and returns the connection and the code of the reply.
    async fn exchange(proxy: &EgressProxy, request: &[u8]) -> io::Result<(TcpStream, u8)> {
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port)).await?;
        client.write_all(&GREETING).await?;
        let mut greeted = [0; 2];
        client.read_exact(&mut greeted).await?;
        assert_eq!(greeted, [VERSION, NO_AUTHENTICATION]);
        client.write_all(request).await?;
        let mut replied = [0; 10];
        client.read_exact(&mut replied).await?;
        Ok((client, replied[1]))
    }

    fn request(command: u8, kind: u8, host: &[u8], port: u16) -> Vec<u8> {
        [&[VERSION, command, 0, kind], host, &port.to_be_bytes()].concat()
    }

    #[tokio::test]
    async fn an_allowed_connection_is_relayed_and_any_other_refused() -> io::Result<()> {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = server.local_addr()?.port();
        let loopback: &[u8] = &[127, 0, 0, 1];

        let strict = EgressProxy::start(Arc::new(Egress::new(Arc::default()))).await?;
        let metadata = request(CONNECT, 1, &[169, 254, 169, 254], 80);
        let mapped = request(CONNECT, 4, &Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets(), port);
        for (request, code) in [
            (request(CONNECT, 1, loopback, port), Reply::NotAllowed),
            (request(CONNECT, 3, b"\x09localhost", port), Reply::NotAllowed),
            (mapped, Reply::NotAllowed),
            (metadata, Reply::NotAllowed),
            (request(2, 1, loopback, port), Reply::CommandNotSupported),
            (request(CONNECT, 2, loopback, port), Reply::AddressNotSupported),
        ] {
            assert_eq!(exchange(&strict, &request).await?.1, code as u8, "{request:?}");
        }

        let rules = super::super::EgressRules(vec!["127.0.0.1".parse().expect("an address")]);
        let proxy = EgressProxy::start(Arc::new(Egress::new(Arc::new(rules)))).await?;
        let (mut client, code) = exchange(&proxy, &request(CONNECT, 1, loopback, port)).await?;
        assert_eq!(code, Reply::Succeeded as u8);
        let (mut accepted, _) = server.accept().await?;
        client.write_all(b"ping").await?;
        client.shutdown().await?;
        let mut received = Vec::new();
        accepted.read_to_end(&mut received).await?;
        accepted.write_all(b"pong").await?;
        drop(accepted);
        let mut answered = Vec::new();
        client.read_to_end(&mut answered).await?;
        assert_eq!((received.as_slice(), answered.as_slice()), (&b"ping"[..], &b"pong"[..]));

        let (mut open, _) = exchange(&proxy, &request(CONNECT, 1, loopback, port)).await?;
        drop(proxy);
        assert_eq!(open.read(&mut [0]).await.unwrap_or(0), 0, "it ends with the proxy");
        Ok(())
    }
}
