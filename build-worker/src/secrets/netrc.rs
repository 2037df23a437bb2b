//! Credentials by host, in the format of netrc.

use std::fmt;

use url::Url;

/// Credentials by host. `Debug` does not show them.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Netrc(Vec<Entry>);

/// Credentials for a host.
#[derive(Clone, Default, PartialEq, Eq)]
struct Entry {
    /// Host, or host and port.
    machine: String,
    login: String,
    password: String,
}

impl Netrc {
    /// Parses a file; returns `None` if it is not in this format, has a default or macros, or names no machine
    /// or what cannot be one.
    pub(crate) fn parse(content: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(content).ok()?;
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let mut words = lines.flat_map(str::split_whitespace);
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(word) = words.next() {
            if word == "machine" {
                entries.push(Entry { machine: words.next()?.to_ascii_lowercase(), ..Entry::default() });
                continue;
            }
            let entry = entries.last_mut()?;
            match word {
                "login" => words.next()?.clone_into(&mut entry.login),
                "password" => words.next()?.clone_into(&mut entry.password),
                _ => return None,
            }
        }
        let is_host = |c: char| c.is_alphanumeric() || ".-_:[]".contains(c);
        let is_valid = |entry: &Entry| entry.machine.chars().all(is_host);
        (!entries.is_empty() && entries.iter().all(is_valid)).then_some(Self(entries))
    }

    /// Returns the user and the password for a URL, on the way from `first`, which the configuration names.
    ///
    /// An entry without a port is for the port of `first` and for the default one of its scheme. After HTTPS,
    /// nothing is for HTTP.
    pub(crate) fn of(&self, url: &Url, first: &Url) -> Option<(&str, &str)> {
        let (host, port) = (url.host_str()?, url.port_or_known_default()?);
        if first.scheme() == "https" && url.scheme() != "https" {
            return None;
        }
        let is_its_port = url.port().is_none()
            || first.host_str() == Some(host) && first.port_or_known_default() == Some(port);
        let found = |machine: &str| self.0.iter().find(|entry| entry.machine == machine);
        let of_host = || found(host).filter(|_| is_its_port);
        found(&format!("{host}:{port}")).or_else(of_host).map(|entry| (&*entry.login, &*entry.password))
    }

    /// Returns host, user and password of each entry; the host may have a port.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.0.iter().map(|entry| (&*entry.machine, &*entry.login, &*entry.password))
    }
}

impl fmt::Debug for Netrc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Netrc")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_for_a_host_or_for_one_port_of_it() {
        let file = "# ours\nmachine git.example login a password b\nmachine git.example:8443\n\tlogin c\n\tpassword d\n\
                    machine Token.Example password t";
        let netrc = Netrc::parse(file.as_bytes()).expect("a file");
        for (url, expected) in [
            ("https://git.example/x.git", Some(("a", "b"))),
            ("http://git.example:80/x.git", Some(("a", "b"))),
            ("https://GIT.example:8443/x.git", Some(("c", "d"))),
            ("https://token.example/", Some(("", "t"))),
            ("https://git.example.org/x.git", None),
            ("https://sub.git.example/x.git", None),
        ] {
            let url = Url::parse(url).expect("a URL");
            assert_eq!(netrc.of(&url, &url), expected, "{url}");
        }
        for (first, url, expected) in [
            ("http://git.example:3000/", "http://git.example:3000/x", Some(("a", "b"))),
            ("http://git.example:3000/", "http://git.example:3001/x", None),
            ("https://git.example/", "http://git.example/x", None),
            ("https://git.example/", "https://git.example:8443/x", Some(("c", "d"))),
            ("https://other.example:3000/", "https://git.example:3000/x", None),
            ("https://other.example:3000/", "https://git.example/x", Some(("a", "b"))),
        ] {
            let [first, url] = [first, url].map(|url| Url::parse(url).expect("a URL"));
            assert_eq!(netrc.of(&url, &first), expected, "{url} after {first}");
        }
        let passwords = netrc.entries().map(|(_, _, password)| password);
        assert_eq!(passwords.collect::<Vec<_>>(), ["b", "d", "t"]);
        assert_eq!(format!("{netrc:?}"), "Netrc");
    }

    #[test]
    fn what_is_no_netrc_is_refused() {
        for wrong in [
            "",
            "# nothing",
            "ghp_0123456789",
            "login a password b",
            "machine",
            "machine a login",
            "machine a account x",
            "machine a\"b login c",
            "default login a password b",
        ] {
            assert!(Netrc::parse(wrong.as_bytes()).is_none(), "{wrong}");
        }
        assert!(Netrc::parse(&[0xff]).is_none());
    }
}
