//! Random images and queries, the same for the same seed.
//!
//! They consist of what is easily handled wrong: characters that fold or compose, that databases read as
//! patterns, or that are next to others in an encoding.

use std::{collections::BTreeMap, ops::Range};

use proto::images::{
    self as api, ContextFile, DockerfileSource, GenerateSource, ImageConfig, ImageFile, PullSource,
    WorkspaceService, image_config::Source,
};

/// Pieces of random texts.
#[rustfmt::skip]
const PIECES: [&str; 72] = [
    "a", "A", "b", "B", "e", "k", "s", "S", "ss", "SS", "ß", "ẞ", "i", "I", "ı", "İ", "i\u{307}", "σ", "ς",
    "Σ", "ΐ", "ᾳ", "ΑΙ", "\u{345}", "c", "C", "c\u{327}", "ç", "Ç", "\u{327}", "\u{301}", "é", "e\u{301}",
    "ﬃ", "ffi", "ŉ", "\u{212a}", "\u{212b}", "\u{c5}", "한", "하", "\u{1112}\u{1161}", "\u{11ab}", "글", "Ꭰ",
    "ꭰ", "𐐀", "𐐨", "😀", "😁", "👩‍💻", "🇩🇪", "%", "_", "\\", "\"", "'", "*", "-", "OR", "NEAR(", ")", "^", "$",
    " ", " ", "\t", "\n", "\u{1e}", "\u{fffe}", "\u{fffd}", "\u{ffff}",
];

/// Search terms with a meaning in some query language, and terms that no value contains.
#[rustfmt::skip]
const HOSTILE: [&str; 48] = [
    "%", "%%", "%%%", "_", "__", "___", "\\", "\\\\", "\\%\\", "\"", "\"\"", "\"\"\"", "'", "''",
    "' OR 1=1 --", "*", "**", "a*", "***", "-", "---", "OR", "a OR b", "a AND NOT b", "NEAR(a b, 1)",
    "NEAR(", "^a", "text:a", "text : a b", "{text} : a", "(", ")", "$1", "?", "?1", ":a", "a\0b", "\0",
    "\0\0\0", "\u{1e}", "\u{1e}\u{1e}\u{1e}", "\u{fffe}", "\u{fffd}\u{fffd}\u{fffd}", "trailer/",
    "apt_packages", "true", "null", "\u{10ffff}",
];

const NAMES: [&str; 5] = ["Go tools", "go tools", "Go tools ", "ubuntu", "Übung"];
const PACKAGES: [&str; 7] =
    ["git", "g++", "libssl3", "nginx=1.22.1-9+deb12u1", "vim/bookworm", "libc6:i386", "python3-pip"];
const PYTHON_PACKAGES: [&str; 4] = ["numpy", "Django==5.0", "uvicorn[standard]", "x[a,b]>=1,<2"];
const BASES: [&str; 5] = ["", "ubuntu:24.04", "debian:12-slim", "quay.io/a/b_c:V1", "alpine"];
const VARIABLES: [&str; 6] = ["PATH", "_x1", "LANG", "lang", "GOFLAGS", "A"];
const PULLS: [&str; 6] = [
    "nginx",
    "nginx:1.27",
    "library/nginx",
    "quay.io/a/b:V1",
    "redis@sha256:0000000000000000000000000000000000000000000000000000000000000000",
    "localhost:5000/redis:7",
];
const TAGS: [&str; 5] = ["", "v1", "V1", "_x", "1.0-a"];
const KEYS: [&str; 8] =
    ["name", "creator", "status", "image_name", "enabled", "pulled", "create_time", "update_time"];

/// A source of random data.
#[derive(Debug)]
pub(super) struct Random {
    rng: fastrand::Rng,
    repositories: u32,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed), repositories: 0 }
    }

    pub(super) fn within(&mut self, range: Range<usize>) -> usize {
        self.rng.usize(range)
    }

    pub(super) fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.within(0..choices.len())].clone()
    }

    /// Returns true in `percent` of a hundred cases.
    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.rng.u32(0..100) < percent
    }

    /// Returns any text without NUL.
    fn text(&mut self, pieces: Range<usize>) -> String {
        (0..self.within(pieces)).map(|_| self.one_of(&PIECES)).collect()
    }

    fn line(&mut self, pieces: Range<usize>) -> String {
        self.text(pieces).replace('\n', " ")
    }

    /// Returns a text without control characters.
    fn printable(&mut self, pieces: Range<usize>) -> String {
        self.text(pieces).replace(char::is_control, "")
    }

    /// Returns a name, sometimes with spaces around it, which are insignificant.
    pub(super) fn name(&mut self) -> String {
        if self.chance(20) {
            return self.one_of(&NAMES).to_owned();
        }
        let name = self.printable(1..8);
        if name.trim().is_empty() { "x".to_owned() } else { name }
    }

    pub(super) fn description(&mut self) -> String {
        self.text(0..12)
    }

    /// Returns an image with the fields that a caller may set. Its repository, if it has one, lacks the
    /// namespace.
    pub(super) fn image(&mut self) -> api::Image {
        let config = self.config();
        let is_given = self.chance(20) && !matches!(config.source, Some(Source::Pull(_)));
        self.repositories += u32::from(is_given);
        let word = self.one_of(&["a", "a-b", "a_b", "a/b", "z"]);
        let repository = if is_given { format!("{word}{}", self.repositories) } else { String::new() };
        api::Image {
            name: self.name(),
            description: self.description(),
            tag: if is_given { self.one_of(&TAGS).to_owned() } else { String::new() },
            repository,
            template: self.chance(15),
            enabled: self.one_of(&[None, Some(true), Some(false)]),
            config: Some(config),
            ..api::Image::default()
        }
    }

    pub(super) fn config(&mut self) -> ImageConfig {
        let source = match self.within(0..5) {
            0 | 1 => Source::Dockerfile(self.dockerfile()),
            2 | 3 => Source::Generate(self.generate()),
            _ => Source::Pull(PullSource { reference: self.one_of(&PULLS).to_owned() }),
        };
        let services = (0..self.within(0..3)).map(|i| self.service(i)).collect();
        let worker = if self.chance(20) { self.printable(0..4) } else { String::new() };
        let labels =
            (0..self.within(0..3)).map(|i| (format!("{i}{}", self.printable(0..3)), self.printable(0..4)));
        ImageConfig {
            source: Some(source),
            services,
            worker,
            worker_labels: labels.collect(),
            ..ImageConfig::default()
        }
    }

    fn dockerfile(&mut self) -> DockerfileSource {
        let file = |random: &mut Self, i| ContextFile {
            path: format!("{i}{}", random.path()),
            content: random.content().into(),
            executable: random.chance(30),
        };
        DockerfileSource {
            text: format!("FROM scratch\n{}", self.text(0..12)),
            files: (0..self.within(0..3)).map(|i| file(self, i)).collect(),
            build_args: self.variables(),
            target: self.one_of(&["", "builder", "a.b-c_d"]).to_owned(),
            ..DockerfileSource::default()
        }
    }

    fn generate(&mut self) -> GenerateSource {
        let file = |random: &mut Self, i| ImageFile {
            path: format!("/{i}{}", random.path()),
            content: random.content().into(),
            executable: random.chance(30),
        };
        GenerateSource {
            base_image: self.one_of(&BASES).to_owned(),
            apt_packages: (0..self.within(0..3)).map(|_| self.one_of(&PACKAGES).to_owned()).collect(),
            python_packages: (0..self.within(0..3))
                .map(|_| self.one_of(&PYTHON_PACKAGES).to_owned())
                .collect(),
            environment: self.variables(),
            user: self.one_of(&["", "dev_1", "root"]).to_owned(),
            start_commands: (0..self.within(0..2)).map(|_| format!("run {}", self.line(0..6))).collect(),
            files: (0..self.within(0..3)).map(|i| file(self, i)).collect(),
        }
    }

    fn service(&mut self, number: usize) -> WorkspaceService {
        WorkspaceService {
            name: format!("{}-{number}", self.one_of(&["ssh", "code-server", "db"])),
            packages: (0..self.within(0..2)).map(|_| self.one_of(&PACKAGES).to_owned()).collect(),
            command: format!("serve {}", self.line(0..6)),
            ports: if self.chance(50) { vec![self.one_of(&[22, 80, 8080])] } else { Vec::new() },
            environment: self.variables(),
        }
    }

    fn variables(&mut self) -> BTreeMap<String, String> {
        (0..self.within(0..3)).map(|_| (self.one_of(&VARIABLES).to_owned(), self.line(0..6))).collect()
    }

    /// Returns the part of a path after its first character.
    fn path(&mut self) -> String {
        format!("{}/f{}", self.printable(0..4), self.printable(0..4))
    }

    /// Returns file content: mostly text, which can be found, sometimes other bytes, which cannot.
    fn content(&mut self) -> Vec<u8> {
        let text = self.text(0..10);
        match self.within(0..8) {
            0 => [text.as_bytes(), &[0xff]].concat(),
            1 => format!("{text}\0{text}").into_bytes(),
            _ => text.into_bytes(),
        }
    }

    /// Returns a search term, mostly derived from these values.
    pub(super) fn term(&mut self, values: &[String]) -> String {
        let (one, other) = (self.one_of(values), self.one_of(values));
        match self.within(0..12) {
            0 | 1 => self.one_of(&HOSTILE).to_owned(),
            2 => self.text(1..4),
            3 => format!("{}{}", self.piece(&one, 1..4), self.piece(&other, 1..4)),
            4 => self.piece(&one, 1..3),
            5 => one.chars().take(1_024).collect(),
            _ => {
                let piece = self.piece(&one, 1..13);
                piece.chars().map(|c| self.in_some_case(c)).collect()
            }
        }
    }

    /// Returns a part of a text, with one of `lengths` in characters.
    fn piece(&mut self, text: &str, lengths: Range<usize>) -> String {
        let begin = self.within(0..text.chars().count().max(1));
        text.chars().skip(begin).take(self.within(lengths)).collect()
    }

    fn in_some_case(&mut self, c: char) -> String {
        match self.within(0..4) {
            0 => c.to_uppercase().collect(),
            1 => c.to_lowercase().collect(),
            _ => c.to_string(),
        }
    }

    /// Returns a list request for images with these values and creators.
    pub(super) fn request(&mut self, values: &[String], creators: &[String]) -> api::ListImagesRequest {
        let search = if self.chance(65) { self.term(values) } else { String::new() };
        let statuses =
            if self.chance(20) { (1..=6).filter(|_| self.chance(40)).collect() } else { Vec::new() };
        api::ListImagesRequest {
            view: self.one_of(&[0, 1, 1, 2]),
            search,
            kind: self.one_of(&[0, 0, 0, 1, 2]),
            statuses,
            enabled: self.one_of(&[None, None, None, Some(true), Some(false)]),
            pulled: self.one_of(&[None, None, None, Some(true), Some(false)]),
            creator: if self.chance(15) { self.one_of(creators) } else { String::new() },
            order_by: self.order_by(),
            include_total_size: self.chance(50),
            ..api::ListImagesRequest::default()
        }
    }

    fn order_by(&mut self) -> String {
        let mut keys = KEYS;
        self.rng.shuffle(&mut keys);
        let count = self.within(0..4);
        let parts = keys[..count].iter().map(|key| format!("{key}{}", self.one_of(&["", " desc"])));
        parts.collect::<Vec<_>>().join(self.one_of(&[",", ", "]))
    }
}
