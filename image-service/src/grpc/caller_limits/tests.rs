use std::time::Duration;

use super::*;
use crate::timestamp::Timestamp;

const UNLIMITED: CallerLimits = CallerLimits { call_rate: 0, calls: 0, streams: 0 };

fn caller(name: &str) -> Principal {
    Principal::new(name.to_owned(), Vec::new(), Timestamp::now().after(Duration::from_secs(60)))
}

fn accounts(callers: &Callers) -> usize {
    lock(&callers.accounts).by_caller.len()
}

fn retry_after(refused: Result<(), Error>) -> Duration {
    match refused {
        Err(Error::TooManyCalls { retry_after }) => retry_after,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_costly_call_is_refused_with_the_time_to_wait_for_all_of_it() {
    let (callers, alice) = (Callers::new(CallerLimits { call_rate: 10, ..UNLIMITED }), caller("alice"));
    let now = Instant::now();
    callers.begin_call_at(&alice, None, now).expect("a unit");
    callers.admit_cost_at(&alice, 6, now).expect("six of ten units");
    callers.begin_call_at(&alice, None, now).expect("the seventh");
    // Six units are used, six more are needed, and ten fit the burst.
    assert_eq!(retry_after(callers.admit_cost_at(&alice, 6, now)), Duration::from_millis(200));
    callers.begin_call_at(&alice, None, now).expect("the seventh again");
    callers.admit_cost_at(&alice, 4, now).expect("what costs less can be paid for");
    callers.begin_call_at(&caller("bob"), None, now).expect("others pay for themselves");
}

#[test]
fn of_two_calls_that_need_all_units_one_is_admitted() {
    let (callers, alice) = (Callers::new(CallerLimits { call_rate: 10, ..UNLIMITED }), caller("alice"));
    let now = Instant::now();
    callers.begin_call_at(&alice, None, now).expect("the first");
    callers.begin_call_at(&alice, None, now).expect("the second");
    assert_eq!(retry_after(callers.admit_cost_at(&alice, 10, now)), Duration::from_millis(100));
    callers.admit_cost_at(&alice, 10, now).expect("the other has made room");
}

#[test]
fn any_call_of_an_idle_caller_is_admitted() {
    let (callers, alice) = (Callers::new(CallerLimits { call_rate: 2, ..UNLIMITED }), caller("alice"));
    let now = Instant::now();
    callers.begin_call_at(&alice, None, now).expect("a unit");
    callers.admit_cost_at(&alice, 1_000, now).expect("the caller was idle");
    assert_eq!(retry_after(callers.begin_call_at(&alice, None, now)), Duration::from_millis(500));
}

#[test]
fn units_charged_afterwards_delay_the_next_call() {
    let (callers, alice) = (Callers::new(CallerLimits { call_rate: 100, ..UNLIMITED }), caller("alice"));
    let now = Instant::now();
    callers.begin_call_at(&alice, None, now).expect("a unit");
    callers.charge_at(&alice, 64, now);
    callers.begin_call_at(&alice, None, now).expect("there are units left");
    for _ in 0..3 {
        callers.charge_at(&alice, u32::MAX, now);
    }
    // 66 units, three times the burst, and one more are 367, of which 100 fit the burst.
    assert_eq!(retry_after(callers.begin_call_at(&alice, None, now)), Duration::from_millis(2_670));
    callers.begin_call_at(&caller("bob"), None, now).expect("others pay for themselves");
}

#[test]
fn a_slot_counts_until_it_is_dropped() {
    let (callers, alice) = (Callers::new(CallerLimits { calls: 2, ..UNLIMITED }), caller("alice"));
    let (first, second, third) = (CallSlot::default(), CallSlot::default(), CallSlot::default());
    callers.begin_call(&alice, Some(&first)).expect("the first");
    callers.begin_call(&alice, Some(&second)).expect("the second");
    let refused = callers.begin_call(&alice, Some(&third));
    assert!(matches!(refused, Err(Error::TooManyConcurrentCalls { limit: 2 })), "{refused:?}");
    callers.begin_call(&alice, None).expect("a stream is no unary call");
    callers.begin_call(&caller("bob"), Some(&CallSlot::default())).expect("others have slots of their own");
    let copy = first.clone();
    drop(first);
    callers.begin_call(&alice, Some(&third)).expect_err("the request still has the slot");
    drop(copy);
    callers.begin_call(&alice, Some(&third)).expect("one has ended");
    drop((second, third));
    assert_eq!(accounts(&callers), 0, "a caller without a call in progress is removed");
}

#[test]
fn callers_are_removed_when_the_rate_has_made_up_for_their_calls() {
    let callers = Callers::new(CallerLimits { call_rate: 1_000_000, calls: 1, streams: 1 });
    let (slot, watcher) = (CallSlot::default(), caller("watcher"));
    callers.begin_call(&caller("under way"), Some(&slot)).expect("a call");
    let permit = callers.open_stream(&watcher).expect("a stream");
    for i in 0..3 * Callers::SWEEP {
        callers.begin_call(&caller(&format!("caller {i}")), None).expect("a call");
    }
    assert!(accounts(&callers) <= Callers::SWEEP + 3, "{}", accounts(&callers));
    let refused = callers.open_stream(&watcher).map(drop);
    assert!(matches!(refused, Err(Error::TooManyStreams { limit: 1 })), "{refused:?}");
    drop((slot, permit));
    callers.open_stream(&watcher).expect("it was closed");
}

#[test]
fn responses_that_a_caller_does_not_read_are_bounded() {
    let callers = Callers::new(CallerLimits { calls: 10, ..UNLIMITED });
    let call = |name| {
        let slot = CallSlot::default();
        callers.begin_call(&caller(name), Some(&slot)).expect("a call");
        slot
    };
    let (first, second) = (call("alice"), call("alice"));
    first.send(2 * Callers::MAX_SENDING).expect("a single one is always sent");
    assert!(matches!(second.send(1), Err(Error::TooManyBytes { .. })));
    call("bob").send(1).expect("others have a bound of their own");
    drop(first);
    second.send(Callers::MAX_SENDING).expect("the first is over");
    drop(second);
    assert_eq!(accounts(&callers), 0);
}
