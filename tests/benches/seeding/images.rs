//! What each image of a seeded catalogue is like: all of it follows from its number.

use uuid::Uuid;

/// Created half of the images.
pub(crate) const HALF: &str = "half";
/// Sees 10,000 of a million images: one half it has created, the other was granted.
pub(crate) const ONE_IN_100: &str = "tenthousand";
/// Sees ten images.
pub(crate) const TEN: &str = "ten";

/// Words that are looked for.
pub(crate) mod term {
    pub(crate) const IN_20_IMAGES: &str = "xylophone";
    pub(crate) const IN_ONE_OF_10: &str = "scikit-learn";
    pub(crate) const IN_THE_OLDEST_10TH: &str = "legacyrunner";
    pub(crate) const IN_ALL: &str = "ubuntu";
    pub(crate) const IN_NONE: &str = "zzqxjv";
    /// In none, but every three characters of it are in all.
    pub(crate) const HOSTILE: &str = "hostile";
    pub(crate) const TWO_IN_ALL: &str = "os";
    pub(crate) const TWO_IN_20: &str = "é8";
    pub(crate) const TWO_IN_NONE: &str = "ñ7";
    pub(crate) const ONE_IN_NONE: &str = "ж";
}

/// 2026-01-01, in microseconds. The images were updated a second after one another.
pub(super) const EPOCH: i64 = 1_767_225_600_000_000;

/// How many of the latest images are in no era, and how many others are in each.
const LATEST: u64 = 500;
const ERA: u64 = 4_096;

/// What an image is like, by its number.
#[derive(Debug)]
pub(super) struct Seeded {
    number: u64,
    /// In the order of updates, from the oldest.
    pub(super) place: u64,
    images: u64,
}

impl Seeded {
    pub(super) fn of(number: u64, images: u64) -> Self {
        Self { number, place: place(number, images), images }
    }

    /// Where Postgres has put it, but for the latest.
    pub(super) fn era(&self) -> Option<u64> {
        (self.place + LATEST < self.images).then(|| self.place / ERA + 1)
    }

    fn mixed(&self, salt: u64) -> u64 {
        fastrand::Rng::with_seed(self.number * 64 + salt).u64(..)
    }

    pub(super) fn name(&self) -> String {
        const KINDS: [&str; 5] = ["Python", "Rust", "Node", "Postgres", "Go"];
        format!("{} workspace {:07}", KINDS[(self.mixed(0) % 5) as usize], self.mixed(1) % 10_000_000)
    }

    pub(super) fn creator(&self) -> String {
        match self.number % 200 {
            1 => ONE_IN_100.to_owned(),
            even if even % 2 == 0 => HALF.to_owned(),
            _ => format!("user-{}", self.mixed(2) % 1_000),
        }
    }

    /// A template, a failed one, a cancelled one, or a finished one.
    pub(super) fn status(&self) -> i32 {
        match self.mixed(3) % 100 {
            0 => 0,
            1..=3 => 6,
            4..=7 => 4,
            _ => 3,
        }
    }

    pub(super) fn enabled(&self) -> bool {
        !self.mixed(4).is_multiple_of(100)
    }

    pub(super) fn pulled(&self) -> bool {
        self.mixed(5).is_multiple_of(10)
    }

    pub(super) fn artifact(&self) -> String {
        format!(
            "{{\"image_id\":\"sha256:{:064x}\",\"size_bytes\":104857600,\"worker\":\"w1\",\"finished_at\":{EPOCH},\"configuration_revision\":1,\"build\":\"{}\"}}",
            self.number,
            id(self.number)
        )
    }

    pub(super) fn granted_to(&self) -> Vec<String> {
        let mut subjects = vec![format!("team-{}", self.mixed(6) % 5_000)];
        if self.number % 200 == 3 {
            subjects.push(ONE_IN_100.to_owned());
        }
        if self.number % (self.images / 10) == 5 {
            subjects.push(TEN.to_owned());
        }
        subjects
    }

    /// About 400 characters of a Dockerfile's, and what is looked for.
    pub(super) fn words(&self) -> String {
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
        if self.number % (self.images / 20) == 7 {
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

/// The numbers of images have few prime factors, so this is a permutation that looks like none.
fn place(number: u64, images: u64) -> u64 {
    number.wrapping_mul(7_368_787) % images
}

/// From the number of an image to that of the one that was updated next.
pub(super) fn between_updates(images: u64) -> u64 {
    (0..images).find(|number| place(*number, images) == 1).unwrap_or(1)
}

/// One of 3,000 words.
fn word(number: u64) -> String {
    let mut random = fastrand::Rng::with_seed(number);
    (0..random.usize(4..10)).map(|_| random.lowercase()).collect()
}

/// The id of an image of a seeded catalogue: a UUID of version 7.
pub(crate) fn id(number: u64) -> Uuid {
    let mut random = fastrand::Rng::with_seed(number);
    let milliseconds = 1_767_225_600_000 + number;
    uuid::Builder::from_unix_timestamp_millis(
        milliseconds,
        &random.u128(..).to_be_bytes()[..10].try_into().expect("ten"),
    )
    .into_uuid()
}
