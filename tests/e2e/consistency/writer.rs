//! Writers that share, change and delete images at random.
//!
//! The description of an image names everyone who cannot see it. It is changed while they cannot: after a
//! grant is revoked, and before one is given. A watcher that receives an image whose description names it has
//! therefore received too much.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use proto::images as api;
use tonic::{Code, Status};

use super::{GUESTS, OWNERS, Random};
use crate::client::{Client, grant_of, image};

#[derive(Debug, Default)]
pub(super) struct Writers(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Existing images, each with the index of its owner and the subjects with a grant.
    images: BTreeMap<String, (usize, BTreeSet<&'static str>)>,
    /// Guests, each with an image that it could see at some time.
    guests: BTreeSet<(&'static str, String)>,
    owners: BTreeMap<String, &'static str>,
    count: usize,
}

impl Writers {
    pub(super) fn could_see(&self, identity: &str, id: &str) -> bool {
        let known = self.known();
        identity == "root"
            || known.owners.get(id).is_some_and(|owner| *owner == identity)
            || known.guests.iter().any(|(guest, image)| *guest == identity && image == id)
    }

    /// Performs one random action of an owner.
    pub(super) async fn step(&self, clients: &[Client], random: &mut Random) -> Result<(), Status> {
        let picked = {
            let known = self.known();
            let count = known.images.len();
            let pick = if count == 0 { None } else { known.images.iter().nth(random.below(count)) };
            pick.map(|(id, (owner, guests))| (id.clone(), *owner, guests.clone()))
        };
        let Some((id, owner, guests)) = picked.filter(|_| random.below(5) > 0) else {
            return self.create(clients, random).await;
        };
        let client = &clients[owner];
        let guest = GUESTS[random.below(GUESTS.len())];
        let done = match random.below(12) {
            0..=2 => self.rename(client, &id, random).await,
            3 => enable(client, &id, true).await,
            4 => enable(client, &id, false).await,
            5 => client.build(&id).await.map(|_| ()),
            6 => client.cancel(&id).await.map(|_| ()),
            7..=8 if guest != OWNERS[owner] => self.share(client, &id, guest, guests, random).await,
            9..=10 if guest != OWNERS[owner] => self.revoke(client, &id, guest, guests).await,
            11 => {
                self.known().images.remove(&id);
                client.delete(&id).await
            }
            _ => Ok(()),
        };
        match done {
            // The state of the image may not allow the action.
            Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
            done => done,
        }
    }

    async fn create(&self, clients: &[Client], random: &mut Random) -> Result<(), Status> {
        let owner = random.below(OWNERS.len());
        let number = {
            let mut known = self.known();
            known.count += 1;
            known.count
        };
        let name = format!("{} {number}", ["Straße", "100%", "plain"][random.below(3)]);
        let description = hidden(&BTreeSet::new(), owner);
        let request = api::CreateImageRequest {
            image: Some(api::Image {
                description,
                template: random.below(4) == 0,
                ..image(&name, "FROM scratch")
            }),
            ..Default::default()
        };
        // The id is recorded before any watcher can hear of its removal, because only the owner deletes it.
        let response = clients[owner].images.clone().create_image(request).await?.into_inner();
        let id = response.image.map(|image| image.id).unwrap_or_default();
        let mut known = self.known();
        known.owners.insert(id.clone(), OWNERS[owner]);
        known.images.insert(id, (owner, BTreeSet::new()));
        Ok(())
    }

    async fn rename(&self, client: &Client, id: &str, random: &mut Random) -> Result<(), Status> {
        let name = format!("{} {}", ["STRASSE", "50 %", "other"][random.below(3)], random.below(1_000));
        update(client, api::Image { id: id.to_owned(), name, ..Default::default() }, "name").await
    }

    async fn share(
        &self,
        client: &Client,
        id: &str,
        guest: &'static str,
        mut guests: BTreeSet<&'static str>,
        random: &mut Random,
    ) -> Result<(), Status> {
        guests.insert(guest);
        let owner = self.known().images.get(id).map_or(0, |(owner, _)| *owner);
        describe(client, id, &guests, owner).await?;
        {
            let mut known = self.known();
            known.guests.insert((guest, id.to_owned()));
            known.images.insert(id.to_owned(), (owner, guests));
        }
        let all = [api::Permission::View, api::Permission::Modify, api::Permission::Delete];
        let permissions = vec![all[random.below(3)].into()];
        grant(client, id, guest, permissions).await
    }

    async fn revoke(
        &self,
        client: &Client,
        id: &str,
        guest: &'static str,
        mut guests: BTreeSet<&'static str>,
    ) -> Result<(), Status> {
        if !guests.remove(guest) {
            return Ok(());
        }
        grant(client, id, guest, Vec::new()).await?;
        let owner = self.known().images.get(id).map_or(0, |(owner, _)| *owner);
        self.known().images.insert(id.to_owned(), (owner, guests.clone()));
        describe(client, id, &guests, owner).await
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hidden(guests: &BTreeSet<&'static str>, owner: usize) -> String {
    let cannot_see = GUESTS.iter().filter(|guest| !guests.contains(*guest) && **guest != OWNERS[owner]);
    cannot_see.map(|guest| format!("hidden-from-{guest}")).collect::<Vec<_>>().join(" ")
}

async fn describe(
    client: &Client,
    id: &str,
    guests: &BTreeSet<&'static str>,
    owner: usize,
) -> Result<(), Status> {
    let description = hidden(guests, owner);
    update(client, api::Image { id: id.to_owned(), description, ..Default::default() }, "description").await
}

async fn update(client: &Client, image: api::Image, path: &str) -> Result<(), Status> {
    let request = api::UpdateImageRequest {
        image: Some(image),
        update_mask: Some(prost_types::FieldMask { paths: vec![path.to_owned()] }),
        ..Default::default()
    };
    client.images.clone().update_image(request).await.map(|_| ())
}

async fn enable(client: &Client, id: &str, enabled: bool) -> Result<(), Status> {
    let id = id.to_owned();
    if enabled {
        let request = api::EnableImageRequest { id, ..Default::default() };
        client.images.clone().enable_image(request).await.map(|_| ())
    } else {
        let request = api::DisableImageRequest { id, ..Default::default() };
        client.images.clone().disable_image(request).await.map(|_| ())
    }
}

async fn grant(client: &Client, id: &str, subject: &str, permissions: Vec<i32>) -> Result<(), Status> {
    let request = api::GrantAccessRequest {
        image_id: id.to_owned(),
        grant: Some(grant_of(subject, permissions)),
        ..Default::default()
    };
    client.access.clone().grant_access(request).await.map(|_| ())
}
