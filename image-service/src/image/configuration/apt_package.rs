//! Debian packages, as they are given to apt.

/// Reports whether a text is a package to install: `name`, `name:architecture`, `name=version`, `name/release`.
pub(super) fn is_package(package: &str) -> bool {
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let name_end = package.find([':', '=', '/']).unwrap_or(package.len());
    let (name, rest) = package.split_at(name_end);
    let (architecture, rest) = match rest.strip_prefix(':') {
        Some(rest) => rest.split_at(rest.find(['=', '/']).unwrap_or(rest.len())),
        None => ("any", rest),
    };
    let version = rest.strip_prefix(['=', '/']).unwrap_or(if rest.is_empty() { "any" } else { "" });
    let version_fits = |c: char| c.is_ascii_alphanumeric() || ".+-:~_".contains(c);
    name.len() >= 2
        && name.starts_with(lower)
        && name.chars().all(|c| lower(c) || "+.-".contains(c))
        && !name.ends_with('-')
        && !architecture.is_empty()
        && !architecture.ends_with('-')
        && architecture.chars().all(|c| lower(c) || c == '-')
        && version.starts_with(|c: char| c.is_ascii_alphanumeric())
        && version.chars().all(version_fits)
        // As the last character of all, as at the end of a name, it would remove the package.
        && !package.ends_with('-')
}
