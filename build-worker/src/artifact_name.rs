//! Names that artifacts keep in their engine, whatever becomes of their references.

use std::fmt;

use uuid::Uuid;

/// The name of an artifact in its engine, `trailer.invalid/artifact/<catalogue>/<image>:<build>`.
///
/// No registry can answer for it, no caller may give it to an image, and it never passes to another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ArtifactName {
    pub(crate) catalogue: String,
    pub(crate) image_id: String,
    pub(crate) build_id: String,
}

impl ArtifactName {
    const PREFIX: &str = "trailer.invalid/artifact/";

    /// Returns the pattern of the repositories of all artifacts of a catalogue.
    pub(crate) fn repositories(catalogue: &str) -> String {
        format!("{}{catalogue}/*", Self::PREFIX)
    }

    /// Parses a name, `repository:tag`; returns `None` if it is no artifact's.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (catalogue, rest) = name.strip_prefix(Self::PREFIX)?.split_once('/')?;
        let (image_id, build_id) = rest.split_once(':')?;
        let id =
            |id: &str| Uuid::try_parse(id).is_ok_and(|uuid| uuid.to_string() == id).then(|| id.to_owned());
        Some(Self { catalogue: id(catalogue)?, image_id: id(image_id)?, build_id: id(build_id)? })
    }
}

impl fmt::Display for ArtifactName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}/{}:{}", Self::PREFIX, self.catalogue, self.image_id, self.build_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_an_artifact_or_of_something_else() {
        let id = Uuid::nil().to_string();
        let name = format!("trailer.invalid/artifact/{id}/{id}:{id}");
        assert_eq!(ArtifactName::parse(&name).map(|parsed| parsed.to_string()), Some(name.clone()));
        for other in [
            format!("docker.io/{name}"),
            format!("trailer.invalid/artifact/{id}/{id}"),
            format!("trailer.invalid/artifact/{id}/{id}:latest"),
            format!("trailer.invalid/artifact/{id}:{id}"),
            format!("trailer.invalid/artifact/a/{id}:{id}"),
            "trailer.invalid/alice-2bd806c9/a:latest".to_owned(),
            String::new(),
        ] {
            assert_eq!(ArtifactName::parse(&other), None, "{other}");
        }
    }
}
