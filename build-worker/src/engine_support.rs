//! Supported engines, and their known flaws.
//!
//! An engine reports only its own version: neither that of its BuildKit nor the fixes that a distribution has
//! backported.

use std::fmt;

use proto::dispatch::WithheldAbility;

use crate::engine::EngineInfo;

/// The extent to which an engine is supported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EngineSupport {
    /// Reason why no builds run on it; `None` if builds run.
    pub(crate) unsupported: Option<String>,
    /// Abilities that are withheld because of flaws, even if builds run.
    pub(crate) withheld: Vec<WithheldAbility>,
}

/// The operator's exceptions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exceptions {
    /// Set if builds may run on engines that are too old.
    pub(crate) allow_old: bool,
    /// Flaws that the engine does not have despite its version, such as `CVE-2026-33748`.
    pub(crate) fixed: Vec<String>,
}

/// The version of an engine, such as the numbers of `26.1.5+dfsg1`.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u16, u16, u16);

/// A flaw of BuildKit that lets a build reach resources that are not its own.
struct Flaw {
    name: &'static str,
    /// Ability to withhold; `None` if no builds may run at all.
    ability: Option<&'static str>,
    /// First version of each branch without the flaw; later branches do not have it, either.
    fixed_in: &'static [Version],
}

/// Ability to ADD a directory of a Git repository.
pub(crate) const ADD_GIT_DIRECTORY: &str = "add-git-directory";

/// Ability to run a frontend that a Dockerfile names.
pub(crate) const FOREIGN_FRONTENDS: &str = "foreign-frontends";

/// Known flaws of BuildKit.
///
/// Docker before 25.0.2 has all of the first three; 24.0.9 has a fixed runc, but no fixed BuildKit.
const FLAWS: [Flaw; 5] = [
    Flaw { name: "CVE-2024-23651", ability: None, fixed_in: &[Version(25, 0, 2)] },
    Flaw { name: "CVE-2024-23652", ability: None, fixed_in: &[Version(25, 0, 2)] },
    Flaw { name: "CVE-2024-23653", ability: None, fixed_in: &[Version(25, 0, 2)] },
    Flaw {
        name: "CVE-2026-33747",
        ability: Some(FOREIGN_FRONTENDS),
        fixed_in: &[Version(25, 0, 16), Version(29, 3, 1)],
    },
    Flaw {
        name: "CVE-2026-33748",
        ability: Some(ADD_GIT_DIRECTORY),
        fixed_in: &[Version(25, 0, 16), Version(29, 3, 1)],
    },
];

impl EngineSupport {
    /// Oldest supported version.
    const OLDEST: Version = Version(25, 0, 2);

    /// Returns the support for an engine, given the operator's exceptions.
    pub(crate) fn new(engine: &EngineInfo, exceptions: &Exceptions) -> Self {
        let Some(version) = Version::parse(&engine.version) else {
            let unsupported =
                format!("the version {:?} of the Docker Engine cannot be understood", engine.version);
            return Self {
                unsupported: (!exceptions.allow_old).then_some(unsupported),
                withheld: Vec::new(),
            };
        };
        let flaws = || {
            let is_there = |flaw: &&Flaw| !flaw.is_fixed_in(version);
            FLAWS
                .iter()
                .filter(is_there)
                .filter(|flaw| !exceptions.fixed.iter().any(|fixed| fixed == flaw.name))
        };
        let fatal: Vec<&str> = flaws().filter(|flaw| flaw.ability.is_none()).map(|flaw| flaw.name).collect();
        let is_old = version < Self::OLDEST;
        let reasons = || {
            let mut reasons = format!(
                "Docker Engine {} is not built on: {} or later is needed, for BuildKit's Control API",
                engine.version,
                Self::OLDEST
            );
            if !fatal.is_empty() {
                reasons.push_str(&format!(
                    ", and because builds of older ones can reach files of the host ({})",
                    fatal.join(", ")
                ));
            }
            reasons
        };
        let withheld = flaws().filter_map(|flaw| {
            Some(WithheldAbility {
                ability: flaw.ability?.to_owned(),
                flaw: flaw.name.to_owned(),
                fixed_in: flaw.fixed_in.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            })
        });
        // An operator has to name each flaw that is fixed, and the age of the engine still counts.
        let is_refused = (is_old || !fatal.is_empty()) && !exceptions.allow_old;
        Self { unsupported: is_refused.then(reasons), withheld: withheld.collect() }
    }

    /// Logs the reason why no builds run, or else the withheld abilities.
    pub(crate) fn log(&self) {
        if let Some(reason) = &self.unsupported {
            tracing::error!("{reason}; nothing is built");
            return;
        }
        for WithheldAbility { ability, flaw, fixed_in } in &self.withheld {
            tracing::warn!(
                ability,
                flaw,
                fixed_in,
                "an ability is withheld for a known flaw of the Docker Engine"
            );
        }
    }

    /// Reports whether an ability is withheld.
    pub(crate) fn withholds(&self, ability: &str) -> bool {
        self.withheld.iter().any(|withheld| withheld.ability == ability)
    }
}

impl Exceptions {
    /// Returns a warning for the operator about these exceptions, if one is needed.
    pub(crate) fn warning(&self) -> Option<&'static str> {
        self.allow_old.then_some(
            "--allow-old-engine: builds run although the Docker Engine is too old; they may reach files of its host, and cancels \
             may not be confirmed: for trying out only",
        )
    }
}

/// Returns the names of the flaws that an operator may declare fixed.
pub(crate) fn flaws() -> impl Iterator<Item = &'static str> {
    FLAWS.iter().map(|flaw| flaw.name)
}

impl Flaw {
    fn is_fixed_in(&self, version: Version) -> bool {
        let is_branch = |fixed: &Version| (fixed.0, fixed.1) == (version.0, version.1) && *fixed <= version;
        self.fixed_in.last().is_some_and(|fixed| *fixed <= version) || self.fixed_in.iter().any(is_branch)
    }
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let end = text
            .find(|character: char| !character.is_ascii_digit() && character != '.')
            .unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(|number| number.parse().ok());
        let (major, minor) = (numbers.next()??, numbers.next()??);
        Some(Self(major, minor, numbers.next().flatten().unwrap_or(0)))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn support(version: &str, exceptions: &Exceptions) -> (bool, Vec<String>) {
        let engine = EngineInfo { version: version.to_owned(), ..EngineInfo::default() };
        let support = EngineSupport::new(&engine, exceptions);
        let withheld = support.withheld.into_iter().map(|withheld| withheld.flaw).collect();
        (support.unsupported.is_none(), withheld)
    }

    #[test]
    fn versions_decide_what_an_engine_is_good_for() {
        let both = ["CVE-2026-33747".to_owned(), "CVE-2026-33748".to_owned()];
        for (version, is_supported, withheld) in [
            ("20.10.24+dfsg1", false, &both[..]),
            ("24.0.9", false, &both),
            ("25.0.1", false, &both),
            ("25.0.2", true, &both),
            ("25.0.16", true, &[]),
            ("26.1.5+dfsg1", true, &both),
            ("28.5.2", true, &both),
            ("29.3.0", true, &both),
            ("29.3.1-rc.1", true, &[]),
            ("30.0", true, &[]),
            ("dev", false, &[]),
        ] {
            assert_eq!(
                support(version, &Exceptions::default()),
                (is_supported, withheld.to_vec()),
                "{version}"
            );
        }
    }

    #[test]
    fn an_operator_may_know_better() {
        let fixed = vec!["CVE-2026-33748".to_owned()];
        let exceptions = Exceptions { allow_old: false, fixed };
        assert_eq!(support("26.1.5", &exceptions), (true, vec!["CVE-2026-33747".to_owned()]));
        let exceptions = Exceptions { allow_old: true, ..Exceptions::default() };
        assert!(support("20.10.24", &exceptions).0 && support("dev", &exceptions).0);
        assert!(exceptions.warning().is_some() && Exceptions::default().warning().is_none());
    }

    #[test]
    fn the_reason_names_both_versions_and_the_flaws() {
        let engine = EngineInfo { version: "20.10.24".to_owned(), ..EngineInfo::default() };
        let reason = EngineSupport::new(&engine, &Exceptions::default()).unsupported.expect("it is too old");
        for part in ["20.10.24", "25.0.2", "CVE-2024-23652"] {
            assert!(reason.contains(part), "{reason}");
        }
    }
}
