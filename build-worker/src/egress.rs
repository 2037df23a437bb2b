//! Connections to the network for remote contexts: no address is connected to before it was checked.
//!
//! A name is resolved here, and the connection goes to the very address that was checked. `git` gets
//! connections from a [`proxy`], so that redirects and submodules meet the same check.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

use self::address::Network;
pub(crate) use self::proxy::EgressProxy;
use crate::source_rules::Pattern;

mod address;
mod proxy;

/// The operator's exceptions to the rule that remote contexts come from public addresses.
#[derive(Clone, Debug, Default)]
pub(crate) struct EgressRules(pub(crate) Vec<AllowedRemote>);

/// Something that remote contexts may reach although it has no public address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AllowedRemote {
    /// A host, by the name that is asked for.
    Host(Pattern),
    Network(Network),
}

/// The connections of one fetch.
#[derive(Debug)]
pub(crate) struct Egress {
    rules: Arc<EgressRules>,
    /// Number of bytes that may still arrive.
    left: AtomicU64,
    obstacle: Mutex<Option<Obstacle>>,
}

/// The reason why a connection was refused or broke off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Obstacle {
    #[error("{0}: resolves to an address that builds may not reach (--allow-remote)")]
    Forbidden(String),
    #[error("more than {} MiB were sent", Egress::MAX_BYTES / 1024 / 1024)]
    TooLarge,
    #[error("cannot reach {host}: {reason}")]
    Unreachable { host: String, reason: String },
    #[error("{0} sent nothing for {seconds} s", seconds = Egress::SILENCE.as_secs())]
    Silent(String),
}

impl Egress {
    /// Maximum number of bytes that a fetch receives.
    pub(crate) const MAX_BYTES: u64 = 1024 * 1024 * 1024;
    /// Maximum time until the next bytes of a connection.
    pub(crate) const SILENCE: Duration = Duration::from_secs(60);
    /// Maximum time to resolve a name and connect to one of its addresses.
    const CONNECT: Duration = Duration::from_secs(30);
    /// Maximum time to connect to one address.
    const CONNECT_ONE: Duration = Duration::from_secs(10);
    /// Maximum number of addresses to try.
    const MAX_ADDRESSES: usize = 8;

    pub(crate) fn new(rules: Arc<EgressRules>) -> Self {
        Self { rules, left: AtomicU64::new(Self::MAX_BYTES), obstacle: Mutex::default() }
    }

    /// Connects to a host, by its name or address, if it has an address that may be reached.
    ///
    /// # Errors
    ///
    /// Returns and remembers the [`Obstacle`].
    pub(crate) async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, Obstacle> {
        let unreachable = |reason: String| Obstacle::Unreachable { host: format!("{host}:{port}"), reason };
        let connecting = async {
            let resolved = lookup_host((host, port)).await.map_err(|error| unreachable(error.to_string()))?;
            let mut allowed = resolved.filter(|address| self.rules.allow(host, address.ip())).peekable();
            if allowed.peek().is_none() {
                return Err(Obstacle::Forbidden(host.to_owned()));
            }
            let mut last = None;
            for address in allowed.take(Self::MAX_ADDRESSES) {
                match connect_one(address).await {
                    Ok(connection) => return Ok(connection),
                    Err(error) => last = Some(error),
                }
            }
            Err(unreachable(last.map_or_else(String::new, |error| error.to_string())))
        };
        let late = || unreachable(format!("no connection within {} s", Self::CONNECT.as_secs()));
        let connected = timeout(Self::CONNECT, connecting).await.unwrap_or_else(|_| Err(late()));
        connected.inspect_err(|obstacle| self.remember(obstacle.clone()))
    }

    /// Counts bytes that have arrived.
    ///
    /// # Errors
    ///
    /// Returns and remembers [`Obstacle::TooLarge`] once there are too many.
    pub(crate) fn count(&self, bytes: usize) -> Result<(), Obstacle> {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let subtract = |left: u64| left.checked_sub(bytes);
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, subtract).is_ok() {
            return Ok(());
        }
        self.remember(Obstacle::TooLarge);
        Err(Obstacle::TooLarge)
    }

    /// Keeps the most specific obstacle, for the error of the fetch.
    fn remember(&self, obstacle: Obstacle) {
        let mut known = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.weight() < obstacle.weight()) {
            *known = Some(obstacle);
        }
    }

    /// Returns the obstacle that was met since the last call.
    pub(crate) fn take_obstacle(&self) -> Option<Obstacle> {
        self.obstacle.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

async fn connect_one(address: SocketAddr) -> io::Result<TcpStream> {
    let connection = timeout(Egress::CONNECT_ONE, TcpStream::connect(address));
    connection.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

impl EgressRules {
    /// Reports whether a connection to this address of a host is allowed.
    fn allow(&self, host: &str, address: IpAddr) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address = address.to_canonical();
        address::is_public(address)
            || self.0.iter().any(|allowed| match allowed {
                AllowedRemote::Host(pattern) => pattern.matches(&host),
                AllowedRemote::Network(network) => network.contains(address),
            })
    }
}

impl Obstacle {
    /// Reports whether the author of the configuration has to act on it.
    pub(crate) fn is_users(&self) -> bool {
        match self {
            Self::Forbidden(_) | Self::TooLarge => true,
            Self::Unreachable { .. } | Self::Silent(_) => false,
        }
    }

    fn weight(&self) -> u8 {
        match self {
            Self::Forbidden(_) => 3,
            Self::TooLarge => 2,
            Self::Unreachable { .. } => 1,
            Self::Silent(_) => 0,
        }
    }
}

impl FromStr for AllowedRemote {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(network) => Ok(Self::Network(network)),
            Err(rule) if text.contains(['/', ':']) => Err(rule),
            Err(_) if text.is_empty() => Err("must not be empty"),
            Err(_) => Ok(Self::Host(Pattern::new(&text.to_ascii_lowercase()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_allows_hosts_by_name_and_networks_by_address() {
        let allowed = ["git.corp.example", "*.internal", "10.1.0.0/16", "192.168.0.7"];
        let rules = EgressRules(allowed.map(|allowed| allowed.parse().expect(allowed)).into());
        for (host, address, expected) in [
            ("git.example", "1.1.1.1", true),
            ("git.example", "10.2.0.1", false),
            ("git.example", "10.1.0.1", true),
            ("git.example", "::ffff:10.1.0.1", true),
            ("git.corp.example", "10.2.0.1", true),
            ("Git.Corp.Example.", "10.2.0.1", true),
            ("evil-git.corp.example", "10.2.0.1", false),
            ("git.internal", "127.0.0.1", true),
            ("internal", "127.0.0.1", false),
            ("192.168.0.7", "192.168.0.7", true),
            ("192.168.0.8", "192.168.0.8", false),
        ] {
            assert_eq!(rules.allow(host, address.parse().expect(address)), expected, "{host} {address}");
        }
        for text in ["", "10.0.0.0/33", "https://git.example", "git.example:443", "git.example/x"] {
            assert!(text.parse::<AllowedRemote>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_name_is_judged_by_what_it_resolves_to() {
        let egress = Egress::new(Arc::default());
        for host in
            ["localhost", "127.0.0.1", "127.1", "0x7f000001", "2130706433", "0", "::1", "169.254.169.254"]
        {
            let refused = egress.connect(host, 80).await.expect_err(host);
            assert_eq!(refused, Obstacle::Forbidden(host.to_owned()));
        }
        assert_eq!(egress.take_obstacle(), Some(Obstacle::Forbidden("localhost".to_owned())));
    }

    #[tokio::test]
    async fn the_number_of_bytes_is_limited() {
        let egress = Egress::new(Arc::default());
        let most = usize::try_from(Egress::MAX_BYTES).expect("this is 64 bit");
        assert_eq!(egress.count(most), Ok(()));
        assert_eq!(egress.count(1), Err(Obstacle::TooLarge));
        assert_eq!(egress.take_obstacle(), Some(Obstacle::TooLarge));
    }
}
