//! Counts of events that are too many to log each.

use std::time::{Duration, Instant};

/// A count of events that are logged at most once a minute.
#[derive(Debug, Default)]
pub struct Tally {
    count: u64,
    logged_at: Option<Instant>,
}

impl Tally {
    const PAUSE: Duration = Duration::from_secs(60);

    /// Counts an event; returns the number of events since the last time, if it is time to log them.
    pub fn count(&mut self, now: Instant) -> Option<u64> {
        self.count += 1;
        let is_due = self.logged_at.is_none_or(|at| now.duration_since(at) >= Self::PAUSE);
        is_due.then(|| {
            self.logged_at = Some(now);
            std::mem::take(&mut self.count)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_logged_once_a_minute() {
        let mut tally = Tally::default();
        let now = Instant::now();
        assert_eq!(tally.count(now), Some(1));
        assert_eq!([tally.count(now), tally.count(now + Duration::from_secs(59))], [None, None]);
        assert_eq!(tally.count(now + Duration::from_secs(60)), Some(3));
    }
}
