use std::collections::BTreeSet;

use super::*;

#[test]
fn every_relation_permits_what_the_contract_says() {
    // One letter per action, in the order of `Action::ALL`: Workspace, Build, Cancel, Enable, Disable,
    // cLone, eDit, Share, delete.
    let row = |relation: Relation| -> String {
        Action::ALL.map(|action| if relation.permits(action) { 'y' } else { 'n' }).iter().collect()
    };
    let guest = |view, modify, delete| Relation::Guest(Permissions::new(view, modify, delete));
    assert_eq!(row(Relation::Owner), "yyyyyyyyy");
    assert_eq!(row(guest(true, false, false)), "ynnnnynnn");
    assert_eq!(row(guest(false, false, true)), "ynnnnynny");
    assert_eq!(row(guest(true, false, true)), "ynnnnynny");
    assert_eq!(row(guest(false, true, false)), "yyyyyyynn");
    assert_eq!(row(guest(true, true, false)), "yyyyyyynn");
    assert_eq!(row(guest(false, true, true)), "yyyyyyyny");
    assert_eq!(row(guest(true, true, true)), "yyyyyyyny");
}

#[test]
fn grants_to_several_grantees_of_a_caller_add_up() {
    let granted = [Permissions::new(false, true, false), Permissions::new(false, false, true)];
    assert_eq!(Relation::guest(granted), Some(Relation::Guest(Permissions::new(true, true, true))));
    assert_eq!(Relation::guest([]), None);
}

#[test]
fn without_the_role_of_a_builder_only_builds_are_refused() {
    let refused = |is_builder| {
        let standing = Standing { relation: Relation::Owner, is_builder };
        Action::ALL.into_iter().filter(|action| standing.permit(*action).is_err()).collect::<Vec<_>>()
    };
    assert_eq!(refused(true), []);
    assert_eq!(refused(false), [Action::Build]);
}

#[test]
fn every_standing_has_an_index_of_its_own() {
    let mut indices = BTreeSet::new();
    let guests = (0..8).map(|bits: u8| {
        // As stored, where view need not be implied.
        Relation::Guest(Permissions { view: bits & 1 > 0, modify: bits & 2 > 0, delete: bits & 4 > 0 })
    });
    for relation in std::iter::once(Relation::Owner).chain(guests) {
        for is_builder in [false, true] {
            indices.insert(Standing { relation, is_builder }.index());
        }
    }
    assert!(indices.into_iter().eq(0..Standing::COUNT));
}
