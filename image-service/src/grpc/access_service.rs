//! `trailer.images.v1.AccessService`.

use proto::images::{self as wire, access_service_server::AccessService};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{authentication::caller, cursor::Binding, field, page, write_request};
use crate::{
    access::{Grantee, Permissions},
    catalog::Catalog,
    error::Violations,
    image::{ImageId, View},
};

/// The implementation of the access service.
#[derive(Debug)]
pub(super) struct Grants {
    catalog: Catalog,
    /// Identifies the catalogue.
    catalogue_id: Uuid,
}

impl Grants {
    pub(super) fn new(catalog: Catalog, catalogue_id: Uuid) -> Self {
        Self { catalog, catalogue_id }
    }
}

#[tonic::async_trait]
impl AccessService for Grants {
    async fn who_am_i(
        &self,
        request: Request<wire::WhoAmIRequest>,
    ) -> Result<Response<wire::WhoAmIResponse>, Status> {
        let caller = caller(&request)?;
        let mut roles: Vec<String> = caller.roles().map(|role| role.to_string()).collect();
        roles.sort_unstable();
        Ok(Response::new(wire::WhoAmIResponse {
            subject: caller.subject().to_owned(),
            roles,
            pools: caller.identity().pools.names().map(str::to_owned).collect(),
            may_create: caller.is_builder(),
            expire_time: Some(field::time(caller.expires_at())),
        }))
    }

    async fn list_grants(
        &self,
        request: Request<wire::ListGrantsRequest>,
    ) -> Result<Response<wire::ListGrantsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let image = ImageId(field::id("image_id", &request.image_id)?);
        let size = field::page_size(request.page_size)?;
        let binding = Binding::new(self.catalogue_id, &format!("ListGrants/{image}"), View::Basic, &caller);
        let after = match request.page_token.as_str() {
            "" => None,
            token => {
                let grantee = binding.open(token).and_then(|token| Grantee::try_from(token.to_owned()).ok());
                Some(grantee.ok_or_else(field::foreign_page_token)?)
            }
        };
        let found = self.catalog.grants(&caller, image, after.as_ref(), size).await?;
        let read = found.len();
        let grants = page::fitting(found.iter().map(|(grantee, permissions)| match grantee {
            Grantee::Subject(subject) => grant(subject.clone(), *permissions),
        }));
        let next_page_token = match grants.len().checked_sub(1).and_then(|last| found.get(last)) {
            Some((last, _)) if grants.len() < read || read as u64 == size => binding.seal(&last.to_string()),
            Some(_) | None => String::new(),
        };
        Ok(Response::new(wire::ListGrantsResponse { grants, next_page_token }))
    }

    async fn grant_access(
        &self,
        request: Request<wire::GrantAccessRequest>,
    ) -> Result<Response<wire::GrantAccessResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let image = field::image(&mut violations, "image_id", &message.image_id);
        let wanted = message.grant.unwrap_or_default();
        field::subject(&mut violations, "grant.subject", &wanted.subject);
        let permissions = permissions(&mut violations, &wanted.permissions);
        violations.check()?;
        let granted = self
            .catalog
            .grant(&request, image, field::etag(&message.etag), &wanted.subject, permissions)
            .await?;
        Ok(Response::new(wire::GrantAccessResponse { grant: Some(grant(wanted.subject, granted)) }))
    }

    async fn revoke_access(
        &self,
        request: Request<wire::RevokeAccessRequest>,
    ) -> Result<Response<wire::RevokeAccessResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let image = field::image(&mut violations, "image_id", &message.image_id);
        field::subject(&mut violations, "subject", &message.subject);
        violations.check()?;
        self.catalog
            .grant(&request, image, field::etag(&message.etag), &message.subject, Permissions::default())
            .await?;
        Ok(Response::new(wire::RevokeAccessResponse {}))
    }
}

fn permissions(violations: &mut Violations, numbers: &[i32]) -> Permissions {
    let mut wanted = Vec::new();
    for (i, number) in numbers.iter().enumerate() {
        match wire::Permission::try_from(*number) {
            Ok(wire::Permission::Unspecified) | Err(_) => {
                violations.add(format!("grant.permissions[{i}]"), "must be a known permission");
            }
            Ok(permission) => wanted.push(permission),
        }
    }
    let has = |permission| wanted.contains(&permission);
    Permissions::new(
        has(wire::Permission::View),
        has(wire::Permission::Modify),
        has(wire::Permission::Delete),
    )
}

fn grant(subject: String, permissions: Permissions) -> wire::Grant {
    let all = [
        (permissions.can_view(), wire::Permission::View),
        (permissions.can_modify(), wire::Permission::Modify),
        (permissions.can_delete(), wire::Permission::Delete),
    ];
    let permissions =
        all.into_iter().filter(|(is_granted, _)| *is_granted).map(|(_, permission)| permission.into());
    wire::Grant { subject, permissions: permissions.collect() }
}
