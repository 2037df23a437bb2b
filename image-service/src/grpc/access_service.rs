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
            groups: caller.identity().groups.names().map(str::to_owned).collect(),
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
        let grants = page::fitting(found.iter().map(|(grantee, permissions)| grant(grantee, *permissions)));
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
        let grantee = grantee(&mut violations, "grant.", wanted.grantee.map(Grantee::from));
        let permissions = permissions(&mut violations, &wanted.permissions);
        violations.check()?;
        let etag = field::etag(&message.etag);
        let granted = self.catalog.grant(&request, image, etag, grantee.clone(), permissions).await?;
        Ok(Response::new(wire::GrantAccessResponse { grant: Some(grant(&grantee, granted)) }))
    }

    async fn revoke_access(
        &self,
        request: Request<wire::RevokeAccessRequest>,
    ) -> Result<Response<wire::RevokeAccessResponse>, Status> {
        let (message, request, mut violations) = write_request::open(request)?;
        let image = field::image(&mut violations, "image_id", &message.image_id);
        let grantee = grantee(&mut violations, "", message.grantee.map(Grantee::from));
        violations.check()?;
        let etag = field::etag(&message.etag);
        self.catalog.grant(&request, image, etag, grantee, Permissions::default()).await?;
        Ok(Response::new(wire::RevokeAccessResponse {}))
    }
}

impl From<wire::grant::Grantee> for Grantee {
    fn from(grantee: wire::grant::Grantee) -> Self {
        use wire::grant::Grantee as Wire;
        match grantee {
            Wire::Subject(subject) => Self::Subject(subject),
            Wire::Group(group) => Self::Group(group),
            Wire::Everybody(wire::Everybody {}) => Self::Everybody,
        }
    }
}

impl From<wire::revoke_access_request::Grantee> for Grantee {
    fn from(grantee: wire::revoke_access_request::Grantee) -> Self {
        use wire::revoke_access_request::Grantee as Wire;
        match grantee {
            Wire::Subject(subject) => Self::Subject(subject),
            Wire::Group(group) => Self::Group(group),
            Wire::Everybody(wire::Everybody {}) => Self::Everybody,
        }
    }
}

/// Checks a grantee, whose field is in the message at `path`. Returns everybody if there is a violation.
fn grantee(violations: &mut Violations, path: &str, grantee: Option<Grantee>) -> Grantee {
    match &grantee {
        Some(Grantee::Subject(subject)) => field::subject(violations, &format!("{path}subject"), subject),
        Some(Grantee::Group(group)) => field::subject(violations, &format!("{path}group"), group),
        Some(Grantee::Everybody) => {}
        None => violations.add(format!("{path}grantee"), "must be a subject, a group or everybody"),
    }
    grantee.unwrap_or(Grantee::Everybody)
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

fn grant(grantee: &Grantee, permissions: Permissions) -> wire::Grant {
    let grantee = match grantee {
        Grantee::Subject(subject) => wire::grant::Grantee::Subject(subject.clone()),
        Grantee::Group(group) => wire::grant::Grantee::Group(group.clone()),
        Grantee::Everybody => wire::grant::Grantee::Everybody(wire::Everybody {}),
    };
    let all = [
        (permissions.can_view(), wire::Permission::View),
        (permissions.can_modify(), wire::Permission::Modify),
        (permissions.can_delete(), wire::Permission::Delete),
    ];
    let permissions =
        all.into_iter().filter(|(is_granted, _)| *is_granted).map(|(_, permission)| permission.into());
    wire::Grant { grantee: Some(grantee), permissions: permissions.collect() }
}
