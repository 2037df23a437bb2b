//! Tests of pages against a plain model: for any query, the concatenated pages equal the sorted result.

use std::collections::BTreeSet;

use fastrand::Rng;
use uuid::Uuid;

use super::{
    entry::{Entry, Viewer},
    filter::{Budget, Filter},
    images::Images,
    scan::{CountScan, PageScan, SlotScan},
    signatures::Trigrams,
};
use crate::{
    access::{Grantee, GranteeDigest, Permissions, Visibility},
    image::{CatalogueEntry, Etag, Image, ImageId, Order, Query, Reference, Status},
    search::{SearchText, Term},
    timestamp::Timestamp,
};

const CREATORS: [&str; 3] = ["ann", "bob", "é"];
const GUEST: &str = "guest";
const WORDS: [&str; 5] = ["ubuntu", "rust", "日本語", "q", "::;"];
const SELDOM: &str = "seldom";
const TERMS: [&str; 13] =
    ["ubuntu", "rust", "日本語", "q", "bu", "語", "st", "zzz", "z", "::;", ":::", SELDOM, "m"];

/// The images that the index should hold, as they were put into it.
struct Model {
    entries: Vec<CatalogueEntry>,
    granted_to: Vec<Vec<&'static str>>,
}

pub(super) fn some_entry(random: &mut Rng, number: i64) -> (CatalogueEntry, Vec<&'static str>) {
    let status = (random.u8(0..5) > 0).then(|| Status::ALL[random.usize(0..Status::ALL.len())]);
    let mut words: Vec<&str> = WORDS.into_iter().filter(|_| random.u8(0..3) == 0).collect();
    words.extend((random.u8(0..15) == 0).then_some(SELDOM));
    let granted_to: Vec<&str> = [GUEST, CREATORS[0]].into_iter().filter(|_| random.u8(0..3) == 0).collect();
    let image = Image {
        id: ImageId(Uuid::from_u128(random.u128(..))),
        name: ["a", "b", "é", "a b"][random.usize(0..4)].to_owned(),
        description: String::new(),
        creator: CREATORS[random.usize(0..3)].to_owned(),
        template: status.is_none(),
        snapshot: false,
        status,
        status_message: String::new(),
        reference: Reference::from_stored("trailer/a".to_owned(), format!("t{}", random.u8(0..4))),
        artifact_reference: random
            .bool()
            .then(|| Box::new(Reference::from_stored("trailer/b".to_owned(), "t".to_owned()))),
        reference_given: false,
        enabled: random.u8(0..3) != 0,
        pulled: random.u8(0..3) == 0,
        configuration_revision: 1,
        artifact: None,
        artifact_missing: false,
        created_at: Timestamp::from_micros(random.i64(0..10)),
        // Some images share a time.
        updated_at: Timestamp::from_micros(number / 2 * 7 % 1_000),
        revision: number,
        etag: Etag(number),
        latest_build: None,
    };
    let text = Some(SearchText::new(words));
    (CatalogueEntry { image, grants: Some(grants(&granted_to)), text }, granted_to)
}

fn grants(granted_to: &[&str]) -> Vec<(GranteeDigest, Permissions)> {
    let view = Permissions::new(true, false, false);
    let mut grants: Vec<_> =
        granted_to.iter().map(|subject| (GranteeDigest::from_subject(subject), view)).collect();
    grants.sort_unstable_by_key(|(grantee, _)| *grantee);
    grants
}

fn put(images: &mut Images, read: &CatalogueEntry) {
    let before = images.get(read.image.id).cloned();
    let entry = Entry::new(read.clone(), before.as_deref());
    let is_another = before.is_none_or(|before| before.text() != entry.text());
    let trigrams = is_another.then(|| Trigrams::new([entry.text()]));
    if let Some(block) = images.put(entry.into(), trigrams.as_ref()) {
        let trigrams = Trigrams::new(images.in_block(block).iter().map(|entry| entry.text()));
        images.replace_signature(block, &trigrams);
    }
}

fn change(random: &mut Rng, images: &mut Images, model: &mut Model, number: i64) {
    let at = random.usize(0..model.entries.len());
    match random.u8(0..6) {
        0 => {
            images.remove(model.entries.swap_remove(at).image.id);
            model.granted_to.swap_remove(at);
        }
        1 | 2 => {
            let (added, granted_to) = some_entry(random, number);
            put(images, &added);
            model.entries.push(added);
            model.granted_to.push(granted_to);
        }
        3 => {
            let (changed, _) = some_entry(random, number);
            let image = Image { id: model.entries[at].image.id, ..changed.image };
            let grants = model.entries[at].grants.clone();
            model.entries[at] = CatalogueEntry { image, grants, text: changed.text };
            put(images, &model.entries[at]);
        }
        4 => {
            model.entries[at].image.updated_at = Timestamp::from_micros(1_000 + number);
            // As read by the follower if only the time has changed.
            let read = CatalogueEntry { grants: None, text: None, ..model.entries[at].clone() };
            put(images, &read);
        }
        _ => {
            let granted_to: Vec<&str> = [GUEST, CREATORS[0]].into_iter().filter(|_| random.bool()).collect();
            model.entries[at].grants = Some(grants(&granted_to));
            model.granted_to[at] = granted_to;
            put(images, &model.entries[at]);
        }
    }
}

#[test]
fn all_pages_together_are_what_sorting_gives() -> Result<(), String> {
    for seed in 0..4 {
        let mut random = Rng::with_seed(seed);
        let mut images = Images::default();
        let mut model = Model { entries: Vec::new(), granted_to: Vec::new() };
        // In some runs there are enough images for the order to be walked.
        for number in 0..[90, 4_000][usize::from(seed % 2 == 1)] {
            let (added, granted_to) = some_entry(&mut random, number);
            put(&mut images, &added);
            model.entries.push(added);
            model.granted_to.push(granted_to);
        }
        for number in 0..150 {
            for _ in 0..random.u8(0..8) {
                change(&mut random, &mut images, &mut model, number);
            }
            let query = query(&mut random)?;
            let visibility = match random.usize(0..4) {
                0 => Visibility::everything(),
                1 => visibility(&[GUEST]),
                2 => visibility(&[GUEST, CREATORS[random.usize(0..3)]]),
                _ => visibility(&[CREATORS[random.usize(0..3)]]),
            };
            let expected = expected(&model, &visibility, &query);
            let filter = || Filter::new(Viewer::new(&visibility), query.clone());
            let limit = random.usize(1..60);
            let (mut listed, mut after) = (Vec::new(), None);
            loop {
                let mut scan = PageScan::new(&images, filter(), after, limit);
                while !scan.advance(&images, Budget::new(random.u64(1..500))) {}
                let page = scan.finish();
                assert!(page.next.is_none() || page.images.len() == limit, "{seed}: {query:?}");
                listed.extend(page.images.into_iter().map(|found| found.entry.image.id));
                let Some(next) = page.next else {
                    break;
                };
                assert!(query.order.fits(&next), "{next:?}");
                after = Some(next);
            }
            assert_eq!(listed, expected, "{seed}/{number}: {visibility:?} {query:?}");

            let mut count = CountScan::new(&images, filter());
            while !count.advance(&images, Budget::new(random.u64(1..500))) {}
            assert_eq!(count.finish().0, expected.len() as u64, "{seed}/{number}: {visibility:?} {query:?}");

            let (mut by_slot, mut first) = (BTreeSet::new(), 0);
            loop {
                let mut scan = SlotScan::new(&images, filter(), first, limit);
                while !scan.advance(&images, Budget::new(random.u64(1..500))) {}
                let (page, _) = scan.finish();
                let Some((last, _)) = page.last() else {
                    break;
                };
                first = last + 1;
                by_slot.extend(page.into_iter().map(|(_, found)| found.entry.image.id));
            }
            assert_eq!(by_slot, expected.into_iter().collect(), "{seed}/{number}: {visibility:?} {query:?}");
        }
        assert_eq!(images.len(), model.entries.len());
    }
    Ok(())
}

#[test]
fn a_removed_image_leaves_nothing_in_the_index() {
    let mut random = Rng::with_seed(1);
    let mut images = Images::default();
    let entries: Vec<CatalogueEntry> = (0..500).map(|number| some_entry(&mut random, number).0).collect();
    for read in &entries {
        put(&mut images, read);
    }
    let signatures = images.signatures.bytes();
    for read in &entries {
        images.remove(read.image.id);
    }
    assert_eq!((images.len(), images.bytes()), (0, signatures));
    assert!(images.sets.visible.is_empty() && images.sets.creators.is_empty() && images.sets.all.is_empty());
    assert_eq!(images.latest_first(None).count(), 0);
}

fn visibility(subjects: &[&str]) -> Visibility {
    let grantees = subjects.iter().map(|subject| Grantee::Subject((*subject).to_owned())).collect();
    Visibility::new(grantees, true)
}

fn expected(model: &Model, visibility: &Visibility, query: &Query) -> Vec<ImageId> {
    let is_visible = |entry: &CatalogueEntry, granted_to: &[&str]| {
        visibility.grantees().is_none_or(|own| {
            let own = |subject: &str| own.contains(&Grantee::Subject(subject.to_owned()));
            own(&entry.image.creator) || granted_to.iter().any(|subject| own(subject))
        })
    };
    let holds = |entry: &CatalogueEntry, term: &Term| {
        entry.text.as_ref().is_some_and(|text| text.as_str().contains(term.as_str()))
    };
    let mut matching: Vec<&Image> = model
        .entries
        .iter()
        .zip(&model.granted_to)
        .filter(|(entry, granted_to)| is_visible(entry, granted_to))
        .filter(|(entry, _)| query.search.as_ref().is_none_or(|term| holds(entry, term)))
        .map(|(entry, _)| &entry.image)
        .filter(|image| query.admits(image))
        .collect();
    matching.sort_by(|a, b| query.order.compare(a, b));
    matching.into_iter().map(|image| image.id).collect()
}

fn query(random: &mut Rng) -> Result<Query, String> {
    const NAMES: [&str; 8] =
        ["name", "creator", "status", "image_name", "enabled", "pulled", "create_time", "update_time"];
    let mut names = NAMES;
    random.shuffle(&mut names);
    let keys: Vec<String> = names[..random.usize(0..4)]
        .iter()
        .map(|name| format!("{name}{}", if random.bool() { " desc" } else { "" }))
        .collect();
    let mut maybe = |one_in: u8| random.u8(0..one_in) == 0;
    let (search, template, enabled, pulled, creator, statuses) =
        (maybe(3), maybe(4), maybe(4), maybe(4), maybe(5), maybe(4));
    Ok(Query {
        search: if search { Term::parse(TERMS[random.usize(0..TERMS.len())])? } else { None },
        template: template.then(|| random.u8(0..4) == 0),
        statuses: if statuses {
            BTreeSet::from([Status::BuildFinished, Status::Error])
        } else {
            BTreeSet::new()
        },
        enabled: enabled.then(|| random.bool()),
        pulled: pulled.then(|| random.bool()),
        creator: creator.then(|| CREATORS[random.usize(0..3)].to_owned()),
        order: Order::parse(&keys.join(", "))?,
    })
}
