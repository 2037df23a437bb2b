//! Write throughput, enabling and disabling images in turn, beside a bare loop over the same rows.

use std::{
    path::Path,
    str::FromStr as _,
    time::{Duration, Instant},
};

use image_service::Role;
use proto::images as api;
use sea_orm::sqlx::{
    self, Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use uuid::Uuid;

use crate::{
    client::{self, Client},
    load::load,
    report::{Goal, Samples, Table, figure},
    seed,
    service::{DATABASE, Service},
};

const CALLERS: usize = 50;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);

/// A write that waits for its commit.
#[derive(Debug)]
struct Write {
    image: Uuid,
    is_enabled: bool,
    committed: oneshot::Sender<()>,
}

/// The bare loop: a single writer with group commit.
///
/// Writes that arrive during a commit go into the next one.
#[derive(Debug)]
struct Loop {
    connection: SqliteConnection,
    revision: i64,
}

pub(crate) async fn run(goals: &mut Table) -> anyhow::Result<()> {
    let (data, bare) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let service = Service::start(data.path(), None, &[]).await?;
    let owner = service.client("owner", &[Role::Builder]);
    let mut ids = Vec::new();
    for number in 0..CALLERS {
        let mut image = client::image(&format!("Written {number}"), "FROM scratch");
        image.template = true;
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        ids.push(owner.images.clone().create_image(request).await?.into_inner().image.unwrap_or_default().id);
    }
    service.end().await?;
    seed::copy(data.path(), bare.path())?;
    let mut peer = Loop::open(&bare.path().join(DATABASE)).await?;
    let service = Service::start(data.path(), None, &[]).await?;
    let owner = service.client("owner", &[Role::Builder]);

    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let own = by_service(&owner, &ids).await?;
        let bare = peer.round(&ids).await?;
        ratios.push(own / bare);
        ours.push(own);
        theirs.push(bare);
    }
    goals.compare(
        format!("writes a second: enable and disable in turn, {CALLERS} callers, SQLite, synchronous=FULL"),
        format!("{}/s", Samples::new(ours)),
        format!("bare loop of the same rows, group commit: {}/s", figure(Samples::new(theirs).median())),
        &Samples::new(ratios),
        Goal::AtLeast(0.6),
    );
    service.end().await
}

/// Returns the writes per second of all callers together, each with an image of its own.
async fn by_service(owner: &Client, ids: &[String]) -> anyhow::Result<f64> {
    let callers = ids.iter().map(|id| (owner.clone(), id.clone())).collect();
    let count = ids.len() as u64;
    let load = load(callers, ROUND, move |(owner, id): (Client, String), number| async move {
        if (number / count).is_multiple_of(2) {
            let request = api::DisableImageRequest { id, ..Default::default() };
            owner.images.clone().disable_image(request).await?;
        } else {
            let request = api::EnableImageRequest { id, ..Default::default() };
            owner.images.clone().enable_image(request).await?;
        }
        Ok(())
    });
    let rate = load.await?.rate;
    // The next round starts with a disable, which only changes an image that is enabled.
    for id in ids {
        let request = api::EnableImageRequest { id: id.clone(), ..Default::default() };
        owner.images.clone().enable_image(request).await?;
    }
    Ok(rate)
}

impl Loop {
    async fn open(file: &Path) -> anyhow::Result<Self> {
        let options = SqliteConnectOptions::from_str(&format!("sqlite://{}", file.display()))?
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let mut connection = SqliteConnection::connect_with(&options).await?;
        let revision =
            sqlx::query_scalar("SELECT revision FROM catalogue").fetch_one(&mut connection).await?;
        Ok(Self { connection, revision })
    }

    /// Runs one round and returns the writes per second.
    async fn round(&mut self, ids: &[String]) -> anyhow::Result<f64> {
        let begun = Instant::now();
        // Never full, because a caller waits for its commit before it writes again.
        let (writes, mut waiting) = mpsc::channel(CALLERS);
        let mut callers = JoinSet::new();
        for id in ids {
            let (writes, image): (_, Uuid) = (writes.clone(), id.parse()?);
            callers.spawn(async move {
                let mut written = 0_u64;
                while begun.elapsed() < ROUND {
                    let (committed, is_committed) = oneshot::channel();
                    let is_enabled = !written.is_multiple_of(2);
                    writes.send(Write { image, is_enabled, committed }).await?;
                    is_committed.await?;
                    written += 1;
                }
                anyhow::Ok(written)
            });
        }
        drop(writes);
        let mut together = Vec::with_capacity(CALLERS);
        while waiting.recv_many(&mut together, CALLERS).await > 0 {
            self.commit(&together).await?;
            for write in together.drain(..) {
                // The caller waits for this, so sending cannot fail.
                let _ = write.committed.send(());
            }
        }
        let mut written = 0;
        while let Some(count) = callers.join_next().await {
            written += count??;
        }
        Ok(written as f64 / begun.elapsed().as_secs_f64())
    }

    async fn commit(&mut self, writes: &[Write]) -> anyhow::Result<()> {
        let mut transaction = self.connection.begin_with("BEGIN IMMEDIATE").await?;
        for write in writes {
            self.revision += 1;
            sqlx::query("UPDATE images SET enabled = $1, updated_at = $2, revision = $3, edit_revision = $3 WHERE id = $4")
                .bind(write.is_enabled)
                .bind(self.revision)
                .bind(self.revision)
                .bind(write.image)
                .execute(&mut *transaction)
                .await?;
            sqlx::query(
                "INSERT INTO changes (revision, nonce, image, kind, creator, grantees_json, changed_at) \
                 VALUES ($1, $2, $3, 1, 'owner', '[]', $1)",
            )
            .bind(self.revision)
            .bind(fastrand::i64(..))
            .bind(write.image)
            .execute(&mut *transaction)
            .await?;
        }
        Ok(transaction.commit().await?)
    }
}
