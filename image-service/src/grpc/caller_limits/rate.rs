//! The rate limit of a caller: the generic cell rate algorithm, without a clock.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

/// A rate in units per second, with the units of one second as its burst.
#[derive(Copy, Clone, Debug)]
pub(super) struct Rate(NonZeroU32);

/// The units that a caller has used, as the time at which all of them are replenished.
#[derive(Copy, Clone, Debug)]
pub(super) struct Debt {
    pub(super) settled_at: Instant,
}

impl Rate {
    const BURST: Duration = Duration::from_secs(1);

    /// Creates a rate; `None` for 0, which means no limit.
    pub(super) fn new(units_a_second: u32) -> Option<Self> {
        NonZeroU32::new(units_a_second).map(Self)
    }

    /// Caps a cost at the burst, so that an idle caller can make the most expensive call.
    pub(super) fn cap(self, cost: u32) -> u32 {
        cost.min(self.0.get())
    }

    /// Takes units, or returns the time to wait until they are available.
    pub(super) fn take(self, debt: &mut Debt, units: u32, now: Instant) -> Result<(), Duration> {
        let wait = self.wait(*debt, units, now);
        if wait.is_zero() {
            self.charge(debt, units, now);
            Ok(())
        } else {
            Err(wait)
        }
    }

    /// Takes units even if they are not available: later calls wait for those that are missing.
    pub(super) fn charge(self, debt: &mut Debt, units: u32, now: Instant) {
        debt.settled_at = debt.settled_at.max(now) + self.time_of(units);
    }

    /// Refunds units that were taken.
    pub(super) fn refund(self, debt: &mut Debt, units: u32) {
        debt.settled_at = debt.settled_at.checked_sub(self.time_of(units)).unwrap_or(debt.settled_at);
    }

    /// Returns the time to wait until units are available.
    pub(super) fn wait(self, debt: Debt, units: u32, now: Instant) -> Duration {
        (debt.settled_at.max(now) + self.time_of(units)).saturating_duration_since(now + Self::BURST)
    }

    fn time_of(self, units: u32) -> Duration {
        Duration::from_secs(self.cap(units).into()) / self.0.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn of_ten() -> (Rate, Debt, Instant) {
        let now = Instant::now();
        (Rate::new(10).expect("a rate"), Debt { settled_at: now }, now)
    }

    #[test]
    fn a_second_of_units_can_be_used_at_once_and_then_one_at_a_time() {
        let (rate, mut debt, now) = of_ten();
        for _ in 0..10 {
            rate.take(&mut debt, 1, now).expect("units of a second");
        }
        assert_eq!(rate.take(&mut debt, 1, now), Err(100 * MILLISECOND));
        assert_eq!(rate.take(&mut debt, 3, now), Err(300 * MILLISECOND), "more units, a longer wait");
        assert_eq!(rate.take(&mut debt, 1, now + 99 * MILLISECOND), Err(MILLISECOND));
        rate.take(&mut debt, 1, now + 100 * MILLISECOND).expect("the wait is over");
    }

    #[test]
    fn a_call_of_over_a_second_of_units_waits_for_an_idle_caller() {
        let (rate, mut debt, now) = of_ten();
        rate.take(&mut debt, 1_000, now).expect("the caller is idle");
        assert_eq!(rate.take(&mut debt, 1_000, now), Err(1_000 * MILLISECOND));
        rate.take(&mut debt, u32::MAX, now + 1_000 * MILLISECOND).expect("it is idle again");
    }

    #[test]
    fn a_charge_never_fails_and_is_waited_for() {
        let (rate, mut debt, now) = of_ten();
        for _ in 0..3 {
            rate.charge(&mut debt, 10, now);
        }
        assert_eq!(rate.take(&mut debt, 1, now), Err(2_100 * MILLISECOND));
        rate.take(&mut debt, 1, now + 2_100 * MILLISECOND).expect("it is made up for");
    }
}
