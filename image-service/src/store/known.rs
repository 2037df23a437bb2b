//! Images for tests, which know what is in the rows.

use std::time::Duration;

use fastrand::Rng;
use sea_orm::{DbErr, EntityTrait, IntoActiveModel, NotSet, Set};
use uuid::Uuid;

use super::{
    Committed, Store,
    entity::{grant, image, image_text},
    rows,
    writing::Writing,
};
use crate::{dispatch::Policy, image::Image, timestamp::Timestamp};

pub(super) const CREATORS: [&str; 3] = ["ann", "bob", "é"];
pub(super) const GUEST: &str = "guest";
const WORDS: [&str; 5] = ["ubuntu", "rust", "日本語", "q", "::;"];
pub(super) const SELDOM: &str = "seldom";

pub(super) struct Known {
    pub(super) image: Image,
    pub(super) text: String,
    pub(super) granted_to: Vec<&'static str>,
}

pub(super) fn policy() -> Policy {
    let any = Duration::from_secs(1);
    Policy {
        lease: any,
        stop_deadline: any,
        offline_after: any,
        queue_timeout: any,
        max_failures: 1,
        retry_backoff: Duration::ZERO,
        max_pending: None,
    }
}

pub(super) async fn fill(
    store: &Store,
    random: &mut Rng,
    images: i64,
) -> Result<Vec<Known>, Box<dyn std::error::Error>> {
    let txn = store.write().await?;
    let mut known = Vec::new();
    for number in 0..images {
        let id = Uuid::from_u128(random.u128(..));
        let name = ["a", "b", "é", "a b"][random.usize(0..4)].to_owned();
        let code = if random.u8(0..5) == 0 { rows::NO_STATUS } else { random.i32(1..=6) };
        let mut words: Vec<&str> = WORDS.into_iter().filter(|_| random.u8(0..3) == 0).collect();
        words.extend((random.u8(0..15) == 0).then_some(SELDOM));
        let row = image::Model {
            id,
            name,
            description: String::new(),
            creator: CREATORS[random.usize(0..3)].to_owned(),
            status: code,
            status_message: String::new(),
            repository: "trailer/a".to_owned(),
            tag: format!("t{}", random.u8(0..4)),
            image_name: String::new(),
            reference_given: false,
            template: code == rows::NO_STATUS,
            snapshot: false,
            enabled: random.u8(0..3) != 0,
            pulled: random.u8(0..3) == 0,
            configuration_revision: 1,
            artifact_json: None,
            artifact_image: None,
            created_at: random.i64(0..10),
            // Unlike the order in which they are written.
            updated_at: number * 7 % images,
            revision: number,
            edit_revision: number,
            latest_build: None,
            deleted: false,
        };
        let row = image::Model { image_name: format!("{}:{}", row.repository, row.tag), ..row };
        let text = words.join("\u{2000}");
        let granted_to: Vec<&str> =
            [GUEST, CREATORS[0]].into_iter().filter(|_| random.u8(0..3) == 0).collect();
        image::Entity::insert(row.clone().into_active_model()).exec_without_returning(&txn).await?;
        let mut of_text = image_text::Model { row: 0, image: id, text: text.clone() }.into_active_model();
        of_text.row = NotSet;
        image_text::Entity::insert(of_text).exec_without_returning(&txn).await?;
        for subject in &granted_to {
            share(&txn, id, subject).await?;
        }
        known.push(Known { image: rows::image_from_row(row)?, text, granted_to });
    }
    let changed = known.iter().map(|known| known.image.id).collect();
    store.commit(txn, &Committed { changed, ..Committed::default() }).await?;
    Ok(known)
}

pub(super) async fn update(
    store: &Store,
    known: &mut Known,
    at: i64,
) -> Result<(), Box<dyn std::error::Error>> {
    let id = known.image.id;
    let txn = store.write().await?;
    let row = image::ActiveModel { id: Set(id.0), updated_at: Set(at), ..Default::default() };
    image::Entity::update(row).exec(&txn).await?;
    store.commit(txn, &Committed { changed: [id].into(), ..Committed::default() }).await?;
    known.image.updated_at = Timestamp::from_micros(at);
    Ok(())
}

/// Grants it to a guest, or takes it back: the image is not updated by that.
pub(super) async fn share_or_not(store: &Store, known: &mut Known) -> Result<(), DbErr> {
    let id = known.image.id;
    let txn = store.write().await?;
    if known.granted_to.contains(&GUEST) {
        let key = (id.0, GUEST.to_owned());
        grant::Entity::delete_by_id(key).exec(&txn).await?;
        known.granted_to.retain(|subject| *subject != GUEST);
    } else {
        share(&txn, id.0, GUEST).await?;
        known.granted_to.push(GUEST);
    }
    store.commit(txn, &Committed { changed: [id].into(), ..Committed::default() }).await
}

async fn share(txn: &Writing, image: Uuid, subject: &str) -> Result<(), DbErr> {
    let grant = grant::Model { image, subject: subject.to_owned(), view: true, modify: false, delete: false };
    grant::Entity::insert(grant.into_active_model()).exec_without_returning(txn).await?;
    Ok(())
}
