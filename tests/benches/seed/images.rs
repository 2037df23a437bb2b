//! The images of a seeded catalogue, each derived from its number.

use uuid::Uuid;

/// Subject that created half of the images.
pub(crate) const HALF: &str = "half";
/// Subject that sees 10,000 images, or a tenth of a smaller catalogue.
///
/// It created half of them; the rest were granted to it.
pub(crate) const TEN_THOUSAND: &str = "tenthousand";
/// Subject that sees ten images.
pub(crate) const TEN: &str = "ten";

/// Creators to filter by, besides [`HALF`].
pub(crate) mod creator {
    pub(crate) const OF_1_PERCENT: &str = "hundredth";
    pub(crate) const OF_10_IMAGES: &str = "rare";
}

/// Terms to search for.
pub(crate) mod term {
    pub(crate) const IN_20_IMAGES: &str = "xylophone";
    pub(crate) const IN_ONE_OF_10: &str = "scikit-learn";
    pub(crate) const IN_THE_OLDEST_10TH: &str = "legacyrunner";
    pub(crate) const IN_ALL: &str = "ubuntu";
    pub(crate) const IN_NONE: &str = "zzqxjv";
    /// A term in no image, although every image has all of its trigrams.
    pub(crate) const HOSTILE: &str = "hostile";
    pub(crate) const TWO_IN_ALL: &str = "os";
    pub(crate) const TWO_IN_20: &str = "é8";
    pub(crate) const TWO_IN_NONE: &str = "ñ7";
    pub(crate) const ONE_IN_ALL: &str = "o";
    pub(crate) const ONE_IN_20: &str = "é";
    pub(crate) const ONE_IN_NONE: &str = "ж";
}

/// The kind of images in a catalogue.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Images like those that people create for workspaces.
    Ordinary,
    /// One image in ten with a random text and grants, both of the maximum size.
    ///
    /// Each grant is to a different subject.
    HostileTenth,
}

/// Length of a hostile image's text, in bytes: 256 KiB together with the rest of its Dockerfile.
const HOSTILE_TEXT: usize = 256 * 1024 - 64;
const HOSTILE_GRANTS: u64 = 1_000;
/// Number of creators of hostile images, each with its own share of the index memory.
const HOSTILE_CREATORS: u64 = 2;

/// Time of the first update, 2026-01-01, in microseconds. Updates are one second apart.
pub(super) const EPOCH: i64 = 1_767_225_600_000_000;

/// Worker of all artifacts, which never connects: one that did would find its engine without them.
pub(super) const WORKER: &str = "seeded";

const BUILDING: i32 = 2;
const FINISHED: i32 = 3;
const CANCELLED: i32 = 4;
const FAILED: i32 = 6;

/// An image derived from its number.
#[derive(Debug)]
pub(super) struct Seeded {
    number: u64,
    /// Position in the order of updates, oldest first.
    pub(super) place: u64,
    images: u64,
    is_hostile: bool,
}

impl Seeded {
    pub(super) fn new(number: u64, images: u64, contents: Contents) -> Self {
        let is_hostile = contents == Contents::HostileTenth && number % 10 == 3;
        Self { number, place: place(number, images), images, is_hostile }
    }

    fn mixed(&self, salt: u64) -> u64 {
        fastrand::Rng::with_seed(self.number * 64 + salt).u64(..)
    }

    /// Returns whether the image is one of `count` that are evenly spread.
    ///
    /// `offset` keeps such sets apart.
    fn is_one_of(&self, count: u64, offset: u64) -> bool {
        self.number % (self.images / count) == offset
    }

    fn is_of_ten_thousand(&self, offset: u64) -> bool {
        let share = (self.images / 5_000).max(20);
        self.number % share == offset
    }

    pub(super) fn name(&self) -> String {
        const KINDS: [&str; 5] = ["Python", "Rust", "Node", "Postgres", "Go"];
        format!("{} workspace {:07}", KINDS[(self.mixed(0) % 5) as usize], self.mixed(1) % 10_000_000)
    }

    pub(super) fn repository(&self) -> String {
        format!("trailer.invalid/seeded-0a1b2c3d/image-{:07}", self.number)
    }

    pub(super) fn creator(&self) -> String {
        if self.is_hostile {
            format!("hostile-{}", self.number / 10 % HOSTILE_CREATORS)
        } else if self.number.is_multiple_of(2) {
            HALF.to_owned()
        } else if self.is_of_ten_thousand(1) {
            TEN_THOUSAND.to_owned()
        } else if self.number % 100 == 7 {
            creator::OF_1_PERCENT.to_owned()
        } else if self.is_one_of(10, 9) {
            creator::OF_10_IMAGES.to_owned()
        } else {
            format!("user-{}", self.mixed(2) % 1_000)
        }
    }

    /// Returns whether the image is one of the ten templates.
    pub(super) fn is_template(&self) -> bool {
        self.is_one_of(10, 12)
    }

    /// Returns the status.
    ///
    /// Half of the images are finished, 1 % have failed, ten are being built, and the rest were cancelled.
    pub(super) fn status(&self) -> i32 {
        match self.mixed(3) % 100 {
            _ if self.is_template() => 0,
            _ if self.is_one_of(10, 14) => BUILDING,
            0 => FAILED,
            1..=50 => FINISHED,
            _ => CANCELLED,
        }
    }

    /// Returns whether the image is enabled, as all but 1 % are.
    pub(super) fn enabled(&self) -> bool {
        !self.mixed(4).is_multiple_of(100)
    }

    /// Returns whether the image is pulled, as half of them are.
    pub(super) fn pulled(&self) -> bool {
        self.mixed(5).is_multiple_of(2)
    }

    /// Returns the artifact of the last successful build, as JSON.
    pub(super) fn artifact(&self) -> String {
        format!(
            "{{\"image_id\":\"{}\",\"size_bytes\":104857600,\"worker\":\"{WORKER}\",\"finished_at\":{EPOCH},\"configuration_revision\":1,\"build\":\"{}\"}}",
            self.artifact_image(),
            id(self.number)
        )
    }

    pub(super) fn artifact_image(&self) -> String {
        format!("sha256:{:064x}", self.number)
    }

    /// Returns three subjects or, if the image is hostile, a thousand that have no other grant.
    pub(super) fn granted_to(&self) -> Vec<String> {
        if self.is_hostile {
            return (0..HOSTILE_GRANTS).map(|grant| format!("stranger-{}-{grant}", self.number)).collect();
        }
        let third = if self.is_of_ten_thousand(3) {
            TEN_THOUSAND.to_owned()
        } else if self.is_one_of(10, 5) {
            TEN.to_owned()
        } else {
            format!("reader-{}", self.mixed(8) % 20_000)
        };
        vec![format!("team-{}", self.mixed(6) % 5_000), format!("user-{}", self.mixed(9) % 1_000), third]
    }

    /// Returns about 400 characters with the search terms or, if hostile, a long incompressible text.
    pub(super) fn words(&self) -> String {
        if self.is_hostile {
            let mut random = fastrand::Rng::with_seed(self.number);
            return (0..HOSTILE_TEXT).map(|_| random.alphanumeric()).collect();
        }
        let mut words = String::from("hos ost sti til ile");
        let mut add = |word: &str| {
            words.push(' ');
            words.push_str(word);
        };
        if self.mixed(7).is_multiple_of(10) {
            add(term::IN_ONE_OF_10);
        }
        if self.place < self.images / 10 {
            add(term::IN_THE_OLDEST_10TH);
        }
        // Ten of the twenty are visible to the subject that sees half.
        if self.is_one_of(20, 6 + self.number / (self.images / 20) % 2) {
            add(term::IN_20_IMAGES);
            add(term::TWO_IN_20);
        }
        let mut random = fastrand::Rng::with_seed(self.number);
        for _ in 0..50 {
            add(&word(random.u64(0..3_000)));
        }
        words
    }
}

/// Permutes the numbers into an order that looks random.
///
/// It is a permutation because image counts have few prime factors, none of which divides the multiplier.
fn place(number: u64, images: u64) -> u64 {
    number.wrapping_mul(7_368_787) % images
}

/// Returns one of 3,000 words.
fn word(number: u64) -> String {
    let mut random = fastrand::Rng::with_seed(number);
    (0..random.usize(4..10)).map(|_| random.lowercase()).collect()
}

/// Returns the id of an image in a seeded catalogue, a UUID of version 7.
pub(crate) fn id(number: u64) -> Uuid {
    let mut random = fastrand::Rng::with_seed(number);
    let milliseconds = 1_767_225_600_000 + number;
    uuid::Builder::from_unix_timestamp_millis(
        milliseconds,
        &random.u128(..).to_be_bytes()[..10].try_into().expect("ten"),
    )
    .into_uuid()
}
